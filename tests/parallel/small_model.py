"""A model of two blocks with no parameter at a value that hides a mistake, and packs for it."""

import torch
from torch import Tensor

from wanloom.model.dit import WanDiT
from wanloom.model.sequence import Grid, Pack, build_pack
from wanloom.model.settings import DiTConfig

SMALL = DiTConfig(
    dim=48, ffn_dim=80, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=16, freq_dim=64, eps=1e-2
)  # an eps that shows: a norm that takes another one would be seen


def build_model(config: DiTConfig = SMALL) -> WanDiT:
    model = WanDiT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if "norm" in name:
                param.copy_(float(name.endswith("weight")) + 0.3 * noise)
            elif "modulation" in name:
                param.copy_(0.5 * noise)
            else:
                param.copy_(noise * (param.shape[-1] ** -0.5 if param.dim() > 1 else 0.2))
    return model


def draw_pack(
    grids: list[Grid], text_lens: list[int], level_lens: list[int] | None = None, *, seed: int
) -> tuple[Pack, Tensor, Tensor]:
    """A pack for SMALL, its noise levels, and a weight of the loss for every value."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randn(f * h * w, 16, generator=generator) for f, h, w in grids]
    texts = [torch.randn(length, SMALL.text_dim, generator=generator) for length in text_lens]
    pack = build_pack(tokens, grids, texts, level_lens)
    sigma = torch.rand(len(pack.level_lens), generator=generator)
    return pack, sigma, torch.randn(pack.tokens.shape, generator=generator)
