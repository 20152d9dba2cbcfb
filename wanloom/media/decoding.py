"""The border to the libraries that decode: what they raise about a file's bytes is that file's drop, and nothing else.

In: a block that decodes one file. Out: the block's result, MediaError for what PyAV or Pillow raised, anything else as
it was. The one decision: blame goes by where an exception began, not by its type. Damaged bytes lead a library to every
type there is (ValueError, KeyError, SystemError, an index out of range), and a mistake of ours raises the same ones. So
the traceback is asked: what left a library on its way to us is the library's; what began in our own lines, or in what
they call beside the decoders, is ours and goes on. Before a file is blamed, the disk and the memory are tried: a file
that cannot be read any more, or a machine that has no memory left, would otherwise be a drop of every file.
"""

from pathlib import Path
from types import TracebackType

import av.error
import numpy as np
from PIL import UnidentifiedImageError

from wanloom.errors import UserError

OWN = "wanloom"
DECODERS = {"av", "PIL"}
PIECE = 1 << 22  # bytes of one read
SPARE = 1 << 29  # bytes that a machine which can decode anything still has
LONGEST = 200  # characters of a library's own words


class MediaError(Exception):
    """A file that gives no (more) samples. `kind` is the heading in the report."""

    def __init__(self, kind: str, reason: str, frames: int | None = None) -> None:
        super().__init__(reason)
        self.kind = kind
        self.frames = frames  # of a video that is too short: how many it has


class Decoding:
    """`with Decoding(path):` around all that decodes the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or not began_in_decoder(traceback):
            return
        self._try_disk()
        if isinstance(error, MemoryError):
            np.empty(SPARE, dtype=np.uint8)  # raises MemoryError when it is the machine that has none left
        raise MediaError("broken", _describe(error)) from error

    def _try_disk(self) -> None:
        """Raise UserError when the file, which could be read for the plan, cannot be read from end to end."""
        try:
            with self.path.open("rb") as file:
                while file.read(PIECE):
                    pass
        except OSError as error:
            raise unreadable(self.path, error) from error


def unreadable(path: Path, error: OSError) -> UserError:
    """What to say of a file that could be read for the plan."""
    return UserError(
        f"'{path}' cannot be read any more: {error.strerror}. Nothing is lost: run the same command again when it can."
    )


def began_in_decoder(traceback: TracebackType | None) -> bool:
    """Whether an exception came out of PyAV or Pillow, as the call that our innermost line made."""
    entered = False
    while traceback is not None:
        package = _package(traceback)
        if package == OWN:
            entered = False
        elif package in DECODERS:
            entered = True
        traceback = traceback.tb_next
    return entered


def _package(traceback: TracebackType) -> str:
    # compiled modules have frames without a name, but with the path of their source, as "av/container/core.py"
    frame = traceback.tb_frame
    name = frame.f_globals.get("__name__") or frame.f_code.co_filename.replace("/", ".").replace("\\", ".")
    return name.partition(".")[0]


def _describe(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "is no image that can be read"
    text = error.strerror if isinstance(error, OSError | av.error.FFmpegError) and error.strerror else str(error)
    first = next(iter(text.splitlines()), "") or type(error).__name__
    return f"cannot be decoded: {first[:LONGEST]}"
