"""A disk of the network that comes back within a minute ends no run; what is missing is so at once."""

import errno
import logging

import pytest

from wanloom.data import retry
from wanloom.data.retry import PATIENCE, Fetching, read_patiently
from wanloom.data.shards import Dataset
from wanloom.data.tar import END, tar_pair
from wanloom.errors import UserError


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the pauses move."""
    now = [0.0]
    monkeypatch.setattr(retry.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT])
def test_a_disk_that_comes_back(clock, caplog, number):
    def read() -> int:
        if clock[0] < PATIENCE / 2:
            raise OSError(number, "gone")
        return 7

    with caplog.at_level(logging.WARNING):
        assert read_patiently("data/x.tar", read) == 7
    assert [record.getMessage() for record in caplog.records] == ["data/x.tar: gone; trying again for a minute"]


def test_after_a_minute_it_is_an_error(clock):
    def read() -> None:
        raise OSError(errno.EIO, "gone")

    with pytest.raises(OSError, match="gone"):
        read_patiently("x", read)
    assert PATIENCE * 0.8 < clock[0] <= PATIENCE


@pytest.mark.parametrize("kind", [FileNotFoundError, PermissionError])
def test_what_is_missing_is_not_waited_for(clock, kind):
    def read() -> None:
        raise kind(errno.ENOENT if kind is FileNotFoundError else errno.EACCES, "no")

    with pytest.raises(kind):
        read_patiently("x", read)
    assert clock[0] == 0


def test_whatever_a_file_system_raises_is_of_the_network(clock):
    class ServerError(Exception): ...

    tries = []

    def read() -> bytes:
        with Fetching():
            tries.append(1)
            if len(tries) < 3:
                raise ServerError("503")
            return b"x"

    assert read_patiently("x", read) == b"x"
    with pytest.raises(FileNotFoundError), Fetching():
        raise FileNotFoundError("a")
    with pytest.raises(KeyboardInterrupt), Fetching():
        raise KeyboardInterrupt


@pytest.mark.parametrize("address", ["{}", "simplecache::file://{}"])
def test_a_sample_is_read_again(clock, tmp_path, monkeypatch, address):
    """From a disk, and through fsspec."""
    import torch

    (tmp_path / "train").mkdir()
    shard = tmp_path / "train" / "shard-000000.tar"
    tensors = {"latents": torch.zeros(16, 1, 4, 4).bfloat16(), "text": torch.zeros(3, 64)}
    shard.write_bytes(tar_pair("a", tensors, {"caption": "x"}) + END)
    data = Dataset.open(tmp_path)
    row = data.rows("train")[0]
    data.is_local = address == "{}"
    read, failures = (data._read_local if data.is_local else data.fs.cat_file), [1, 2]

    def flaky(*words, **options):
        if failures:
            failures.pop()
            raise OSError(errno.ESTALE, "Stale file handle") if data.is_local else ValueError("bad gateway")
        return read(*words, **options)

    monkeypatch.setattr(data if data.is_local else data.fs, "_read_local" if data.is_local else "cat_file", flaky)
    assert data.read(row).key == "a" and not failures
    shard.unlink()
    with pytest.raises(UserError, match=r"The sample 'a' in .*shard-000000.tar cannot be read: .*[^.]\.$"):
        data.read(row)
