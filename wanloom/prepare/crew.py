"""The ranks of one prepare: each works at its own speed, and what stops one stops all.

In: nothing but the ranks themselves. Out: blocks dealt to whoever is free, waits of any length, and an alarm. The one
decision: nobody waits inside a collective, where a long film on another rank would look like a hang. The ranks look at
shared counts between two pieces of work; only when all have left their work do they meet to tell what happened.
"""

import time
from collections.abc import Callable, Iterator
from types import TracebackType

from wanloom.dist import Tally, rank, world_size

LOOK = 0.1  # seconds between two looks at what one waits for
PATIENCE = 10.0  # seconds in which a stopped rank lets the others finish their batch


class CalledOff(Exception):  # noqa: N818 - no error of this rank
    """Another rank failed and says why."""


class Crew:
    """A block of work of all ranks: an error inside makes the others leave theirs with `CalledOff`, which ends here.

    A stop (KeyboardInterrupt) of one rank is a stop of all.
    """

    def __init__(self) -> None:
        self.planned, self.ended, self.complete = Tally(), Tally(), Tally()  # the stages of the work
        self._dealt, self._failed, self._stopped = Tally(), Tally(), Tally()

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._stop_together()
        elif kind is not None and kind is not CalledOff:
            self._failed.add()
        return kind is CalledOff

    def _stop_together(self) -> None:
        """Leave when all have finished their batch: the launcher ends at once what is left when a rank is gone."""
        deadline, size = time.monotonic() + PATIENCE, world_size()
        # counted when they come and when they go: rank 0, which may hold the counts, goes last
        for number in (size, 2 * size) if rank() == 0 else (size,):
            self._stopped.add()
            while self._stopped.add(0) < number and time.monotonic() < deadline:
                time.sleep(LOOK)
        if rank() != 0:
            self._stopped.add()

    def check(self) -> None:
        """To be called between two pieces of work."""
        if self._stopped.add(0):
            raise KeyboardInterrupt
        if self._failed.add(0):
            raise CalledOff

    def wait(self, until: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait as long as it takes."""
        while not until():
            self.check()
            meanwhile()
            time.sleep(LOOK)

    def deal(self, total: int) -> Iterator[int]:
        """Numbers below `total`, each to one rank, when it asks for the next."""
        while (number := self._dealt.add() - 1) < total:
            yield number
