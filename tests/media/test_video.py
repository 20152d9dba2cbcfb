"""Decoding real files: which picture is taken when, how it is turned, sized and coloured, and what broken files do."""

import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from media_files import numbered, read_number, write_numbers, write_video
from PIL import Image

from wanloom.config import build_config
from wanloom.errors import UserError
from wanloom.geometry import WAN_21
from wanloom.media import player as player_module
from wanloom.media.decoding import MediaError
from wanloom.media.framing import Crop, FramingConfig, choose_crop
from wanloom.media.picture import SWS_FLAGS, Clip, PictureConverter, Track
from wanloom.media.video import TimingConfig, read_clips
from wanloom.suffixes import kind_of

CORNERS = np.zeros((48, 80, 3), dtype=np.uint8)
CORNERS[:24, :40], CORNERS[:24, 40:], CORNERS[24:, :40] = (230, 20, 20), (20, 230, 20), (20, 20, 230)


def native(width: float, height: float, number: int) -> Crop:
    """Keep the displayed size."""
    size = (round(width), round(height))
    return Crop(size, (0, 0), size)


def read(path: Path, choose=native, **timing) -> list[Clip]:
    return list(read_clips(path, kind_of(path.name) or "", TimingConfig(**timing), choose))


def numbers(clip: Clip) -> list[int]:
    return [read_number(picture) for picture in clip.pixels]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "mov", "webm"])
def test_the_same_rate_takes_every_picture_once(tmp_path: Path, suffix: str) -> None:
    codec = {"webm": "libvpx-vp9", "avi": "mpeg4"}.get(suffix, "libx264")
    path = write_numbers(tmp_path / f"a.{suffix}", 21, codec=codec, fps=Fraction(16))
    (clip,) = read(path, frames=17)
    assert numbers(clip) == list(range(17))
    assert (clip.start, clip.stop, clip.source_fps, clip.source_size) == (0, 1, 16, (64, 48))
    assert clip.notes == []


@pytest.mark.parametrize("rate", [Fraction(30), Fraction(30000, 1001), Fraction(25), Fraction(8), Fraction(12)])
def test_other_rates_keep_the_speed_of_the_action(tmp_path: Path, rate: Fraction) -> None:
    path = write_numbers(tmp_path / "a.mp4", 31, fps=rate)
    (clip,) = read(path, frames=13)
    assert numbers(clip) == [int((Fraction(k, 16) + Fraction(1, 1000)) * rate) for k in range(13)]


def test_variable_rate_goes_by_the_clock(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    times = [0.0, *np.cumsum(rng.uniform(0.02, 0.3, size=24)).tolist()]
    path = write_numbers(tmp_path / "a.mkv", 25, times=times)
    (clip,) = read(path, frames=33)
    expected = [int(np.searchsorted(times, k / 16 + 0.0011, side="right")) - 1 for k in range(33)]
    assert numbers(clip) == expected
    assert len(set(expected)) < 25 and max(np.diff(expected)) > 1  # some held, some left out


def test_a_clock_that_does_not_start_at_zero(tmp_path: Path) -> None:
    path = write_numbers(tmp_path / "a.mkv", 20, times=[5 + i / 16 for i in range(20)])
    assert numbers(read(path, frames=17)[0]) == list(range(17))


def test_first_all_and_uniform(tmp_path: Path) -> None:
    path = write_numbers(tmp_path / "a.mp4", 29)
    assert [numbers(c) for c in read(path, frames=5)] == [[0, 1, 2, 3, 4]]
    clips = read(path, frames=5, clips="all")
    assert [n for c in clips for n in numbers(c)] == list(range(25))  # the last four are too few
    assert [c.number for c in clips] == [0, 1, 2, 3, 4]
    spread = read(path, frames=5, clips="uniform", clips_per_video=3)
    assert [numbers(c)[0] for c in spread] == [0, 12, 24]
    assert [numbers(c)[-1] for c in spread] == [4, 16, 28]
    assert [c.start for c in spread] == [0, 0.75, 1.5]
    (middle,) = read(path, frames=13, clips="uniform", clips_per_video=1)
    assert numbers(middle) == list(range(8, 21))
    assert len(read(path, frames=5, clips="uniform", clips_per_video=100)) == 5  # never overlapping


def test_single_frames_are_from_the_middles_of_equal_parts(tmp_path: Path) -> None:
    path = write_numbers(tmp_path / "a.mp4", 30)
    clips = read(path, mode="frames", frames_per_video=3)
    assert [numbers(c) for c in clips] == [[5], [15], [25]]
    assert [c.pixels.shape for c in clips] == [(1, 48, 64, 3)] * 3
    assert len(read(write_numbers(tmp_path / "b.mp4", 2), mode="frames", frames_per_video=5)) == 2


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
def test_jumps_land_where_decoding_all_would(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute with key pictures far apart; jumping must not change a single value."""
    pictures = [np.roll(CORNERS, (i % 48, i % 80), axis=(0, 1)) for i in range(60 * 8)]
    codec = "mpeg4" if suffix == "avi" else "libx264"
    path = write_video(tmp_path / f"a.{suffix}", pictures, fps=8, codec=codec, options={"g": "60"})
    timings = ({"frames": 5, "clips": "uniform"}, {"mode": "frames", "frames_per_video": 3})
    jumped = [read(path, **timing) for timing in timings]
    with monkeypatch.context() as patch:
        patch.setattr(player_module, "FAR", 10_000)
        decoded = [read(path, **timing) for timing in timings]
    for one, other in zip(jumped, decoded, strict=True):
        assert [c.start for c in one] == [c.start for c in other]
        assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(one, other, strict=True))
    assert len(jumped[0]) == 4 and jumped[0][1].start > 15


def test_too_short_says_what_it_has_and_needs(tmp_path: Path) -> None:
    path = write_numbers(tmp_path / "a.mp4", 20)
    for clips in ("first", "all", "uniform"):
        with pytest.raises(MediaError, match="has 20 frames at 16 fps, 33 are asked for") as caught:
            read(path, frames=33, clips=clips)
        assert (caught.value.kind, caught.value.frames) == ("too short", 20)
    assert len(read(path, frames=17)) == 1


@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_rotation_and_mirroring(tmp_path: Path, rotation: int, hflip: bool) -> None:
    path = write_video(tmp_path / "a.mp4", [CORNERS] * 3, rotation=rotation, hflip=hflip, pix_fmt="yuv444p")
    (clip,) = read(path, frames=1)
    expected = np.rot90(CORNERS, k=rotation // 90)  # counter-clockwise, then mirrored
    expected = expected[:, ::-1] if hflip else expected
    assert clip.pixels[0].shape == expected.shape
    assert np.abs(clip.pixels[0].astype(int) - expected).mean() < 4
    assert clip.display_size == expected.shape[1::-1]
    assert clip.source_size == (80, 48)
    assert clip.notes == (["rotated"] if rotation or hflip else [])


def test_rotation_with_resize_and_crop(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [CORNERS] * 3, rotation=90, pix_fmt="yuv444p")
    config = FramingConfig(height=32, width=32)
    (clip,) = read(path, lambda w, h, n: choose_crop(w, h, config, WAN_21.grid, 0, "k"), frames=1)
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(CORNERS))).resize((32, 53), Image.Resampling.BICUBIC)
    expected = np.asarray(turned)[10:42]
    assert clip.pixels[0].shape == (32, 32, 3)
    assert np.abs(clip.pixels[0].astype(int) - expected).mean() < 5


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", [CORNERS] * 3, pixel_shape=Fraction(4, 3))
    (clip,) = read(path, frames=1)
    assert clip.pixels.shape == (1, 48, 107, 3)
    assert clip.notes == ["pixels of shape 4:3 made square"]


def test_odd_sizes(tmp_path: Path) -> None:
    picture = np.ascontiguousarray(CORNERS[:47, :63])
    path = write_video(tmp_path / "a.mkv", [picture] * 3, codec="ffv1", pix_fmt="yuv420p")
    (clip,) = read(path, frames=1)
    assert clip.pixels.shape == (1, 47, 63, 3)
    assert np.abs(clip.pixels[0].astype(int) - picture).mean() < 4


def gradient(height: int = 48, width: int = 64) -> np.ndarray:
    rows, cols = np.mgrid[0:height, 0:width]
    return np.stack([30 + 2 * rows, 200 - cols, 60 + rows + cols], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(("pix_fmt", "bits"), [("yuv420p", 8), ("yuv444p10le", 10), ("yuv420p10le", 10)])
def test_colours_match_the_formula_at_any_depth(tmp_path: Path, pix_fmt: str, bits: int) -> None:
    """Against BT.601 limited range written out; the mean error shows a bias that rounding down would make."""
    picture = gradient()
    r, g, b = (picture[..., i] / 255 for i in range(3))
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    planes = [16 + 219 * luma, 128 + 224 * (b - luma) / 1.772, 128 + 224 * (r - luma) / 1.402]
    if "420" in pix_fmt:
        planes[1:] = [p.reshape(24, 2, 32, 2).mean((1, 3)) for p in planes[1:]]
    frame = av.VideoFrame(64, 48, pix_fmt)
    for plane, values in zip(frame.planes, planes, strict=True):
        kind = np.uint8 if bits == 8 else np.uint16
        lines = np.zeros((plane.height, plane.line_size // np.dtype(kind).itemsize), dtype=kind)
        lines[:, : values.shape[1]] = np.round(values * 2 ** (bits - 8))
        plane.update(lines)
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (clip,) = read(path, frames=1)
    error = clip.pixels[0].astype(int) - picture
    assert np.abs(error).mean() < 0.9
    assert np.abs(error.mean((0, 1))).max() < 0.35
    assert clip.notes == (["10 bits to 8"] if bits == 10 else [])


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuvj420p", "yuv422p10le", "yuv444p12le", "nv12", "gray", "yuyv422"])
def test_planes_give_the_bytes_of_a_direct_conversion(pix_fmt: str) -> None:
    rng = np.random.default_rng(3)
    for colorspace, color_range, size in ((1, 1, (86, 64)), (5, 2, (129, 65)), (9, 1, (200, 150))):
        picture = av.VideoFrame(130, 98, pix_fmt)
        for plane in picture.planes:
            plane.update(rng.bytes(plane.buffer_size))
        picture.colorspace, picture.color_range, picture.color_primaries = colorspace, color_range, 1
        expected = picture.reformat(*size, format="rgb24", interpolation=SWS_FLAGS).to_ndarray()
        if pix_fmt == "gray" and color_range == 1:  # which the library takes as full
            expected = np.clip(np.round((expected.astype(float) - 16) * 255 / 219), 0, 255)
        screen = PictureConverter(
            Track(None, None, None), lambda width, height, number, size=size: Crop(size, (0, 0), size)
        )
        assert np.array_equal(screen.convert(picture, 0), expected)


def test_a_reader_that_stops_early_ends_its_thread(tmp_path: Path) -> None:
    path = write_numbers(tmp_path / "a.mp4", 200)
    before = threading.active_count()
    clips = read_clips(path, "video", TimingConfig(frames=5, clips="all"), native)
    assert numbers(next(clips)) == list(range(5))
    assert threading.active_count() == before + 1  # it decodes ahead
    clips.close()
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_resizing_is_antialiased(tmp_path: Path) -> None:
    """Stripes one pixel wide become gray; a filter without antialiasing leaves stripes."""
    stripes = np.zeros((96, 128, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    for codec, pix_fmt in (("ffv1", "yuv444p"), ("ffv1", "bgr0")):
        path = write_video(tmp_path / "a.mkv", [stripes] * 2, codec=codec, pix_fmt=pix_fmt)
        (clip,) = read(path, lambda w, h, n: Crop((48, 36), (0, 0), (48, 36)), frames=1)
        assert np.abs(clip.pixels[0, :, 2:-2].astype(int) - 127.5).max() < 24


@pytest.mark.parametrize(("suffix", "codec", "pix_fmt"), [("mov", "qtrle", "argb"), ("mkv", "ffv1", "yuva444p")])
def test_alpha_is_laid_on_black(tmp_path: Path, suffix: str, codec: str, pix_fmt: str) -> None:
    rgba = np.full((48, 64, 4), 200, dtype=np.uint8)
    rgba[:, :32, 3], rgba[:, 32:, 3] = 255, 0
    rgba[24:, :, 3] = 128
    path = write_video(tmp_path / f"a.{suffix}", [rgba] * 3, codec=codec, pix_fmt=pix_fmt, source_format="rgba")
    (clip,) = read(path, frames=1)
    got = clip.pixels[0].astype(int)
    assert abs(got[:20, :28].mean() - 200) < 3
    assert got[:20, 36:].max() <= 2
    assert abs(got[28:].mean() - 100) < 3
    assert clip.notes == ["alpha on black"]


def test_crops_may_differ_between_clips_of_one_file(tmp_path: Path) -> None:
    path = write_numbers(tmp_path / "a.mp4", 20)
    clips = read(path, lambda w, h, n: Crop((64, 48), (16 * n, 0), (16, 16)), frames=5, clips="all")
    assert [c.crop.corner for c in clips] == [(0, 0), (16, 0), (32, 0), (48, 0)]


def broken_files(root: Path) -> dict[str, tuple[Path, str]]:
    whole = write_numbers(root / "whole.mp4", 30, options={"g": "5"}).read_bytes()
    (root / "text.mp4").write_text("this is no video\n" * 50)
    (root / "noise.mkv").write_bytes(np.random.default_rng(0).bytes(5000))
    (root / "headless.mp4").write_bytes(whole[: len(whole) // 2])
    (root / "empty.mp4").write_bytes(b"")
    with av.open(str(root / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), dtype=np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    large = write_numbers(root / "large.h264", 6).read_bytes()
    small = write_video(root / "small.h264", [numbered(3, 32, 32)] * 6).read_bytes()
    (root / "changes.h264").write_bytes(large + small)
    return {
        name: (root / name, reason)
        for name, reason in (
            ("text.mp4", "cannot be decoded"),
            ("noise.mkv", "cannot be decoded"),
            ("headless.mp4", "cannot be decoded"),
            ("empty.mp4", "cannot be decoded"),
            ("sound.mp4", "has no video"),
            ("changes.h264", "changes its size to 32x32"),
        )
    }


def test_broken_files_are_media_errors(tmp_path: Path) -> None:
    for name, (path, reason) in broken_files(tmp_path).items():
        for timing in ({"frames": 9}, {"frames": 9, "clips": "uniform"}, {"mode": "frames", "frames_per_video": 12}):
            with pytest.raises(MediaError, match=reason) as caught:
                read(path, **timing)
            assert caught.value.kind == "broken", (name, timing)


def test_a_file_that_breaks_in_the_middle_gives_the_clips_before(tmp_path: Path) -> None:
    whole = write_numbers(tmp_path / "a.mkv", 31, options={"g": "5", "bf": "0"}, codec="libx264").read_bytes()
    (tmp_path / "b.mkv").write_bytes(whole[: int(len(whole) * 0.7)])
    clips = read(tmp_path / "b.mkv", frames=5, clips="all")
    assert 2 <= len(clips) < 6
    assert [n for c in clips for n in numbers(c)] == list(range(5 * len(clips)))


def test_images(tmp_path: Path) -> None:
    plain = Image.fromarray(gradient())
    plain.save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png")[0].pixels[0], gradient())
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter to the right
    plain.save(tmp_path / "b.jpg", exif=exif, quality=95)
    (clip,) = read(tmp_path / "b.jpg")
    assert np.abs(clip.pixels[0].astype(int) - np.rot90(gradient(), k=-1)).mean() < 3
    assert clip.notes == ["rotated"] and clip.source_size == (64, 48) and clip.display_size == (48, 64)
    rgba = np.dstack([gradient(), np.full((48, 64), 128, dtype=np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "c.png")
    (clip,) = read(tmp_path / "c.png")
    assert np.abs(clip.pixels[0] - gradient() * (128 / 255)).max() <= 0.51
    assert clip.notes == ["alpha on black"]
    Image.fromarray(gradient()[..., 0].astype(np.uint16) * 257).save(tmp_path / "d.png")
    assert np.array_equal(read(tmp_path / "d.png")[0].pixels[0, ..., 1], gradient()[..., 0])
    plain.convert("CMYK").save(tmp_path / "e.jpg", quality=95)
    assert np.abs(read(tmp_path / "e.jpg")[0].pixels[0].astype(int) - gradient()).mean() < 6
    palette = plain.convert("P")
    palette.save(tmp_path / "f.png", transparency=palette.getpixel((0, 0)))
    assert read(tmp_path / "f.png")[0].pixels[0, 0, 0].max() == 0
    (tmp_path / "g.png").write_text("no image")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "h.png").write_bytes(whole[: len(whole) // 2])
    for name in ("g.png", "h.png"):
        with pytest.raises(MediaError) as caught:
            read(tmp_path / name)
        assert caught.value.kind == "broken"


def test_what_counts_as_media() -> None:
    assert [kind_of(n) for n in ("a.MP4", "b.Jpeg", "c.txt", "d", "e.mp4.json")] == ["video", "image", None, None, None]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fps": 0.0}, "`fps=0` is not a frame rate"),
        ({"clips_per_video": 0}, "at least 1"),
        ({"clips_per_video": 4}, "`clips_per_video` only counts with `clips=uniform`"),
        ({"clips_per_video": 4, "clips": "all"}, "`clips_per_video` only counts with `clips=uniform`"),
        ({"frames_per_video": 1}, "`frames_per_video` only counts with `mode=frames`"),
        ({"frames_per_video": 2, "mode": "image"}, "`frames_per_video` only counts with `mode=frames`"),
        ({"mode": "frames", "clips": "first"}, "`clips` has no effect with `mode=frames`"),
        ({"mode": "image", "clips": "all"}, "`clips` has no effect with `mode=image`"),
        ({"mode": "frames", "frames": 5}, "`frames` has no effect with `mode=frames`"),
        ({"mode": "image", "fps": 8.0}, "`fps` has no effect with `mode=image`"),
    ],
)
def test_timings_that_cannot_be(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_config(TimingConfig, values)
