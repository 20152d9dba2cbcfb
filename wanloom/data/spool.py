"""The unfinished part of a prepared folder: what is encoded already, and the shards made of it.

In: encoded samples, in order. Out: `OUT/.work` while it runs, whole shards in `OUT/train` and `OUT/val`. The one
decision: each encoded batch is one small tar, renamed into place when it is on the disk; a shard is a few of them
joined. So whenever the process dies, everything but the batch under way is kept, and which samples share a shard
depends on their order and sizes alone. One process at a time holds the folder.
"""

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from wanloom.data.shards import DONE, WORK
from wanloom.data.tar import END, scan_tar
from wanloom.files import lock_folder, write_atomic

SPLITS: tuple[str, ...] = ("train", "val")
COPY_BYTES = 1 << 24


class Piece(NamedTuple):
    """One sample inside a batch file."""

    key: str
    path: Path
    start: int
    stop: int


class Spool:
    """Open with `with`; raises UserError when another process has the folder."""

    def __init__(self, out: Path, shard_bytes: int) -> None:
        self.out = out
        self.work = out / WORK
        self.shard_bytes = shard_bytes
        self.done: dict[str, str] = {}  # key -> source of every encoded sample
        self.drops: dict[str, dict[str, str]] = {}  # source -> what is in the report
        self._queues: dict[str, list[Piece]] = {split: [] for split in SPLITS}
        self._shards = {split: 0 for split in SPLITS}
        self._batches = 0
        self._waiting: dict[Path, int] = {}  # batch file -> its samples that are not in a shard yet
        self._lock: TextIO | None = None

    def __enter__(self) -> "Spool":
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
        """Find out what is done: shards first, then batches that are in no shard yet."""
        for leftover in (*self.out.glob("*.tmp"), *self.out.glob("*/*.tmp")):
            leftover.unlink()
        for split in SPLITS:
            for shard in self.shards(split):
                with shard.open("rb") as file:
                    self.done |= {pair.key: pair.record["source"] for pair in scan_tar(file, str(shard))}
                self._shards[split] += 1
        for path in sorted(self.work.glob("batch-*.tar")):
            self._batches = int(path.stem.split("-")[1]) + 1
            self._queue(path)
        log = self.work / "drops.jsonl"
        for line in log.read_text().splitlines() if log.exists() else []:
            if line.endswith("}"):  # not cut off
                drop = json.loads(line)
                self.drops[drop["file"]] = drop

    def shards(self, split: str) -> list[Path]:
        """The finished shards of a split, in order."""
        return sorted((self.out / split).glob("shard-*.tar"))

    def add(self, pairs: list[bytes]) -> None:
        """Keep an encoded batch, then write the shards that are full."""
        path = self.work / f"batch-{self._batches:09d}.tar"
        self._batches += 1
        write_atomic(path, pairs)
        self._queue(path)
        for split in SPLITS:
            self._write_full(split)

    def drop(self, file: str, kind: str, reason: str) -> None:
        """Remember why a file gave no, or no more, samples."""
        self.drops[file] = {"file": file, "kind": kind, "reason": reason}
        with (self.work / "drops.jsonl").open("a") as log:
            log.write("\n" + json.dumps(self.drops[file]))  # a line that was cut off before ends here

    def finish(self) -> None:
        """Write the last, partly filled shards."""
        for split in SPLITS:
            self._write_full(split)
            if self._queues[split]:
                self._write_shard(split, len(self._queues[split]))

    def remove(self) -> None:
        """The folder is complete: only the result stays."""
        shutil.rmtree(self.work)

    def _queue(self, path: Path) -> None:
        pieces: dict[str, list[Piece]] = {split: [] for split in SPLITS}
        with path.open("rb") as file:
            for pair in scan_tar(file, str(path)):
                if pair.key not in self.done:  # else it was stopped between writing a shard and clearing up
                    pieces[pair.record["split"]].append(Piece(pair.key, path, pair.start, pair.stop))
                    self.done[pair.key] = pair.record["source"]
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


def _joined(pieces: list[Piece]) -> Iterator[bytes]:
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
