"""What the colours of a video mean, and how other primaries and transparency become 8-bit sRGB.

In: the tags of a decoded picture. Out: the matrix to read it with and what is to be converted, in words for the report,
or MediaError for colours that nothing here converts. The one decision: a tag is believed, what is missing is guessed as
players do and said, and what can be neither taken as it is nor converted is dropped: a picture with wrong colours looks
like any other to training. docs/prepare.md has the whole policy. Numbers of tags: ITU-T H.273; primaries: SMPTE RP 177.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from wanloom.media.decoding import MediaError

MATRICES = {1: "BT.709", 4: "FCC", 5: "BT.601", 6: "BT.601", 7: "SMPTE 240M", 9: "BT.2020"}
UNTAGGED = {0, 2, 3}  # RGB, where there is none; unspecified; reserved
HD_WIDTH, HD_HEIGHT = 1280, 720
SHOWN_ALIKE = {0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 14, 15}  # transfers that players show without a conversion
TRANSFERS = {8: "linear light", 9: "logarithmic", 10: "logarithmic", 17: "SMPTE ST 428"}
HDR = {16: "PQ", 18: "HLG"}
LIKE_SRGB = {0, 1, 2, 3, 4, 5, 6, 7, 22}  # primaries, those of SD video too: players show them without a conversion
D65 = (0.3127, 0.3290)
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), D65)
WIDE = {9: ("BT.2020", ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), D65))}
WIDE[12] = ("Display P3", ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), D65))
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
BAND = 1 << 18  # pixels that are converted at a time: what this takes in floats does not grow with the picture
LIMITED = np.clip(np.round((np.arange(256) - 16) * 255 / 219), 0, 255).astype(np.uint8)
Chromaticities = tuple[tuple[float, float], ...]  # x and y of red, green, blue and white
Curve = Callable[[np.ndarray], np.ndarray]


class Colour(NamedTuple):
    """The colours of a file. `said` is for the report, `guessed` tells that a tag was missing."""

    said: str
    guessed: bool = False
    matrix: int | None = None  # to read YUV with, where it is not tagged
    gamut: "Gamut | None" = None  # to be converted to sRGB
    notes: tuple[str, ...] = ()
    levels: np.ndarray | None = None  # a table from 0 to 255, for gray of limited range: the library takes it as full


UNKNOWN = Colour("")


def video_colour(picture: Any) -> Colour:
    """The colours of a video, by its first picture. Raises MediaError for those that are not converted."""
    layout = picture.format
    bits = layout.components[0].bits
    if "f16" in layout.name or "f32" in layout.name:
        raise MediaError("colour", "has pictures in floating point, which do not say what is white")
    if picture.color_trc in HDR:
        raise MediaError("colour", f"is HDR ({HDR[picture.color_trc]}): make an SDR copy of it, with tone mapping")
    if picture.color_trc not in SHOWN_ALIKE:
        name = TRANSFERS.get(picture.color_trc, f"number {picture.color_trc}")
        raise MediaError(
            "colour", f"has the transfer {name}, which is not converted: make an sRGB or BT.709 copy of it"
        )
    gamut, notes, guessed, matrix, levels = None, [], False, None, None
    if layout.has_palette or layout.is_rgb:
        said = "RGB"
    else:
        is_gray = sum(not component.is_alpha for component in layout.components) == 1
        is_full = picture.color_range == 2 or layout.name.startswith("yuvj") or (is_gray and picture.color_range != 1)
        said = "full range" if is_full else "limited range"
        if is_gray:
            said, levels = f"gray, {said}", None if is_full else LIMITED
        else:
            name, matrix = _matrix(picture)
            guessed = matrix is not None
            said = f"{name}{' by its size, no matrix is tagged' if guessed else ''}, {said}"
    primaries = picture.color_primaries
    if primaries == 2 and picture.colorspace == 9:
        primaries, guessed = 9, True
    if primaries in WIDE:
        name, chromaticities = WIDE[primaries]
        gamut = Gamut(chromaticities, srgb_to_linear)
        notes.append(f"{name} primaries to sRGB")
        said += f", {name} primaries"
    elif primaries not in LIKE_SRGB:
        raise MediaError(
            "colour", f"has primaries (number {primaries}) that are not converted: make a BT.709 copy of it"
        )
    return Colour(f"{said}, {bits} bits", guessed, matrix, gamut, tuple(notes), levels)


def _matrix(picture: Any) -> tuple[str, int | None]:
    """Name of the matrix, and its number where it is not tagged."""
    if picture.colorspace in UNTAGGED:
        guess = 1 if picture.width >= HD_WIDTH or picture.height >= HD_HEIGHT else 6
        return MATRICES[guess], guess
    if picture.colorspace not in MATRICES:
        number = picture.colorspace
        raise MediaError(
            "colour", f"has a colour matrix (number {number}) that is not converted: make a BT.709 copy of it"
        )
    return MATRICES[picture.colorspace], None


class Gamut:
    """Converts 8-bit RGB of other primaries, and of a curve of its own, to sRGB; what sRGB does not have is cut off."""

    def __init__(self, chromaticities: Chromaticities, to_linear: Curve) -> None:
        self.curve = to_linear(np.arange(256) / 255).astype(np.float32)
        self.matrix = np.linalg.solve(_to_xyz(SRGB), _adapted(chromaticities)).T.astype(np.float32)

    def convert(self, pixels: np.ndarray) -> np.ndarray:
        """`(..., 3)` uint8 to the same."""
        out = np.empty_like(pixels)
        for part, into in bands(pixels, out):
            linear = self.curve[part] @ self.matrix
            into[...] = _levels()[np.round(np.clip(linear, 0, 1) * 65535).astype(np.uint16)]
        return out


@lru_cache(maxsize=1)
def _levels() -> np.ndarray:
    """sRGB of 16-bit linear light: finer than a twentieth of a level everywhere."""
    return np.round(255 * linear_to_srgb(np.arange(65536) / 65535)).astype(np.uint8)


def srgb_to_linear(values: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, in [0, 1]."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(values: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, in [0, 1]."""
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


def _to_xyz(chromaticities: Chromaticities) -> np.ndarray:
    """Columns: XYZ of full red, green and blue, whose sum is the white."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in chromaticities], dtype=np.float64).T
    return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])


def _adapted(chromaticities: Chromaticities) -> np.ndarray:
    """`_to_xyz`, its white turned into that of sRGB (Bradford)."""
    xyz, white = _to_xyz(chromaticities), _to_xyz(SRGB).sum(1)
    factors = np.diag((BRADFORD @ white) / (BRADFORD @ xyz.sum(1)))
    return np.linalg.solve(BRADFORD, factors @ BRADFORD @ xyz)


def bands(*arrays: np.ndarray) -> Any:
    """The same rows of pictures of one height, a band of `BAND` pixels at a time."""
    height, width = arrays[0].shape[:2]
    rows = max(1, BAND // width)
    return (tuple(array[i : i + rows] for array in arrays) for i in range(0, height, rows))


def to_8_bits(deep: np.ndarray) -> np.ndarray:
    """16 bits to the nearest of 8."""
    out = np.empty(deep.shape, dtype=np.uint8)
    for part, into in bands(deep, out):
        into[...] = np.clip(np.round(part.astype(np.float64) / 257), 0, 255).astype(np.uint8)
    return out


def on_black(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """`(H, W, 3)` with opacities `(H, W)`, not multiplied in before, on a black ground."""
    out = np.empty(rgb.shape, dtype=np.uint8)
    for part, opacity, into in bands(rgb, alpha, out):
        into[...] = np.round(part * (opacity[..., None] / 255.0)).astype(np.uint8)
    return out
