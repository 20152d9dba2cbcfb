"""C10, C11: a video file to the pictures of a sample, against OpenCV as NVIDIA's DFM uses it.

C10: 150 pictures of 1280x720 to one clip of 81 frames 480x832 at 16 a second. The peer decodes, resizes and cuts every
picture and makes float32 of it, from which 81 are chosen outside of the timed region; wanloom converts those 81 alone,
to the uint8 that its encoder takes. C11: 40 single frames of the file with the most key pictures; the peer seeks for
each, and the fewer there are, the longer it takes.
Both read files of x264 made here, at 1, 5 and 12 Mbit/s (clips.py); all 150 pictures are decoded by both. Timed is from
the file's name to the arrays, the file in the system's cache. Checked first: every picture is the one of the same
moment (no neighbour is nearer) and differs in the mean by under 4 of 255 levels; the filters differ, OpenCV's bilinear
does not antialias and wanloom's bicubic does. Other files by hand: `measure_clip(path, "what it is", (832, 480), 81)`.
"""

import tempfile
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from torch import Tensor

from benchmarks.clips import write_clip
from benchmarks.dfm_way import count_frames, load_frames, load_video, spread
from benchmarks.measure import THREADS, Row, main, take_turns
from wanloom.geometry import WAN_21
from wanloom.media.framing import Crop, FramingConfig, choose_crop
from wanloom.media.picture import Clip
from wanloom.media.video import TimingConfig, read_clips

CLIPS = (  # Mbit/s, options of x264, what it is like
    (1.0, {}, "1 Mbit/s"),
    (5.0, {"g": "60"}, "5 Mbit/s, a key picture every 2 s"),
    (12.0, {}, "12 Mbit/s"),
)
FPS = 16
CLOSE = 4.0  # levels of 255, in the mean


def measure(toy: bool) -> list[Row]:
    """Decode, resize and cut: whole clips (C10) and single frames (C11)."""
    stored, wanted, total, frames, stills = (
        ((256, 144), (128, 80), 22, 9, 5) if toy else ((1280, 720), (832, 480), 150, 81, 40)
    )
    rows = []
    cv2.setNumThreads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        for i, (megabits, options, what) in enumerate(CLIPS[: 1 if toy else None]):
            path = write_clip(Path(folder) / f"{i}.mp4", stored, total, megabits, options)
            what = f"{stored[0]}x{stored[1]}, {total} frames, {what}"
            rows.append(measure_clip(path, what, wanted, frames))
            if toy or options:  # seeking is cheapest with many key pictures, and takes the peer long enough
                rows.append(measure_stills(path, what, wanted, stills))
    return rows


def measure_clip(path: Path, what: str, size: tuple[int, int], frames: int) -> Row:
    """C10 of one file."""
    total, rate = count_frames(path), _rate(path)
    numbers = [int((Fraction(k, FPS) + Fraction(1, 1000)) * rate) for k in range(frames)]
    timing = TimingConfig(frames=frames)
    theirs = _levels(load_video(path, size, total))
    difference = _check(_read(path, size, timing)[0].pixels, theirs, numbers)
    del theirs
    taken = take_turns(
        {
            "peer": lambda: load_video(path, size, total),
            "wanloom": lambda: _read(path, size, timing),
            "decoding": lambda: _decode(path),
        }
    )
    decoding = min(taken["decoding"])
    return Row(
        "C10",
        f"decode, resize and cut {what} to {size[0]}x{size[1]}, {frames} frames",
        "s",
        taken["wanloom"],
        "OpenCV as in DFM",
        taken["peer"],
        target=4.0,
        limit=f"decoding alone, one thread: {min(taken['peer']) / decoding:.1f}x",
        checked=f"the same moments, {difference:.2f} of 255 levels apart in the mean (other resize filters)",
        note="one thread decodes a file and one converts; OpenCV decodes one file on all cores. prepare has all cores "
        "at work by reading several files at once, and what a damaged file gives must not vary. So decoding on one "
        "thread is the limit, and the bits of a clip decide",
        facts={"decoding alone, one thread, s": taken["decoding"], "bytes of the file": path.stat().st_size},
    )


def measure_stills(path: Path, what: str, size: tuple[int, int], stills: int) -> Row:
    """C11 of one file."""
    total = count_frames(path)
    timing = TimingConfig(mode="frames", frames_per_video=stills)
    sought = spread(total, stills)
    middles = [int(total * (2 * i + 1) / (2 * stills) + 0.001) for i in range(stills)]
    every = _levels(load_video(path, size, total))
    difference = _check(np.concatenate([clip.pixels for clip in _read(path, size, timing)]), every, middles)
    _check(np.stack(load_frames(path, size, sought)), every, sought)
    del every
    taken = take_turns({"peer": lambda: load_frames(path, size, sought), "wanloom": lambda: _read(path, size, timing)})
    return Row(
        "C11",
        f"{stills} even frames of {what} to {size[0]}x{size[1]}",
        "s",
        taken["wanloom"],
        "OpenCV seeking as in DFM",
        taken["peer"],
        target=8.0,
        limit="one pass over the file: the fewer its key pictures, the longer a seek",
        checked=f"each the picture of its moment, {difference:.2f} of 255 levels apart in the mean",
        note="the peer takes the first and the last picture and evenly between, wanloom the middles of equal parts",
    )


def _read(path: Path, size: tuple[int, int], timing: TimingConfig) -> list[Clip]:
    config = FramingConfig(width=size[0], height=size[1])

    def choose(width: float, height: float, number: int) -> Crop:
        return choose_crop(width, height, config, WAN_21.grid, 0, f"{number}")

    return list(read_clips(path, "video", timing, choose))


def _levels(video: Tensor) -> np.ndarray:
    """The peer's tensor as `(F, H, W, 3)` uint8."""
    return (video[0].permute(1, 2, 3, 0) * 255).round().byte().numpy()


def _check(ours: np.ndarray, every: np.ndarray, numbers: list[int]) -> float:
    """The mean difference, after asserting that no neighbour of the expected picture is nearer."""
    assert len(ours) == len(numbers)
    apart = []
    for picture, number in zip(ours, numbers, strict=True):
        near = range(max(0, number - 1), min(len(every), number + 2))
        far = {n: float(np.abs(picture.astype(np.int16) - every[n]).mean()) for n in near}
        assert min(far, key=far.__getitem__) == number, (number, far)
        apart.append(far[number])
    assert np.mean(apart) < CLOSE, np.mean(apart)
    return float(np.mean(apart))


def _rate(path: Path) -> Fraction:
    with av.open(str(path)) as container:
        return Fraction(container.streams.video[0].average_rate or 0)


def _decode(path: Path) -> None:
    """What no one can do without."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for _ in container.decode(stream):
            pass


if __name__ == "__main__":
    main(__spec__, measure)
