"""Real media files for the tests: every picture carries its number, so that a test can tell which ones were taken."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

Edit = Callable[[int, Any], bool]
LEVELS = 8  # gray steps between two numbers: lossy codecs change a few


def numbered(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """A gray picture `(H, W, 3)` that says `number` (0 to 30)."""
    return np.full((height, width, 3), LEVELS * number, dtype=np.uint8)


def read_number(picture: np.ndarray) -> int:
    """The number in a decoded picture."""
    return round(float(picture.mean()) / LEVELS)


def write_video(
    path: Path,
    pictures: Sequence[np.ndarray],
    fps: Fraction | int = 16,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    times: Sequence[Fraction | float] | None = None,
    rotation: int | None = None,
    hflip: bool = False,
    pixel_shape: Fraction | None = None,
    source_format: str = "rgb24",
    options: dict[str, str] | None = None,
    **codec_fields: Any,
) -> Path:
    """Encode RGB (or `source_format`) pictures; `times` in seconds make the rate variable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = pictures[0].shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        if pixel_shape is not None:
            stream.codec_context.sample_aspect_ratio = pixel_shape
        if rotation is not None:
            stream.set_display_rotation(rotation, hflip=hflip)
        for name, value in codec_fields.items():
            setattr(stream.codec_context, name, value)
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 12800)
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format=source_format)
            if times is not None:
                frame.pts, frame.time_base = round(Fraction(times[i]) * 12800), Fraction(1, 12800)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_numbers(path: Path, count: int, fps: Fraction | int = 16, **keywords: Any) -> Path:
    """A video of `count` numbered pictures."""
    return write_video(path, [numbered(i % 31) for i in range(count)], fps, **keywords)


def remux(source: Path, target: Path, edit: Edit = lambda i, packet: True, **options: str) -> Path:
    """The packets of a video in another container, in their order; `edit` may change them, False leaves one out."""
    with av.open(str(source)) as given, av.open(str(target), "w", options=options) as made:
        stream = given.streams.video[0]
        copy = made.add_stream_from_template(stream)
        packets = [packet for packet in given.demux(stream) if packet.size]
        for i, packet in enumerate(packets):
            if edit(i, packet):
                packet.stream = copy
                made.mux(packet)
    return target


def shift(seconds: Fraction | float) -> Edit:
    """An edit that moves the clock."""

    def edit(i: int, packet: Any) -> bool:
        ticks = round(Fraction(seconds) / packet.time_base)
        packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
        return True

    return edit


B_FRAMES = {"bf": "2", "b_strategy": "0", "g": "12", "sc_threshold": "0"}


def write_stream(path: Path, *parts: tuple[int, int, float]) -> Path:
    """A transport stream of numbered pictures, joined of parts (first number, count, begin of its clock)."""
    data = b""
    for first, count, begin in parts:
        whole = write_video(
            path.with_suffix(".part.mp4"), [numbered(first + i) for i in range(count)], options=B_FRAMES
        )
        data += remux(whole, path, shift(begin), mpegts_copyts="1").read_bytes()
    path.write_bytes(data)
    return path
