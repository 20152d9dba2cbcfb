"""Mixes of images and clips, drawn as a data set would give them: tokens of each sample, 81 frames unless it is said.

In: a mix, a number of samples, a seed. Out: token counts. A clip of 240 x 416 has 8,190 tokens, of 480 x 832 32,760.
"""

import random
from collections.abc import Callable

IMAGE, CLIP_240P, CLIP_480P = 390, 8190, 32760

MIXES: dict[str, tuple[str, Callable[[random.Random], int]]] = {
    "A": ("images and 240p clips 50/50", lambda r: r.choice([IMAGE, CLIP_240P])),
    "B": ("images and 240p clips 90/10", lambda r: r.choices([IMAGE, CLIP_240P], [9, 1])[0]),
    "D": ("480p of 1 to 81 frames", lambda r: CLIP_480P // 21 * r.randint(1, 21)),
    "F": ("images, 240p, 480p clips 40/40/20", lambda r: r.choices([IMAGE, CLIP_240P, CLIP_480P], [4, 4, 2])[0]),
}


def draw(mix: str, samples: int, seed: int) -> list[int]:
    """Tokens of each sample."""
    r = random.Random(seed)
    return [MIXES[mix][1](r) for _ in range(samples)]
