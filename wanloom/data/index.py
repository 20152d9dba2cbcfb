"""The index as columns: what planning and reading need to know of every sample, in memory or mapped from a disk.

In: tables that have at least the columns of `SCHEMA`, as index.parquet has. Out: an `Index` for each split. The one
decision: columns are plain arrays, numbers by row and strings as Arrow has them, their bytes and where each ends. So
those of a large index can be files that all processes of a machine map and share (`index_cache.py`), of which only
what is looked at is ever read, and a row is a few values in place of objects. Whatever comes from an index is checked
once, while the columns are made.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wanloom.data.places import SPLITS
from wanloom.errors import UserError

INDEX = "index.parquet"
AGAIN = f"delete {INDEX} to have it built again."
MOST = 2**62  # a place in a file; two of them can be added up


class Row(NamedTuple):
    """One sample in the index. frames, height and width are those of the latents."""

    key: str
    split: str  # "train" or "val"
    shard: str  # path inside the folder
    offset: int  # of the safetensors data in the shard, bytes
    size: int
    frames: int
    height: int
    width: int
    channels: int
    tokens: int
    text_len: int
    caption: str
    source: str
    sha256: str  # of the safetensors member; empty in a folder that others made


SCHEMA = pa.schema([(name, pa.string() if kind is str else pa.int64()) for name, kind in Row.__annotations__.items()])
TEXTS = ("key", "caption", "source", "sha256")
NUMBERS = ("offset", "size", "frames", "height", "width", "channels", "tokens", "text_len")
# what a run depends on
CONTENT = ("key", "key.ends", "sha256", "sha256.ends", "frames", "height", "width", "channels", "tokens", "text_len")


@dataclass(frozen=True)
class Index:
    """Rows of one split, in the order of the shards. `index[i]` is a `Row`; columns are read-only arrays."""

    split: str
    shards: Sequence[str]
    columns: dict[str, np.ndarray]  # (N,) each; `shard` holds places in `shards`
    texts: dict[str, pa.LargeStringArray]
    digest: str  # of what a run depends on

    def __len__(self) -> int:
        return len(self.columns["tokens"])

    def __getitem__(self, i: int) -> Row:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        values: dict[str, Any] = {name: int(self.columns[name][i]) for name in NUMBERS}
        values |= {name: self.texts[name][i].as_py() for name in TEXTS}
        return Row(split=self.split, shard=self.shards[int(self.columns["shard"][i])], **values)

    @property
    def tokens(self) -> np.ndarray:
        """`(N,)` int64: tokens of each sample."""
        return self.columns["tokens"]

    def count_shapes(self) -> dict[tuple[int, int, int], int]:
        """How many samples have latents of so many frames, rows and columns, the most frequent first."""
        names = ["frames", "height", "width"]
        counted = pa.table({name: self.columns[name] for name in names}).group_by(names).aggregate([([], "count_all")])
        shapes = zip(*(counted[name].to_pylist() for name in names), strict=True)
        found = dict(zip(shapes, counted["count_all"].to_pylist(), strict=True))
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


class Columns(NamedTuple):
    """A whole index."""

    splits: dict[str, Index]
    shards: list[str]
    ends: list[int]  # how long each shard must be, bytes


class Builder:
    """Columns from tables, batch by batch; a context manager. With a `folder` they are files of it, else in memory.

    Raises UserError unless the tables have the columns of `SCHEMA`: they decide what is read, and from where.
    """

    def __init__(self, path: str, folder: Path | None = None) -> None:
        self._path, self._folder = path, folder
        self._files: dict[tuple[str, str], BinaryIO] = {
            (split, name): (folder / f"{split}.{name}").open("wb") if folder else io.BytesIO()
            for split in SPLITS
            for name in file_names()
        }
        self._hashes: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        self._shards: dict[str, int] = {}
        self._ends = np.zeros(0, np.int64)
        for split, name in product(SPLITS, TEXTS):
            self._put(split, f"{name}.ends", np.zeros(1, np.int64))

    def __enter__(self) -> "Builder":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def add(self, batch: pa.RecordBatch) -> None:
        """More rows; columns beside those of `SCHEMA` are not looked at."""
        for name in SCHEMA.names:
            if batch.schema.get_field_index(name) < 0:
                raise UserError(f"The index of '{self._path}' has no column '{name}': {AGAIN}")
        batch = batch.select(SCHEMA.names)
        if not batch.schema.equals(SCHEMA) or any(column.null_count for column in batch.columns):
            raise UserError(f"The index of '{self._path}' is of another version: {AGAIN}")
        batch.validate(full=True)  # strings are text
        self._check_places(batch)
        found = batch["split"].unique().to_pylist()
        if other := sorted(set(found) - set(SPLITS)):
            raise UserError(f"The index of '{self._path}' has a split '{other[0]}': known are train and val.")
        for split in found:
            self._add_split(split, batch if len(found) == 1 else batch.filter(pc.field("split") == split))

    def _check_places(self, batch: pa.RecordBatch) -> None:
        for shard in batch["shard"].unique().to_pylist():
            if PurePosixPath(shard).is_absolute() or ".." in PurePosixPath(shard).parts:
                raise UserError(
                    f"The index of '{self._path}' names '{shard}', which is outside of the folder: do not use it."
                )
        for name in NUMBERS:
            values, least = batch[name].to_numpy(), 0 if name in ("offset", "size", "text_len") else 1
            if len(values) and not least <= values.min() <= values.max() < MOST:
                wrong = int(values.min()) if values.min() < least else int(values.max())
                raise UserError(f"The index of '{self._path}' says {name} {wrong}: {AGAIN}")

    def _add_split(self, split: str, batch: pa.RecordBatch) -> None:
        keys = batch["key"].to_pylist()
        self._hashes[split].append(np.fromiter(map(hash, keys), np.int64, len(keys)))
        self._put(split, "shard", self._places_of(batch))
        for name in NUMBERS:
            self._put(split, name, batch[name].to_numpy())
        for name in TEXTS:
            ends, data = bytes_of(batch[name])
            self._put(split, f"{name}.ends", ends + self._files[split, name].tell())
            self._put(split, name, data)

    def _put(self, split: str, name: str, values: np.ndarray) -> None:
        self._files[split, name].write(np.ascontiguousarray(values, file_names()[name]).data)

    def _places_of(self, batch: pa.RecordBatch) -> np.ndarray:
        """The shard of each row as a number; its end is noted."""
        encoded = batch["shard"].dictionary_encode()
        places = [self._shards.setdefault(name, len(self._shards)) for name in encoded.dictionary.to_pylist()]
        self._ends = np.concatenate([self._ends, np.zeros(len(self._shards) - len(self._ends), np.int64)])
        found = np.array(places, np.int64)[encoded.indices.to_numpy()]
        np.maximum.at(self._ends, found, batch["offset"].to_numpy() + batch["size"].to_numpy())
        return found

    def finish(self) -> Columns:
        """All of it. In a folder, the columns are those of its files."""
        if self._folder:
            self.__exit__()
            arrays = map_files(self._folder)
        else:
            arrays = {
                place: np.frombuffer(file.getvalue(), file_names()[place[1]])
                for place, file in self._files.items()
                if isinstance(file, io.BytesIO)
            }
        shards = list(self._shards)
        splits = {split: index_of(split, shards, arrays, digest_of(split, arrays)) for split in SPLITS}
        self._check_keys(splits)
        return Columns(splits, shards, self._ends.tolist())

    def _check_keys(self, splits: dict[str, Index]) -> None:
        """Raises UserError when two samples have one key. Equal hashes are looked at: they may be of unlike keys."""
        hashes = np.concatenate([part for split in SPLITS for part in (np.empty(0, np.int64), *self._hashes[split])])
        ordered = np.sort(hashes)
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if not len(twice):
            return
        first = len(splits["train"])
        rows = np.flatnonzero(np.isin(hashes, twice)).tolist()
        keys = Counter(splits["train"][i].key if i < first else splits["val"][i - first].key for i in rows)
        key, number = keys.most_common(1)[0]
        if number > 1:
            raise UserError(f"The key '{key}' is in '{self._path}' {number} times: every sample needs its own.")


def file_names() -> dict[str, np.dtype]:
    """The columns of a split as they are stored, and the type of their values."""
    numbers = ("shard", *NUMBERS, *(f"{name}.ends" for name in TEXTS))
    return dict.fromkeys(numbers, np.dtype("<i8")) | dict.fromkeys(TEXTS, np.dtype("u1"))


def map_files(folder: Path) -> dict[tuple[str, str], np.ndarray]:
    """Every column of a folder, mapped: pages that no process has looked at are in no memory."""
    found = {}
    for split in SPLITS:
        for name, dtype in file_names().items():
            path = folder / f"{split}.{name}"
            is_empty = not path.stat().st_size  # which cannot be mapped
            found[split, name] = np.empty(0, dtype) if is_empty else np.asarray(np.memmap(path, dtype, "r"))
    return found


def index_of(split: str, shards: Sequence[str], arrays: dict[tuple[str, str], np.ndarray], digest: str) -> Index:
    """The columns of a split."""
    columns = {name: arrays[split, name] for name in ("shard", *NUMBERS)}
    texts = {}
    for name in TEXTS:
        ends, data = pa.py_buffer(arrays[split, f"{name}.ends"]), pa.py_buffer(arrays[split, name])
        texts[name] = pa.LargeStringArray.from_buffers(len(columns["tokens"]), ends, data)
    return Index(split, shards, columns, texts, digest)


def digest_of(split: str, arrays: dict[tuple[str, str], np.ndarray]) -> str:
    """A hash of what a run depends on of a split."""
    # where strings end as well, so that two keys cannot be joined to another two; not the 0 with which they begin
    parts = (arrays[split, name][1 if name.endswith(".ends") else 0 :] for name in CONTENT)
    digests = (hashlib.blake2b(part.data, digest_size=16).digest() for part in parts)
    return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()


def bytes_of(column: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
    """Where each string ends, and the bytes of all, from the first on."""
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1].astype(np.int64)
    if not len(column) or data is None:
        return np.zeros(len(column), np.int64), np.empty(0, np.uint8)
    return bounds[1:] - bounds[0], np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]]


def read_table(table: pa.Table, path: str) -> Columns:
    """The columns of a table, in memory. Raises UserError as `Builder` does."""
    with Builder(path) as builder:
        for batch in table.to_batches():
            builder.add(batch)
        return builder.finish()


def build_table(rows: Sequence[Row]) -> pa.Table:
    """Rows as an arrow table."""
    return pa.table([list(column) for column in zip(*rows, strict=True)] or [[] for _ in SCHEMA], schema=SCHEMA)


def encode_index(table: pa.Table) -> bytes:
    """The bytes of the index file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
