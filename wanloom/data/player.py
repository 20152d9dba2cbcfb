"""The picture that a player shows at a given time.

In: an open video. Out: for times that only grow, the decoded picture on the screen then. The one decision: what counts
is when a picture is due (its timestamp) and when the next one is, not its number. Long gaps between the times asked for
are jumped over by seeking to the key picture before; where a file cannot do that, everything is decoded instead.
"""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import av.error

from wanloom.data.decoding import MediaError

TICK = Fraction(1, 1000)  # containers with millisecond clocks (Matroska) round by up to half of this
FAR = 10  # seconds that are worth a jump


class Shown(NamedTuple):
    """A picture and when it is on the screen, in seconds from the first picture of the file."""

    begin: Fraction
    end: Fraction
    picture: Any


def frame_interval(stream: Any) -> Fraction:
    """Seconds between pictures by the header, for streams without timestamps or durations."""
    return 1 / Fraction(stream.average_rate or stream.guessed_rate or 25)


class Player:
    """Plays one stream forward."""

    def __init__(self, container: Any, stream: Any) -> None:
        self.container = container
        self.stream = stream
        self.base = Fraction(stream.time_base)
        self.end = Fraction(0)  # of the last picture met so far
        self.origin: Fraction | None = None  # timestamp of the first picture
        self.can_seek = True
        self._pictures = self._play()
        self._now = next(self._pictures, None)
        if self._now is None:
            raise MediaError("broken", "has no pictures")

    def at(self, time: Fraction) -> Any:
        """The picture shown at `time`, None after the end."""
        if self.can_seek and self._now is not None and time - self._now.end > FAR:
            self._jump(time)
        while self._now is not None and time + TICK >= self._now.end:
            self._now = next(self._pictures, None)
        return self._now.picture if self._now else None

    def _play(self) -> Iterator[Shown]:
        interval = frame_interval(self.stream)
        previous: Any = None
        begin = Fraction(0)
        for picture in self.container.decode(self.stream):
            stamp = picture.pts if picture.pts is not None else picture.dts
            if self.origin is None:
                self.origin = stamp * self.base if stamp is not None else Fraction(0)
                self.can_seek = stamp is not None
            time = stamp * self.base - self.origin if stamp is not None else begin + interval * (previous is not None)
            if previous is not None and time > begin:  # a picture with an older stamp replaces the one before it
                self.end = time
                yield Shown(begin, time, previous)
            previous, begin = picture, max(time, begin)
        if previous is not None:
            length = previous.duration * self.base if previous.duration else interval
            self.end = begin + length
            yield Shown(begin, self.end, previous)

    def _jump(self, time: Fraction) -> None:
        """To a picture at or before `time`, or back to the first one for good."""
        assert self.origin is not None
        try:
            self.container.seek(int((self.origin + time) / self.base), stream=self.stream)
        except av.error.FFmpegError:
            self.can_seek = False  # the position did not change
            return
        self._pictures = self._play()
        self._now = next(self._pictures, None)
        if self._now is None or self._now.begin > time:
            self.can_seek = False
            self.container.seek(int(self.origin / self.base), stream=self.stream)
            self._pictures = self._play()
            self._now = next(self._pictures, None)
