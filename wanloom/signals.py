"""Ctrl-C, SIGTERM and a closed terminal as a wish: the work under way is finished first; asked twice it stops at once.

In: what is finished first, in words. Out: the signal that came, which the command turns into its exit code. The one
decision: the first signal only leaves a note, so nothing is interrupted half way; while `is_patient` is false there is
nothing worth finishing, and it stops at once. Before a command has anything to lose, Ctrl-C ends the process itself: a
KeyboardInterrupt comes wherever Python is, and libraries turn it into errors of their own or lose it.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SAME = 1.0  # seconds
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LAUNCHER = "WANLOOM_LAUNCHER"  # the process that has started this one as one of several, by its number


def follow_launcher() -> None:
    """Stop as by SIGTERM when the launcher that has started this process is gone: a run never goes on unwatched.

    To be called first of all, before the seconds in which torch is imported.
    """
    if LAUNCHER not in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = int(os.environ.get(LAUNCHER, os.getppid()))  # torch's does not say its number

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def ended_by_ctrl_c(says: bool = True) -> Iterator[None]:
    """A block in which Ctrl-C ends the process where it stands, with a word, or by the system without one.

    By the system also while a library waits: a handler of Python's is not called before it comes back. Where Ctrl-C is
    ignored, as in the background of a script, it stays so.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGINT, _leave if says else signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(number: int, _: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # the terminal is closed
            os.write(2, b"\nwanloom: Stopped.\n")
    os._exit(128 + number)


class StopSignal:
    """Remembers the first SIGTERM, SIGINT or SIGHUP; a second one raises KeyboardInterrupt.

    Not a second SIGHUP: a closed terminal sends several, and there is no one who insists. One that is ignored, as below
    nohup, stays so.

    Outside of the main thread, where Python hands no signal to, it waits for none: whose thread that is decides.

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
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in STOPS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def has_cut(self) -> bool:
        """Whether an error may be what a library made of the KeyboardInterrupt that was raised inside of it."""
        return self.received is not None and not self.is_patient

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        is_second, now = self.received is not None, time.monotonic()
        is_same = now - self._first < SAME and int(os.environ.get("WORLD_SIZE", "1")) > 1
        if is_second and (is_same or number == signal.SIGHUP):
            return
        self.received, self._first = signal.Signals(number), now
        if is_second or not self.is_patient:
            raise KeyboardInterrupt
        if os.environ.get("RANK", "0") == "0":  # not print: a signal may come in the middle of one
            with suppress(OSError):  # the terminal is closed
                os.write(2, f"\n{self.received.name}: finishing {self.finishes}; once more stops at once.\n".encode())
