"""What the model is compared with: diffusers' transformer, one sample at a time, the text padded with zeros."""

from typing import NamedTuple

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from wanloom.formats.transformer import state_dict_as
from wanloom.model.dit import WanDiT
from wanloom.model.sequence import Pack, build_pack, grid_of, patchify
from wanloom.model.settings import DiTConfig

SMALL = DiTConfig(
    dim=48, ffn_dim=80, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=16, freq_dim=64
)


class Samples(NamedTuple):
    latents: list[Tensor]
    texts: list[Tensor]
    sigma: Tensor
    weights: list[Tensor]  # random weights of the loss, in token layout
    pack: Pack


def randomise(model: torch.nn.Module, seed: int) -> None:
    """No parameter at a value that hides a mistake: no zero head, no norm of ones, no small table."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if "norm" in name:
                param.copy_(float(name.endswith("weight")) + 0.3 * noise)
            elif "modulation" in name:
                param.copy_(0.5 * noise)
            else:
                param.copy_(noise * (param.shape[-1] ** -0.5 if param.dim() > 1 else 0.2))


def build_model(config: DiTConfig, seed: int = 0) -> WanDiT:
    model = WanDiT(config)
    randomise(model, seed)
    return model


def build_reference(model: WanDiT) -> WanTransformer3DModel:
    """The diffusers model with the same weights."""
    config = model.config
    reference = WanTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.dim // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        eps=config.eps,
    )
    state = {key: value.clone() for key, value in state_dict_as(model.state_dict(), "diffusers").items()}
    reference.load_state_dict(state)
    return reference


def draw_samples(
    config: DiTConfig, shapes: list[tuple[int, int, int]], text_lens: list[int], seed: int, levels: int = 1
) -> Samples:
    """`shapes` are frames, height and width of the latents. With two levels the first frame of a video has its own."""
    generator = torch.Generator().manual_seed(seed)
    latents = [torch.randn(config.in_channels, *shape, generator=generator) for shape in shapes]
    texts = [torch.randn(length, config.text_dim, generator=generator) for length in text_lens]
    tokens = [patchify(x) for x in latents]
    lens = [len(x) for x in tokens]
    if levels == 2:
        firsts = [len(x) // frames for x, (frames, _, _) in zip(tokens, shapes, strict=True)]
        lens = [n for x, first in zip(tokens, firsts, strict=True) for n in (first, len(x) - first) if n]
    sigma = torch.rand(len(lens), generator=generator)
    weights = [torch.randn(len(x), config.out_channels * 4, generator=generator) for x in tokens]
    pack = build_pack(tokens, [grid_of(x.shape) for x in latents], texts, lens)
    return Samples(latents, texts, sigma, weights, pack)


def run_reference(reference: WanTransformer3DModel, samples: Samples, slots: int) -> list[Tensor]:
    """Velocity tokens of each sample alone: at its noise level, or at that of each token where there are several."""
    out, pack = [], samples.pack
    of_tokens = samples.sigma.repeat_interleave(torch.tensor(pack.level_lens)).split(pack.video_lens)
    for latents, text, levels in zip(samples.latents, samples.texts, of_tokens, strict=True):
        sigma = levels if len(levels.unique()) > 1 else levels[0]
        padded = torch.cat([text, text.new_zeros(slots - len(text), text.shape[1])])
        dtype = reference.dtype
        velocity = reference(latents[None].to(dtype), 1000 * sigma[None], padded[None].to(dtype)).sample[0]
        out.append(patchify(velocity))
    return out


def loss(velocity: list[Tensor], samples: Samples) -> Tensor:
    return sum(((v * w).sum() for v, w in zip(velocity, samples.weights, strict=True)), torch.zeros(()))


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


def gradients(model: WanDiT) -> dict[str, Tensor]:
    """By diffusers' names, in its shapes."""
    return state_dict_as({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, "diffusers")
