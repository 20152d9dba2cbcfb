"""The unfinished part of a prepared folder: finished blocks, and the shards made of them.

In: batches of encoded samples, from all ranks. Out: whole shards in `OUT/train` and `OUT/val`. The one decision: each
encoded batch is one small tar, and a shard is a few of them joined in the order of the blocks. So whenever a process
dies, everything but the batches under way is kept, and which samples share a shard depends on their order and sizes
alone. One rank joins; one run at a time holds the folder.
"""

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from wanloom.data.places import DONE, SPLITS, WORK
from wanloom.data.tar import END, scan_tar
from wanloom.errors import UserError
from wanloom.files import lock_folder, write_atomic
from wanloom.prepare.journal import Journal

COPY_BYTES = 1 << 24


class SampleRange(NamedTuple):
    """One sample inside a batch file."""

    key: str
    path: Path
    start: int
    stop: int


class ShardWriter:
    """Open with `with`, on one rank; raises UserError when another process has the folder."""

    def __init__(self, out: Path, shard_bytes: int) -> None:
        self.out = out
        self.work = out / WORK
        self.shard_bytes = shard_bytes
        self.journal = Journal(self.work)
        self._keys: set[str] = set()  # of the samples that are in shards or queues
        self._next = 0  # the first block that is in neither
        self._queues: dict[str, list[SampleRange]] = {split: [] for split in SPLITS}
        self._shards = {split: 0 for split in SPLITS}
        self._waiting: dict[Path, int] = {}  # batch file -> its samples that are not in a shard yet
        self._lock: TextIO | None = None

    def __enter__(self) -> "ShardWriter":
        taken = f"Another `wanloom prepare` is writing to '{self.out}': wait for it or stop it."
        self._lock = lock_folder(self.work, taken)
        return self

    def __exit__(self, *_: object) -> None:
        if self.work.exists() and not (self.work / DONE).exists():  # it ended before anything was begun
            shutil.rmtree(self.work)
            if not any(self.out.iterdir()):
                self.out.rmdir()
        if self._lock is not None:
            self._lock.close()

    def load(self) -> None:
        """Find out what is done: the shards, and what was logged. No rank may be writing yet."""
        for leftover in (*self.out.glob("*.tmp"), *self.out.glob("*/*.tmp")):
            leftover.unlink()
        for split in SPLITS:
            for shard in self.files(split):
                with shard.open("rb") as file:
                    self._keys |= {pair.key for pair in scan_tar(file, str(shard))}
                self._shards[split] += 1
        self.collect()

    def files(self, split: str) -> list[Path]:
        """The finished shards of a split, in order."""
        return sorted((self.out / split).glob("shard-*.tar"))

    def collect(self) -> None:
        """Take the blocks that are finished, as far as none is missing before them, and write the full shards."""
        self.journal.refresh()
        while (batches := self.journal.finished.get(self._next)) is not None:
            for number in range(batches):
                path = self.journal.path(self._next, number)
                if path.exists():  # else its samples are in shards
                    self._queue(path)
            self._next += 1
            for split in SPLITS:
                self._write_full(split)

    def finish(self) -> None:
        """Write the last, partly filled shards. Raises UserError when there are fewer samples than were encoded."""
        lost = self.journal.samples - len(self._keys)
        if lost > 0:
            raise UserError(f"{lost} encoded samples are gone from '{self.work}': delete '{self.out}' and start again.")
        for split in SPLITS:
            if self._queues[split]:
                self._write_shard(split, len(self._queues[split]))

    def remove(self) -> None:
        """The folder is complete: only the result stays."""
        shutil.rmtree(self.work)

    def _queue(self, path: Path) -> None:
        pieces: dict[str, list[SampleRange]] = {split: [] for split in SPLITS}
        with path.open("rb") as file:
            for pair in scan_tar(file, str(path)):
                if pair.key not in self._keys:  # else it was stopped between writing a shard and clearing up
                    pieces[pair.record["split"]].append(SampleRange(pair.key, path, pair.start, pair.stop))
                    self._keys.add(pair.key)
        self._waiting[path] = sum(map(len, pieces.values()))
        for split in SPLITS:
            self._queues[split] += pieces[split]
        if not self._waiting[path]:
            path.unlink()

    def _write_full(self, split: str) -> None:
        """A shard is full when the next sample would make it larger than wished."""
        queue, size, number = self._queues[split], 0, 0
        while number < len(queue):
            length = queue[number].stop - queue[number].start
            if number and size + length > self.shard_bytes:
                self._write_shard(split, number)
                queue, size, number = self._queues[split], 0, 0
            else:
                size, number = size + length, number + 1

    def _write_shard(self, split: str, number: int) -> None:
        pieces, self._queues[split] = self._queues[split][:number], self._queues[split][number:]
        name = f"shard-{self._shards[split]:06d}.tar"
        self._shards[split] += 1
        write_atomic(self.out / split / name, _joined(pieces))
        for piece in pieces:
            self._waiting[piece.path] -= 1
            if not self._waiting[piece.path]:
                piece.path.unlink()


def _joined(pieces: list[SampleRange]) -> Iterator[bytes]:
    for piece in pieces:
        with piece.path.open("rb") as file:
            file.seek(piece.start)
            left = piece.stop - piece.start
            while left:
                data = file.read(min(left, COPY_BYTES))
                if not data:
                    raise OSError(errno.EIO, f"{piece.path} became shorter")
                left -= len(data)
                yield data
    yield END
