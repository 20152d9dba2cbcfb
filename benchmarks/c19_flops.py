"""C19: how far the FLOPs that wanloom counts are from what others count; exact, no time is taken.

Counted by: torch's FlopCounterMode on diffusers' WanTransformer3DModel on the meta device, at full size; the published
model TFLOP/s over tokens/s of NVIDIA's DFM (Wan 14B, 37,440 tokens); the golden number of MaxDiffusion's test (14B at
720p). All are three forward passes with full attention and 512 text slots.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Row, main
from benchmarks.peer import build_diffusers
from wanloom.model.flops import forward_flops, train_flops
from wanloom.model.settings import DiTConfig
from wanloom.variants import VARIANTS

DFM_PER_TOKEN = 165.907e9  # at 37,440 tokens
MAXDIFFUSION_720P = 19_573e12


def counted_forward(config: DiTConfig, latents: tuple[int, int, int]) -> int:
    """What torch counts in one forward pass of diffusers' model on latents of (frames, height, width)."""
    with torch.device("meta"):
        model = build_diffusers(config)
        inputs = torch.empty(1, config.in_channels, *latents), torch.empty(1), torch.empty(1, 512, config.text_dim)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


def measure(toy: bool) -> list[Row]:
    """The relative distance of each count."""
    small, large = VARIANTS["wan2.1-t2v-1.3b"].shape, VARIANTS["wan2.1-t2v-14b"].shape
    shapes = {"480x832, 81 frames": (21, 60, 104), "240x416, an image": (1, 30, 52)}
    if toy:
        del shapes["480x832, 81 frames"]
    rows = []
    for name, (frames, height, width) in shapes.items():
        counted = counted_forward(small, (frames, height, width))
        off = abs(forward_flops(small, frames * height * width // 4) / counted - 1)
        rows.append(Row("C19", f"1.3B, {name}: off FlopCounterMode on diffusers", "", [off], target=0.01, at_most=True))
    off = abs(train_flops(large, 37_440) / 37_440 / DFM_PER_TOKEN - 1)
    rows.append(
        Row("C19", "14B, 37,440 tokens: off DFM's published FLOPs per token", "", [off], target=0.01, at_most=True)
    )
    off = abs(train_flops(large, 75_600) / MAXDIFFUSION_720P - 1)
    rows.append(
        Row("C19", "14B, 720p, 81 frames: off MaxDiffusion's 19,573 TFLOP", "", [off], target=0.01, at_most=True)
    )
    return rows


if __name__ == "__main__":
    main(__spec__, measure)
