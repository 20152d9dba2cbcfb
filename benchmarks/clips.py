"""Video files to measure with, made when they are needed: a scene under a moving camera, with the grain of a sensor.

In: sizes and a bit rate. Out: mp4 files of x264, the same every time. The one decision: the bit rate is forced upon a
picture that always has more to give (grain), as it is in recordings; a smooth synthetic clip would decode far quicker.
"""

from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

FPS = Fraction(148, 5)  # 150 pictures at this rate are just enough for 81 at 16 a second: every picture is decoded


def write_clip(
    path: Path,
    size: tuple[int, int],
    frames: int,
    megabits: float,
    options: dict[str, str] | None = None,
    seed: int = 0,
    fps: Fraction = FPS,
) -> Path:
    """A clip of (width, height) `size` at `megabits` per second; `options` are those of x264."""
    width, height = size
    rng = np.random.default_rng(seed)
    scene = _scene(rng, width, height, frames)
    grain = rng.normal(0, 4, (8, height, width, 3)).astype(np.int16)
    side = height // 3
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "fast", **(options or {})})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", int(megabits * 1e6)
        for i in range(frames):
            left, top = 2 * i, round(height / 8 * (1 + np.sin(i / 20)))
            picture = scene[top : top + height, left : left + width].astype(np.int16) + grain[rng.integers(8)]
            picture = np.clip(picture, 0, 255).astype(np.uint8)
            at = i * 7 % (width - side)
            picture[side : 2 * side, at : at + side] = 255 - picture[side : 2 * side, at : at + side]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def _scene(rng: np.random.Generator, width: int, height: int, frames: int) -> np.ndarray:
    """Colour noise of several scales, large enough for the camera's way: `(H, W, 3)` uint8."""
    height, width = height + height // 4 + 1, width + 2 * frames
    scene = np.full((height, width, 3), 120, dtype=np.float32)
    for cell, strength in ((2, 15), (4, 40), (16, 40), (64, 50)):
        coarse = rng.uniform(-strength, strength, (height // cell + 1, width // cell + 1, 3)).astype(np.float32)
        scene += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(scene, 0, 255).astype(np.uint8)
