"""Ctrl-C and SIGTERM as a wish: the work under way is finished first, and the second time it stops at once.

In: what is finished first, in words. Out: the signal that came, which the command turns into its exit code. The one
decision: the first signal only leaves a note, so nothing is interrupted half way; while `is_patient` is false there is
nothing worth finishing, and it stops at once.
"""

import os
import signal
from types import FrameType
from typing import Any


class StopSignal:
    """Remembers the first SIGTERM or SIGINT; a second one raises KeyboardInterrupt."""

    def __init__(self, finishes: str) -> None:
        self.finishes = finishes
        self.is_patient = True
        self.received: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        is_second, self.received = self.received is not None, signal.Signals(number)
        if is_second or not self.is_patient:
            raise KeyboardInterrupt
        # not print: a signal may come in the middle of one
        os.write(2, f"\n{self.received.name}: finishing {self.finishes}; once more stops at once.\n".encode())
