"""The work of the ranks of one prepare: each takes a block when it is free, and what stops one stops all.

In: nothing but the ranks themselves. Out: the numbers of blocks, waits of any length, and an alarm. The one decision:
nobody waits inside a collective, where a long film on another rank would look like a hang. The ranks look at shared
counts between two pieces of work; only when all have left their work do they meet to tell what happened. Blocks are
taken and not striped over the ranks: with unequal films that took 7% less time on two ranks; simulated on eight, 25%.
"""

import time
from collections.abc import Callable, Iterator
from types import TracebackType

from wanloom.dist import SharedCounter, rank, world_size

LOOK = 0.1  # seconds between two looks at what one waits for
PATIENCE = 10.0  # seconds in which a stopped rank lets the others finish their batch
PLANNED, COMPLETE = 1, 2


class Cancelled(Exception):  # noqa: N818 - no error of this rank
    """Another rank failed and says why."""


class WorkQueue:
    """A block of work of all ranks: an error inside makes the others leave theirs with `Cancelled`, which ends here.

    A stop (KeyboardInterrupt) of one rank is a stop of all.
    """

    def __init__(self) -> None:
        self._stage, self._taken, self._failed, self._stopped = (SharedCounter() for _ in range(4))

    def __enter__(self) -> "WorkQueue":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._stop_together()
        elif kind is not None and kind is not Cancelled:
            self._failed.add()
        return kind is Cancelled

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
            raise Cancelled

    def reach(self, stage: int) -> None:
        """Rank 0 is at `PLANNED`, `COMPLETE`."""
        self._stage.add(stage - self._stage.add(0))

    def has_reached(self, stage: int) -> bool:
        return self._stage.add(0) >= stage

    def wait(self, until: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait as long as it takes."""
        while not until():
            self.check()
            meanwhile()
            time.sleep(LOOK)

    def take(self, total: int) -> Iterator[int]:
        """Numbers below `total`, each to one rank, when it asks for the next."""
        while (number := self._taken.add() - 1) < total:
            yield number
