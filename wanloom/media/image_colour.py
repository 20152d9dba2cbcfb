"""What the colours of an image mean, and the image as 8-bit sRGB.

In: an image that Pillow opened. Out: `(H, W, 3)` uint8 and what its colours were, or MediaError for those that nothing
here converts. The one decision: of the tags that an image may have, the one counts that a browser takes: an embedded
ICC profile, the numbers of H.273, EXIF's Adobe RGB, PNG's gAMA and cHRM; without any it is sRGB. Colours that are sRGB
already are not touched, whatever their profile calls them.
"""

import io
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from wanloom.media.colour import (
    HDR,
    LIKE_SRGB,
    SHOWN_ALIKE,
    SRGB,
    WIDE,
    Chromaticities,
    Colour,
    Curve,
    Gamut,
    on_black,
    srgb_to_linear,
    to_8_bits,
)
from wanloom.media.decoding import MediaError

ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), SRGB[3])
ADOBE_GAMMA = 563 / 256
ALIKE = 2  # levels: a profile that moves no colour by more is sRGB in other words
EXIF, INTEROP = 0x8769, 0xA005


def image_to_rgb(image: Image.Image, kind: str | None, head: bytes) -> tuple[np.ndarray, Colour]:
    """`(H, W, 3)` of an opened image and its colours; `kind` and `head` are the format and first bytes of its file.

    Raises MediaError for colours that are not converted.
    """
    notes: list[str] = []
    said, convert = _meaning(image, kind, head, notes)
    if image.mode == "F" or (image.mode.startswith("I") and not _is_16_bit(image.mode, kind)):
        what = "floating point" if image.mode == "F" else "whole numbers of 32 bits or with a sign"
        raise MediaError("colour", f"has {what}, which do not say what is white: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray(to_8_bits(np.asarray(image)))
        said += ", 16 bits"
    if not image.has_transparency_data:
        return np.asarray(convert(image)), Colour(said, notes=tuple(notes))
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    rgba = np.asarray(image)
    pixels, alpha = rgba[..., :3] if convert is _plain else np.asarray(convert(image)), rgba[..., 3]
    if (alpha < 255).any():
        notes.append("alpha on black")
        pixels = on_black(pixels, alpha)
    return pixels, Colour(said, notes=tuple(notes))


def _is_16_bit(mode: str, kind: str | None) -> bool:
    """16-bit gray has a mode of its own, but for PPM, which Pillow spreads to 16 bits in wider numbers."""
    return mode.startswith("I;16") or kind == "PPM"


ToRgb = Callable[[Image.Image], "Image.Image | np.ndarray"]


def _meaning(image: Image.Image, kind: str | None, head: bytes, notes: list[str]) -> tuple[str, ToRgb]:
    """What the colours of an image are, and how to get sRGB; by the strongest of its tags."""
    profile = image.info.get("icc_profile")
    if profile:
        return _profiled(image.mode, bytes(profile), notes)
    tagged = _coded_points(kind, head)
    if tagged is not None:
        primaries, transfer = tagged
        if transfer in HDR:
            raise MediaError("colour", f"is HDR ({HDR[transfer]}): make an SDR copy of it, with tone mapping")
        if transfer not in SHOWN_ALIKE or primaries not in LIKE_SRGB | WIDE.keys():
            raise MediaError("colour", f"has primaries {primaries} and transfer {transfer}, which are not converted")
        if primaries in WIDE:
            return _other_gamut(*WIDE[primaries], srgb_to_linear, notes)
        return "sRGB", _plain
    if image.getexif().get_ifd(INTEROP).get(1) == "R03" or image.getexif().get_ifd(EXIF).get(0xA001) == 2:
        return _other_gamut("Adobe RGB", ADOBE, lambda values: values**ADOBE_GAMMA, notes)
    gamma, points = image.info.get("gamma"), image.info.get("chromaticity")
    if "srgb" not in image.info and (gamma or points):
        return _measured(gamma, points, notes)
    if image.mode == "CMYK":
        notes.append("CMYK without a profile, by the plain formula")
        return "CMYK", _plain
    return "sRGB", _plain


def _plain(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _other_gamut(name: str, points: Chromaticities, curve: Curve, notes: list[str]) -> tuple[str, ToRgb]:
    notes.append(f"{name} to sRGB")
    gamut = Gamut(points, curve)
    return name, lambda image: gamut.convert(np.asarray(_plain(image)))


def _measured(gamma: float | None, points: tuple[float, ...] | None, notes: list[str]) -> tuple[str, ToRgb]:
    """PNG's gAMA and cHRM: white, red, green, blue. Those of sRGB, up to their rounding, are not touched."""
    usual = [value for point in (SRGB[3], *SRGB[:3]) for value in point]
    if gamma is not None and abs(gamma - 1 / 2.2) <= 0.01:
        gamma = None
    if points is not None and max(abs(a - b) for a, b in zip(points, usual, strict=True)) <= 0.002:
        points = None
    if gamma is None and points is None:
        return "sRGB", _plain
    if (gamma is not None and not 0.1 < gamma < 10) or (points is not None and not _is_triangle(points)):
        raise MediaError("colour", "has a gAMA or cHRM of no real screen")
    pairs = SRGB if points is None else tuple((points[i], points[i + 1]) for i in (2, 4, 6, 0))
    curve: Curve = srgb_to_linear if gamma is None else lambda values: values ** (1 / gamma)
    return _other_gamut("gAMA and cHRM", pairs, curve, notes)


def _is_triangle(points: tuple[float, ...]) -> bool:
    x, y = np.array(points[0::2]), np.array(points[1::2])
    area = (x[2] - x[1]) * (y[3] - y[1]) - (x[3] - x[1]) * (y[2] - y[1])
    return bool((y > 0.01).all() and abs(area) > 0.01)


def _coded_points(kind: str | None, head: bytes) -> tuple[int, int] | None:
    """Primaries and transfer by the numbers of H.273, where AVIF ('nclx') or PNG ('cICP') has them."""
    mark = {"AVIF": b"colrnclx", "PNG": b"cICP"}.get(kind or "")
    place = head.find(mark) if mark else -1
    if place < 0 or mark is None:
        return None
    data = head[place + len(mark) :]
    if kind == "PNG":
        return (data[0], data[1]) if len(data) >= 4 and place < head.find(b"IDAT") else None
    return (int.from_bytes(data[:2], "big"), int.from_bytes(data[2:4], "big")) if len(data) >= 7 else None


def _profiled(mode: str, data: bytes, notes: list[str]) -> tuple[str, ToRgb]:
    """An embedded ICC profile. As in browsers one that cannot be read counts as none, which is noted."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        core: Any = profile.profile
        base = _profile_mode(mode, core.xcolor_space)
        name = " ".join((core.profile_description or "without a name").split())[:60]
        transform = _transform(profile, base)
        is_srgb = _is_srgb(data, base)
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        notes.append(f"a colour profile that is not for this picture or cannot be read, taken as sRGB ({error})"[:120])
        return "sRGB", _plain
    if is_srgb:
        return "sRGB", _plain
    notes.append("colour profile to sRGB")
    return f"profile '{name}'", lambda image: _apply(transform, image, base)


def _profile_mode(mode: str, space: str) -> str:
    """The mode that pixels have when a profile is applied. Raises ValueError for a profile of other pixels."""
    is_gray = mode in {"1", "L", "LA", "La"} or mode.startswith("I")
    if space == "RGB " and mode != "CMYK":
        return "RGB"
    if (space == "GRAY" and is_gray) or (space == "CMYK" and mode == "CMYK"):
        return "L" if is_gray else "CMYK"
    raise ValueError(f"it is for {space.strip()}")


def _transform(profile: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    return ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)


def _apply(transform: ImageCms.ImageCmsTransform, image: Image.Image, base: str) -> Image.Image:
    return transform.apply(image if image.mode == base else image.convert(base))


@lru_cache(maxsize=16)
def _is_srgb(data: bytes, mode: str) -> bool:
    """Whether a profile moves no colour: profiles of sRGB are many, and their names say anything."""
    if mode == "CMYK":
        return False
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3) if mode == "RGB" else levels[None]
    image = Image.fromarray(grid)
    moved = np.asarray(_transform(ImageCms.ImageCmsProfile(io.BytesIO(data)), mode).apply(image)).astype(int)
    return int(np.abs(moved - np.asarray(image.convert("RGB")).astype(int)).max()) <= ALIKE
