"""Damage media files in every way and read them: each must give clips or a reason, never an error of the program.

In: a seed and a number of mutants. Out: how many gave clips and how many each reason, and exit code 1 with a traceback
for the first mutant that did something else. The one decision: mutant k of a seed is always the same, and it is on the
disk while it is read, so that also one that kills the process or hangs can be looked at.

    python tools/fuzz.py --mutants 20000 --seed 1
"""

import argparse
import random
import re
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image

from wanloom.geometry import WAN_21
from wanloom.media.decoding import MediaError
from wanloom.media.framing import Crop, FramingConfig, choose_crop
from wanloom.media.limits import LimitsConfig
from wanloom.media.video import TimingConfig, read_clips
from wanloom.suffixes import kind_of

WIDTH, HEIGHT, PICTURES = 64, 48, 7
VIDEOS = {
    "mp4": "libx264",
    "mov": "prores_ks",
    "mkv": "ffv1",
    "avi": "mpeg4",
    "webm": "libvpx-vp9",
    "wmv": "wmv2",
    "ts": "mpeg2video",
    "gif": "gif",
}
PIX_FMTS = {"prores_ks": "yuv422p10le", "gif": "rgb8"}
IMAGES = ("png", "jpg", "webp", "avif", "tiff")
TIMINGS = (
    TimingConfig(frames=5),
    TimingConfig(frames=5, clips="uniform", clips_per_video=2),
    TimingConfig(frames=1, clips="all"),
    TimingConfig(mode="frames", frames_per_video=2),
)
LIMITS = LimitsConfig(
    max_pixels=4_000_000, max_pictures=10_000, max_seconds=30.0
)  # a header with any size at all must not take long
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def write_originals(folder: Path) -> dict[str, bytes]:
    """A small whole file of every kind, by its suffix."""
    rows, cols = np.mgrid[0:HEIGHT, 0:WIDTH]
    pictures = [np.stack([4 * rows, 3 * cols, 20 * k + rows], axis=-1).astype(np.uint8) for k in range(PICTURES)]
    for suffix, codec in VIDEOS.items():
        with av.open(str(folder / f"a.{suffix}"), "w") as container:
            stream = container.add_stream(codec, rate=16)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, PIX_FMTS.get(codec, "yuv420p")
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
            container.mux(stream.encode())
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in IMAGES:
        Image.fromarray(pictures[0]).save(folder / f"a.{suffix}", exif=exif)
    return {suffix: (folder / f"a.{suffix}").read_bytes() for suffix in (*VIDEOS, *IMAGES)}


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Bytes changed, numbers made extreme, parts cut, doubled or filled; often near the start, where headers are."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16, 64))):
        reach = draw.choice((64, 512, len(out)))
        place = draw.randrange(min(reach, len(out)) or 1)
        match draw.randrange(8):
            case 0:
                number = draw.choice(EXTREMES)
                order = draw.choice("<>")
                code = "B" if number < 0x100 else draw.choice("HI") if number < 0x10000 else "I"
                packed = struct.pack(order + code, number)
                out[place : place + len(packed)] = packed
            case 1:
                length = draw.choice((1, 4, 32, 256))
                part = out[place : place + length]
                out[place : place + length] = draw.choice((b"", bytes(len(part)), part + part, part[::-1]))
            case 2 if draw.random() < 0.2:
                del out[place:]
            case _:
                out[place : place + 1] = bytes([draw.randrange(256)])
    return bytes(out) or b"\0"


def mutants(originals: dict[str, bytes], seed: int, numbers: range) -> Iterator[tuple[int, str, bytes, TimingConfig]]:
    """Number, suffix, bytes and how to read them; all kinds in turn."""
    kinds = list(originals)
    for number in numbers:
        draw = random.Random(f"{seed}:{number}")
        suffix = kinds[number % len(kinds)]
        yield number, suffix, mutate(originals[suffix], draw), draw.choice(TIMINGS)


def read_mutant(path: Path, timing: TimingConfig) -> str:
    """What became of a file: "clips", or the reason why it gave no more."""
    framing = FramingConfig(height=32, width=48)

    def choose(width: float, height: float, number: int) -> Crop:
        return choose_crop(width, height, framing, WAN_21.grid, 0, str(number))

    try:
        for clip in read_clips(path, kind_of(path.name) or "", timing, choose, limits=LIMITS):
            assert clip.pixels.shape[1:] == (32, 48, 3)
    except MediaError as error:
        assert str(error) and error.kind
        return f"{error.kind}: {error}"
    return "clips"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant, to see one again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("fuzz"), help="holds the originals and the latest mutant")
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)
    originals = write_originals(arguments.folder)
    found: Counter[str] = Counter()
    slowest, numbers = (0.0, -1), range(arguments.first, arguments.first + arguments.mutants)
    for number, suffix, data, timing in mutants(originals, arguments.seed, numbers):
        path = arguments.folder / f"mutant.{suffix}"
        path.write_bytes(data)
        (arguments.folder / "mutant.txt").write_text(f"--seed {arguments.seed} --first {number}\n{timing}\n")
        started = time.monotonic()
        found[re.sub(r"[\d.]+", "N", read_mutant(path, timing))] += 1
        slowest = max(slowest, (time.monotonic() - started, number))
    for reason, count in found.most_common():
        print(f"{count:7d}  {reason}")
    print(f"{found.total()} mutants; the slowest was number {slowest[1]} with {slowest[0]:.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
