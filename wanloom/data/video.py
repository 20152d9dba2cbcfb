"""Video files to clips at one rate.

In: a file. Out: clips `(F, H, W, 3)` uint8 RGB. The one decision: time is sampled by timestamps. A clip's frame k is
the picture that a player shows at start + k / fps, so variable frame rates, other rates and odd containers keep the
speed of the action. The file is decoded once, and a picture is converted only when it is used, while the next ones are
decoded on another thread.
"""

from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import av
import numpy as np
from pydantic import model_validator

from wanloom.config import Config
from wanloom.data.decoding import Decoding, MediaError
from wanloom.data.picture import ChooseFrame, Clip, Screen, read_image
from wanloom.data.player import Player, frame_interval
from wanloom.data.readers import read_ahead

VIDEO_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("mp4", "m4v", "mov", "mkv", "webm", "avi", "wmv", "asf", "flv", "f4v", "mpg", "mpeg", "m2v", "mpe", "ts"),
        *("mts", "m2ts", "vob", "ogv", "ogg", "3gp", "3g2", "mxf", "gif", "y4m", "h264", "264", "h265", "265", "hevc"),
        *("ivf", "obu", "av1", "nut", "dv", "divx", "rm", "rmvb", "mjpeg", "mjpg"),
    )
)
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".tga"))


class TimingConfig(Config):
    """Which moments of a file become samples."""

    mode: Literal["video", "image", "frames"] = "video"
    frames: int = 81
    fps: float = 16.0
    clips: Literal["first", "uniform", "all"] = "first"
    clips_per_video: int = 4
    frames_per_video: int = 1

    @model_validator(mode="after")
    def _check(self) -> "TimingConfig":
        if self.frames < 1 or self.frames % 4 != 1:
            low = max(1, (self.frames - 1) // 4 * 4 + 1)
            raise ValueError(
                f"--frames {self.frames} is not 4n+1, which the VAE needs: the nearest are {low} and {low + 4}"
            )
        if not 0 < self.fps <= 1000:
            raise ValueError(f"--fps {self.fps:g} is not a frame rate")
        if self.clips_per_video < 1 or self.frames_per_video < 1:
            raise ValueError("--clips-per-video and --frames-per-video are at least 1")
        self._check_use()
        return self

    def _check_use(self) -> None:
        """Raise ValueError for a setting that was given and would change nothing."""
        for name in ("frames", "fps", "clips"):
            if self.mode != "video" and name in self.model_fields_set:
                raise ValueError(f"--{name} has no effect with --mode {self.mode}: leave it out")
        if "clips_per_video" in self.model_fields_set and (self.mode, self.clips) != ("video", "uniform"):
            raise ValueError("--clips-per-video only counts with --clips uniform: leave it out or give that too")
        if "frames_per_video" in self.model_fields_set and self.mode != "frames":
            raise ValueError("--frames-per-video only counts with --mode frames: leave it out or give that too")


def kind_of(name: str) -> str | None:
    """ "video", "image" or None for a file that is no media, by its suffix."""
    suffix = Path(name).suffix.lower()
    return "video" if suffix in VIDEO_SUFFIXES else "image" if suffix in IMAGE_SUFFIXES else None


def read_clips(path: Path, kind: str, timing: TimingConfig, choose: ChooseFrame) -> Iterator[Clip]:
    """The samples of one file, in order of time. Raises MediaError where it can give no more."""
    with Decoding(path):
        if kind == "image":
            yield read_image(path, choose)
        else:
            yield from _read_video(path, timing, choose)


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


def scan_packets(path: Path) -> tuple[Fraction, int]:
    """Duration in seconds and number of pictures, from the packets alone: exact, and nothing is decoded."""
    first, last, number = None, Fraction(0), 0
    with _open(path) as container:
        stream = _video_stream(container)
        for packet in container.demux(stream):
            stamp = packet.pts if packet.pts is not None else packet.dts
            if packet.size == 0:
                continue
            number += 1
            begin = last if stamp is None else stamp * Fraction(stream.time_base)  # raw streams have no clock
            length = packet.duration * Fraction(stream.time_base) if packet.duration else frame_interval(stream)
            first = begin if first is None else min(first, begin)
            last = max(last, begin + length)
    if first is None:
        raise MediaError("broken", "has no pictures")
    return last - first, number


class Due(NamedTuple):
    """A decoded picture and its place: frame `k` of clip `number`."""

    picture: Any
    k: int
    number: int
    moments: list[Fraction]  # of the clip
    pixel_shape: Fraction | None
    rate: Fraction | None  # of the stream


def _read_video(path: Path, timing: TimingConfig, choose: ChooseFrame) -> Iterator[Clip]:
    screen = pixels = None
    with closing(read_ahead([path], lambda path: _decode(path, timing), workers=1)) as pictures:
        for _, due in pictures:
            screen = screen or Screen(due.pixel_shape, due.rate, choose)
            shown = screen.convert(due.picture, due.number)
            if pixels is None:
                pixels = np.empty((len(due.moments), *shown.shape), dtype=np.uint8)
            pixels[due.k] = shown
            if due.k == len(due.moments) - 1:
                yield screen.clip(due.number, pixels, due.moments)
                pixels = None


def _decode(path: Path, timing: TimingConfig) -> Iterator[Due]:
    """The pictures of every clip, in order of time."""
    spread = timing.mode == "frames" or timing.clips == "uniform"
    duration, pictures = scan_packets(path) if spread else (Fraction(0), 0)
    with _open(path) as container:
        stream = _video_stream(container)
        stream.codec_context.thread_count = 1  # files are decoded side by side; what a damaged one gives must not vary
        player = Player(container, stream)
        shape, rate = stream.sample_aspect_ratio, stream.average_rate or stream.guessed_rate
        for number, moments in enumerate(plan_times(timing, duration, pictures)):
            for k, moment in enumerate(moments):
                picture = player.at(moment)
                if picture is None:
                    _check_enough(number, timing, moments, player)
                    return
                yield Due(picture, k, number, moments, shape, rate)


def _check_enough(number: int, timing: TimingConfig, moments: list[Fraction], player: Player) -> None:
    """The video ended inside clip `number`: fine for the rest that `all` leaves, else a MediaError."""
    has, needs = float(player.end), float(moments[-1] - moments[0])
    if has <= needs:
        reason = f"has {has:.3g} s, needs {needs:.3g} s ({timing.frames} frames at {timing.fps:g})"
        raise MediaError("too short", reason)
    spread = timing.mode == "frames" or timing.clips == "uniform"
    stated = float(player.stream.duration * player.base) if player.stream.duration else has
    if spread or stated > 1.1 * has + 1:
        raise MediaError("broken", f"ends at {has:.3g} s" + ("" if spread else f", its header says {stated:.3g} s"))


def _open(path: Path) -> Any:
    return av.open(str(path), metadata_errors="replace")  # tags in odd encodings are none of our business


def _video_stream(container: Any) -> Any:
    if not container.streams.video:
        raise MediaError("broken", "has no video in it")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise MediaError("broken", "has pictures in a format that no decoder is for")
    return stream
