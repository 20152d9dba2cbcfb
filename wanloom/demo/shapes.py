"""Small captioned clips of one moving shape, for the demo, the tests and the tiny pipeline.

In: a seed and an index. Out: RGB frames `(F, H, W, 3)` uint8 and the words that describe them. Everything about a clip
is a function of (seed, index), so a clip can be made again anywhere. Twelve of the 72 colour-shape-direction
combinations are held out: every single word is seen in training, but never together.
"""

from dataclasses import dataclass

import numpy as np

COLORS = {
    "red": (225, 45, 45),
    "green": (45, 190, 65),
    "blue": (50, 85, 235),
    "yellow": (240, 215, 50),
    "purple": (185, 60, 215),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # rows, columns
PHRASES = {"left": "to the left", "right": "to the right", "up": "upwards", "down": "downwards"}
TEMPLATES = (
    "A {color} {shape} moves {phrase} across a dark background.",
    "On a dark background, a {color} {shape} drifts {phrase}.",
    "A short clip of a {color} {shape} that slides {phrase}.",
    "The {shape} is {color} and it travels {phrase}.",
    "Something {color} in the form of a {shape} is going {phrase}.",
    "A {shape} painted {color} glides slowly {phrase}.",
)
EDGE = 2.0  # pixels over which a shape fades into the background, about what a lens does


@dataclass(frozen=True)
class Scene:
    """What a clip shows."""

    color: str
    shape: str
    direction: str

    def caption(self, template: int) -> str:
        """The sentence for this scene in one of the `TEMPLATES`."""
        return TEMPLATES[template % len(TEMPLATES)].format(
            color=self.color, shape=self.shape, phrase=PHRASES[self.direction]
        )


def _is_held_out(color: int, shape: int, direction: int) -> bool:
    return (color + 2 * shape + 3 * direction) % len(COLORS) == 0


SCENES = tuple(Scene(c, s, d) for c in COLORS for s in SHAPES for d in DIRECTIONS)
HELD_OUT = tuple(
    Scene(c, s, d)
    for i, c in enumerate(COLORS)
    for j, s in enumerate(SHAPES)
    for k, d in enumerate(DIRECTIONS)
    if _is_held_out(i, j, k)
)
SEEN = tuple(scene for scene in SCENES if scene not in HELD_OUT)


def coverage(shape: str, rows: np.ndarray, cols: np.ndarray, radius: float) -> np.ndarray:
    """Soft-edged mask in [0, 1] of a shape centred on 0, at pixel offsets `rows`, `cols` `(H, W)`.

    The square and the triangle are as wide as the circle: 2 * radius.
    """
    if shape == "circle":
        distance = np.hypot(rows, cols) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(rows), np.abs(cols)) - radius
    else:  # a triangle that points up: apex at -radius, base at +radius
        slope = (2 * np.abs(cols) - (rows + radius)) / np.sqrt(5)
        distance = np.maximum(slope, rows - radius)
    return np.clip(0.5 - distance / EDGE, 0, 1)


def render(scene: Scene, rng: np.random.Generator, frames: int = 17, height: int = 64, width: int = 64) -> np.ndarray:
    """Frames `(F, H, W, 3)` uint8 of one shape that crosses a dark background at constant speed."""
    side = min(height, width)
    radius = rng.uniform(0.17, 0.2) * side
    step = np.array(DIRECTIONS[scene.direction], dtype=np.float64)
    extent = np.array([height, width], dtype=np.float64)
    room = extent - 2 * radius - 2  # where the centre may be, so that the shape never leaves the picture
    travel = rng.uniform(0.32 * side, side - 2 * radius - 2)
    low, high = radius + 1, radius + 1 + room
    start = rng.uniform(low, high)
    axis = int(np.argmax(np.abs(step)))
    slack = rng.uniform(0, room[axis] - travel)
    start[axis] = low + slack if step[axis] > 0 else high[axis] - slack
    background = rng.uniform(20, 40)
    grid = np.mgrid[0:height, 0:width] + 0.5
    color = np.array(COLORS[scene.color], dtype=np.float64)
    out = np.empty((frames, height, width, 3), dtype=np.uint8)
    for i in range(frames):
        centre = start + step * travel * (i / max(frames - 1, 1))
        mask = coverage(scene.shape, grid[0] - centre[0], grid[1] - centre[1], radius)[..., None]
        out[i] = np.round(background * (1 - mask) + color * mask)
    return out


def build_clip(
    seed: int,
    index: int,
    scenes: tuple[Scene, ...] = SEEN,
    frames: int = 17,
    height: int = 64,
    width: int = 64,
) -> tuple[np.ndarray, Scene, str]:
    """Clip number `index`: frames `(F, H, W, 3)` uint8, its scene and its caption. Scenes take turns."""
    rng = np.random.default_rng([seed, index])
    scene = scenes[index % len(scenes)]
    return (
        render(scene, rng, frames, height, width),
        scene,
        scene.caption(int(rng.integers(len(TEMPLATES)))),
    )
