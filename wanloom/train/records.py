"""metrics.jsonl: the records of a run, which everything else that shows a run is made of.

In: one record every `log.every` steps. Out: RUN/metrics.jsonl. The one decision: a resumed run continues the same file
as if it had never stopped: records after the checkpoint are dropped first, so no step is there twice.
"""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wanloom.errors import UserError
from wanloom.files import parse_json, write_atomic

FILE = "metrics.jsonl"
Record = Mapping[str, float]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a metrics.jsonl; a last line cut off by a kill is left out. Raises UserError for other damage."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [_parse(path, number, line) for number, line in enumerate(lines, 1) if line.endswith(b"\n")]


def _parse(path: Path, number: int, line: bytes) -> dict[str, float]:
    try:
        record = parse_json(line)
    except ValueError:  # of json, or no text
        record = None
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("step"), int)
        or not all(map(_is_number, record.values()))
    ):
        raise UserError(
            f"Line {number} of {path} is damaged: delete the line, or move the file away. No checkpoint depends on it."
        )
    return record


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def unwritten(path: Path, error: OSError) -> str:
    """What to tell when a file of the run takes no more."""
    return (
        f"{path} could not be written: {error.strerror}. Make room, then start the same command again to go on from "
        "the newest checkpoint."
    )


class Records:
    """The file of a run, from `start_step` on."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        self._path = run_dir / FILE
        kept = [record for record in read_metrics(self._path) if record["step"] <= start_step]
        write_atomic(self._path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        # unbuffered: what could not be written must not be tried again when the file is closed
        self._jsonl = self._path.open("ab", buffering=0)

    def write(self, record: Record) -> None:
        """Append a record. Raises UserError when the disk does not take it, or the run folder is no longer there."""
        self._check()
        line = (json.dumps(dict(record)) + "\n").encode()
        try:
            if self._jsonl.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UserError(unwritten(self._path, error)) from error

    def sync(self) -> None:
        """Wait until the records are on the disk: before a checkpoint that would skip them on resume."""
        self._check()
        os.fsync(self._jsonl.fileno())

    def _check(self) -> None:
        """What is written to a file without a name is lost."""
        if os.fstat(self._jsonl.fileno()).st_nlink == 0 or not self._path.exists():
            raise UserError(f"{self._path} is no longer there: it was moved or deleted while the run went on.")

    def close(self) -> None:
        """Close the file."""
        self._jsonl.close()
