"""Colours of images against formulas in float64: profiles, other tags, transparency, depth; what is dropped."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin
from test_colour import TO_SRGB, from_linear, patches, to_linear, worst
from test_video import gradient, read

from wanloom.media.decoding import MediaError

# columns of XYZ under D50, as the profiles of Apple, Adobe and HP have them
COLUMNS = {
    "Display P3": ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407)),
    "Adobe RGB (1998)": ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)),
    "sRGB": ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141)),
}
ADOBE_TO_SRGB = ((1.39836, -0.39836, 0), (0, 1, 0), (0, -0.04293, 1.04293))
ADOBE_GAMMA = 563 / 256


def tag(kind: bytes, data: bytes) -> bytes:
    data = kind + bytes(4) + data
    return data + bytes(-len(data) % 4)


def xyz(values: tuple[float, ...]) -> bytes:
    return tag(b"XYZ ", struct.pack(">3i", *(round(65536 * value) for value in values)))


def curve(values: np.ndarray) -> bytes:
    return tag(b"curv", struct.pack(f">I{len(values)}H", len(values), *np.round(65535 * values).astype(int)))


def build_profile(space: bytes, tags: dict[bytes, bytes], name: str) -> bytes:
    """An ICC profile of version 2 (ICC.1:2001-04)."""
    text = name.encode() + b"\0"
    words = struct.pack(">I", len(text)) + text + bytes(8 + 3 + 67)
    tags = {b"desc": tag(b"desc", words), b"cprt": tag(b"text", b"none\0"), b"wtpt": xyz((0.9642, 1, 0.8249)), **tags}
    table, body = struct.pack(">I", len(tags)), b""
    for key, data in tags.items():
        table += key + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(body), len(data))
        body += data
    head = struct.pack(
        ">I4sI4s4s4s12s4s", 132 + 12 * len(tags) + len(body), b"", 0x02400000, b"mntr", space, b"XYZ ", b"", b"acsp"
    )
    head += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head + bytes(128 - len(head)) + table + body


def rgb_profile(name: str) -> bytes:
    ramp = np.arange(4096) / 4095
    bend = curve(ramp**ADOBE_GAMMA if name.startswith("Adobe") else to_linear(ramp))
    tags = {key: xyz(values) for key, values in zip((b"rXYZ", b"gXYZ", b"bXYZ"), COLUMNS[name], strict=True)}
    return build_profile(b"RGB ", tags | {key: bend for key in (b"rTRC", b"gTRC", b"bTRC")}, name)


def expected_srgb(picture: np.ndarray, name: str) -> np.ndarray:
    values = picture / 255
    linear = values**ADOBE_GAMMA if name.startswith("Adobe") else to_linear(values)
    matrix = np.array(ADOBE_TO_SRGB if name.startswith("Adobe") else TO_SRGB[12])
    return 255 * from_linear(linear @ matrix.T)


PICTURE = np.concatenate([patches(24, 96), gradient(24, 96)])
SAVED = {
    "png": {},
    "tiff": {},
    "webp": {"lossless": True},
    "jpg": {"quality": 98, "subsampling": 0},
    "avif": {"quality": 98},
}


@pytest.mark.parametrize("name", ["Display P3", "Adobe RGB (1998)"])
@pytest.mark.parametrize("suffix", sorted(SAVED))
def test_an_embedded_profile_becomes_srgb(tmp_path: Path, suffix: str, name: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(PICTURE).save(path, icc_profile=rgb_profile(name), **SAVED[suffix])
    (clip,) = read(path)
    error = np.abs(clip.pixels[0] - expected_srgb(PICTURE, name))
    assert error.mean() < (0.5 if suffix in ("png", "tiff", "webp") else 3.5)
    assert suffix in ("jpg", "avif") or error.max() <= 2
    assert np.abs(clip.pixels[0].astype(int) - PICTURE).max() > 20
    assert clip.notes == ["colour profile to sRGB"] and clip.colour.said == f"profile '{name}'"


def test_profiles_of_srgb_change_no_byte(tmp_path: Path) -> None:
    """HP's numbers, and those of the library: a conversion would round."""
    built_in = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for number, profile in enumerate((rgb_profile("sRGB"), built_in)):
        path = tmp_path / f"{number}.png"
        Image.fromarray(PICTURE).save(path, icc_profile=profile)
        (clip,) = read(path)
        assert np.array_equal(clip.pixels[0], PICTURE)
        assert clip.notes == [] and clip.colour.said == "sRGB"


def test_profile_and_alpha(tmp_path: Path) -> None:
    rgba = np.dstack([PICTURE, np.full((48, 96), 128, dtype=np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "a.png", icc_profile=rgb_profile("Display P3"))
    (clip,) = read(tmp_path / "a.png")
    assert worst(clip.pixels[0], expected_srgb(PICTURE, "Display P3") * (128 / 255)) <= 2
    assert sorted(clip.notes) == ["alpha on black", "colour profile to sRGB"]


def test_profile_of_a_palette(tmp_path: Path) -> None:
    image = Image.fromarray(patches(48, 96)).convert("P", palette=Image.Palette.ADAPTIVE)
    image.save(tmp_path / "a.png", icc_profile=rgb_profile("Display P3"))
    (clip,) = read(tmp_path / "a.png")
    assert worst(clip.pixels[0], expected_srgb(np.asarray(image.convert("RGB")), "Display P3")) <= 2


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_profile_of_gray(tmp_path: Path, mode: str) -> None:
    gray = gradient()[..., 0]
    profile = build_profile(b"GRAY", {b"kTRC": curve((np.arange(4096) / 4095) ** 1.8)}, "gray")
    image = Image.fromarray(gray.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(gray).convert(mode)
    image.save(tmp_path / "a.png", icc_profile=profile)
    (clip,) = read(tmp_path / "a.png")
    assert worst(clip.pixels[0, ..., 1], 255 * from_linear((gray / 255) ** 1.8)) <= 2
    assert "colour profile to sRGB" in clip.notes


def test_gray_with_a_profile_of_colours(tmp_path: Path) -> None:
    gray = gradient()[..., 0]
    Image.fromarray(gray).save(tmp_path / "a.png", icc_profile=rgb_profile("Display P3"))
    (clip,) = read(tmp_path / "a.png")
    assert worst(clip.pixels[0], np.repeat(gray[..., None], 3, axis=2)) <= 1  # its white and curve are those of sRGB


@pytest.mark.parametrize("profile", [b"no profile at all", rgb_profile("Display P3")[:300], b"\0" * 200])
def test_a_damaged_profile_is_none_and_noted(tmp_path: Path, profile: bytes) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "a.png", icc_profile=profile)
    (clip,) = read(tmp_path / "a.png")
    assert np.array_equal(clip.pixels[0], PICTURE)
    assert len(clip.notes) == 1 and clip.notes[0].startswith("a colour profile that is not for this picture or cannot")


def test_a_profile_for_other_pixels_is_none_and_noted(tmp_path: Path) -> None:
    profile = build_profile(b"GRAY", {b"kTRC": curve(np.arange(256) / 255)}, "gray")
    Image.fromarray(PICTURE).save(tmp_path / "a.png", icc_profile=profile)
    (clip,) = read(tmp_path / "a.png")
    assert np.array_equal(clip.pixels[0], PICTURE)
    assert clip.notes == [
        "a colour profile that is not for this picture or cannot be read, taken as sRGB (it is for GRAY)"
    ]


def test_adobe_rgb_of_cameras_is_in_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x8769] = {0xA001: 0xFFFF, 0xA005: {1: "R03", 2: b"0100"}}
    Image.fromarray(PICTURE).save(tmp_path / "a.png", exif=exif)
    (clip,) = read(tmp_path / "a.png")
    assert worst(clip.pixels[0], expected_srgb(PICTURE, "Adobe RGB (1998)")) <= 1
    assert clip.notes == ["Adobe RGB to sRGB"]


def write_png(path: Path, picture: np.ndarray, **chunks: bytes) -> Path:
    info = PngImagePlugin.PngInfo()
    for name, data in chunks.items():
        info.add(name.encode(), data)
    Image.fromarray(picture).save(path, pnginfo=info)
    return path


def test_gamma_and_primaries_of_a_png(tmp_path: Path) -> None:
    usual = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
    (clip,) = read(write_png(tmp_path / "a.png", PICTURE, gAMA=struct.pack(">I", 45455), cHRM=usual))
    assert np.array_equal(clip.pixels[0], PICTURE) and clip.notes == []
    (clip,) = read(write_png(tmp_path / "b.png", PICTURE, gAMA=struct.pack(">I", 100000)))
    assert worst(clip.pixels[0], 255 * from_linear(PICTURE / 255)) <= 1  # linear light
    (clip,) = read(write_png(tmp_path / "f.png", PICTURE, gAMA=struct.pack(">I", 50000)))
    assert worst(clip.pixels[0], 255 * from_linear((PICTURE / 255) ** 2)) <= 1
    wide = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
    (clip,) = read(write_png(tmp_path / "c.png", PICTURE, cHRM=wide))
    assert worst(clip.pixels[0], expected_srgb(PICTURE, "Display P3")) <= 1
    assert clip.notes == ["gAMA and cHRM to sRGB"]
    (clip,) = read(write_png(tmp_path / "d.png", PICTURE, gAMA=struct.pack(">I", 100000), sRGB=b"\0"))
    assert np.array_equal(clip.pixels[0], PICTURE)
    with pytest.raises(MediaError, match="no real screen"):
        read(write_png(tmp_path / "e.png", PICTURE, cHRM=bytes(32)))


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
@pytest.mark.parametrize("suffix", ["png", "avif"])
def test_images_in_hdr_are_dropped(tmp_path: Path, suffix: str, transfer: int, name: str) -> None:
    with pytest.raises(MediaError, match=rf"is HDR \({name}\)") as caught:
        read(coded(tmp_path / f"a.{suffix}", 9, transfer))
    assert caught.value.kind == "colour"


@pytest.mark.parametrize("suffix", ["png", "avif"])
def test_coded_primaries_of_an_image(tmp_path: Path, suffix: str) -> None:
    (clip,) = read(coded(tmp_path / f"a.{suffix}", 12, 13))
    (plain,) = read(coded(tmp_path / f"b.{suffix}", 1, 13))
    linear = to_linear(plain.pixels[0] / 255) @ np.array(TO_SRGB[12]).T
    assert worst(clip.pixels[0], 255 * from_linear(linear)) <= 1
    assert clip.notes == ["Display P3 to sRGB"] and plain.notes == []
    with pytest.raises(MediaError, match="has primaries 8 and transfer 13, which are not converted"):
        read(coded(tmp_path / f"c.{suffix}", 8, 13))


def coded(path: Path, primaries: int, transfer: int) -> Path:
    """An image with the numbers of H.273."""
    if path.suffix == ".png":
        return write_png(path, PICTURE, cICP=bytes([primaries, transfer, 0, 1]))
    Image.fromarray(PICTURE).save(path, quality=95)
    data = path.read_bytes()
    place = data.index(b"colrnclx") + 8
    path.write_bytes(data[:place] + struct.pack(">HH", primaries, transfer) + data[place + 4 :])
    return path


def test_depths(tmp_path: Path) -> None:
    gray = np.random.default_rng(0).integers(0, 65536, (48, 64)).astype(np.uint16)
    expected = np.repeat(np.round(gray / 257)[..., None], 3, axis=2)
    Image.fromarray(gray).save(tmp_path / "a.png")
    Image.fromarray(gray).save(tmp_path / "b.tiff")
    (tmp_path / "c.ppm").write_bytes(b"P5 64 48 65535\n" + gray.astype(">u2").tobytes())
    for name in ("a.png", "b.tiff", "c.ppm"):
        (clip,) = read(tmp_path / name)
        assert np.array_equal(clip.pixels[0], expected), name
        assert clip.colour.said == "sRGB, 16 bits"
    (clip,) = read(write_deep_png(tmp_path / "d.png", np.stack([gray] * 3, -1)))
    assert worst(clip.pixels[0], expected) <= 1  # the library takes the upper byte
    Image.fromarray(gray > 30000).save(tmp_path / "e.png")
    (clip,) = read(tmp_path / "e.png")
    assert np.array_equal(clip.pixels[0, ..., 0], np.where(gray > 30000, 255, 0))


def write_deep_png(path: Path, picture: np.ndarray) -> Path:
    """RGB of 16 bits, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = picture.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in picture)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.linspace(0, 1, 48 * 64, dtype=np.float32), "floating point"),
        (np.arange(48 * 64, dtype=np.int32), "whole numbers of 32 bits"),
        (np.arange(48 * 64, dtype=np.int32) << 19, "whole numbers of 32 bits"),
    ],
)
def test_pictures_that_do_not_say_what_is_white_are_dropped(tmp_path: Path, values: np.ndarray, kind: str) -> None:
    Image.fromarray(values.reshape(48, 64)).save(tmp_path / "a.tiff")
    with pytest.raises(MediaError, match=f"has {kind}.*: save it with 8 or 16 bits") as caught:
        read(tmp_path / "a.tiff")
    assert caught.value.kind == "colour"


def test_cmyk_without_a_profile_is_noted(tmp_path: Path) -> None:
    image = Image.fromarray(PICTURE).convert("CMYK")
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    (tmp_path / "a.tiff").write_bytes(buffer.getvalue())
    (clip,) = read(tmp_path / "a.tiff")
    assert np.array_equal(clip.pixels[0], np.asarray(image.convert("RGB")))
    assert clip.notes == ["CMYK without a profile, by the plain formula"]
