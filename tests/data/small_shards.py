"""Small shards."""

import torch

SHAPES = [(16, 3, 4, 6), (16, 1, 8, 8), (16, 2, 2, 4), (16, 5, 4, 4)]


def draw(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(i)
    latents = torch.randn(SHAPES[i % len(SHAPES)], generator=generator).bfloat16()
    return latents, torch.randn(3 + 2 * i, 8, generator=generator).bfloat16()


def named(i: int) -> dict[str, torch.Tensor]:
    return dict(zip(("latents", "text"), draw(i), strict=True))
