"""Who is told of a run: each tracker gets the merged record of every `log.every` steps.

In: records. Out: whatever a tracker makes of them, such as TensorBoard's events. The one decision: events are written
here and not by TensorBoard's own thread, so that a full disk is an error of this run, with its sentence, and not a
traceback from elsewhere.
"""

import os
import socket
import time
from pathlib import Path
from typing import Protocol

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter

from wanloom.errors import UserError
from wanloom.train.records import Record, unwritten


class Tracker(Protocol):
    """What hears of a run."""

    def write(self, record: Record) -> None:
        """Take a record. Raises UserError, which ends the run."""

    def sync(self) -> None:
        """Wait until what was taken is safe: before a checkpoint that would skip it on resume."""

    def close(self) -> None:
        """No more records come."""


class TensorBoard:
    """A TensorBoard event file of scalars. Starting at a step hides later events of earlier files."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        folder = run_dir / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{start_step}"
        self._path = folder / name
        self._file = self._path.open("ab", buffering=0)
        self._records = RecordWriter(self._file)
        self._put(Event(wall_time=time.time(), file_version="brain.Event:2"))
        log = SessionLog(status=SessionLog.START)
        self._put(Event(wall_time=time.time(), step=start_step + 1, session_log=log))

    def write(self, record: Record) -> None:
        """Show a record. Raises UserError when the disk does not take it."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in record.items() if tag != "step"]
        try:
            self._put(Event(wall_time=time.time(), step=int(record["step"]), summary=Summary(value=values)))
        except OSError as error:
            raise UserError(unwritten(self._path, error)) from error

    def sync(self) -> None:
        """Wait until the events are on the disk."""
        os.fsync(self._file.fileno())

    def _put(self, event: Event) -> None:
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        self._file.close()
