"""Ctrl-C and SIGTERM as a wish: the work under way is finished first, and the second time it stops at once.

In: what is finished first, in words. Out: the signal that came, which the command turns into its exit code. The one
decision: the first signal only leaves a note, so nothing is interrupted half way; while `is_patient` is false there is
nothing worth finishing, and it stops at once.
"""

import os
import signal
import time
from types import FrameType
from typing import Any

SAME = 1.0  # seconds


class StopSignal:
    """Remembers the first SIGTERM or SIGINT; a second one raises KeyboardInterrupt.

    Of a run of several processes one tells the user. There a second signal right after the first is the same one: a
    launcher passes on what a scheduler has sent to its processes too.
    """

    def __init__(self, finishes: str) -> None:
        self.finishes = finishes
        self.is_patient = True
        self.received: signal.Signals | None = None
        self._before: dict[int, Any] = {}
        self._first = 0.0  # when it came

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        is_second, now = self.received is not None, time.monotonic()
        if is_second and now - self._first < SAME and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return
        self.received, self._first = signal.Signals(number), now
        if is_second or not self.is_patient:
            raise KeyboardInterrupt
        if os.environ.get("RANK", "0") == "0":  # not print: a signal may come in the middle of one
            os.write(2, f"\n{self.received.name}: finishing {self.finishes}; once more stops at once.\n".encode())
