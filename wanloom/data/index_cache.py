"""A large index as columns that the processes of a machine share: made once, kept in the user's cache, mapped.

In: an index.parquet. Out: its columns; those of a small index in memory, those of a large one mapped from
`~/.cache/wanloom/index` (XDG_CACHE_HOME moves it). The one decision: a cache is known by the hash of the index it was
made of, which every process computes when it opens the folder, so it cannot be stale; and it is never beside the data,
because what stands in it was checked when it was made and is not checked again. The process that comes first makes it
and the others wait. Columns of an older index of the same folder are removed.
"""

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from wanloom.data.index import SCHEMA, Builder, Columns, file_names, index_of, map_files
from wanloom.data.places import SPLITS
from wanloom.errors import UserError
from wanloom.files import parse_json, write_atomic

FORMAT = 2  # of the files
FACTS = "facts.json"  # written last: the columns are whole
LARGE = 100_000  # rows; fewer take less memory than the interpreter
BATCH = 65_536  # rows that are read at a time


def open_index(file: Path, path: str) -> Columns:
    """The columns of the index `file` of the data at `path`.

    Raises UserError as `Builder` does and when a cache cannot be written, OSError and ArrowException for the file.
    """
    with pq.ParquetFile(file) as parquet:
        if parquet.metadata.num_rows < LARGE:
            return _read(parquet, path)
    with file.open("rb") as data:
        name = hashlib.file_digest(data, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    folder = cache_root() / f"{name}-{FORMAT}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait for the first
            if not is_whole(folder):
                _make(file, path, folder)
                pa.default_memory_pool().release_unused()  # else this process keeps what reading took
            try:
                return _map(folder)  # under the lock: another index of the same folder would remove them
            except (LookupError, TypeError, ValueError, pa.ArrowException):  # damaged since: the index itself is not
                _make(file, path, folder)
                return _map(folder)
    except OSError as error:
        raise UserError(
            f"The columns of the index of '{path}' cannot be written to {folder} ({error.strerror}): make room, or set "
            "XDG_CACHE_HOME to a folder on a disk of this machine."
        ) from error


def cache_root() -> Path:
    """Where the columns of all indices are. Raises UserError for a user without a home."""
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "wanloom" / "index"
    except RuntimeError as error:
        raise UserError(
            "The columns of a large index are kept in a folder of the user, and there is none: set XDG_CACHE_HOME to a "
            "folder on a disk of this machine."
        ) from error


def is_whole(folder: Path) -> bool:
    """Whether all columns are there, each as long as it was written."""
    sizes = _facts(folder).get("bytes")
    if not isinstance(sizes, dict):
        return False
    found = {name: (folder / name).stat().st_size for name in sizes if (folder / name).exists()}
    return bool(sizes) and found == sizes


def _facts(folder: Path) -> dict[str, Any]:
    """What is known of the columns in a folder; nothing when that is damaged, and they are made again."""
    try:
        found = parse_json((folder / FACTS).read_bytes()) if (folder / FACTS).exists() else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _read(parquet: pq.ParquetFile, path: str, folder: Path | None = None) -> Columns:
    with Builder(path, folder) as builder:
        for batch in parquet.iter_batches(BATCH, columns=SCHEMA.names):
            builder.add(batch)
        return builder.finish()


def _make(file: Path, path: str, folder: Path) -> None:
    """Write the columns and, when all are on the disk, what says so."""
    source = str(Path(path).absolute())
    for other in folder.parent.iterdir():
        if other != folder and _facts(other).get("source") == source:
            shutil.rmtree(other, ignore_errors=True)  # processes that still map them keep them
    names = [f"{split}.{name}" for split in SPLITS for name in file_names()]
    write_atomic(folder / FACTS, json.dumps({"source": source}).encode())
    whole = False
    try:
        with pq.ParquetFile(file) as parquet:
            found = _read(parquet, path, folder)
        for name in names:
            with (folder / name).open("rb") as written:
                os.fsync(written.fileno())
        facts = {
            "source": source,
            "bytes": {name: (folder / name).stat().st_size for name in names},
            "shards": found.shards,
            "ends": found.ends,
            "digests": {split: found.splits[split].digest for split in SPLITS},
        }
        write_atomic(folder / FACTS, json.dumps(facts).encode())
        whole = True
    finally:
        for name in () if whole else names:
            (folder / name).unlink(missing_ok=True)


def _map(folder: Path) -> Columns:
    facts, arrays = _facts(folder), map_files(folder)
    shards = facts["shards"]
    splits = {split: index_of(split, shards, arrays, facts["digests"][split]) for split in SPLITS}
    return Columns(splits, shards, facts["ends"])
