"""Mixes of images and clips, drawn as a data set would give them: tokens of each sample, 81 frames unless it is said.

In: a mix, a number of samples, a seed. Out: token counts. A clip of 240 x 416 has 8,190 tokens, of 480 x 832 32,760.
"""

import random

IMAGE, CLIP_240P, CLIP_480P = 390, 8190, 32760

MIXES: dict[str, tuple[str, list[int]]] = {  # tokens, each as likely as the next
    "A": ("images and 240p clips 50/50", [IMAGE, CLIP_240P]),
    "B": ("images and 240p clips 90/10", [IMAGE] * 9 + [CLIP_240P]),
    "D": ("480p of 1 to 81 frames", [CLIP_480P // 21 * frames for frames in range(1, 22)]),
    "F": ("images, 240p, 480p clips 40/40/20", [IMAGE] * 2 + [CLIP_240P] * 2 + [CLIP_480P]),
}


def draw(mix: str, samples: int, seed: int) -> list[int]:
    """Tokens of each sample."""
    return random.Random(seed).choices(MIXES[mix][1], k=samples)
