"""Tar writing, the index, and reading samples back: equality, damage, folders of others, remote paths."""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save
from small_shards import SHAPES, draw, named

from wanloom.data import shards
from wanloom.data.index import INDEX, SCHEMA, build_table, encode_index
from wanloom.data.shards import Dataset, index_rows
from wanloom.data.tar import END, scan_tar, tar_member, tar_pair
from wanloom.errors import UserError
from wanloom.files import write_atomic


def write_folder(folder: Path, with_index: bool = True) -> Path:
    rows = []
    for split, shard, numbers in (("train", 0, (0, 1, 2)), ("train", 1, (3, 4)), ("val", 0, (5,))):
        name = f"{split}/shard-{shard:06d}.tar"
        pairs = [tar_pair(f"clip{i}", named(i), {"caption": f"caption {i}", "source": f"{i}.mp4"}) for i in numbers]
        write_atomic(folder / name, [*pairs, END])
        with (folder / name).open("rb") as file:
            rows += index_rows(scan_tar(file, name), name, split)
    if with_index:
        write_atomic(folder / INDEX, encode_index(build_table(rows)))
    return folder


def test_every_sample_reads_back(tmp_path: Path) -> None:
    dataset = Dataset.open(write_folder(tmp_path))
    train, val = dataset.rows("train"), dataset.rows("val")
    assert (train.texts["key"].to_pylist(), val.texts["key"].to_pylist()) == ([f"clip{i}" for i in range(5)], ["clip5"])
    assert train[3].caption == "caption 3"
    for i, row in enumerate([*(train[i] for i in range(5)), val[0]]):
        sample = dataset.read(row)
        latents, text = draw(i)
        assert torch.equal(sample.tensors["latents"], latents)
        assert torch.equal(sample.tensors["text"], text)
        assert (sample.key, sample.caption) == (f"clip{i}", f"caption {i}")
        channels, frames, height, width = latents.shape
        assert (row.channels, row.frames, row.height, row.width) == (channels, frames, height, width)
        assert row.tokens == frames * height * width // 4
        assert row.text_len == len(text)
    assert train.tokens.tolist() == [18, 16, 4, 20, 18]
    assert train.columns["channels"].tolist() == [16] * 5
    assert train.count_shapes() == {SHAPES[0][1:]: 2, SHAPES[1][1:]: 1, SHAPES[2][1:]: 1, SHAPES[3][1:]: 1}
    assert train.columns["text_len"].tolist() == [3, 5, 7, 9, 11]


def test_the_range_in_the_index_is_the_member(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    for row in pq.read_table(folder / INDEX).to_pylist():
        with tarfile.open(folder / row["shard"]) as archive:
            member = archive.getmember(f"{row['key']}.safetensors")
            data = archive.extractfile(member).read()
        assert (folder / row["shard"]).read_bytes()[row["offset"] : row["offset"] + row["size"]] == data


def test_the_archive_is_plain_and_has_no_trace_of_the_machine(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    with tarfile.open(folder / "train/shard-000000.tar") as archive:
        members = archive.getmembers()
        assert [m.name for m in members] == [f"clip{i}.{end}" for i in range(3) for end in ("json", "safetensors")]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}
        assert json.load(archive.extractfile("clip1.json"))["caption"] == "caption 1"


def test_a_folder_without_index_is_scanned_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", with_index=False)
    scanned = Dataset.open(folder)
    assert (folder / INDEX).is_file()
    indexed = Dataset.open(write_folder(tmp_path / "b"))
    for split in ("train", "val"):
        assert [*scanned.rows(split)] == [*indexed.rows(split)]
        assert scanned.rows(split).digest == indexed.rows(split).digest
    assert torch.equal(scanned.read(scanned.rows("val")[0]).tensors["latents"], draw(5)[0])


def test_a_remote_folder() -> None:
    memory = fsspec.filesystem("memory")
    for i in range(2):
        memory.pipe(f"/set/train/{i}.tar", tar_pair(f"k{i}", named(i), {"caption": "c"}) + END)
    dataset = Dataset.open("memory://set")
    rows = dataset.rows("train")
    assert rows.texts["key"].to_pylist() == ["k0", "k1"]
    assert torch.equal(dataset.read(rows[1]).tensors["text"], draw(1)[1])
    memory.rm("/set", recursive=True)


def test_damage_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    dataset = Dataset.open(folder)
    row = dataset.rows("train")[1]
    shard = folder / row.shard
    good = shard.read_bytes()
    bad = bytearray(good)
    bad[row.offset + row.size - 1] ^= 1
    shard.write_bytes(bad)
    with pytest.raises(UserError, match=r"'clip1' in .*shard-000000\.tar is damaged \(its bytes changed\)"):
        Dataset.open(folder).read(row)
    shard.write_bytes(good[: row.offset + 10])
    with pytest.raises(UserError, match=r"shard-000000\.tar is cut off"):
        Dataset.open(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-000000\.tar is missing"):
        Dataset.open(folder)
    (folder / INDEX).write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"index .* is damaged"):
        Dataset.open(folder)


def test_a_file_that_is_written_to_is_checked_again(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    dataset = Dataset.open(folder)
    row = dataset.rows("train")[1]
    dataset.read(row)
    with (folder / row.shard).open("r+b") as file:  # in place, the size stays
        file.seek(row.offset + row.size - 4)
        file.write(b"\0\0\0\1")
    with pytest.raises(UserError, match="its bytes changed"):
        dataset.read(row)


def test_a_sample_is_hashed_once_and_over_a_network_always(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []

    def sha256(data: memoryview):
        hashed.append(len(data))
        return hashlib.sha256(data)

    monkeypatch.setattr(shards, "hashlib", SimpleNamespace(sha256=sha256))
    dataset = Dataset.open(write_folder(tmp_path))
    rows = [dataset.rows("train")[i] for i in (1, 0, 3, 1, 3, 1)]
    first = [dataset.read(row) for row in rows]
    assert hashed == [row.size for row in rows[:3]]
    assert torch.equal(first[3].tensors["latents"], draw(1)[0])
    first[0].tensors["latents"].zero_()  # the reader's own memory
    for sample in (first[3], dataset.read(rows[0])):
        assert torch.equal(sample.tensors["latents"], draw(1)[0])
    hashed.clear()
    memory = fsspec.filesystem("memory")
    for path in tmp_path.rglob("*.*"):
        memory.pipe(f"/copy/{path.relative_to(tmp_path)}", path.read_bytes())
    remote = Dataset.open("memory://copy")
    for row in rows:
        remote.read(row)
    assert hashed == [row.size for row in rows]
    memory.rm("/copy", recursive=True)


def test_what_is_no_prepared_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no folder"):
        Dataset.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no prepared data"):
        Dataset.open(tmp_path)
    (write_folder(tmp_path / "set") / ".work").mkdir()
    with pytest.raises(UserError, match="not finished"):
        Dataset.open(tmp_path / "set")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (b'{"caption": "x \\ud800 y"}', "half of a surrogate pair"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"caption": "\xff"}', "can't decode"),
        (b"[]", "no json object"),
    ],
)
def test_a_record_of_others_that_is_no_json(tmp_path: Path, record: bytes, words: str) -> None:
    tensors = save({"latents": draw(0)[0], "text": draw(0)[1]})
    (tmp_path / "x.tar").write_bytes(tar_member("a.json", record) + tar_member("a.safetensors", tensors) + END)
    with pytest.raises(UserError, match=rf"x.tar is damaged: the member 'a.json' is .*{words}"):
        Dataset.open(tmp_path)


def test_records_of_others_may_hold_anything(tmp_path: Path) -> None:
    record = {"caption": None, "source": ["a", 1], "sha256": {}}
    tensors = save({"latents": draw(0)[0], "text": draw(0)[1]})
    data = tar_member("a.json", json.dumps(record).encode()) + tar_member("a.safetensors", tensors) + END
    (tmp_path / "x.tar").write_bytes(data)
    row = Dataset.open(tmp_path).rows("train")[0]
    assert (row.caption, row.source, row.sha256) == ("", "", "")


def test_odd_sizes_and_equal_keys_are_errors(tmp_path: Path) -> None:
    def rows(*shape: int) -> list:
        data = tar_pair("a", {"latents": torch.zeros(shape), "text": torch.zeros(2, 8)}, {}) + END
        return index_rows(scan_tar(io.BytesIO(data), "x.tar"), "x.tar", "train")

    with pytest.raises(UserError, match=r"'a' .* cannot be trained on"):
        rows(16, 1, 3, 4)
    with pytest.raises(UserError, match="is not latents"):
        rows(16, 3, 4)
    for name in ("x.tar", "y.tar"):
        tensors = {"latents": torch.zeros(16, 1, 2, 2), "text": torch.zeros(2, 8)}
        (tmp_path / name).write_bytes(tar_pair("a", tensors, {}) + END)
    with pytest.raises(UserError, match=r"'a' is in .* 2 times"):
        Dataset.open(tmp_path)
    assert build_table([]).schema.equals(SCHEMA)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("foo://bar", None, r"'foo://bar' cannot be opened: Protocol not known: foo\."),
        ("s3://bar", ImportError("Install s3fs to access S3"), r"'s3://bar' cannot be opened: Install s3fs to access"),
    ],
)
def test_an_address_that_cannot_be_opened_is_a_sentence(
    path: str, error: Exception | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(protocol: str) -> None:
        raise error or AssertionError

    if error:
        monkeypatch.setattr("fsspec.core.get_filesystem_class", fail)
    with pytest.raises(UserError, match=message):
        Dataset.open(path)


def test_a_shard_cut_while_it_is_in_use_is_an_error_and_not_a_dead_process(tmp_path):
    dataset = Dataset.open(write_folder(tmp_path))
    rows = dataset.rows("train")
    dataset.read(rows[0])
    os.truncate(tmp_path / rows[0].shard, 600)
    with pytest.raises(UserError, match=r"'clip2' in .*shard-000000.tar is damaged \(0 of \d+ bytes\)"):
        dataset.read(rows[2])


class Halves(io.FileIO):
    """A file whose reads give half of what is asked for."""

    def readinto(self, buffer) -> int:
        return super().readinto(buffer[: (len(buffer) + 1) // 2])


def test_a_read_that_gives_less_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "open", lambda path, mode, buffering: Halves(path, mode), raising=False)
    dataset = Dataset.open(write_folder(tmp_path))
    rows = dataset.rows("train")
    assert all(torch.equal(dataset.read(rows[i]).tensors["latents"], draw(i)[0]) for i in range(5))
    os.truncate(tmp_path / rows[0].shard, rows[0].offset + 100)
    with pytest.raises(UserError, match=r"damaged \(100 of \d+ bytes\)"):
        dataset.read(rows[0])


def rewrite_index(folder: Path, column: str, values: list, kind: pa.DataType | None = None) -> None:
    """Put other values in a column of the index."""
    table = pq.read_table(folder / INDEX)
    place = table.schema.get_field_index(column)
    changed = pa.array(values, type=kind or table.schema.field(column).type)
    write_atomic(folder / INDEX, encode_index(table.set_column(place, column, changed)))


@pytest.mark.parametrize(
    ("column", "values", "kind", "message"),
    [
        ("tokens", [None] * 6, None, "of another version"),
        ("tokens", ["1"] * 6, pa.string(), "of another version"),
        ("offset", [512.0] * 6, pa.float64(), "of another version"),
        ("shard", ["../elsewhere/shard.tar"] * 6, None, "outside of the folder"),
        ("shard", ["/etc/shard.tar"] * 6, None, "outside of the folder"),
        ("key", ["clip0"] * 6, None, "'clip0' is in '.*' 6 times"),
        ("key", [*"abcd", "clip5", "clip5"], None, "'clip5' is in '.*' 2 times"),  # in train and in val
        ("split", ["train"] * 5 + ["test"], None, "has a split 'test': known are train and val"),
        ("offset", [512, 0, -1, 0, 0, 0], None, "says offset -1"),
        ("size", [2**63 - 1] * 6, None, "says size 9223372036854775807"),  # added to the offset it would be negative
        ("tokens", [0] * 6, None, "says tokens 0"),
        ("text_len", [-3] * 6, None, "says text_len -3"),
    ],
)
def test_an_index_that_is_not_ours_is_refused(tmp_path, column, values, kind, message):
    rewrite_index(write_folder(tmp_path), column, values, kind)
    with pytest.raises(UserError, match=message):
        Dataset.open(tmp_path)


@pytest.mark.parametrize("rows_of_a_small_index", [100, 0])
def test_an_index_has_at_least_our_columns(tmp_path, monkeypatch, rows_of_a_small_index):
    """Further ones, in any order, change nothing, mapped or not; one that is missing is named."""
    monkeypatch.setattr("wanloom.data.index_cache.LARGE", rows_of_a_small_index)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = Dataset.open(write_folder(tmp_path / "data")).rows("train")
    table = pq.read_table(tmp_path / "data" / INDEX)
    more = table.append_column("quality", pa.array([0.5, None] * 3)).append_column("made", pa.array([["a"]] * 6))
    write_atomic(tmp_path / "data" / INDEX, encode_index(more.select(more.schema.names[::-1])))
    dataset = Dataset.open(tmp_path / "data")
    after = dataset.rows("train")
    assert list(after) == list(before) and after.digest == before.digest
    assert torch.equal(dataset.read(after[1]).tensors["latents"], draw(1)[0])
    for name in table.schema.names:
        write_atomic(tmp_path / "data" / INDEX, encode_index(more.drop_columns([name])))
        with pytest.raises(UserError, match=f"has no column '{name}': delete index.parquet to have it built again"):
            Dataset.open(tmp_path / "data")


def test_of_a_sample_only_what_the_schema_names_is_read(tmp_path):
    """What it lacks is named, whether its header is scanned or an index leads to it."""
    latents, text = draw(0)

    def write(**tensors: torch.Tensor) -> bytes:
        data = save(tensors)
        (tmp_path / "x.tar").write_bytes(tar_member("a.json", b"{}") + tar_member("a.safetensors", data) + END)
        (tmp_path / INDEX).unlink(missing_ok=True)
        return data

    write(latents=latents, text=text, depth=torch.arange(3))
    dataset = Dataset.open(tmp_path)
    (whole,) = dataset.rows("train")
    assert dataset.read(whole).tensors.keys() == {"latents", "text"}
    for tensors, missing in (({"latents": latents}, "text"), ({"text": text}, "latents")):
        data = write(**tensors)
        with pytest.raises(UserError, match=r"'a' in x.tar is not latents \(C, F, H, W\) and text \(L, D\): "):
            Dataset.open(tmp_path)
        row = whole._replace(offset=(tmp_path / "x.tar").read_bytes().index(data), size=len(data), sha256="")
        write_atomic(tmp_path / INDEX, encode_index(build_table([row])))
        with pytest.raises(UserError, match=rf"is damaged \(it has no {missing}\)"):
            Dataset.open(tmp_path).read(row)


@pytest.mark.parametrize("column", ["tokens", "frames", "text_len"])
def test_an_index_that_says_other_sizes_than_the_sample_is_an_error(tmp_path, column):
    """Packing counts on these: a sample that is larger than its row would burst its pack."""
    rewrite_index(write_folder(tmp_path), column, [1, 1, 1, 1, 1, 99])
    dataset = Dataset.open(tmp_path)
    with pytest.raises(UserError, match="the index says other sizes"):
        dataset.read(dataset.rows("train")[0])
