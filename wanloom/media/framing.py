"""Which part of a picture becomes a sample, and of what size.

In: the displayed size of a file (rotation and pixel shape applied) and the user's wish. Out: a `Crop`: the size to
resize to, the window to cut, in whole pixels. The one decision: a picture is never squashed to fit. It is resized by
one factor and cut (`center`, `random`), or fitted whole inside the size and rounded to whole tokens (`none`), which
bends it by the rounding alone, and that is recorded. A side that is too many times the other one is refused before
anything is resized: what covers a size would grow with it without end.
"""

import hashlib
import math
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from wanloom.config import Config
from wanloom.media.decoding import MediaError

DEFAULT_AREA = 480 * 832


class FramingConfig(Config):
    """Sizes in pixels. Without height and width every file keeps its aspect inside `max_area`."""

    height: int | None = Field(default=None, description="of every sample, in pixels")
    width: int | None = Field(default=None, description="of every sample, in pixels")
    crop: Literal["center", "random", "none"] = Field(default="center", description="what to do with other aspects")
    keep_aspect: bool = Field(
        default=False, description="each file keeps its aspect, in as many pixels as `height` times `width`"
    )
    max_area: int | None = Field(
        default=None, description=f"most pixels of a picture ({DEFAULT_AREA}, which is 832x480)"
    )
    max_aspect: float = Field(
        default=20.0, description="a picture whose longer side is more than X times the shorter one is dropped"
    )

    @model_validator(mode="after")
    def _check(self) -> "FramingConfig":
        if (self.height is None) != (self.width is None):
            raise ValueError("`height` and `width` belong together; for sizes of any aspect give `max_area` instead")
        if self.max_area is not None and self.height is not None and not self.keep_aspect:
            raise ValueError("`max_area` has no effect beside `height` and `width`: leave one out")
        if not 1 <= self.max_aspect <= 1000:
            raise ValueError(f"`max_aspect={self.max_aspect:g}` is not between 1 and 1000: a longer by a shorter side")
        if self.keep_aspect and self.height is None:
            raise ValueError("without `height` and `width` every file keeps its aspect: leave `keep_aspect` out")
        if self.keep_aspect and self.max_area is not None:
            raise ValueError("with `keep_aspect` give `max_area` or `height` and `width` (their area counts), not both")
        return self

    @property
    def area(self) -> int | None:
        """The largest area when files keep their aspect, None when all get one size."""
        if self.height is None or self.width is None:
            return self.max_area or DEFAULT_AREA
        return self.height * self.width if self.keep_aspect else None


class Crop(NamedTuple):
    """Resize to `resized`, then cut the window of `size` at `corner`; all are (horizontal, vertical)."""

    resized: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]


def choose_crop(width: float, height: float, config: FramingConfig, grid: int, seed: int, key: str) -> Crop:
    """The crop of a picture displayed at `width` x `height`; `seed` and `key` place a random crop.

    Sides are multiples of `grid`, the pixels of a token.
    Raises MediaError when a picture is too narrow to be fitted without squashing, or beyond `max_aspect`.
    """
    aspect = max(width, height) / min(width, height)
    if aspect > config.max_aspect:
        raise MediaError(
            "too narrow",
            f"{width:.0f}x{height:.0f}, one side {aspect:.2f} times the other, is beyond "
            f"`max_aspect={config.max_aspect:g}`",
        )
    if config.area is not None:
        size = fit_area(width, height, config.area, grid)
    else:
        assert config.width is not None and config.height is not None
        size = (config.width, config.height)
        if config.crop == "none":
            size = fit_inside(width, height, size, grid)
    if config.crop == "none":
        return Crop(size, (0, 0), size)
    scale = max(size[0] / width, size[1] / height)
    resized = (max(size[0], round(width * scale)), max(size[1], round(height * scale)))
    slack = (resized[0] - size[0], resized[1] - size[1])
    if config.crop == "center":
        return Crop(resized, (slack[0] // 2, slack[1] // 2), size)
    draw = hashlib.blake2b(f"crop:{seed}:{key}".encode(), digest_size=16).digest()
    across, down = int.from_bytes(draw[:8], "little"), int.from_bytes(draw[8:], "little")
    return Crop(resized, (across % (slack[0] + 1), down % (slack[1] + 1)), size)


def fit_inside(width: float, height: float, box: tuple[int, int], grid: int) -> tuple[int, int]:
    """The largest size on the grid inside `box` with the picture's aspect, up to the rounding."""
    scale = min(box[0] / width, box[1] / height)
    sides = (width * scale, height * scale)
    _check_narrow(width, height, sides, grid)
    return _nearest(sides[0], grid), _nearest(sides[1], grid)


def fit_area(width: float, height: float, area: int, grid: int) -> tuple[int, int]:
    """The size on the grid closest in aspect with at most `area` pixels; pictures are not enlarged beyond the grid."""
    scale = min(1.0, math.sqrt(area / (width * height)))
    sides = (width * scale, height * scale)
    _check_narrow(width, height, sides, grid)
    options = [
        (across, down)
        for across in (_below(sides[0], grid), _below(sides[0], grid) + grid)
        for down in (_below(sides[1], grid), _below(sides[1], grid) + grid)
        if across * down <= area
    ]
    if scale == 1.0:  # a small picture: only down to the grid, never up
        options = [o for o in options if o[0] <= max(grid, width) and o[1] <= max(grid, height)]
    if not options:  # the short side is one token already
        raise MediaError(
            "too narrow", f"{width:.0f}x{height:.0f} has no size in steps of {grid} within `max_area={area}`"
        )
    return min(options, key=lambda o: (abs(math.log(o[0] / o[1] * height / width)), -o[0] * o[1]))


def aspect_change(width: float, height: float, crop: Crop) -> float:
    """By how much the picture is bent: 0.01 means it became 1% wider than it should be."""
    return crop.resized[0] / crop.resized[1] * height / width - 1


def _below(side: float, grid: int) -> int:
    return max(grid, int(side + 1e-6) // grid * grid)


def _nearest(side: float, grid: int) -> int:
    return max(grid, int(side / grid + 0.5) * grid)


def _check_narrow(width: float, height: float, sides: tuple[float, float], grid: int) -> None:
    if min(sides) < grid <= min(width, height):
        raise MediaError(
            "too narrow",
            f"{width:.0f}x{height:.0f} would become {sides[0]:.0f}x{sides[1]:.0f}, less than {grid} pixels",
        )
