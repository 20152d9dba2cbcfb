"""The pieces of tensors: which box of a tensor a process holds, who writes it, and how boxes are written and read.

In: tensors, whole or spread over processes (DTensor), by name. Out: safetensors files of torch.distributed.checkpoint
(each tells where its pieces belong), or tensors filled from them. The one decision: a piece is a box, and everything is
decided by boxes; so what was written by one layout is read by any other, and a box that several processes hold is
written by one of them.
"""

import json
import os
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load

from wanloom.dist import gather, rank
from wanloom.parallel.params import box_of, local
from wanloom.tensors import DTYPE_NAMES
from wanloom.threads import one_thread

SUFFIX = ".safetensors"
# where torch.distributed.checkpoint looks for the places of pieces
CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY = "DCP_SHARDING_INFO", "saved_offsets"
CHUNK = 2**24  # bytes


@dataclass(frozen=True)
class Box:
    """A part of a tensor: where it begins and how far it goes, dim by dim."""

    shape: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Box":
        """What this process holds of a tensor; the whole of a plain one."""
        slices = box_of(tensor)
        box = cls(tuple(tensor.shape), tuple(s.start for s in slices), tuple(s.stop - s.start for s in slices))
        held = tuple(local(tensor).shape)
        if held != box.size:
            raise ValueError(f"a process holds {held} of a tensor, and not {box}")
        return box

    @property
    def is_nothing(self) -> bool:
        """Whether this is the empty part of a tensor that is not empty."""
        return prod(self.size) == 0 and prod(self.shape) > 0

    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offset), torch.Size(self.size))


def share(boxes: Mapping[str, Box], group: dist.ProcessGroup | None) -> list[str]:
    """The names of the pieces that this rank writes; all ranks of the group ask together.

    A box that several ranks hold is written by the one that has least to write so far, the lowest of these. Raises
    ValueError if the pieces of a tensor do not make it up.
    """
    held = gather({name: (box.shape, box.offset, box.size) for name, box in boxes.items()}, group)
    holders: dict[tuple[str, Box], list[int]] = {}
    for holder, named in enumerate(held):
        for name, numbers in named.items():
            holders.setdefault((name, Box(*map(tuple, numbers))), []).append(holder)
    load, mine, found = [0] * len(held), [], dict[tuple[str, tuple[int, ...]], int]()
    for (name, box), ranks in holders.items():
        volume = prod(box.size)
        found[name, box.shape] = found.get((name, box.shape), 0) + volume
        if box.is_nothing:
            continue
        writer = min(ranks, key=lambda i: (load[i], i))
        load[writer] += volume
        if writer == rank():
            mine.append(name)
    wrong = [name for (name, shape), volume in found.items() if volume != prod(shape)]
    if wrong:
        raise ValueError(f"the pieces of {len(wrong)} tensors do not make them up, such as {wrong[0]}")
    return mine


def write_pieces(
    folder: Path, pieces: Mapping[str, Tensor], boxes: Mapping[str, Box], files: Mapping[str, int]
) -> dict[str, dict[str, int]]:
    """Write and sync this rank's files; `files` says which, from 1, each piece on the host goes to. Raises OSError.

    Returns size and CRC-32 by file name. The files are as HuggingFaceStorageWriter of torch.distributed.checkpoint
    names and fills them. It is not used: it serialises a file in one go, and the training thread stands still meanwhile
    (0.8 s a gigabyte); here no Python lock is held, nothing is copied and nothing is read back.
    """
    count, out = max(files.values(), default=0), {}
    for number in range(1, count + 1):
        name = f"shard-{rank() + 1:05d}-model-{number:05d}-of-{count:05d}{SUFFIX}"
        mine = {key: piece for key, piece in pieces.items() if files[key] == number}
        out[name] = _write_file(folder / name, mine, boxes)
    return out


def _write_file(path: Path, pieces: Mapping[str, Tensor], boxes: Mapping[str, Box]) -> dict[str, int]:
    places = {name: {SAVED_OFFSETS_KEY: boxes[name].offset} for name in pieces}
    header: dict[str, Any] = {"__metadata__": {CUSTOM_METADATA_KEY: json.dumps(places), "format": "pt"}}
    end = 0
    for name, piece in pieces.items():
        begin, end = end, end + piece.nbytes
        header[name] = {"dtype": DTYPE_NAMES[piece.dtype], "shape": tuple(piece.shape), "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    crc = told = 0
    with path.open("wb") as file:
        for chunk in chain([struct.pack("<Q", len(text)), text], *map(_chunks_of, pieces.values())):
            crc = zlib.crc32(chunk, crc)
            file.write(chunk)
            if sys.platform == "linux" and file.tell() - told >= CHUNK:
                # the disk starts now instead of at fsync, and the cache keeps what others read
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                told = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": 8 + len(text) + end, "crc32": crc}


def _chunks_of(piece: Tensor) -> Iterator[memoryview]:
    data = piece.reshape(-1).view(torch.uint8).numpy().data
    return (data[i : i + CHUNK] for i in range(0, len(data), CHUNK))


class StoredPieces(HuggingFaceStorageReader):
    """The tensors in a checkpoint folder, by the headers of its files, which are read once.

    Raises ValueError when they make no sense.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._metadata = super().read_metadata()
        found = self._metadata.state_dict_metadata
        self.tensors = {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}
        for name, entry in self.tensors.items():
            numbers = [n for chunk in entry.chunks for n in chunk.offsets]
            ranks = {len(part) for chunk in entry.chunks for part in (chunk.offsets, chunk.sizes)}
            whole = sum(prod(chunk.sizes) for chunk in entry.chunks) == prod(entry.size)
            if not whole or ranks != {len(entry.size)} or any(n < 0 for n in numbers):
                raise ValueError(f"the pieces of {name} do not make it up")

    def read_metadata(self) -> Metadata:
        return self._metadata

    def fill(self, pieces: Mapping[str, Tensor], boxes: Mapping[str, Box]) -> None:
        """Read each box into the tensor of its name, in place. Raises OSError where a file cannot be read."""
        try:
            with one_thread():
                load(dict(pieces), storage_reader=self, planner=_LoadPlanner(boxes), no_dist=True)
        except CheckpointException as error:  # no Exception of Python's: what it holds is one, or a Ctrl-C
            raise error.failures[0][0] from error


class _LoadPlanner(DefaultLoadPlanner):
    """Reads the box of each tensor from whatever pieces overlap it."""

    def __init__(self, boxes: Mapping[str, Box]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._boxes = boxes

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        stored, items = self.metadata.state_dict_metadata, []
        for name in self.state_dict:
            entry, box = stored[name], self._boxes[name]
            if isinstance(entry, TensorStorageMetadata) and prod(box.size):
                items += create_read_items_for_chunk_list(name, entry, [box.chunk()])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn]
