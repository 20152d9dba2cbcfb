"""Columns of an index: in memory and mapped alike, made once, kept apart from the data, made anew when they must be."""

import json
import multiprocessing
import os
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wanloom.data import index, index_cache
from wanloom.data.index import INDEX, SCHEMA, Row, build_table, bytes_of, encode_index, read_table
from wanloom.data.index_cache import cache_root, open_index
from wanloom.errors import UserError

COUNT = 500


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Every index is large, and is read in several batches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_cache, "LARGE", 1)
    monkeypatch.setattr(index_cache, "BATCH", 64)
    return tmp_path / "cache" / "wanloom" / "index"


def draw_rows(count: int = COUNT, seed: int = 0) -> list[Row]:
    r = random.Random(seed)
    rows = []
    for i in range(count):
        text = "".join(r.choice("a\u00e9\U0001f600 ,\n\0") for _ in range(r.choice([0, 0, 3, 40])))
        numbers = {name: r.choice([1, 5, 2**40]) for name in ("frames", "height", "width", "tokens", "text_len")}
        split = "val" if i % 7 == 3 else "train"
        shard = f"{split}/shard-{i // 50:06d}.tar"
        values = {
            "offset": 1000 * (i ^ 7),  # not in order
            "size": r.randint(1, 999),
            "channels": 16,
            "caption": text,
            "source": f"{i % 9}.mp4",
        }
        rows.append(Row(key=f"k{i}{text[:1]}", split=split, shard=shard, sha256="ab" * (i % 3), **numbers, **values))
    return rows


def write(folder: Path, rows: list[Row]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / INDEX).write_bytes(encode_index(build_table(rows)))
    return folder / INDEX


def test_mapped_columns_are_those_in_memory(tmp_path, cache):
    rows = draw_rows()
    mapped = open_index(write(tmp_path / "data", rows), str(tmp_path / "data"))
    held = read_table(build_table(rows), "data")
    assert dict(zip(mapped.shards, mapped.ends, strict=True)) == dict(zip(held.shards, held.ends, strict=True))
    for split in ("train", "val"):
        one, other = mapped.splits[split], held.splits[split]
        assert [*one] == [*other] == [row for row in rows if row.split == split]
        assert one.digest == other.digest and one.texts["key"].to_pylist() == [
            row.key for row in rows if row.split == split
        ]
        for name, column in one.columns.items():
            assert isinstance(column.base, np.memmap)
            assert name == "shard" or np.array_equal(column, other.columns[name]), name
        assert one.count_shapes() == other.count_shapes() and sum(one.count_shapes().values()) == len(one)
        with pytest.raises(IndexError):
            one[len(one)]
    ends = {shard: max(row.offset + row.size for row in rows if row.shard == shard) for shard in mapped.shards}
    assert dict(zip(mapped.shards, mapped.ends, strict=True)) == ends
    assert {path.name for path in (tmp_path / "data").iterdir()} == {INDEX}  # nothing beside the data
    assert len([*cache.iterdir()]) == 1


def test_strings_of_a_part_of_a_column_are_those_of_the_part():
    """Arrow cuts without a copy: the strings then begin somewhere within those of the whole."""
    words = ["", "a", "bcd", "\u00e9", "", "fghij"]
    ends, data = bytes_of(pa.array(words).slice(2, 3))
    assert ends.tolist() == [3, 5, 5] and data.tobytes().decode() == "bcd\u00e9"


def test_columns_are_made_once_and_anew_when_a_file_was_cut(tmp_path, cache, monkeypatch):
    file = write(tmp_path / "data", draw_rows())
    made, make = [], index_cache._make
    monkeypatch.setattr(index_cache, "_make", lambda *words: made.append(1) or make(*words))
    first = open_index(file, "data")
    assert [*open_index(file, "data").splits["train"]] == [*first.splits["train"]] and len(made) == 1
    (folder,) = cache.iterdir()
    for name in ("train.tokens", "val.key.ends", "facts.json"):
        (folder / name).unlink()
        assert [*open_index(file, "data").splits["val"]] == [*first.splits["val"]]
    with (folder / "train.caption").open("r+b") as columns:
        columns.truncate(5)
    assert [*open_index(file, "data").splits["train"]] == [*first.splits["train"]] and len(made) == 5


@pytest.mark.parametrize("facts", [b"{", b"[1]", b'{"bytes": 3}', b"[" * 50_000])
def test_what_is_known_of_columns_may_be_damaged(tmp_path, cache, facts):
    """Those of this index are made again; those of another one are left alone."""
    file = write(tmp_path / "data", draw_rows())
    open_index(file, "data")
    (made,) = cache_root().iterdir()
    (made / "facts.json").write_bytes(facts)
    (cache_root() / "other").mkdir()
    (cache_root() / "other" / "facts.json").write_bytes(facts)
    assert len(open_index(file, "data").splits["train"]) > 0
    assert index_cache.is_whole(made) and (cache_root() / "other" / "facts.json").exists()


@pytest.mark.parametrize("name", ["train.caption.ends", "facts.json"])
def test_columns_that_are_of_their_size_and_damaged_are_made_again(tmp_path, cache, name):
    file = write(tmp_path / "data", draw_rows())
    rows = [*open_index(file, "data").splits["train"]]
    (made,) = cache_root().iterdir()
    if name == "facts.json":
        (made / name).write_text(json.dumps({"bytes": json.loads((made / name).read_text())["bytes"]}))
    else:
        ends = np.fromfile(made / name, np.int64)
        (ends - ends[-1] - 9).tofile(made / name)
    assert [*open_index(file, "data").splits["train"]] == rows


def test_a_user_without_a_home_is_told(tmp_path, cache, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        open_index(write(tmp_path / "data", draw_rows()), "data")


def test_another_index_has_columns_of_its_own_and_those_of_before_go(tmp_path, cache):
    file = write(tmp_path / "data", draw_rows())
    before = open_index(file, str(tmp_path / "data"))
    other = open_index(write(tmp_path / "other", draw_rows(seed=3)), str(tmp_path / "other"))
    rows = draw_rows(seed=1)
    status = file.stat()
    file.write_bytes(encode_index(build_table(rows)))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # what it holds decides, not when it was written
    now = open_index(file, str(tmp_path / "data"))
    assert [*now.splits["train"]] == [row for row in rows if row.split == "train"]
    assert [*before.splits["train"]] == [row for row in draw_rows() if row.split == "train"]  # mapped before
    sources = [json.loads((folder / "facts.json").read_bytes())["source"] for folder in cache.iterdir()]
    assert sorted(sources) == [str(tmp_path / "data"), str(tmp_path / "other")]
    assert [*other.splits["val"]] == [row for row in draw_rows(seed=3) if row.split == "val"]


@pytest.mark.parametrize("fault", ["key", "shard", "text"])
def test_columns_of_an_index_that_is_refused_are_not_kept(tmp_path, cache, fault):
    rows = draw_rows()
    if fault == "key":
        rows[-1] = rows[-1]._replace(key=rows[3].key)
    if fault == "shard":
        rows[-1] = rows[-1]._replace(shard="../x.tar")
    file = write(tmp_path / "data", rows)
    if fault == "text":
        table = pq.read_table(file)
        bad = pa.array([*[b"x"] * (COUNT - 1), b"\xff\xfe"], pa.binary()).cast(pa.string(), safe=False)
        place = SCHEMA.get_field_index("caption")
        file.write_bytes(encode_index(table.set_column(place, SCHEMA.field("caption"), bad)))
    for _ in range(2):
        with pytest.raises((UserError, pa.ArrowInvalid), match=r"2 times|outside of the folder|[Ii]nvalid UTF8"):
            open_index(file, "data")
    (folder,) = cache.iterdir()
    assert {path.name for path in folder.iterdir()} == {".lock", "facts.json"}


def test_keys_of_one_hash_are_not_one_key(monkeypatch):
    monkeypatch.setattr(index, "hash", lambda key: len(key), raising=False)
    rows = draw_rows()
    assert len(read_table(build_table(rows), "data").splits["train"]) == sum(row.split == "train" for row in rows)
    with pytest.raises(UserError, match=f"The key '{rows[3].key[:2]}.*' is in 'data' 2 times"):
        read_table(build_table([*rows, rows[3]._replace(split="train")]), "data")


def open_and_count(file: Path, cache_home: str, counted: Path) -> None:
    os.environ["XDG_CACHE_HOME"] = cache_home
    index_cache.LARGE = 1
    make = index_cache._make

    def slow(*words) -> None:
        counted.with_suffix(f".{os.getpid()}").touch()
        make(*words)

    index_cache._make = slow
    assert len(open_index(file, "data").splits["train"]) == sum(row.split == "train" for row in draw_rows())


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_of_many_processes_one_makes_the_columns(tmp_path):
    file = write(tmp_path / "data", draw_rows())
    words = (file, str(tmp_path / "cache"), tmp_path / "made")
    processes = [multiprocessing.get_context("fork").Process(target=open_and_count, args=words) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len([*tmp_path.glob("made.*")]) == 1


def test_a_cache_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written to .*set XDG_CACHE_HOME to a folder on a disk"):
        open_index(write(tmp_path / "data", draw_rows()), "data")


def test_small_indices_leave_no_trace(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(index_cache, "LARGE", COUNT + 1)
    assert len(open_index(write(tmp_path / "data", draw_rows()), "data").splits["val"]) == 71
    assert not cache.exists() and cache_root() == cache
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "wanloom" / "index"
