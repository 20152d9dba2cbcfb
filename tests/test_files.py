"""Files are whole or as they were; a folder has one owner."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from wanloom.errors import UserError, sentence_of
from wanloom.files import LOCK, lock_folder, parse_json, write_atomic, written
from wanloom.prepare.shard_writer import ShardWriter


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events, sync, replace = [], os.fsync, Path.replace
    path = tmp_path / "new" / "a.txt"
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("sync", os.fstat(fd).st_size)), sync(fd)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (events.append(("name", b)), replace(a, b)))
    write_atomic(path, (part for part in (b"one", b" and two")))
    assert events == [("sync", 11), ("name", path)]
    assert path.read_bytes() == b"one and two" and os.listdir(path.parent) == ["a.txt"]


def test_what_fails_half_way_changes_nothing(tmp_path):
    def chunks():
        yield b"half"
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.txt"
    write_atomic(path, b"old")
    with pytest.raises(OSError, match="No space") as caught:
        write_atomic(path, chunks())
    assert sentence_of(caught.value) == f"'{path}' cannot be used: No space left on device."
    with pytest.raises(KeyboardInterrupt), written(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a.txt"] and path.read_bytes() == b"old"


def test_a_folder_has_one_owner(tmp_path, monkeypatch):
    with lock_folder(tmp_path / "run", "It is taken."), pytest.raises(UserError, match=r"It is taken\."):
        lock_folder(tmp_path / "run", "It is taken.")
    lock_folder(tmp_path / "run", "It is taken.").close()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        lock_folder(tmp_path / "file" / "run", "")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match="disk without file locks"), ShardWriter(tmp_path / "out", 1000):
        pass


def test_what_a_kill_left_half_written_goes_with_the_next_owner(tmp_path, monkeypatch):
    files = [tmp_path / name for name in ("run.yaml", ".notes.tmp", "a.12.tmp", ".x.y.tmp")]
    for file in files:
        write_atomic(file, b"whole")
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt), written(files[0]) as temporary:
        killed.setattr(Path, "unlink", lambda path: None)
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert temporary.exists()
    lock_folder(tmp_path, "").close()
    assert sorted(tmp_path.iterdir()) == sorted([*files, tmp_path / LOCK]), "and nothing of anyone else's"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' * 200_000 + b"1" + b"}" * 200_000, "nested too deeply"),
        (rb'["\ud83d"]', "half of a surrogate pair"),
        (b'"\xff"', "decode"),
        (b"1" * 5000, "digits"),
        (b"{", "line 1 column 2"),
    ],
)
def test_every_fault_of_json_is_a_value_error(data, words):
    with pytest.raises(ValueError, match=words):
        parse_json(data)


def test_json_is_read():
    assert parse_json(r'{"\u732b": [1, 2.5, null, "\ud83e\udd9c"]}') == {"猫": [1, 2.5, None, "🦜"]}
