"""What one file may take: refused by its header before memory is taken, or ended while it is decoded."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import pytest
from media_files import read_number, write_numbers
from PIL import Image
from test_video import native

from wanloom.config import build_config
from wanloom.errors import UserError
from wanloom.geometry import WAN_21
from wanloom.media import limits as limits_module
from wanloom.media.decoding import MediaError
from wanloom.media.framing import Crop, FramingConfig, choose_crop
from wanloom.media.limits import Budget, LimitsConfig
from wanloom.media.picture import Clip
from wanloom.media.video import TimingConfig, read_clips
from wanloom.suffixes import kind_of

MIB = 1 << 20


def read(path: Path, limits: LimitsConfig, choose=native, **timing) -> list[Clip]:
    return list(read_clips(path, kind_of(path.name) or "", TimingConfig(**timing), choose, limits=limits))


@contextmanager
def peak_below(most: int) -> Iterator[None]:
    """The memory of this process grows by less than `most` bytes (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = memory("VmHWM")
    yield
    assert memory("VmHWM") - before < most, f"{(memory('VmHWM') - before) / MIB:.0f} MiB"


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10


def test_the_peak_is_measured() -> None:
    with pytest.raises(AssertionError, match="MiB"), peak_below(64 * MIB):
        bytes(range(256)) * (1 << 19)


def tiny_gif(path: Path, width: int, height: int) -> Path:
    Image.new("P", (8, 8)).save(path, "GIF")
    data = bytearray(path.read_bytes())
    data[6:10] = struct.pack("<HH", width, height)
    path.write_bytes(data)
    return path


def tiny_png(path: Path, width: int, height: int) -> Path:
    """Black, of a thousandth of its size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(1)
    lines = b"".join(packer.compress(bytes(1 + width)) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", lines) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("timing", [{"frames": 1}, {"mode": "frames"}])
def test_a_tiny_gif_with_a_huge_canvas(tmp_path: Path, timing: dict) -> None:
    path = tiny_gif(tmp_path / "a.gif", 16000, 16000)
    assert path.stat().st_size < 100
    with (
        peak_below(40 * MIB),
        pytest.raises(MediaError, match=r"or of more than `max_pixels=100000000`") as e,
    ):
        read(path, LimitsConfig(), **timing)
    assert e.value.kind == "too large"


@pytest.mark.filterwarnings("ignore:Image size")  # as when prepare runs
@pytest.mark.parametrize(("side", "reason"), [(6000, "pixels"), (12000, "more pixels than `max_pixels=20000000`")])
def test_a_png_beyond_the_limit_is_not_decoded(tmp_path: Path, side: int, reason: str) -> None:
    path = tiny_png(tmp_path / "a.png", side, side)
    with peak_below(20 * MIB), pytest.raises(MediaError, match=reason) as caught:
        read(path, LimitsConfig(max_pixels=20_000_000))
    assert caught.value.kind == "too large"


def test_a_sliver_at_a_given_size(tmp_path: Path) -> None:
    """1x1000 would be resized to 832x832000."""
    Image.new("RGB", (1, 1000)).save(tmp_path / "a.png")
    config = FramingConfig(height=480, width=832)

    def choose(width: float, height: float, number: int) -> Crop:
        return choose_crop(width, height, config, WAN_21.grid, 0, "k")

    with peak_below(20 * MIB), pytest.raises(MediaError, match="is beyond `max_aspect=20`") as caught:
        read(tmp_path / "a.png", LimitsConfig(), choose)
    assert caught.value.kind == "too narrow"


def test_what_a_picture_takes_is_as_the_help_says(tmp_path: Path) -> None:
    """RGBA of 4 million pixels, laid on black in bands."""
    Image.new("RGBA", (2000, 2000), (200, 100, 50, 128)).save(tmp_path / "a.png", compress_level=1)

    def choose(width: float, height: float, number: int) -> Crop:
        return Crop((64, 48), (0, 0), (64, 48))

    with peak_below(12 * 4_000_000 + 30 * MIB):
        (clip,) = read(tmp_path / "a.png", LimitsConfig(), choose)
    assert clip.pixels[0, 0, 0].tolist() == [100, 50, 25]


def test_a_video_beyond_the_limit(tmp_path: Path) -> None:
    path = write_numbers(tmp_path / "a.mp4", 5)
    assert len(read(path, LimitsConfig(max_pixels=64 * 48), frames=5)) == 1
    with pytest.raises(MediaError, match="has pictures of 64x48 pixels, more than `max_pixels=3071`"):
        read(path, LimitsConfig(max_pixels=64 * 48 - 1), frames=5)


def test_pictures_that_grow_beyond_what_the_header_says(tmp_path: Path) -> None:
    small = write_numbers(tmp_path / "small.h264", 6, codec="libx264").read_bytes()
    path = tmp_path / "a.h264"
    large = tmp_path / "large.h264"
    from media_files import numbered, write_video

    write_video(large, [numbered(3, 640, 480)] * 6)
    path.write_bytes(small + large.read_bytes())
    with pytest.raises(MediaError) as caught:
        read(path, LimitsConfig(max_pixels=64 * 48), frames=9)
    assert "changes its size" not in str(caught.value)  # it was not decoded


@pytest.mark.parametrize("timing", [{"frames": 33}, {"frames": 33, "clips": "all"}, {"mode": "frames"}])
def test_pictures_are_counted_for_one_sample(tmp_path: Path, timing: dict) -> None:
    path = write_numbers(tmp_path / "a.mp4", 80)
    assert len(read(path, LimitsConfig(max_pictures=170), **timing)) >= 1
    with pytest.raises(MediaError, match="needs more than `max_pictures=20` for one sample") as caught:
        read(path, LimitsConfig(max_pictures=20), **timing)
    assert caught.value.kind == "too large"


def test_looking_through_counts_too(tmp_path: Path) -> None:
    """80 packets and the first 40 pictures."""
    with pytest.raises(MediaError, match="`max_pictures=110`"):
        read(write_numbers(tmp_path / "a.mp4", 80), LimitsConfig(max_pictures=110), mode="frames")


def test_a_long_video_of_many_samples_passes(tmp_path: Path) -> None:
    path = write_numbers(tmp_path / "a.mp4", 100)
    assert len(read(path, LimitsConfig(max_pictures=8), frames=5, clips="all")) == 20


def test_seconds_are_those_of_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [5.0]
    monkeypatch.setattr(limits_module.time, "thread_time", lambda: clock[0])
    budget = Budget(LimitsConfig(max_seconds=2))
    clock[0] = 7.0
    budget.spend()
    budget.renew()
    clock[0] = 9.0
    budget.spend()
    clock[0] = 9.1
    with pytest.raises(MediaError, match="needs more than `max_seconds=2` of decoding for one sample"):
        budget.spend()


def test_decoding_that_takes_too_long_ends(tmp_path: Path) -> None:
    path = write_numbers(tmp_path / "a.mp4", 60)
    with pytest.raises(MediaError, match="`max_seconds=1e-09`"):
        read(path, LimitsConfig(max_seconds=1e-9), frames=33)


def test_a_picture_that_stays_for_a_million_seconds_ends(tmp_path: Path) -> None:
    """All clips of it would show one picture: they are looked at one by one."""
    path = write_numbers(tmp_path / "a.mkv", 3, times=[0, Fraction(1, 16), 1_000_000])
    with pytest.raises(MediaError):
        read(path, LimitsConfig(max_pictures=1000), frames=5, clips="all")


def test_a_picture_that_stays_is_one_sample_of_one_frame(tmp_path: Path) -> None:
    """A damaged rate lets it stay for days; without end it would be the same sample again and again."""
    path = write_numbers(tmp_path / "a.mkv", 3, times=[0, Fraction(1, 16), Fraction(3, 4)])
    clips = []
    with pytest.raises(MediaError, match="10 clips show the picture of the sample before") as caught:
        for clip in read_clips(path, "video", TimingConfig(frames=1, clips="all"), native):
            clips.append(clip)
    assert [read_number(clip.pixels[0]) for clip in clips] == [0, 1, 2] and caught.value.kind == "held picture"
    slow = write_numbers(tmp_path / "b.avi", 2, fps=Fraction(1, 500_000), codec="mpeg4")
    with pytest.raises(MediaError, match="`max_pictures=1000`"):
        read(slow, LimitsConfig(max_pictures=1000), frames=1, clips="all")


@pytest.mark.parametrize("values", [{"max_pixels": 0}, {"max_pictures": 0}, {"max_seconds": 0.0}])
def test_limits_that_cannot_be(values: dict) -> None:
    with pytest.raises(UserError, match="lets no file pass"):
        build_config(LimitsConfig, values)
