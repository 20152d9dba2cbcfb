"""When pictures are due, also where the clock of their file is broken.

In: pictures as a decoder gives them, in the order of showing. Out: for each its time, in seconds from the first. The
one decision: stamps are believed as long as they go on. One that steps back or leaps (by more than 10 s, or than 50
frames' time) is a broken clock, as where transport streams were joined: that picture is due one frame after the one
before it, and so on from there. Where a container has no stamps of showing, a picture is due at the decode stamp with
which it came out: that is the order of showing, rebuilt.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

from wanloom.media.container import MediaFile, choose_track, frame_interval, open_container
from wanloom.media.decoding import MediaError

LEAP, LEAP_FRAMES = Fraction(10), 50
PAUSE = Fraction(1)  # seconds that a picture may always stay

JUMPS = "its clock jumps: bridged by one frame's time"
DISORDER = "its stamps go back: pictures shown in the order of decoding"


def longest_step(interval: Fraction) -> Fraction:
    """Seconds from one picture to the next beyond which the clock has leapt."""
    return max(PAUSE, 2 * interval, min(LEAP, LEAP_FRAMES * interval))


class Clock:
    """Takes the pictures of a track one after the other."""

    def __init__(self, track: Any) -> None:
        self.base = Fraction(track.time_base)
        self.interval = frame_interval(track)
        self.longest = longest_step(self.interval)
        self.origin: Fraction | None = None  # the stamp of time 0, in seconds
        self.now: Fraction | None = None  # the time of the latest picture
        self.notes: dict[str, None] = {}
        self._steps: deque[Fraction] = deque(maxlen=9)
        # decode stamps are given for stamps of showing: pictures change places, their stamps do not
        self._posing, self._latest = bool(track.codec_context.has_b_frames), -math.inf
        self._by_decoding = False

    def look(self, packet: Any) -> None:
        """To be told of every packet before it is decoded."""
        if packet.pts is not None:
            self._posing = self._posing and packet.pts > self._latest
            self._latest = packet.pts

    def restart(self) -> None:
        """The next picture comes after a seek."""
        self.now = None

    def time(self, picture: Any) -> Fraction:
        """When the next picture is due."""
        after = Fraction(0) if self.now is None else self.now + self._usual()
        stamp = picture.dts if picture.pts is None or self._by_decoding else picture.pts
        if stamp is None:
            self.now = after
            return after
        if self.origin is None:
            self.origin = stamp * self.base - after
        time = stamp * self.base - self.origin
        step = time - self.now if self.now is not None else Fraction(0)
        if step > self.longest or step < -self.interval / 2:
            if self._posing and step < 0 and picture.dts is not None:
                self._by_decoding, stamp = True, picture.dts
            self.notes[DISORDER if self._by_decoding else JUMPS] = None
            self.origin = stamp * self.base - after
            time = after
        elif step > 0:
            self._steps.append(step)
        self.now = time = time if self.now is None else max(time, self.now)
        return time

    def _usual(self) -> Fraction:
        """The step of the latest pictures; by the header, where that is the same up to the ticks of the clock."""
        step = median(self._steps) if self._steps else self.interval
        return self.interval if abs(step - self.interval) < 2 * self.base else step


def decodable(packets: Iterable[Any]) -> Iterator[Any]:
    """The packets from the first key picture on, without empty ones (which stand for a picture that stays)."""
    started = False
    for packet in packets:
        started = started or packet.is_keyframe
        if packet.size and started:
            yield packet


class Extent(NamedTuple):
    """What the packets of a track say."""

    begin: Fraction  # the first stamp of showing, in seconds
    seconds: Fraction
    pictures: int
    whole: bool  # the clock does not jump


def scan(file: MediaFile) -> Extent:
    """The extent of what will be shown, from the packets alone: nothing is decoded."""
    key: Any = None
    end, whole = Fraction(0), True
    shown: list[tuple[Fraction, Fraction]] = []  # when, and for how long by the packet
    latest: Fraction | None = None  # decode stamp
    with open_container(file) as container:
        track, _ = choose_track(container)
        base, interval = Fraction(track.time_base), frame_interval(track)
        for packet in decodable(container.demux(track)):
            file.budget.spend()
            stamp = packet.pts if packet.pts is not None else packet.dts
            time = end if stamp is None else stamp * base  # raw streams have no clock
            key = time if key is None else key
            if packet.is_discard or time < key:  # what comes before the first key picture needs pictures before it
                continue
            decoding = packet.dts * base if packet.dts is not None else latest
            if decoding is not None:
                whole = whole and (latest is None or decoding - latest > -interval / 2)
                latest = decoding
            length = packet.duration * base
            shown.append((time, max(length, interval) if packet.pts is None else length or interval))
            end = max(end, time + shown[-1][1])
    if not shown:
        raise MediaError("broken", "has no pictures")
    shown.sort()
    times = [time for time, _ in shown]
    whole = whole and all(after - before <= longest_step(interval) for before, after in pairwise(times))
    # lengths of packets are steps in the order of decoding: one that is shown before may seem to outlast the last one
    last, length = shown[-1]
    return Extent(times[0], last + length - times[0], len(shown), whole)
