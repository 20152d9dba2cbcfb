"""The picture that a player shows at a given time.

In: an open video. Out: for times that only grow, the decoded picture on the screen then. The one decision: what counts
is when a picture is due and when the next one is, not its number. Long gaps between the times asked for are jumped over
by seeking to the key picture before, where the file is known to allow it; else everything is decoded.
"""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import av.error

from wanloom.media.clock import Clock, decodable
from wanloom.media.container import choose_decoder
from wanloom.media.decoding import MediaError
from wanloom.media.limits import Budget

TICK = Fraction(1, 1000)  # containers with millisecond clocks (Matroska) round by up to half of this
FAR = 10  # seconds that are worth a jump


class TimedPicture(NamedTuple):
    """A picture and when it is on the screen, in seconds from the first picture of the file."""

    begin: Fraction
    end: Fraction
    picture: Any


class Player:
    """Plays one track forward."""

    def __init__(self, container: Any, track: Any, budget: Budget, can_seek: bool = False) -> None:
        self.container = container
        self.track = track
        self.budget = budget
        self.decoder = choose_decoder(track, budget)
        self.clock = Clock(track)
        self.end = Fraction(0)  # of the last picture met so far
        self._pictures = self._play()
        try:
            self.now = next(self._pictures, None)
        except av.error.ArgumentError as error:
            if track.width:
                raise
            reason = f"has pictures of a size that is damaged, or of more than `max_pixels={budget.limits.max_pixels}`"
            raise MediaError("too large", reason) from error
        self.can_seek = can_seek and self.clock.origin is not None  # raw streams have no stamps
        if self.now is None:
            raise MediaError("broken", "has no pictures")
        self.last = self.now  # on the screen; stays at the end
        self.begin = self.clock.origin if self.now.picture.pts is not None else None  # the first stamp of showing

    def at(self, time: Fraction) -> Any:
        """The picture shown at `time`, None after the end."""
        if self.can_seek and self.now is not None and time - self.now.end > FAR:
            self._jump(time)
        while self.now is not None and time + TICK >= self.now.end:
            self._step()
        return self.now.picture if self.now else None

    def play_out(self) -> int:
        """To the end; the number of pictures on the way."""
        number = 0
        while self.now is not None:
            number += 1
            self._step()
        return number

    def _step(self) -> None:
        self.now = next(self._pictures, None)
        self.last = self.now or self.last

    def _decode(self) -> Iterator[Any]:
        for packet in decodable(self.container.demux(self.track)):
            self.clock.look(packet)
            yield from self.decoder.decode(packet)
        yield from self.decoder.decode(None)

    def _play(self) -> Iterator[TimedPicture]:
        previous: Any = None
        begin = Fraction(0)
        for picture in self._decode():
            self.budget.spend()
            time = self.clock.time(picture)
            if previous is not None and time > begin:  # of two with one stamp the second is shown
                self.end = time
                yield TimedPicture(begin, time, previous)
            previous, begin = picture, time
        if previous is not None:
            length = previous.duration * self.clock.base
            if not length or previous.pts is None:
                length = max(length, self.clock.interval)
            self.end = begin + length
            yield TimedPicture(begin, self.end, previous)

    def _jump(self, time: Fraction) -> None:
        """To a picture at or before `time`, or back to the first one for good."""
        origin = self.clock.origin
        assert origin is not None, "checked at the start"
        try:
            self.container.seek(int((origin + time) / self.clock.base), stream=self.track)
        except av.error.FFmpegError:
            self.can_seek = False  # the position did not change
            return
        self._restart()
        if self.now is None or self.now.begin > time:
            self.can_seek = False
            self.container.seek(int(origin / self.clock.base), stream=self.track)
            self._restart()

    def _restart(self) -> None:
        if self.decoder is not self.track:  # that one is emptied by the jump
            self.decoder.flush_buffers()
        self.clock.restart()
        self._pictures = self._play()
        self._step()
