"""Reading again, for a minute, where a disk of the network may come back.

In: a read. Out: what it gives, or the OSError that it still ends in after a minute. The one decision: only errors that
pass are waited for: those of a network or of its server. A file that is missing, or that one may not read, is so now.
"""

import errno
import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds
PAUSES = 0.5, 8.0  # seconds between two tries: the first pause, and the longest
# what reads of NFS, SMB, FUSE and object stores end in while a server or the way to it is down
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOTCONN, errno.ECONNRESET, errno.ECONNREFUSED}
PASSING |= {errno.ECONNABORTED, errno.EPIPE, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH}
PASSING |= {getattr(errno, "EREMOTEIO", errno.EIO), errno.ENODEV, errno.ENXIO}


def read_patiently(what: str, read: Callable[[], T]) -> T:
    """What `read` gives; `what` names it in the line that says that it is waited for. Raises OSError."""
    deadline, (pause, longest), waits = time.monotonic() + PATIENCE, PAUSES, False
    while True:
        try:
            return read()
        except OSError as error:
            if not passes(error) or time.monotonic() + pause > deadline:
                raise
            if not waits:
                log.warning("%s: %s; trying again for a minute", what, error.strerror or error)
            waits = True
        time.sleep(pause)
        pause = min(2 * pause, longest)


def passes(error: OSError) -> bool:
    """Whether it may go well a little later."""
    return error.errno in PASSING or isinstance(error, TimeoutError | ConnectionError)


class Fetching:
    """`with Fetching():` around one call into fsspec: each file system raises errors of its own, here all are OSErrors.

    One without a number of the system is taken for an error of the network.
    """

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, FileNotFoundError | PermissionError):
            return
        if not isinstance(error, OSError) or error.errno is None:
            raise OSError(errno.EIO, str(error) or type(error).__name__) from error
