"""A prepared folder: its index, and samples by one range read each.

In: a folder (or any fsspec address) of WebDataset tars made by `wanloom prepare`, or by others with the same members.
Out: `Index` (what planning and packing need, without touching a shard) and `Sample` (latents, text, caption). The one
decision: the index holds byte ranges, so a sample is one read at a known place and never a scan. It is a read and no
memory map: a file that is cut while it is mapped kills the process without a word. The tensors are views of the bytes
that were read. A sample is checked against its sha256 when a process reads it first, which takes ten times as long as
reading it, and again once its file was written to; what fsspec fetches from elsewhere is checked every time. A folder
without an index is scanned once.
"""

import hashlib
import logging
import math
import os
import shlex
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import torch
from fsspec.core import url_to_fs
from torch import Tensor

from wanloom.data.index import AGAIN, INDEX, Columns, Index, Row, build_table, encode_index, read_table
from wanloom.data.index_cache import open_index
from wanloom.data.places import DONE, WORK
from wanloom.data.retry import Fetching, read_patiently
from wanloom.data.tar import TENSORS, StoredSample, scan_tar, view_tensors
from wanloom.errors import UserError
from wanloom.files import write_atomic
from wanloom.model.sequence import grid_of
from wanloom.suffixes import kind_of

log = logging.getLogger(__name__)

Version = tuple[int, int, int]  # of a file: inode, size, time of the last change in ns


class Sample(NamedTuple):
    """What training takes."""

    key: str
    tensors: dict[str, Tensor]  # by the names of `tar.TENSORS`
    caption: str


class Dataset:
    """An open folder. Safe to read from several threads."""

    def __init__(self, path: str, columns: Columns) -> None:
        self.path = path
        self.fs, self.root = url_to_fs(path)
        self._columns = columns
        self.is_local = "file" in _protocols(self.fs)
        self._checked: defaultdict[tuple[str, Version], set[int]] = defaultdict(set)  # offsets in each shard

    @classmethod
    def open(cls, path: str | Path) -> "Dataset":
        """Read the index, or build it from the tars. Raises UserError when this is no finished prepared folder."""
        path = str(path)
        try:
            fs, root = url_to_fs(path)
        except (ValueError, ImportError) as error:  # a protocol that is unknown, or whose package is not installed
            raise UserError(f"'{path}' cannot be opened: {str(error).rstrip('.')}.") from error
        try:
            if fs.exists(f"{root}/{WORK}") and not fs.exists(f"{root}/{DONE}"):
                raise UserError(
                    f"'{path}' is not finished: run the same `wanloom prepare` command again to complete it."
                )
            columns = _read_columns(fs, root, path)
        except (pa.ArrowInvalid, pa.ArrowException) as error:
            raise UserError(f"The index of '{path}' is damaged: {AGAIN}") from error
        except OSError as error:
            raise UserError(f"'{path}' cannot be read: {error}") from error
        dataset = cls(path, columns)
        dataset._check_shards()
        return dataset

    def rows(self, split: str) -> Index:
        """The samples of "train" or "val"."""
        return self._columns.splits[split]

    def count_unhashed(self) -> int:
        """How many samples have no sha256, as others make them: that they stay the same cannot be checked."""
        columns = (pa.table([index.texts["sha256"]], ["sha256"]) for index in self._columns.splits.values())
        return sum(column.filter(pc.field("sha256") == "").num_rows for column in columns)

    def read(self, row: Row) -> Sample:
        """One sample. Raises UserError that names the shard and the key when its bytes are not what was written."""
        data, version = self._bytes(row)
        checked = self._checked[row.shard, version] if version else set[int]()
        problem = ""
        tensors: dict[str, Tensor] = {}
        if len(data) != row.size:
            problem = f"{len(data)} of {row.size} bytes"
        elif row.sha256 and row.offset not in checked and hashlib.sha256(data.numpy().data).hexdigest() != row.sha256:
            problem = "its bytes changed"
        else:
            try:
                tensors = view_tensors(data)
            except ValueError as error:
                problem = str(error)
        if not problem and (missing := [name for name in TENSORS if name not in tensors]):
            problem = f"it has no {missing[0]}"
        if not problem and not _is_as_planned(row, tensors):
            problem = f"the index says other sizes: delete {INDEX}"
        if problem:
            raise UserError(
                f"The sample '{row.key}' in {self.path}/{row.shard} is damaged ({problem}): "
                "restore the file or prepare the folder again."
            )
        checked.add(row.offset)
        return Sample(row.key, tensors, row.caption)

    def _bytes(self, row: Row) -> tuple[Tensor, Version | None]:
        """`(N,)` uint8 of a memory of its own; and which version of the file they are from, where that is known."""
        shard = f"{self.path}/{row.shard}"
        try:
            return read_patiently(shard, lambda: self._read_local(row) if self.is_local else self._fetch(row))
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"The sample '{row.key}' in {shard} cannot be read: {reason.rstrip('.')}.") from error

    def _read_local(self, row: Row) -> tuple[Tensor, Version]:
        with open(f"{self.root}/{row.shard}", "rb", buffering=0) as file:
            found = os.fstat(file.fileno())
            file.seek(row.offset)
            data, filled = torch.empty(row.size, dtype=torch.uint8), 0
            while more := file.readinto(data.numpy().data[filled:]):  # one read may give less than there is
                filled += more
            return data[:filled], (found.st_ino, found.st_size, found.st_mtime_ns)

    def _fetch(self, row: Row) -> tuple[Tensor, None]:
        with Fetching():
            fetched = self.fs.cat_file(f"{self.root}/{row.shard}", start=row.offset, end=row.offset + row.size)
        return torch.frombuffer(bytearray(fetched), dtype=torch.uint8), None

    def _check_shards(self) -> None:
        """Every shard is there and long enough: a lost or cut file is named now and not after hours."""
        sizes: dict[str, int] = {}
        for folder in sorted({f"{self.root}/{shard}".rpartition("/")[0] for shard in self._columns.shards}):
            if self.fs.isdir(folder):  # one question for all shards of a folder: over a network each takes its time
                sizes |= {found["name"]: found["size"] for found in self.fs.ls(folder, detail=True)}
        for shard, end in zip(self._columns.shards, self._columns.ends, strict=True):
            size = sizes.get(self.fs._strip_protocol(f"{self.root}/{shard}"))
            if size is None:
                raise UserError(f"The shard {self.path}/{shard} is missing: restore it or prepare again.")
            if size < end:
                raise UserError(f"The shard {self.path}/{shard} is cut off: it has {size} of at least {end} bytes.")


def index_rows(pairs: Iterable[StoredSample], shard: str, split: str) -> list[Row]:
    """Index rows of the samples of one shard. Raises UserError when a sample is not latents and text."""
    rows = []
    for pair in pairs:
        if any(len(pair.shapes.get(name, ())) != len(dims) for name, dims in TENSORS.items()):
            wanted = " and ".join(f"{name} ({', '.join(dims)})" for name, dims in TENSORS.items())
            raise UserError(f"The sample '{pair.key}' in {shard} is not {wanted}: {pair.shapes}.")
        latents, text = pair.shapes["latents"], pair.shapes["text"]
        try:
            frames, height, width = grid_of(latents)
        except ValueError as error:
            raise UserError(f"The sample '{pair.key}' in {shard} cannot be trained on: {error}.") from error
        rows.append(
            Row(
                key=pair.key,
                split=split,
                shard=shard,
                offset=pair.offset,
                size=pair.size,
                frames=latents[1],
                height=latents[2],
                width=latents[3],
                channels=latents[0],
                tokens=frames * height * width,
                text_len=text[0],
                caption=_text(pair.record, "caption"),
                source=_text(pair.record, "source"),
                sha256=_text(pair.record, "sha256"),
            )
        )
    return rows


def _text(record: dict[str, Any], key: str) -> str:
    return value if isinstance(value := record.get(key), str) else ""  # others may keep anything under these names


def scan_folder(fs: fsspec.AbstractFileSystem, root: str, path: str) -> pa.Table:
    """The index of a folder of tars that has none. Tars under a folder `val` are the val split, all others train."""
    root = root.rstrip("/")
    if not fs.isdir(root):
        raise UserError(f"There is no folder '{path}'.")
    names = fs.find(root)
    tars = sorted(name for name in names if name.endswith(".tar"))
    if not tars:
        here = shlex.quote(path)
        if any(kind_of(name) for name in names):
            raise UserError(f"'{path}' holds videos or images: make data of them with `wanloom prepare {here} OUT`.")
        raise UserError(f"'{path}' holds no prepared data: make it with `wanloom prepare INPUT {here}`.")
    log.info("%s has no index: reading the headers of %d shards", path, len(tars))
    tables = []
    for tar in tars:
        shard = tar[len(root) :].lstrip("/")
        split = "val" if shard.split("/")[0] in ("val", "valid", "validation") else "train"
        with fs.open(tar, "rb") as file:
            tables.append(build_table(index_rows(scan_tar(cast(BinaryIO, file), f"{path}/{shard}"), shard, split)))
    return pa.concat_tables(tables)


def _read_columns(fs: fsspec.AbstractFileSystem, root: str, path: str) -> Columns:
    """The index of a folder, which is built where there is none."""
    if "file" in _protocols(fs) and fs.exists(f"{root}/{INDEX}"):
        return open_index(Path(root) / INDEX, path)
    if not fs.exists(f"{root}/{INDEX}"):
        table = scan_folder(fs, root, path)
        _keep_index(fs, root, table)
        return read_table(table, path)
    with tempfile.TemporaryDirectory() as folder:
        fs.get_file(f"{root}/{INDEX}", f"{folder}/{INDEX}")
        return open_index(Path(folder) / INDEX, path)


def _is_as_planned(row: Row, tensors: dict[str, Tensor]) -> bool:
    """Whether the sample has the sizes that packing counted on."""
    shape = (row.channels, row.frames, row.height, row.width)
    if tuple(tensors["latents"].shape) != shape or len(tensors["text"]) != row.text_len:
        return False
    return math.prod(grid_of(shape)) == row.tokens


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _keep_index(fs: fsspec.AbstractFileSystem, root: str, table: pa.Table) -> None:
    """Save a scanned index beside the shards where that is allowed, so that the next start is quick."""
    if "file" not in _protocols(fs):
        return
    try:
        write_atomic(Path(root) / INDEX, encode_index(table))
    except OSError as error:
        log.warning("the index of %s could not be saved (%s): it is built again at every start", root, error)
