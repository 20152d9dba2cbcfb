"""P6: one call of the 1.3B as sampling makes it, guidance's two branches together or apart, and the VAE.

Weights in bf16, no gradients. Keys and values of the text are kept from call to call, as `generate` does, and are not
in the time. diffusers' model and the VAE are measured where diffusers is here.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.instruments import Bench, Case, Line, distance, kernel_facts, kernel_problem, left_out, ratio, taken
from benchmarks.gpu.models import DiffusersModel, Input, build_model, config_of, draw_input, grid_of, has, parts_of
from wanloom.model.dit import TextKV, WanDiT

VELOCITY_BOUND = 5e-2  # of bf16 velocities against diffusers', which rounds more
FORWARD_GATE = 0.55
NO_DIFFUSERS = "diffusers is not here"


def cases(bench: Bench) -> Iterator[Case]:
    yield Case("P6 diffusers", 15 if has("diffusers") else 0, partial(peer, bench))
    yield Case("P6 forward", 60, partial(forward, bench))
    yield Case("P6 vae", 30 if has("diffusers") else 0, partial(vae, bench))


def ratios(bench: Bench) -> list[Line]:
    """Over ours."""
    out = ratio(bench, "P6 forward 32760 diffusers / wanloom", "P6 forward 32760 diffusers", "P6 forward 32760")
    for tokens, expect in ((390, "up to 1.9"), (32760, "1.0")):
        names = f"P6 guidance {tokens} apart", f"P6 guidance {tokens} together"
        out += ratio(bench, f"P6 guidance {tokens} apart / together", *names, expect=expect)
    return out


def ours(bench: Bench) -> WanDiT:
    return build_model(bench, config_of(bench, "1.3b"), "cudnn", torch.bfloat16, compile=bench.compile)


@torch.no_grad()
def peer(bench: Bench) -> Sequence[Line]:
    """diffusers' model, eager, attention as PyTorch chooses; its velocity is compared with ours, eager too."""
    name = "P6 forward 32760 diffusers"
    if not has("diffusers"):
        return left_out(name, NO_DIFFUSERS)
    config = config_of(bench, "1.3b")
    plain = build_model(bench, config, "flash", torch.bfloat16)
    model, data = DiffusersModel(bench, plain, recompute=False), draw_input(bench, config, [grid_of(bench, 32760)])
    off = distance(plain(data.pack, data.sigma), model(data.pack, data.sigma))
    problem = "" if off <= VELOCITY_BOUND else f"velocities differ by {off:.1%}"
    names = bench.kernels(lambda: model(data.pack, data.sigma))
    seconds = bench.time(lambda: model(data.pack, data.sigma), warm_up=2)
    return [taken(name, seconds, expect="0.8", facts={"off": off, **kernel_facts(names)}, problem=problem)]


@torch.no_grad()
def forward(bench: Bench) -> Sequence[Line]:
    """One sample, and guidance's two at two sizes."""
    model, config = ours(bench), config_of(bench, "1.3b")
    lines = []
    for tokens in (390, 32760):
        both = draw_input(bench, config, [grid_of(bench, tokens)] * 2)
        apart = with_text_kv(model, parts_of(both))
        together = with_text_kv(model, [both])
        off = distance(torch.cat(velocities(model, apart)), velocities(model, together)[0])
        problem = "" if off <= VELOCITY_BOUND else f"velocities differ by {off:.1%}"
        names = bench.kernels(partial(velocities, model, apart[:1]))
        kernels = kernel_problem(names, {bench.kernel("cudnn"), bench.kernel("efficient")})
        gate, expect = (FORWARD_GATE, "0.45-0.48") if tokens == 32760 else (None, "")
        one = bench.time(partial(velocities, model, apart[:1]), warm_up=2)
        lines.append(taken(f"P6 forward {tokens}", one, expect=expect, at_most=gate, problem=kernels))
        seconds = bench.time(partial(velocities, model, apart), warm_up=2)
        lines.append(taken(f"P6 guidance {tokens} apart", seconds))
        seconds = bench.time(partial(velocities, model, together), warm_up=2)
        lines.append(taken(f"P6 guidance {tokens} together", seconds, facts={"off": off}, problem=problem))
    return lines


def with_text_kv(model: WanDiT, packs: Sequence[Input]) -> list[tuple[Input, TextKV]]:
    """Each with the keys and values of its text."""
    return [(data, model.text_kv(data.pack)) for data in packs]


def velocities(model: nn.Module, packs: Sequence[tuple[Input, TextKV]]) -> list[torch.Tensor]:
    """Pack by pack."""
    return [model(data.pack, data.sigma, text_kv=text_kv) for data, text_kv in packs]


@torch.no_grad()
def vae(bench: Bench) -> Sequence[Line]:
    """Encoding and decoding 81 frames of 480 x 832 in bf16, random weights."""
    if not has("diffusers"):
        return left_out("P6 vae", NO_DIFFUSERS)
    from diffusers import AutoencoderKLWan

    small = {"base_dim": 8, "num_res_blocks": 1}
    frames, height, width = (5, 32, 32) if bench.toy else (81, 480, 832)
    with torch.device(bench.device):
        codec: Any = AutoencoderKLWan(**(small if bench.toy else {})).to(torch.bfloat16).eval()
    clip = bench.randn(1, 3, frames, height, width).clamp(-1, 1)
    latents = codec.encode(clip).latent_dist.mode()
    bench.reset_peak()
    encode = bench.time(lambda: codec.encode(clip).latent_dist.mode(), warm_up=1)
    facts = {"gib": bench.peak_gib()}
    bench.reset_peak()
    decode = bench.time(lambda: codec.decode(latents).sample, warm_up=1)
    return [
        taken("P6 vae encode", encode, facts=facts),
        taken("P6 vae decode", decode, facts={"gib": bench.peak_gib()}),
    ]
