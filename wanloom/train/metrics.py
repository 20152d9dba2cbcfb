"""What a run tells: metrics.jsonl, TensorBoard events, and a progress line on the terminal.

In: one record every `log.every` steps. Out: RUN/metrics.jsonl, RUN/tensorboard/, and lines on stdout. The one decision:
a resumed run continues the same files as if it had never stopped: records after the checkpoint are dropped first, so
no step is there twice. TensorBoard events are written here and not by its own thread, so that a full disk is an error
of this run, with its sentence, and not a traceback from elsewhere.
"""

import errno
import json
import os
import resource
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter

from wanloom.errors import UserError
from wanloom.files import parse_json, write_atomic
from wanloom.terminal import Outlet, Terminal

FILE = "metrics.jsonl"
Record = Mapping[str, float]
KEPT_EVERY = 60.0  # seconds between the lines that stay on a terminal


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


class Metrics:
    """The two files of a run, from `start_step` on."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        self._path = run_dir / FILE
        kept = [record for record in read_metrics(self._path) if record["step"] <= start_step]
        write_atomic(self._path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        # unbuffered: what could not be written must not be tried again when the file is closed
        self._jsonl = self._path.open("ab", buffering=0)
        self._events = EventFile(run_dir / "tensorboard", start_step)

    def write(self, record: Record) -> None:
        """Append a record. Raises UserError when the disk does not take it, or the run folder is no longer there."""
        self._check()
        line = (json.dumps(dict(record)) + "\n").encode()
        try:
            if self._jsonl.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._events.write(record)
        except OSError as error:
            raise UserError(
                f"{self._path} could not be written: {error.strerror}. Make room, then start the same command again to "
                "go on from the newest checkpoint."
            ) from error

    def sync(self) -> None:
        """Wait until the records are on the disk: before a checkpoint that would skip them on resume."""
        self._check()
        os.fsync(self._jsonl.fileno())

    def _check(self) -> None:
        """What is written to a file without a name is lost."""
        if os.fstat(self._jsonl.fileno()).st_nlink == 0 or not self._path.exists():
            raise UserError(f"{self._path} is no longer there: it was moved or deleted while the run went on.")

    def close(self) -> None:
        """Close both files."""
        self._jsonl.close()
        self._events.close()


class EventFile:
    """A TensorBoard event file of scalars. Starting at a step hides later events of earlier files."""

    def __init__(self, folder: Path, start_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{start_step}"
        self._file = (folder / name).open("ab", buffering=0)
        self._records = RecordWriter(self._file)
        self._put(Event(wall_time=time.time(), file_version="brain.Event:2"))
        log = SessionLog(status=SessionLog.START)
        self._put(Event(wall_time=time.time(), step=start_step + 1, session_log=log))

    def write(self, record: Record) -> None:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in record.items() if tag != "step"]
        self._put(Event(wall_time=time.time(), step=int(record["step"]), summary=Summary(value=values)))

    def _put(self, event: Event) -> None:
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        self._file.close()


class ProgressLine:
    """A live line on a terminal; where there is none, a plain line for every record; nothing when `quiet`."""

    def __init__(
        self, start_step: int, num_steps: int, console: Console | None = None, ranks: int = 1, quiet: bool = False
    ) -> None:
        self._outlet = Outlet(sys.stdout)
        self.console = console or Terminal(soft_wrap=True, quiet=quiet, file=self._outlet)
        self._num_steps, self._ranks = num_steps, ranks
        self._seen = start_step, time.monotonic()  # the last record's step, and when
        self._kept = time.monotonic() if self.console.is_terminal else 0.0
        self._live: Progress | None = None
        if self.console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
            )
            self._live = Progress(*columns, console=self.console)
            self._task = self._live.add_task("train", total=num_steps, completed=start_step, text="")

    def __enter__(self) -> "ProgressLine":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    @property
    def closed(self) -> OSError | None:
        """Why nothing can be shown any more, such as a pipe whose reader has gone; None while all is well."""
        return self._outlet.error

    def advance(self, step: int) -> None:
        """One more step is done."""
        if self._live:
            self._live.update(self._task, completed=step)

    def show(self, record: Record) -> None:
        """Show a record."""
        text = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in record:
            text += f"  {record['model_tflops_per_gpu']:.0f} TFLOP/s per GPU, MFU {record['mfu']:.1%}"
        if self._ranks > 1:
            text += f"  balance {record['balance']:.2f}"
        if "val_loss" in record:
            text += f"  val loss {record['val_loss']:.4f}"
        done = int(record["step"])
        if self._live:
            self._live.update(self._task, completed=done, text=text)
            # the line is written over; some of its values stay above it
            if "val_loss" in record or done == self._num_steps or time.monotonic() - self._kept >= KEPT_EVERY:
                self._kept = time.monotonic()
                self.say(f"step {done}/{self._num_steps}  {text}")
            return
        before, then = self._seen
        self._seen = done, time.monotonic()
        left = (self._seen[1] - then) / (done - before) * (self._num_steps - done)  # at the speed of now
        self.say(f"step {done}/{self._num_steps}  {text}  {format_seconds(left)} left")

    def say_end(self, a_step: float, left: int, until_saved: int) -> None:
        """When the run ends, from the seconds of a step; and when it saves, where the first time is still to come."""
        clock = time.strftime("%a %H:%M", time.localtime(time.time() + a_step * left))
        ends = f"the run ends in about {format_seconds(a_step * left)} ({clock})"
        saves = f"; it saves in {format_seconds(a_step * until_saved)}" if 0 < until_saved < left else ""
        self.say(f"A step takes {a_step:.2g} s: {ends}{saves}.")

    def say(self, text: str) -> None:
        """Print a line above the progress."""
        self.console.print(text, markup=False, soft_wrap=True)  # a command in it is pasted into a shell


def format_seconds(seconds: float) -> str:
    """`75` -> `1:15`, `3700` -> `1:01:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def peak_memory_gib(device: torch.device) -> float:
    """The most memory in use so far: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
