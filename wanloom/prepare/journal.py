"""What is encoded already, as every rank sees it: batch files, and one log for each rank.

In: encoded batches and what became of files. Out: `OUT/.work/batch-BLOCK-NUMBER.tar`, and `OUT/.work/log/RANK.jsonl`
with a line for every dropped file and every finished block. The one decision: ranks share nothing but files that one
of them writes. A batch is renamed into place when it is on the disk, and a block counts as finished by its line alone,
which comes after its batches; so whichever rank dies, any number of ranks can go on from what is there.
"""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from wanloom.data.tar import scan_tar
from wanloom.dist import rank
from wanloom.files import write_atomic

EVERY = 0.5  # seconds between two looks at what the other ranks have logged


class Journal:
    """The work folder. `finished`, `drops` and the counts know what this rank wrote and what `refresh` found."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.finished: dict[int, int] = {}  # block -> its number of batches
        self.drops: dict[str, dict[str, Any]] = {}  # source -> what is in the report
        self.files = 0  # read to the end, in finished blocks
        self.samples = 0  # in finished blocks
        self._read: dict[Path, int] = {}  # log -> bytes taken in
        self._looked = -math.inf

    def refresh(self) -> None:
        """Take in what was logged since the last time; often called, it looks now and then."""
        now = time.monotonic()
        if now - self._looked < EVERY:
            return
        self._looked = now
        for log in (self.work / "log").glob("*.jsonl"):
            start = self._read.get(log, 0)
            with log.open("rb") as file:
                file.seek(start)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]  # the rest is being written
            self._read[log] = start + len(whole)
            for line in filter(None, whole.split(b"\n")):
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # cut off by a kill: its file or block was done again
                    continue
                self._take(entry)

    def path(self, block: int, number: int) -> Path:
        """The file of a batch."""
        return self.work / f"batch-{block:06d}-{number:06d}.tar"

    def begun(self, block: int) -> list[dict[str, str]]:
        """Of each batch that an unfinished block has already: key -> source of its samples."""
        batches = []
        while (path := self.path(block, len(batches))).exists():
            with path.open("rb") as file:
                batches.append({pair.key: pair.record["source"] for pair in scan_tar(file, str(path))})
        return batches

    def keep(self, block: int, number: int, pairs: list[bytes]) -> None:
        """Write an encoded batch."""
        write_atomic(self.path(block, number), pairs)

    def drop(self, file: str, kind: str, reason: str, frames: int | None = None) -> None:
        """Remember why a file gave no, or no more, samples; `frames` is what a video that is too short has."""
        found = {} if frames is None else {"frames": frames}
        self._write({"file": file, "kind": kind, "reason": reason, **found})

    def finish(self, block: int, batches: int, files: int, samples: int) -> None:
        """Remember that nothing more comes of a block."""
        self._write({"block": block, "batches": batches, "files": files, "samples": samples})

    def _write(self, entry: dict[str, Any]) -> None:
        log = self.work / "log" / f"{rank()}.jsonl"
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as file:
            file.write(b"\n" + json.dumps(entry).encode() + b"\n")  # a line that was cut off before ends here
            file.flush()
            os.fsync(file.fileno())
        self._take(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        if "block" not in entry:
            self.drops[entry["file"]] = entry
        elif entry["block"] not in self.finished:
            self.finished[entry["block"]] = entry["batches"]
            self.files += entry["files"]
            self.samples += entry["samples"]
