"""WanDiT and diffusers' transformer with the same random weights, and samples that both can take.

In: a config, a dtype, sizes and lengths of captions. Out: the two models, and for each a function that runs the samples
through it, forward alone or with the backward pass. The one decision: each is fed in its own users' way. Wanloom gets
one pack with captions as long as they are; diffusers one sample at a time, its caption padded with zeros to 512 states.

In bf16 the weights are what each side's own loading makes of them: `cast_weights` here, and there
`from_pretrained(torch_dtype=torch.bfloat16)`, which keeps norms, time embedding and tables in fp32.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from benchmarks.peer import build_diffusers, cast_as_loaded
from wanloom.formats.transformer import state_dict_as
from wanloom.model.dit import WanDiT, cast_weights
from wanloom.model.sequence import Pack, build_pack, grid_of, patchify
from wanloom.model.settings import DiTConfig

WIDTHS = {  # of one block of the published models
    "1.3B": {"dim": 1536, "ffn_dim": 8960, "num_heads": 12},
    "14B": {"dim": 5120, "ffn_dim": 13824, "num_heads": 40},
    "toy": {"dim": 48, "ffn_dim": 80, "num_heads": 2, "text_dim": 16, "freq_dim": 32},
}
# How far velocity and gradients may be apart, relative norms. At full width fp32 gradients differ by up to 9e-6. With
# captions of a few states it is 1e-4, by the rounding of diffusers and not of wanloom: against fp64, 1.4e-4 and 2e-5.
# Nearly all text keys are then one padded key 500 times over; the gradient of its logits is a difference of near equal
# numbers, its one rounding error is added up 500 times, and reaches all that queries and keys of the text come from.
# In bf16 the bias of self-attention's keys is 6e-2 apart (diffusers 6e-2 from fp64, wanloom 1e-2), everything else
# 1.4e-2: what it adds is nearly the same for all keys of a query, which the softmax does not see, so its gradient is a
# sum that nearly cancels.
BOUNDS = {torch.float32: (1e-5, 2e-5), torch.bfloat16: (1e-2, 1e-1)}
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Samples:
    """The same samples for both; the loss is the sum of the velocity times random weights."""

    pack: Pack
    sigma: Tensor
    weight: Tensor  # (T, C*4)
    latents: list[Tensor]  # (1, C, F, H, W)
    texts: list[Tensor]  # (1, 512, text_dim)
    weights: list[Tensor]  # (1, C, F, H, W)


def build_pair(width: str, blocks: int, dtype: torch.dtype = torch.float32) -> tuple[WanDiT, WanTransformer3DModel]:
    """Random weights, none at a value that hides a mistake."""
    config = DiTConfig(num_layers=blocks, **WIDTHS[width])
    ours = WanDiT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in ours.named_parameters():
            if "norm" in name or param.dim() == 1:
                param.normal_(float("norm" in name and name.endswith("weight")), 0.1, generator=generator)
            else:
                param.normal_(0, 0.5 if "modulation" in name else param.shape[-1] ** -0.5, generator=generator)
    theirs = build_diffusers(config)
    theirs.load_state_dict(state_dict_as(ours.state_dict(), "diffusers"))
    cast_weights(ours, dtype)
    cast_as_loaded(theirs, dtype)
    return ours, theirs


def draw_samples(config: DiTConfig, shapes: Sequence[Shape], text_lens: Sequence[int], dtype: torch.dtype) -> Samples:
    """`shapes` are frames, rows and columns of the latents; `text_lens` states of each caption."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    latents = [draw(config.in_channels, *shape) for shape in shapes]
    texts = [draw(length, config.text_dim) for length in text_lens]
    weights = [draw(config.out_channels, *shape) for shape in shapes]
    padded = [torch.cat([text, text.new_zeros(config.text_slots - len(text), config.text_dim)]) for text in texts]
    return Samples(
        pack=build_pack([patchify(x) for x in latents], [grid_of(x.shape) for x in latents], texts),
        sigma=torch.rand(len(shapes), generator=generator),
        weight=torch.cat([patchify(x) for x in weights]),
        latents=[x[None].to(dtype) for x in latents],
        texts=[x[None].to(dtype) for x in padded],
        weights=[x[None] for x in weights],
    )


def run_ours(model: WanDiT, samples: Samples, backward: bool = True) -> Callable[[], Tensor]:
    """Runs them all, and returns the velocity in tokens `(T, C*4)`."""

    def run() -> Tensor:
        model.zero_grad()
        velocity = model(samples.pack, samples.sigma)
        assert isinstance(velocity, Tensor)
        if backward:
            (velocity * samples.weight).sum().backward()
        return velocity.detach()

    return run


def run_theirs(model: nn.Module, samples: Samples, backward: bool = True) -> Callable[[], Tensor]:
    """The same through diffusers, sample by sample."""

    def run() -> Tensor:
        model.zero_grad()
        out = []
        for latents, text, sigma, weight in zip(
            samples.latents, samples.texts, samples.sigma, samples.weights, strict=True
        ):
            velocity = model(latents, 1000 * sigma[None], text, return_dict=False)[0]
            if backward:
                (velocity.float() * weight).sum().backward()
            out.append(patchify(velocity[0].detach().float()))
        return torch.cat(out)

    return run


def relative(value: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what is expected."""
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


def check_equal(
    ours: WanDiT, theirs: WanTransformer3DModel, samples: Samples, bounds: tuple[float, float] | None = None
) -> str:
    """Runs both once; asserts velocity and gradients within bounds (`BOUNDS`), and says how far apart they were."""
    value, expected = run_ours(ours, samples)(), run_theirs(theirs, samples)()
    output = relative(value, expected)
    found = state_dict_as({name: p.grad for name, p in ours.named_parameters() if p.grad is not None}, "diffusers")
    worst, name = max((relative(found[name], p.grad), name) for name, p in theirs.named_parameters())
    bounds = bounds or BOUNDS[samples.latents[0].dtype]
    assert output <= bounds[0] and worst <= bounds[1], (output, worst, name)
    return f"velocity within {output:.0e} and every gradient within {worst:.0e} of diffusers', relative norms"


class Nothing(nn.Module):
    """A block that does nothing, of the dtype of the others."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.zeros((), dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor, cond: object) -> Tensor:
        return x


def share_weights(model: WanDiT) -> WanDiT:
    """A second model on the same weights."""
    with torch.device("meta"):
        other = WanDiT(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    return other


def without_blocks(ours: WanDiT, theirs: WanTransformer3DModel) -> tuple[WanDiT, WanTransformer3DModel]:
    """What is outside of the blocks: embeddings and head, on the same weights."""
    dtype = ours.blocks["0"].ffn[0].weight.dtype  # pyright: ignore
    ours, theirs = copy.copy(share_weights(ours)), copy.copy(theirs)
    ours.blocks = nn.ModuleDict({"0": Nothing(dtype)})
    theirs._modules = {**theirs._modules, "blocks": nn.ModuleList()}
    return ours, theirs


def at_depth(whole: Sequence[float], outside: Sequence[float], blocks: int, depth: int) -> list[float]:
    """Seconds with `depth` blocks, round by round, from those with `blocks` and with none."""
    return [rest + (all_ - rest) * depth / blocks for all_, rest in zip(whole, outside, strict=True)]
