"""Models, inputs and steps for the GPU script: random weights and data, drawn on the device.

In: a size and how the model is to run. Out: a model, a pack with its target, one pass forward and backward. The one
decision: weights follow from the seed alone, so every variant of a model has the same, also in a later call. Matrices
are drawn so that activations keep their size, the head too, which starts at zero in training.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from benchmarks.gpu.instruments import Bench, kernel_facts
from wanloom.model.dit import WanDiT, cast_weights
from wanloom.model.sequence import Grid, Pack, build_pack, patchify, unpatchify
from wanloom.model.settings import DiTConfig
from wanloom.parallel.apply import apply_layout
from wanloom.parallel.mesh import ONE_PROCESS, Mesh
from wanloom.parallel.settings import ComputeConfig
from wanloom.variants import VARIANTS

GRIDS: dict[int, Grid] = {
    390: (1, 15, 26),  # an image of 240 x 416
    8190: (21, 15, 26),  # 81 frames of it
    32760: (21, 30, 52),  # 81 frames of 480 x 832
    37440: (24, 52, 30),  # what DFM publishes: latents of 24 x 104 x 60
    75600: (21, 45, 80),  # 81 frames of 720 x 1280
}
TOY_GRIDS: dict[int, Grid] = {390: (1, 2, 3), 8190: (3, 2, 3), 32760: (3, 4, 5), 37440: (4, 4, 4), 75600: (3, 5, 6)}
TEXT = 100  # states of a caption
PROBED = ("self_attn.q.weight", "self_attn.o.weight", "cross_attn.v.weight", "ffn.0.weight")
PROBES = 64  # values of each, in the first, middle and last block


def config_of(bench: Bench, name: str, layers: int | None = None) -> DiTConfig:
    """`14b` or `1.3b`, with fewer blocks if asked; in the toy small ones."""
    config = VARIANTS[f"wan2.1-t2v-{name}"].shape
    if bench.toy:
        small = {"dim": 96, "ffn_dim": 160, "num_heads": 2, "num_layers": 2, "text_dim": 24}
        return DiTConfig(**small)
    return config.model_copy(update={"num_layers": layers or config.num_layers})


def grid_of(bench: Bench, tokens: int) -> Grid:
    """The grid that stands for so many tokens."""
    return (TOY_GRIDS if bench.toy else GRIDS)[tokens]


def size_of(bench: Bench, tokens: int) -> int:
    """How many tokens it really has, in the toy too."""
    frames, rows, cols = grid_of(bench, tokens)
    return frames * rows * cols


@torch.no_grad()
def draw_weights(model: nn.Module, device: torch.device) -> None:
    """Random values for every parameter, in place."""
    generator = torch.Generator(device).manual_seed(0)
    for name, param in model.named_parameters():
        if param.dim() == 2:
            param.normal_(0, param.shape[1] ** -0.5, generator=generator)
        elif "modulation" in name:
            param.normal_(0, param.shape[-1] ** -0.5, generator=generator)
        else:
            param.normal_(0, 0.02, generator=generator)
            if "norm" in name and name.endswith("weight"):
                param.add_(1)


def build_model(
    bench: Bench, config: DiTConfig, kernel: str, dtype: torch.dtype = torch.float32, **options: Any
) -> WanDiT:
    """A WanDiT; `options` are settings of `compute`: recompute, compile."""
    with torch.device("meta"):
        model = WanDiT(config, bench.kernel(kernel))
    cast_weights(model, dtype)
    apply_layout(model, Mesh(ONE_PROCESS, bench.device), ComputeConfig(**options))
    model.to_empty(device=bench.device)
    draw_weights(model, bench.device)
    return model


class Input(NamedTuple):
    """A pack with what the model should answer."""

    pack: Pack
    sigma: Tensor
    target: Tensor
    grids: Sequence[Grid]


def draw_input(bench: Bench, config: DiTConfig, grids: Sequence[Grid], text: int = TEXT) -> Input:
    """Random samples, the noise levels spread over 0.2 to 0.8."""
    total, width = sum(f * r * c for f, r, c in grids), 4 * config.in_channels
    text = min(text, config.text_slots)
    states = bench.randn(len(grids) * text, config.text_dim, seed=1, dtype=torch.float32)
    tokens = bench.randn(total, width, seed=2, dtype=torch.float32).split([f * r * c for f, r, c in grids])
    pack = build_pack(tokens, grids, states.split(text))
    sigma = torch.linspace(0.2, 0.8, len(grids), device=bench.device)
    return Input(pack, sigma, bench.randn(total, width, seed=3, dtype=torch.float32), grids)


def parts_of(whole: Input) -> list[Input]:
    """Every sample as a pack of its own."""
    pack, first, out = whole.pack, 0, []
    tokens, texts = pack.tokens.split(pack.video_lens), pack.text.split(pack.text_lens)
    for i, grid in enumerate(whole.grids):
        alone = build_pack([tokens[i]], [grid], [texts[i]])
        out.append(Input(alone, whole.sigma[i : i + 1], whole.target[first : first + len(tokens[i])], [grid]))
        first += len(tokens[i])
    return out


def forward_backward(bench: Bench, model: nn.Module, packs: Sequence[Input]) -> Tensor:
    """Leave the gradients of the mean squared error over all packs, one after the other; returns that error.

    fp32 weights run under autocast, as in training; bf16 weights as they are.
    """
    model.zero_grad(set_to_none=True)
    bf16_weights = any(p.dtype == torch.bfloat16 for p in model.parameters())
    total, losses = sum(data.target.numel() for data in packs), []
    for data in packs:
        with torch.autocast(bench.device.type, dtype=torch.bfloat16, enabled=not bf16_weights):
            velocity = model(data.pack, data.sigma)
        loss = F.mse_loss(velocity, data.target, reduction="sum") / total
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def gradient_facts(model: nn.Module) -> dict[str, Any]:
    """The norm over all gradients, and values here and there of some: what a variant is compared by."""
    params = dict(model.named_parameters())
    names: dict[str, str] = getattr(model, "names", {name: name for name in params})
    last = max(int(name.split(".")[1]) for name in names if name.startswith("blocks."))
    picked = {}
    for number in sorted({0, last // 2, last}):
        for probed in PROBED:
            grad = params[names[f"blocks.{number}.{probed}"]].grad
            if grad is not None:
                picked[f"{number} {probed}"] = grad.flatten()[:: max(1, grad.numel() // PROBES)][:PROBES].tolist()
    norm = get_total_norm([p.grad for p in params.values() if p.grad is not None]).item()
    return {"grad_norm": norm, "gradient": picked}


def measure_step(
    bench: Bench, model: nn.Module, packs: Sequence[Input], update: Callable[[], object] = lambda: None
) -> tuple[dict[str, Any], list[float], list[str]]:
    """Facts (loss, gradient norm, kernels, peak memory), seconds and all kernels of a pass forward and backward.

    The first call compiles and gives loss and norm, the second is profiled, of the first pack alone: two of the three
    warm-up calls. `update` is timed with the pass.
    """
    run = partial(forward_backward, bench, model, packs)
    facts = {"loss": run().item()} | gradient_facts(model)
    names = bench.kernels(partial(forward_backward, bench, model, packs[:1]))
    bench.reset_peak()
    seconds = bench.time(lambda: (run(), update()), warm_up=1)
    return facts | {"gib": bench.peak_gib(), **kernel_facts(names)}, seconds, names


def has(package: str) -> bool:
    """Whether a package is here; none is needed."""
    return importlib.util.find_spec(package) is not None


class DiffusersModel(nn.Module):
    """diffusers' own model under the signature of ours: one sample, its text padded to the slots with zeros.

    Weights in bf16 as `from_pretrained` casts them, in training too: under autocast its norms are slower.
    """

    def __init__(self, bench: Bench, weights: WanDiT, recompute: bool) -> None:
        super().__init__()
        from benchmarks.peer import build_diffusers, cast_as_loaded
        from wanloom.formats.transformer import rename, state_dict_as

        self.slots = weights.config.text_slots
        with torch.device(bench.device):
            self.model = build_diffusers(weights.config)
        self.model.load_state_dict(state_dict_as(weights.state_dict(), "diffusers"), strict=True)
        self.names = {name: f"model.{rename(name, 'diffusers')}" for name, _ in weights.named_parameters()}
        cast_as_loaded(self.model, torch.bfloat16)
        if recompute:
            self.model.enable_gradient_checkpointing()
            self.model.train()

    def forward(self, pack: Pack, sigma: Tensor) -> Tensor:
        """Velocity tokens `(T, C*4)` of the only sample."""
        frames, rows, cols = (int(n) + 1 for n in pack.positions.amax(0))
        latents = unpatchify(pack.tokens, (frames, rows, cols))[None]
        text = F.pad(pack.text, (0, 0, 0, self.slots - len(pack.text)))[None]
        out = self.model(latents.bfloat16(), 1000 * sigma, text.bfloat16(), return_dict=False)[0]
        return patchify(out[0]).float()
