"""A media file and the video track in it that counts.

In: a path. Out: an open file, a container that reads it, one of its tracks, that track's rate. The one decision: the
decoders are given bytes, never a name. So no name is an address (`12:30.mp4`, a folder `http:`) or a pattern, no file
can make another one be opened, and what is decoded can be held against what was hashed.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from io import FileIO
from pathlib import Path
from typing import Any

import av
from av.stream import Disposition

from wanloom.media.decoding import MediaError, unreadable
from wanloom.media.limits import USUAL, Budget, LimitsConfig

READ_BYTES = 1 << 16  # at once
GENERATE_STAMPS = 1  # AVFMT_FLAG_GENPTS, which PyAV sets: it takes decode stamps for moments of showing
NO_FILM = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.dependent
NO_OTHER_FILE = {"protocol_whitelist": ""}  # a list of other files (a playlist) must not have them opened
BESIDE = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
MOST_RATE = 300  # pictures per second; beyond it a header gives the ticks of its clock


class MediaFile(FileIO):
    """A file to be read; `budget` is what it may take."""

    def __init__(self, path: Path, limits: LimitsConfig = USUAL) -> None:
        try:
            super().__init__(path, "rb")
        except OSError as error:
            raise unreadable(path, error) from error
        self.budget = Budget(limits)

    def read(self, size: int | None = -1, /) -> bytes:
        """A thread that decodes ahead may read once more when a file was given up: it meets the end, and no error."""
        try:
            return super().read(size)
        except ValueError:
            if self.closed:
                return b""
            raise

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Damaged files ask for places before the start: the decoder takes a negative number for the error to tell."""
        try:
            return super().seek(offset, whence)
        except OSError as error:
            return -(error.errno or errno.EIO)
        except ValueError:
            return -errno.EBADF


@contextmanager
def open_container(file: MediaFile) -> Iterator[Any]:
    """The container in an open file, which stays open."""
    file.seek(0)
    # tags in odd encodings are none of our business
    options = {**NO_OTHER_FILE, "max_pixels": str(file.budget.limits.max_pixels)}  # of pictures decoded for the header
    with av.open(file, metadata_errors="replace", buffer_size=READ_BYTES, options=options) as container:
        container.flags &= ~GENERATE_STAMPS
        yield container


def choose_track(container: Any) -> tuple[Any, list[str]]:
    """The video track that a player shows, and notes: the one marked as default, else the largest, else the first."""
    tracks = [track for track in container.streams.video if not track.disposition & NO_FILM]
    if not tracks:
        covers = len(container.streams.video)
        raise MediaError("broken", "has a cover picture, but no video in it" if covers else "has no video in it")
    usable = [track for track in tracks if track.codec_context is not None]
    default = [track for track in usable if track.disposition & Disposition.default]
    if not usable:
        raise MediaError("broken", "has pictures in a format that no decoder is for")
    chosen = max(default or usable, key=_area)  # the first of equal ones
    if len(tracks) == 1:
        return chosen, []
    sizes = {_area(track) for track in default or usable}
    which = "default one" if len(default) == 1 else "largest" if len(sizes) > 1 else "first"
    return chosen, [f"{len(tracks)} video tracks, the {which} taken"]


def choose_decoder(track: Any, budget: Budget) -> Any:
    """What decodes a track: its own decoder, or one that also takes the transparency which WebM has beside pictures.

    Raises MediaError for pictures that are too large; those that a header does not tell it will not decode.
    """
    budget.check_size(track.width, track.height)
    decoder = _own_or_beside(track)
    context = track.codec_context if decoder is track else decoder
    context.thread_count = 1  # files are decoded side by side; what a damaged one gives must not vary
    context.options = {"max_pixels": str(budget.limits.max_pixels)}
    return decoder


def _own_or_beside(track: Any) -> Any:
    if track.metadata.get("alpha_mode", "0") == "0":
        return track
    name = BESIDE.get(track.codec.name)
    if name not in av.codecs_available:
        raise MediaError("colour", "has transparency beside its pictures, which is not decoded: lay it on black first")
    return av.CodecContext.create(name, "r")


def _area(track: Any) -> int:
    return track.width * track.height


def picture_rate(track: Any) -> Fraction | None:
    """Pictures per second by the header, None when it says nothing. Absurd averages give way to the guessed rate."""
    rates = [Fraction(rate) for rate in (track.average_rate, track.guessed_rate) if rate and rate > 0]
    if track.start_time is None:  # a raw stream has no clock: its average is a default
        rates.reverse()
    return next((rate for rate in rates if rate <= MOST_RATE), min(rates, default=None))


def frame_interval(track: Any) -> Fraction:
    """Seconds between pictures by the header, for streams without timestamps or durations."""
    return 1 / (picture_rate(track) or Fraction(25))
