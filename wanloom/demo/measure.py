"""What a clip of wanloom.demo.shapes shows, measured from its pixels: colour, shape and direction of motion.

In: frames `(F, H, W, 3)` uint8. Out: a Scene, or what could not be seen as None. The shape is the one whose outline of
equal area, laid on the blob's centre, overlaps it best; so a ragged edge or a lost corner does not decide alone.
"""

from dataclasses import dataclass

import numpy as np

from wanloom.demo.shapes import COLORS, DIRECTIONS, SHAPES, Scene, coverage

MIN_CONTRAST = 40  # of 255, between blob and background; less is noise
MAX_AREA = 0.5  # of the picture; more is texture, not a shape on a background
MAX_COLOR_ERROR = 100.0  # distance in RGB to the nearest of the six; gray is further from each, they are 139 apart
MIN_TRAVEL = 0.06  # of the picture's side; less is standing still
MIN_HALF = 0.1  # of the travel, done in each half of the clip; less is a jump at its start or end
MIN_OVERLAP = 0.6  # intersection over union with the best outline; less is no known shape


@dataclass(frozen=True)
class Seen:
    """The attributes found in a clip; None where nothing clear was found."""

    color: str | None
    shape: str | None
    direction: str | None

    def agrees(self, scene: Scene) -> tuple[bool, bool, bool]:
        """Whether colour, shape and direction are those of the scene."""
        return self.color == scene.color, self.shape == scene.shape, self.direction == scene.direction


def measure(frames: np.ndarray) -> Seen:
    """Find the one shape in frames `(F, H, W, 3)` uint8 on a plain background."""
    pictures = frames.astype(np.float64)
    background = np.median(pictures.reshape(-1, 3), axis=0)
    contrast = np.abs(pictures - background).max(axis=-1)
    peak = np.percentile(contrast, 99)
    if peak < MIN_CONTRAST:
        return Seen(None, None, None)
    masks = contrast > peak / 2
    rows, cols = np.mgrid[0 : frames.shape[1], 0 : frames.shape[2]] + 0.5
    areas = masks.sum(axis=(1, 2))
    if (areas == 0).any() or areas.mean() > MAX_AREA * masks[0].size:  # gone for a while, or no single blob
        return Seen(_color(pictures[contrast > 0.8 * peak]), None, None)
    centres = np.stack([(masks * rows).sum((1, 2)) / areas, (masks * cols).sum((1, 2)) / areas], axis=1)
    return Seen(
        _color(pictures[contrast > 0.8 * peak]),
        _shape(masks, areas, centres, rows, cols),
        _direction(centres, min(frames.shape[1:3])),
    )


def _color(pixels: np.ndarray) -> str | None:
    mean = pixels.mean(axis=0)
    error = {name: float(np.linalg.norm(mean - color)) for name, color in COLORS.items()}
    best = min(error, key=lambda name: error[name])
    return best if error[best] <= MAX_COLOR_ERROR else None


def _direction(centres: np.ndarray, side: int) -> str | None:
    ends = max(1, len(centres) // 5)
    start, end = centres[:ends].mean(axis=0), centres[-ends:].mean(axis=0)
    moved, axis = end - start, int(np.argmax(np.abs(end - start)))
    if np.abs(moved[axis]) < MIN_TRAVEL * side:
        return None
    half = (centres[len(centres) // 2] - start)[axis] / moved[axis]
    if not MIN_HALF <= half <= 1 - MIN_HALF:
        return None
    return max(DIRECTIONS, key=lambda name: float(np.dot(moved, DIRECTIONS[name])))


def _shape(masks: np.ndarray, areas: np.ndarray, centres: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> str | None:
    overlap = dict.fromkeys(SHAPES, 0.0)
    for mask, area, (row, col) in zip(masks, areas, centres, strict=True):
        for shape in SHAPES:
            # radius of equal area; a triangle's centre of mass lies a third of the radius below its middle
            radius = {"circle": np.sqrt(area / np.pi), "square": np.sqrt(area) / 2, "triangle": np.sqrt(area / 2)}[
                shape
            ]
            middle = row - radius / 3 if shape == "triangle" else row
            outline = coverage(shape, rows - middle, cols - col, radius) > 0.5
            overlap[shape] += (outline & mask).sum() / (outline | mask).sum() / len(masks)
    best = max(SHAPES, key=lambda shape: overlap[shape])
    return best if overlap[best] >= MIN_OVERLAP else None
