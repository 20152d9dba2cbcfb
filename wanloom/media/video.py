"""Video files to clips at one rate.

In: a file. Out: clips `(F, H, W, 3)` uint8 RGB. The one decision: time is sampled by timestamps. A clip's frame k is
the picture that a player shows at start + k / fps, so variable frame rates, other rates and odd containers keep the
speed of the action. The file is decoded once, and a picture is converted only when it is used, while the next ones are
decoded on another thread.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import av
import numpy as np
from pydantic import Field, model_validator

from wanloom.config import Config
from wanloom.media.clock import JUMPS, Extent, scan
from wanloom.media.container import MediaFile, choose_track, open_container, picture_rate
from wanloom.media.decoding import Decoding, MediaError
from wanloom.media.limits import USUAL, LimitsConfig
from wanloom.media.picture import ChooseCrop, Clip, PictureConverter, Track, read_image
from wanloom.media.player import FAR, TICK, Player
from wanloom.media.readers import read_ahead

TURN_S = 2**33 / 90_000  # of the clock of a transport stream
HELD = "last picture held for less than a frame"


class TimingConfig(Config):
    """Which moments of a file become samples."""

    frames: int = Field(default=81, description="of every clip, 4n+1 for every Wan")
    fps: float = Field(
        default=16.0,
        description="frames per second of every clip; without it the model's own, which is this for Wan 2.1",
    )
    mode: Literal["video", "image", "frames"] = Field(
        default="video",
        description="video: clips, and images as clips of one frame; image: images only; frames: single frames of the "
        "videos, and images",
    )
    clips: Literal["first", "uniform", "all"] = Field(
        default="first",
        description="first: one clip from the start of each video; uniform: up to `clips_per_video`, evenly spread; "
        "all: as many as fit one after the other, the rest at the end is not used",
    )
    clips_per_video: int = Field(default=4, description="for `clips=uniform`")
    frames_per_video: int = Field(
        default=1, description="for `mode=frames`: from the middles of N equal parts of the video"
    )

    @model_validator(mode="after")
    def _check(self) -> "TimingConfig":
        if not 0 < self.fps <= 1000:
            raise ValueError(f"`fps={self.fps:g}` is not a frame rate")
        if self.clips_per_video < 1 or self.frames_per_video < 1:
            raise ValueError("`clips_per_video` and `frames_per_video` are at least 1")
        self._check_use()
        return self

    def _check_use(self) -> None:
        """Raise ValueError for a setting that was given and would change nothing."""
        for name in ("frames", "fps", "clips"):
            if self.mode != "video" and name in self.model_fields_set:
                raise ValueError(f"`{name}` has no effect with `mode={self.mode}`: leave it out")
        if "clips_per_video" in self.model_fields_set and (self.mode, self.clips) != ("video", "uniform"):
            raise ValueError("`clips_per_video` only counts with `clips=uniform`: leave it out or give that too")
        if "frames_per_video" in self.model_fields_set and self.mode != "frames":
            raise ValueError("`frames_per_video` only counts with `mode=frames`: leave it out or give that too")


Same = Callable[[MediaFile], None]  # raises MediaError when an open file is not what it was


def read_clips(
    path: Path,
    kind: str,
    timing: TimingConfig,
    choose: ChooseCrop,
    same: Same = lambda file: None,
    limits: LimitsConfig = USUAL,
) -> Iterator[Clip]:
    """The samples of one file, in order of time. Raises MediaError where it can give no more.

    `same` is asked before a clip is handed out, or an error: every byte that counted was read by then.
    """
    with MediaFile(path, limits) as file:
        try:
            with Decoding(path):
                clips = _read_video(file, timing, choose) if kind == "video" else iter([read_image(file, choose)])
                for clip in clips:
                    same(file)
                    yield clip
        except MediaError:
            same(file)
            raise


def plan_times(timing: TimingConfig, duration: Fraction, pictures: int) -> Iterator[list[Fraction]]:
    """The moments of each clip of a video, in seconds from its first picture; clips do not overlap.

    `duration` and `pictures` are only used by the modes that spread samples over the whole video.
    """
    step = 1 / Fraction(timing.fps).limit_denominator(1001)
    if timing.mode == "frames":
        number = min(timing.frames_per_video, pictures)
        yield from ([duration * (2 * i + 1) / (2 * number)] for i in range(number))
        return
    moments = [k * step for k in range(timing.frames)]
    length = timing.frames * step
    if timing.clips == "first":
        yield moments
    elif timing.clips == "all":
        yield from ([n * length + moment for moment in moments] for n in count())
    else:
        number = max(1, min(timing.clips_per_video, int(duration / length)))
        latest = max(duration - length, Fraction(0))
        for i in range(number):
            start = latest * i / (number - 1) if number > 1 else latest / 2
            yield [start + moment for moment in moments]


class ClipFrame(NamedTuple):
    """A decoded picture and its place: frame `k` of clip `number`."""

    picture: Any
    k: int
    number: int
    moments: list[Fraction]  # of the clip
    track: Track
    notes: tuple[str, ...]  # what was done to the clock and the track until now


def _read_video(file: MediaFile, timing: TimingConfig, choose: ChooseCrop) -> Iterator[Clip]:
    screen = pixels = None
    with closing(read_ahead([file], lambda file: _decode(file, timing), workers=1)) as pictures:
        for _, due in pictures:
            screen = screen or PictureConverter(due.track, choose)
            shown = screen.convert(due.picture, due.number)
            if pixels is None:
                pixels = np.empty((len(due.moments), *shown.shape), dtype=np.uint8)
            pixels[due.k] = shown
            if due.k == len(due.moments) - 1:
                yield screen.clip(due.number, pixels, due.moments, due.notes)
                pixels = None


def _decode(file: MediaFile, timing: TimingConfig) -> Iterator[ClipFrame]:
    """The pictures of every clip, in order of time."""
    budget = file.budget
    budget.renew()
    spread = timing.mode == "frames" or timing.clips == "uniform"
    extent = scan(file) if spread or 1 / timing.fps > FAR else None
    if extent is not None and not extent.whole:
        extent = play_through(file)
    with open_container(file) as container:
        track, notes = choose_track(container)
        player = Player(container, track, budget, can_seek=extent is not None and extent.whole)
        header = Track(track.sample_aspect_ratio, picture_rate(track), _stated(container, track))
        duration, pictures = _whole(extent, player) if extent else (Fraction(0), 0)
        held, before = 0, None
        for number, moments in enumerate(plan_times(timing, duration, pictures)):
            if _is_held(player, moments, before):
                budget.spend()
                held += 1
                continue
            for k, moment in enumerate(moments):
                picture = player.at(moment)
                if picture is None and _may_hold(player, number, moments):
                    player.clock.notes[HELD] = None
                    picture = player.last.picture
                if picture is None:
                    _check_held(held, timing)
                    _check_enough(number, k, timing, moments, player)
                    return
                yield ClipFrame(picture, k, number, moments, header, (*notes, *player.clock.notes))
            before = player.last.picture if timing.mode == "video" else None
            budget.renew()
        _check_held(held, timing)


def play_through(file: MediaFile) -> Extent:
    """The extent of a track whose clock is broken: only the order of its pictures tells."""
    with open_container(file) as container:
        track, _ = choose_track(container)
        player = Player(container, track, file.budget)
        begin = player.clock.origin or Fraction(0)
        pictures = player.play_out()
        return Extent(begin, player.end, pictures, whole=False)


def _stated(container: Any, track: Any) -> float | None:
    """Seconds by the header, None where it says nothing that can be believed."""
    if track.duration:
        seconds = float(track.duration * track.time_base)
    else:
        seconds = container.duration / av.time_base if container.duration else 0.0
    # a step back of its clock looks like a turn of 2**33 ticks, which are 26 hours
    return None if not seconds or (container.format.name == "mpegts" and seconds > TURN_S / 2) else seconds


def _whole(extent: Extent, player: Player) -> tuple[Fraction, int]:
    """Seconds and pictures that will be shown: the first ones may need others that are not in the file."""
    late = max(Fraction(0), player.begin - extent.begin) if player.begin is not None else Fraction(0)
    return extent.seconds - late, extent.pictures


def _is_held(player: Player, moments: list[Fraction], before: Any) -> bool:
    """Whether a clip would show one picture all the time, or, of a single frame, the picture of the sample before."""
    if player.at(moments[0]) is None or player.now is None:
        return False
    if len(moments) == 1:
        return player.now.picture is before
    return moments[-1] + TICK < player.now.end


def _may_hold(player: Player, number: int, moments: list[Fraction]) -> bool:
    """Whether the last picture stays for the last frame: for less than one frame, of a video without another clip."""
    step = moments[1] - moments[0] if len(moments) > 1 else Fraction(0)
    return number == 0 and moments[-1] - player.end < min(step, player.clock.interval)


def _check_held(held: int, timing: TimingConfig) -> None:
    """Raise MediaError for clips that were left out because nothing moves in them."""
    if held:
        clips = "clip shows" if held == 1 else "clips show"
        what = "one picture all the time" if timing.frames > 1 else "the picture of the sample before"
        reason = f"{held} {clips} {what} ({timing.frames} frames at {timing.fps:g} fps)"
        raise MediaError("held picture", reason)


def _check_enough(number: int, frames: int, timing: TimingConfig, moments: list[Fraction], player: Player) -> None:
    """The video ended inside clip `number`: fine for the rest that `all` leaves, else a MediaError."""
    has, needs = float(player.end), float(moments[-1] - moments[0])
    if number == 0 and has <= needs:
        has_frames = f"has {frames} frame{'s' * (frames > 1)} at {timing.fps:g} fps"
        raise MediaError("too short", f"{has_frames}, {timing.frames} are asked for", frames=frames)
    spread = timing.mode == "frames" or timing.clips == "uniform"
    stated = float(player.track.duration * player.clock.base) if player.track.duration else has
    if JUMPS not in player.clock.notes and (spread or stated > 1.1 * has + 1):
        raise MediaError("broken", f"ends at {has:.3g} s" + ("" if spread else f", its header says {stated:.3g} s"))
