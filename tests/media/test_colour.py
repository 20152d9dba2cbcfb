"""Colours of real encodes against formulas in float64: tags, guesses, primaries, transfers, alpha; what is dropped."""

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from media_files import write_video
from test_video import gradient, native, read

from wanloom.geometry import WAN_21
from wanloom.media.colour import Gamut, bands, on_black, srgb_to_linear
from wanloom.media.decoding import MediaError
from wanloom.media.picture import SWS_FLAGS, PictureConverter, Track

WEIGHTS = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087)}
WEIGHTS[9] = (0.2627, 0.0593)
# BT.2087, and SMPTE EG 432-1 with RP 177: linear light to that of BT.709
TO_SRGB = {
    9: ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),
    12: ((1.22494, -0.22494, 0), (-0.04206, 1.04206, 0), (-0.01964, -0.07864, 1.09827)),
}


def to_linear(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def from_linear(values: np.ndarray) -> np.ndarray:
    values = np.clip(values, 0, 1)
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


def patches(height: int, width: int) -> np.ndarray:
    """Six strong colours in blocks."""
    colours = np.array([(200, 30, 30), (30, 180, 40), (40, 50, 210), (220, 200, 30), (120, 120, 120), (250, 250, 250)])
    column = np.arange(width) * len(colours) // width
    return np.broadcast_to(colours[column], (height, width, 3)).astype(np.uint8)


def to_yuv(picture: np.ndarray, matrix: int, full: bool) -> list[np.ndarray]:
    red, blue = WEIGHTS[matrix]
    r, g, b = (picture[..., i] / 255 for i in range(3))
    luma = red * r + (1 - red - blue) * g + blue * b
    across, down = 0.5 * (b - luma) / (1 - blue), 0.5 * (r - luma) / (1 - red)
    if full:
        return [255 * luma, 128 + 255 * across, 128 + 255 * down]
    return [16 + 219 * luma, 128 + 224 * across, 128 + 224 * down]


def write_planes(path: Path, planes: list[np.ndarray], codec: str = "ffv1", **tags: int) -> Path:
    """One picture of 4:4:4, without loss."""
    height, width = planes[0].shape
    frame = av.VideoFrame(width, height, "yuv444p")
    for plane, values in zip(frame.planes, planes, strict=True):
        lines = np.zeros((plane.height, plane.line_size), dtype=np.uint8)
        lines[:, :width] = np.round(values)
        plane.update(lines)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16, options={"crf": "0"} if codec == "libx264" else {})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
            setattr(frame, name, value)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def worst(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found.astype(np.float64) - expected).max())


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", sorted(WEIGHTS))
def test_a_tagged_matrix_and_range_are_believed(tmp_path: Path, matrix: int, full: bool) -> None:
    picture = patches(48, 96)
    tags = {"colorspace": matrix, "color_range": 2 if full else 1, "color_primaries": 1, "color_trc": 1}
    path = write_planes(tmp_path / "a.mp4", to_yuv(picture, matrix, full), "libx264", **tags)
    (clip,) = read(path, frames=1)
    assert worst(clip.pixels[0], picture) <= 2
    assert clip.notes == [] and not clip.colour.guessed
    assert clip.colour.said.endswith(f"{'full' if full else 'limited'} range, 8 bits")


@pytest.mark.parametrize(
    ("width", "height", "matrix"),
    [
        (640, 480, 6),
        (1024, 576, 6),
        (1278, 718, 6),
        (1280, 720, 1),
        (960, 720, 1),
        (1280, 544, 1),
        (720, 1280, 1),
        (1920, 1080, 1),
    ],
)
def test_an_untagged_matrix_is_guessed_by_the_size_and_said(
    tmp_path: Path, width: int, height: int, matrix: int
) -> None:
    picture = patches(height, width)
    (clip,) = read(write_planes(tmp_path / "a.mkv", to_yuv(picture, matrix, False)), frames=1)
    assert worst(clip.pixels[0], picture) <= 2
    name = {1: "BT.709", 6: "BT.601"}[matrix]
    assert clip.colour.said == f"{name} by its size, no matrix is tagged, limited range, 8 bits"
    assert clip.colour.guessed


@pytest.mark.parametrize(("color_range", "said"), [(0, "full"), (1, "limited"), (2, "full")])
@pytest.mark.parametrize("pix_fmt", ["gray", "gray10le"])
def test_gray_is_full_unless_it_is_tagged_as_limited(pix_fmt: str, color_range: int, said: str) -> None:
    picture = np.repeat(np.arange(64, dtype=np.uint8)[None] * 4, 48, axis=0)
    frame = av.VideoFrame(64, 48, pix_fmt)
    bits = frame.format.components[0].bits
    full = picture * ((2**bits - 1) / 255)
    values = (16 + 219 * (picture / 255)) * 2 ** (bits - 8) if said == "limited" else full
    kind = np.uint8 if bits == 8 else np.uint16
    (plane,) = frame.planes
    lines = np.zeros((48, plane.line_size // np.dtype(kind).itemsize), dtype=kind)
    lines[:, :64] = np.round(values)
    plane.update(lines)
    frame.color_range = color_range
    screen = PictureConverter(Track(None, None, None), native)
    found = screen.convert(frame, 0)
    assert worst(found, np.repeat(picture[..., None], 3, axis=2)) <= 1
    assert screen.colour.said == f"gray, {said} range, {bits} bits"


def test_small_untagged_videos_keep_their_bytes() -> None:
    """The library's own guess is BT.601."""
    rng = np.random.default_rng(3)
    picture = av.VideoFrame(130, 98, "yuv420p")
    for plane in picture.planes:
        plane.update(rng.bytes(plane.buffer_size))
    expected = picture.reformat(format="rgb24", interpolation=SWS_FLAGS).to_ndarray()
    assert np.array_equal(PictureConverter(Track(None, None, None), native).convert(picture, 0), expected)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"color_trc": 16, "colorspace": 9, "color_primaries": 9}, r"is HDR \(PQ\): make an SDR copy"),
        ({"color_trc": 18, "colorspace": 9, "color_primaries": 9}, r"is HDR \(HLG\): make an SDR copy"),
        ({"color_trc": 8, "colorspace": 1}, "has the transfer linear light, which is not converted"),
        ({"color_trc": 9, "colorspace": 1}, "has the transfer logarithmic"),
        ({"colorspace": 8}, r"has a colour matrix \(number 8\) that is not converted"),
        ({"colorspace": 10}, r"has a colour matrix \(number 10\)"),
        ({"colorspace": 1, "color_primaries": 8}, r"has primaries \(number 8\) that are not converted"),
    ],
)
def test_colours_that_are_not_converted_are_dropped(tmp_path: Path, tags: dict[str, int], reason: str) -> None:
    path = write_planes(tmp_path / "a.mkv", to_yuv(patches(48, 64), 1, False), **tags)
    with pytest.raises(MediaError, match=reason) as caught:
        read(path, frames=1)
    assert caught.value.kind == "colour"


def test_floating_point_has_no_white() -> None:
    with pytest.raises(MediaError, match="floating point, which do not say what is white"):
        PictureConverter(Track(None, None, None), native).convert(av.VideoFrame(64, 48, "gbrpf32le"), 0)


@pytest.mark.parametrize(
    ("primaries", "matrix", "name"), [(9, 9, "BT.2020"), (2, 9, "BT.2020"), (12, 1, "Display P3"), (9, 1, "BT.2020")]
)
def test_wide_primaries_become_srgb(tmp_path: Path, primaries: int, matrix: int, name: str) -> None:
    wide = np.concatenate([patches(24, 96), gradient(24, 96)])
    tags = {"colorspace": matrix, "color_range": 1, "color_primaries": primaries, "color_trc": 1}
    (clip,) = read(write_planes(tmp_path / "a.mkv", to_yuv(wide, matrix, False), **tags), frames=1)
    plain = {"colorspace": matrix, "color_range": 1, "color_primaries": 1, "color_trc": 1}
    (as_is,) = read(write_planes(tmp_path / "b.mkv", to_yuv(wide, matrix, False), **plain), frames=1)
    linear = to_linear(as_is.pixels[0] / 255) @ np.array(TO_SRGB[12 if primaries == 12 else 9]).T
    assert worst(clip.pixels[0], 255 * from_linear(linear)) <= 1
    assert worst(clip.pixels[0], as_is.pixels[0]) > 20
    assert clip.notes == [f"{name} primaries to sRGB"] and as_is.notes == []
    assert clip.colour.guessed == (primaries == 2)


def test_a_white_is_adapted() -> None:
    """DCI's P3 has a greenish white; white stays white."""
    dci = Gamut(((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)), srgb_to_linear)
    grays = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    assert worst(dci.convert(grays), grays) <= 1


@pytest.mark.parametrize(
    ("codec", "suffix", "pix_fmt"),
    [
        ("png", "mov", "rgba"),
        ("qtrle", "mov", "argb"),
        ("ffv1", "mkv", "yuva444p"),
        ("prores_ks", "mov", "yuva444p10le"),
    ],
)
def test_alpha_in_a_video_is_laid_on_black(tmp_path: Path, codec: str, suffix: str, pix_fmt: str) -> None:
    rgba = np.dstack([patches(48, 96), np.full((48, 96), 255, dtype=np.uint8)])
    rgba[:24, :, 3] = 64
    options = {"profile": "4444"} if codec == "prores_ks" else {}
    path = write_video(
        tmp_path / f"a.{suffix}", [rgba] * 2, codec=codec, pix_fmt=pix_fmt, source_format="rgba", options=options
    )
    (clip,) = read(path, frames=1)
    assert np.abs(clip.pixels[0] - rgba[..., :3] * (rgba[..., 3:] / 255)).mean() < 3
    assert "alpha on black" in clip.notes


VPX = [("libvpx", {"auto-alt-ref": "0", "g": "8"}), ("libvpx-vp9", {"g": "8"})]


@pytest.mark.parametrize(("codec", "options"), VPX)
def test_alpha_beside_the_pictures_is_laid_on_black(
    tmp_path: Path, codec: str, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """VP8 and VP9 in WebM have it in a track of its own; what is hidden by it must not show. After jumps too."""
    pictures = []
    for number in range(48):
        rgba = np.dstack([patches(48, 96), np.full((48, 96), 255, dtype=np.uint8)])
        rgba[:24, :, 3] = 4 * number
        pictures.append(rgba)
    path = write_video(
        tmp_path / "a.webm",
        pictures,
        codec=codec,
        pix_fmt="yuva420p",
        source_format="rgba",
        options=options,
        bit_rate=4_000_000,
    )
    monkeypatch.setattr("wanloom.media.player.FAR", 0.5)
    clips = read(path, mode="frames", frames_per_video=3)
    assert len(clips) == 3
    for clip, number in zip(clips, (8, 24, 40), strict=True):
        expected = pictures[number][..., :3] * (pictures[number][..., 3:] / 255)
        assert np.abs(clip.pixels[0] - expected).mean() < 6
        assert np.abs(clip.pixels[0, :22] - expected[:22]).max() < 60
        assert clip.notes == ["alpha on black"]


def test_alpha_beside_the_pictures_that_no_decoder_takes_is_a_drop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rgba = np.dstack([patches(48, 96), np.full((48, 96), 64, dtype=np.uint8)])
    codec, options = VPX[1]
    path = write_video(
        tmp_path / "a.webm", [rgba] * 2, codec=codec, pix_fmt="yuva420p", source_format="rgba", options=options
    )
    monkeypatch.setattr("wanloom.media.container.BESIDE", {})
    with pytest.raises(MediaError, match="has transparency beside its pictures") as caught:
        read(path, frames=1)
    assert caught.value.kind == "colour"


@pytest.mark.parametrize("pix_fmt", ["yuva420p", "yuva444p"])
def test_alpha_does_not_darken_or_blur_colours(pix_fmt: str) -> None:
    """Opaque, against the formula: the mean error shows a bias that rounding down would make."""
    picture = gradient()
    planes = [*to_yuv(picture, 6, False), np.full((48, 64), 255.0)]
    if pix_fmt == "yuva420p":
        planes[1:3] = [plane.reshape(24, 2, 32, 2).mean((1, 3)) for plane in planes[1:3]]
    frame = av.VideoFrame(64, 48, pix_fmt)
    for plane, values in zip(frame.planes, planes, strict=True):
        lines = np.zeros((plane.height, plane.line_size), dtype=np.uint8)
        lines[:, : values.shape[1]] = np.round(values)
        plane.update(lines)
    error = PictureConverter(Track(None, None, None), native).convert(frame, 0).astype(int) - picture
    assert np.abs(error).mean() < 0.6
    assert np.abs(error.mean((0, 1))).max() < 0.1


@pytest.mark.parametrize(("pix_fmt", "channels"), [("gbrp10le", 3), ("rgb48le", 3), ("gbrap12le", 4), ("rgba64le", 4)])
def test_deep_rgb_goes_to_the_nearest_level(pix_fmt: str, channels: int) -> None:
    frame = av.VideoFrame(64, 48, pix_fmt)
    bits = frame.format.components[0].bits
    deep = np.random.default_rng(0).integers(0, 1 << bits, (48, 64, channels)).astype(np.uint16)
    planes = [deep[..., i] for i in (1, 2, 0, 3)[:channels]] if frame.format.is_planar else [deep.reshape(48, -1)]
    for plane, values in zip(frame.planes, planes, strict=True):
        lines = np.zeros((plane.height, plane.line_size // 2), dtype=np.uint16)
        lines[:, : values.shape[1]] = values
        plane.update(lines)
    found = PictureConverter(Track(None, None, None), native).convert(frame, 0)
    levels = np.round(deep / ((1 << bits) - 1) * 255)
    expected = levels if channels == 3 else np.round(levels[..., :3] * levels[..., 3:] / 255)
    assert worst(found, expected) <= (0 if bits != 12 else 1)


def test_what_is_done_in_bands_is_what_is_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (97, 33, 4), dtype=np.uint8)
    monkeypatch.setattr("wanloom.media.colour.BAND", 33 * 10 + 5)
    assert [part.shape[0] for (part,) in bands(rgba)] == [10] * 9 + [7]
    expected = np.round(rgba[..., :3] * (rgba[..., 3:] / 255.0)).astype(np.uint8)
    assert np.array_equal(on_black(rgba[..., :3], rgba[..., 3]), expected)


def test_the_report_has_the_colours_of_every_file(tmp_path: Path) -> None:
    from fake_encoders import IDENTITY, build_encoders
    from PIL import Image

    from wanloom.media.framing import FramingConfig
    from wanloom.media.video import TimingConfig
    from wanloom.prepare.run import PrepareJob, encode_folder
    from wanloom.prepare.settings import PrepareConfig

    source = tmp_path / "in"
    source.mkdir()
    tagged: dict[str, Any] = {"colorspace": 1, "color_range": 2}
    write_planes(source / "a.mkv", to_yuv(patches(48, 64), 1, True), **tagged)
    write_planes(source / "b.mkv", to_yuv(patches(48, 64), 6, False))
    write_planes(source / "c.mkv", to_yuv(patches(48, 64), 9, False), colorspace=9, color_trc=16)
    Image.new("RGB", (64, 48)).save(source / "d.png")
    for name in "abcd":
        (source / f"{name}.txt").write_text(f"a caption {name}")
    config = PrepareConfig(timing=TimingConfig(frames=1), framing=FramingConfig(height=32, width=48))
    report = encode_folder(PrepareJob(source, tmp_path / "out", config, WAN_21, IDENTITY, build_encoders)).report
    guess = "BT.601 by its size, no matrix is tagged, limited range, 8 bits"
    assert report["colours"] == {"a.mkv": "BT.709, full range, 8 bits", "b.mkv": guess, "d.png": "sRGB"}
    assert report["colours_guessed"] == {"b.mkv": guess}
    assert [(drop["file"], drop["kind"]) for drop in report["dropped"]] == [("c.mkv", "colour")]
