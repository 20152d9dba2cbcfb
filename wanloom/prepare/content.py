"""The bytes of a file, as they were when it was hashed.

In: an open file. Out: its hash, and stamps of the disk that tell later whether it may have changed. The one decision:
stamps say that a file is the same; where they differ, or were taken so soon after the last change that a change after
them could have the same ones, its bytes are hashed again and decide.
"""

import hashlib
import os
import time
from typing import NamedTuple

from wanloom.media.container import MediaFile
from wanloom.media.decoding import MediaError

SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system that is in use
PIECE = 1 << 22  # bytes of one read


class Stamp(NamedTuple):
    """What the disk says of a file."""

    size: int
    mtime_ns: int
    ctime_ns: int  # 0 where it says too little


def read_stamp(status: os.stat_result) -> Stamp:
    """The stamp to keep beside a hash that is made after this."""
    settled = time.time_ns() - status.st_ctime_ns > SETTLED_NS  # of mtime anything may be made
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns if settled else 0)


def hash_file(descriptor: int) -> str:
    """sha256 of an open file. Its position is left alone: another thread may be reading."""
    digest, at = hashlib.sha256(), 0
    while data := os.pread(descriptor, PIECE, at):
        digest.update(data)
        at += len(data)
    return digest.hexdigest()


class Content:
    """What a file held when it was hashed."""

    def __init__(self, stamp: Stamp, sha256: str) -> None:
        self.stamp = stamp
        self.sha256 = sha256

    def check(self, file: MediaFile) -> None:
        """Raise MediaError when an open file holds something else by now."""
        now = read_stamp(os.fstat(file.fileno()))
        if now == self.stamp and now.ctime_ns:
            return
        if hash_file(file.fileno()) != self.sha256:
            raise MediaError("changed", "its bytes are others than those that were hashed at the start")
        self.stamp = now
