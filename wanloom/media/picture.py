"""One picture as it is to be seen: 8-bit RGB of the chosen size.

In: an image file, or decoded pictures of a video. Out: `(H, W, 3)` uint8 with the file's rotation, mirroring and pixel
shape applied and alpha laid on black. The one decision: resizing is bicubic with antialiasing, by swscale for YUV
(with `ACCURATE_RND` and `FULL_CHR_H_INT`, without which it darkens by one level and halves the colour resolution) in
the same pass as the conversion, and by Pillow for RGB, which swscale would send through YUV. With these flags swscale
has quick code for RGB in planes alone; the same bytes are interleaved after it.
"""

import logging
import struct
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from wanloom.media.colour import UNKNOWN, UNTAGGED, Colour, on_black, to_8_bits, video_colour
from wanloom.media.container import MediaFile
from wanloom.media.decoding import MediaError
from wanloom.media.framing import Crop
from wanloom.media.image_colour import image_to_rgb

SWS_FLAGS = 0x4 | 0x40000 | 0x2000  # SWS_BICUBIC, SWS_ACCURATE_RND, SWS_FULL_CHR_H_INT
EXIF_ORIENTATION, TURNS = 0x0112, range(2, 9)
HEAD = 1 << 16  # bytes of an image's file in which its colours are told
# what a suffix of an image may stand for; others (PostScript) start programs
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "GIF", "ICO")

# Pillow tells of odd tags on the terminal, without the file's name; what it cannot decode it raises
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())

ChooseCrop = Callable[[float, float, int], Crop]  # displayed width and height, clip number -> crop


@dataclass
class Clip:
    """One sample's pictures and where they come from. Sizes are (horizontal, vertical)."""

    number: int
    pixels: np.ndarray  # (F, H, W, 3) uint8
    start: float  # seconds from the first picture of the file
    stop: float
    source_fps: float | None  # None for an image
    source_size: tuple[int, int]  # as stored
    display_size: tuple[float, float]  # as it is to be seen
    crop: Crop
    notes: list[str] = field(default_factory=list)  # what was done beyond time and size
    source_seconds: float | None = None  # of the whole video, by its header
    colour: Colour = UNKNOWN


def read_image(file: MediaFile, choose: ChooseCrop) -> Clip:
    """An image as a clip of one frame, turned as its EXIF orientation says."""
    notes, head = [], file.read(HEAD)
    file.seek(0)
    with _open_image(file) as image:
        stored = image.size
        if getattr(image, "n_frames", 1) > 1:
            notes.append("animated image: first picture only")
        is_turned = image.getexif().get(EXIF_ORIENTATION) in TURNS
        if is_turned:
            notes.append("rotated")
        turned = ImageOps.exif_transpose(image) if is_turned else image
        pixels, colour = image_to_rgb(turned, image.format, head)
    height, width = pixels.shape[:2]
    crop = choose(width, height, 0)
    cut = _cut(_resize_rgb(pixels, crop.resized), crop)
    return Clip(0, cut[None], 0.0, 0.0, None, stored, (width, height), crop, [*notes, *colour.notes], colour=colour)


def _open_image(file: MediaFile) -> Image.Image:
    """The header read, nothing decoded. Raises MediaError for too many pixels."""
    Image.MAX_IMAGE_PIXELS = most = file.budget.limits.max_pixels  # it is also asked about tiles, which may be larger
    try:
        image = Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # before a size is told
        raise MediaError("too large", f"has more pixels than `max_pixels={most}`") from error
    file.budget.check_size(*image.size)
    return image


class Track(NamedTuple):
    """What the header of a video says, None where it does not."""

    pixel_shape: Fraction | None  # width of a pixel over its height
    rate: Fraction | None
    seconds: float | None


class PictureConverter:
    """Turns decoded pictures into RGB of the chosen crop, and remembers what it met on the way."""

    def __init__(self, track: Track, choose: ChooseCrop) -> None:
        self.track = track
        self.choose = choose
        self.scale, self.interleave = VideoReformatter(), VideoReformatter()  # they keep their tables
        self.stored: tuple[int, int] | None = None
        self.display: tuple[float, float] = (0.0, 0.0)
        self.turn = np.eye(2, dtype=int)
        self.crops: dict[int, Crop] = {}
        self.notes: dict[str, None] = {}
        self.latest: tuple[Any, int, np.ndarray] | None = None
        self.colour = UNKNOWN

    def convert(self, picture: Any, number: int) -> np.ndarray:
        """`(H, W, 3)` of a decoded picture for clip `number`."""
        if self.latest and self.latest[0] is picture and self.latest[1] == number:
            return self.latest[2]
        if picture.is_corrupt:
            raise MediaError("broken", f"a picture in clip {number} is damaged")
        if self.stored is None:
            self._look(picture)
        elif self.stored != (picture.width, picture.height):
            raise MediaError("broken", f"changes its size to {picture.width}x{picture.height} in the middle")
        if number not in self.crops:
            self.crops = {number: self.choose(*self.display, number)}
        crop = self.crops[number]
        width, height = crop.resized
        stored = (height, width) if self.turn[0, 1] else (width, height)
        pixels = _cut(_apply_turn(self._to_rgb(picture, stored), self.turn), crop)
        self.latest = (picture, number, pixels)
        return pixels

    def clip(self, number: int, pixels: np.ndarray, moments: list[Fraction], notes: Iterable[str]) -> Clip:
        return Clip(
            number=number,
            pixels=pixels,
            start=round(float(moments[0]), 6),
            stop=round(float(moments[-1]), 6),
            source_fps=round(float(self.track.rate), 6) if self.track.rate else None,
            source_size=self.stored or (0, 0),
            display_size=self.display,
            crop=self.crops[number],
            notes=[*self.notes, *notes],
            source_seconds=self.track.seconds,
            colour=self.colour,
        )

    def _look(self, picture: Any) -> None:
        """Size, pixel shape, rotation and colours of the first picture."""
        self.stored = (picture.width, picture.height)
        shape = self.track.pixel_shape or Fraction(1)
        shape = shape if Fraction(1, 10) < shape < 10 else Fraction(1)
        self.turn = display_turn(picture)
        width, height = picture.width * float(shape), float(picture.height)
        self.display = (height, width) if self.turn[0, 1] else (width, height)
        if shape != 1:
            self.notes[f"pixels of shape {shape.numerator}:{shape.denominator} made square"] = None
        if not np.array_equal(self.turn, np.eye(2)):
            self.notes["rotated"] = None
        if any(component.is_alpha for component in picture.format.components):
            self.notes["alpha on black"] = None
        if picture.format.components[0].bits > 8:
            self.notes[f"{picture.format.components[0].bits} bits to 8"] = None
        self.colour = video_colour(picture)
        self.notes.update(dict.fromkeys(self.colour.notes))
        if picture.interlaced_frame:
            self.notes["interlaced, taken as it is"] = None

    def _to_rgb(self, picture: Any, size: tuple[int, int]) -> np.ndarray:
        if self.colour.matrix is not None and picture.colorspace in UNTAGGED:
            picture.colorspace = self.colour.matrix
        pixels = self._resized_rgb(picture, size)
        pixels = pixels if self.colour.levels is None else self.colour.levels[pixels]
        return self.colour.gamut.convert(pixels) if self.colour.gamut else pixels

    def _resized_rgb(self, picture: Any, size: tuple[int, int]) -> np.ndarray:
        layout = picture.format
        has_alpha = any(component.is_alpha for component in layout.components)
        if layout.is_rgb and layout.components[0].bits > 8:  # in one step the library would not round to the nearest
            pixels = to_8_bits(picture.to_ndarray(format="rgba64le" if has_alpha else "rgb48le"))
        elif layout.has_palette or has_alpha:
            pixels = picture.reformat(format="rgba", interpolation=SWS_FLAGS, threads=1).to_ndarray()
        elif layout.is_rgb:
            pixels = picture.to_ndarray(format="rgb24")
        else:
            return self._resized_yuv(picture, size)
        return _resize_rgb(on_black(pixels[..., :3], pixels[..., 3]) if pixels.shape[2] == 4 else pixels, size)

    def _resized_yuv(self, picture: Any, size: tuple[int, int]) -> np.ndarray:
        planes = self.scale.reformat(picture, *size, format="gbrp", interpolation=SWS_FLAGS, threads=1)
        return self.interleave.reformat(planes, format="rgb24", threads=1).to_ndarray()


def display_turn(picture: Any) -> np.ndarray:
    """The rotation and mirroring of a file's display matrix as a 2x2 matrix of -1, 0, 1; row vectors (x, y) times it.

    Other angles than multiples of 90 degrees do not occur in recordings and are taken to the nearest one.
    """
    data = picture.side_data.get("DISPLAYMATRIX") if picture.side_data else None
    if data is None:
        return np.eye(2, dtype=int)
    values = struct.unpack("<9i", bytes(data)[:36])
    matrix = np.array([[values[0], values[1]], [values[3], values[4]]], dtype=np.float64)
    scale = np.abs(matrix).max()
    turn = np.round(matrix / scale).astype(int) if scale else np.eye(2, dtype=int)
    return turn if abs(round(float(np.linalg.det(turn)))) == 1 else np.eye(2, dtype=int)


def _apply_turn(pixels: np.ndarray, turn: np.ndarray) -> np.ndarray:
    if turn[0, 1]:  # x goes to y: transpose first, then each axis has its own sign
        pixels = pixels.transpose(1, 0, 2)
        flip_x, flip_y = turn[1, 0] < 0, turn[0, 1] < 0
    else:
        flip_x, flip_y = turn[0, 0] < 0, turn[1, 1] < 0
    return pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


def _resize_rgb(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if pixels.shape[1::-1] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _cut(pixels: np.ndarray, crop: Crop) -> np.ndarray:
    (left, top), (width, height) = crop.corner, crop.size
    return pixels[top : top + height, left : left + width]
