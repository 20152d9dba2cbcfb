"""What a run shows on the terminal: a live line, or a plain line for every record.

In: steps as they are done, and their records. Out: lines on stdout. The one decision: on a terminal one line is written
over, and some of its values stay above it, so that scrolling back tells how the run went.
"""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from wanloom.terminal import Outlet, Terminal
from wanloom.train.records import Record

KEPT_EVERY = 60.0  # seconds between the lines that stay on a terminal


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
