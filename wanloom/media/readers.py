"""Several files decoded at once, their clips handed out in the order of the files.

In: jobs and a function that yields the results of one. Out: (job, result) in the order of the jobs. The one decision:
threads, because decoding and resizing release Python's lock and pictures need not be copied between processes. What
waits is bounded: a thread holds one finished result and works on the next, so memory is about 2 * workers clips.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

J = TypeVar("J")
R = TypeVar("R")


class _DecodeThread(Generic[J, R]):
    """One job on its thread. An empty list in `results` is the end; `error` is what ended it before."""

    def __init__(self, job: J, work: Callable[[J], Iterator[R]], stop: threading.Event) -> None:
        self.job = job
        self.work = work
        self.stop = stop
        self.results: queue.Queue[list[R]] = queue.Queue(maxsize=1)
        self.error: BaseException | None = None
        # Python does not wait for daemons: a generator that is neither read nor closed would hold up its end for ever
        threading.Thread(target=self.run, name="decode", daemon=True).start()

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        self.error = error  # the reader meets it at the end
        return True

    def run(self) -> None:
        with self:
            for result in self.work(self.job):
                self._put([result])
                if self.stop.is_set():
                    return
        self._put([])

    def _put(self, result: list[R]) -> None:
        while not self.stop.is_set():
            try:
                return self.results.put(result, timeout=0.1)
            except queue.Full:
                continue


def read_ahead(jobs: Iterable[J], work: Callable[[J], Iterator[R]], workers: int) -> Generator[tuple[J, R], None, None]:
    """Results of `work(job)` for every job, in order, with `workers` jobs under way; an error of `work` is raised here.

    A job is asked for when a thread is free. Threads end with their next result once the generator is closed.
    """
    stop = threading.Event()
    waiting = iter(jobs)
    threads: deque[_DecodeThread[J, R]] = deque()
    try:
        while True:
            while len(threads) < workers and (job := next(waiting, None)) is not None:
                threads.append(_DecodeThread(job, work, stop))
            if not threads:
                return
            result = threads[0].results.get()
            if result:
                yield threads[0].job, result[0]
            elif (error := threads.popleft().error) is not None:
                raise error
    finally:
        stop.set()
