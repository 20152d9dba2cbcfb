"""P4: samples of unequal size in one pass, four ways; and text without its padding.

1.3B width, 8 blocks, compiled, full recomputation, one pass forward and backward over all samples. `padded`: batches
of four in the order of the data, every sample as long as the longest of its batch. `loop`: one sample after the other.
`packed`: one sequence, cuDNN sample by sample. `varlen`: the same with PyTorch's kernel for packed samples. The ratio
of padded to packed is set against that of the FLOPs of these very samples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from benchmarks.gpu.instruments import (
    Bench,
    Case,
    Line,
    difference_problem,
    distance,
    kernel_problem,
    left_out,
    ratio,
    taken,
)
from benchmarks.gpu.models import (
    Input,
    build_model,
    config_of,
    draw_input,
    grid_of,
    measure_step,
    parts_of,
    size_of,
)
from wanloom.model.dit import WanDiT
from wanloom.model.flops import train_flops

LAYERS = 8
BATCH = 4
IMAGE, SHORT, LONG = 390, 8190, 32760
MIXES = {  # in the order of the data; about 33 thousand tokens, F 50 thousand
    "A": (IMAGE, SHORT) * 4,
    "B": ((IMAGE,) * 9 + (SHORT,)) * 3,
    "F": (IMAGE, SHORT, LONG, IMAGE, SHORT),
}
WAYS = ("padded", "loop", "packed", "varlen")
SHARE = 0.85  # of the ratio of FLOPs
IMAGES, WORDS = 64, 80
FOLD_BOUND = 2e-2  # of velocities, bf16
LOOP_GATE = 2.0


def samples_of(bench: Bench, mix: str) -> tuple[int, ...]:
    """The tokens of every sample; the toy takes fewer of them."""
    return MIXES[mix][-6:] if bench.toy else MIXES[mix]


def cases(bench: Bench) -> Iterator[Case]:
    for mix in MIXES:
        for way in WAYS:
            yield Case(f"P4 {mix} {way}", cost(bench, mix, way), partial(measure, bench, mix, way))
    for way in ("loop", "unfolded", "packed"):
        yield Case(f"P4 images {way}", 12, partial(images, bench, way))


def cost(bench: Bench, mix: str, way: str) -> float:
    """Seconds on an H200."""
    sizes = padded(MIXES[mix]) if way == "padded" else MIXES[mix]
    config = config_of(bench, "1.3b", LAYERS)
    fresh = (mix, way) in (("A", "padded"), ("A", "loop"), ("A", "varlen"))  # others find their graphs on the disk
    return 8 * sum(train_flops(config, size) for size in sizes) / 250e12 + (20 if fresh else 8)


def ratios(bench: Bench) -> list[Line]:
    """Over the packed one; units are seconds, so peers over packed are speed-ups."""
    out = []
    config = config_of(bench, "1.3b", LAYERS)
    for mix in MIXES:
        sizes = samples_of(bench, mix)
        real = [[size_of(bench, size) for size in some] for some in (padded(sizes), sizes)]
        flops = [sum(train_flops(config, size) for size in some) for some in real]
        gate, expect = SHARE * flops[0] / flops[1], f"{flops[0] / flops[1]:.2f} by FLOPs"
        for way in ("padded", "loop", "varlen"):
            bound = {"at_least": gate, "expect": expect} if way == "padded" else {}
            out += ratio(bench, f"P4 {mix} {way} / packed", f"P4 {mix} {way}", f"P4 {mix} packed", **bound)
    names = "P4 images loop", "P4 images packed"
    out += ratio(bench, "P4 images loop / packed", *names, at_least=LOOP_GATE)
    names = "P4 images unfolded", "P4 images packed"
    return out + ratio(bench, "P4 images unfolded / packed", *names, expect="1.15-1.2")


def padded(sizes: Sequence[int]) -> list[int]:
    """Every sample as long as the longest of its batch."""
    batches = [sizes[i : i + BATCH] for i in range(0, len(sizes), BATCH)]
    return [max(some) for some in batches for _ in some]


class Varlen(nn.Module):
    """Self-attention of one known pack by PyTorch's kernel; the lengths that the model gives are not read."""

    def __init__(self, lens: Sequence[int], device: torch.device) -> None:
        super().__init__()
        ends = torch.tensor([0, *lens]).cumsum(0)
        self.ends, self.longest = ends.to(device, torch.int32), max(lens)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        """`(T, H, D)` each."""
        return varlen_attn(q, k, v, self.ends, self.ends, self.longest, self.longest)  # pyright: ignore


def build(bench: Bench) -> WanDiT:
    return build_model(bench, config_of(bench, "1.3b", LAYERS), "cudnn", recompute="full", compile=bench.compile)


def timed(bench: Bench, name: str, model: WanDiT, packs: Sequence[Input], plain: str = "", kernel: str = "") -> Line:
    """Seconds of all packs; loss and gradient norm are those of one mean over them, compared with those of `plain`.

    Self-attention must run by `kernel`, if one is said.
    """
    facts, seconds, names = measure_step(bench, model, packs)
    facts["tokens"] = sum(len(data.target) for data in packs)
    problems = []
    if (found := bench.found.get(plain)) and found.value:
        problems.append(difference_problem(facts, found.facts))
    if kernel:
        problems.append(kernel_problem(names, {bench.kernel(kernel), bench.kernel("efficient")}))
    return taken(name, seconds, facts=facts, problem=", ".join(filter(None, problems)))


def measure(bench: Bench, mix: str, way: str) -> Sequence[Line]:
    """One mix in one way."""
    name = f"P4 {mix} {way}"
    if way == "varlen" and not bench.on_gpu:
        return left_out(name, "runs on CUDA alone")
    model, config = build(bench), config_of(bench, "1.3b", LAYERS)
    if way == "padded":
        sizes = padded(samples_of(bench, mix))
        grids = [grid_of(bench, size) for size in sizes]
        batches = [draw_input(bench, config, grids[i : i + BATCH]) for i in range(0, len(grids), BATCH)]
        return [timed(bench, name, model, batches)]
    whole = draw_input(bench, config, [grid_of(bench, size) for size in samples_of(bench, mix)])
    if way == "varlen":
        for block in model.blocks.values():
            block.self_attn.attend = Varlen(whole.pack.video_lens, bench.device)  # pyright: ignore
    if way == "loop":
        return [timed(bench, name, model, parts_of(whole))]
    return [timed(bench, name, model, [whole], f"P4 {mix} loop", "flash" if way == "varlen" else "cudnn")]


def images(bench: Bench, way: str) -> Sequence[Line]:
    """64 images with captions of 80 states; `unfolded` writes the unused text slots out, as other trainers do."""
    model, config = build(bench), config_of(bench, "1.3b", LAYERS)
    whole = draw_input(bench, config, [grid_of(bench, IMAGE)] * (4 if bench.toy else IMAGES), WORDS)
    name, plain = f"P4 images {way}", "P4 images loop"
    if way == "loop":
        return [timed(bench, name, model, parts_of(whole))]
    if way == "packed":
        return [timed(bench, name, model, [whole], plain, "cudnn")]
    filled = with_slots(whole, config.text_slots)
    with torch.no_grad(), torch.autocast(bench.device.type, dtype=torch.bfloat16):
        off = distance(model(filled.pack, whole.sigma), model(whole.pack, whole.sigma))
    line = timed(bench, name, model, [filled], plain)
    said = "" if off <= FOLD_BOUND else f"velocities are off by {off:.1%}"
    return [replace(line, problem=", ".join(filter(None, [line.problem, said])), facts={**line.facts, "off": off})]


def with_slots(data: Input, slots: int) -> Input:
    """Every caption filled up with zeros to all text slots."""
    lens = data.pack.text_lens
    filled = torch.cat([torch.cat([x, x.new_zeros(slots - len(x), x.shape[1])]) for x in data.pack.text.split(lens)])
    return data._replace(pack=replace(data.pack, text=filled, text_lens=(slots,) * len(lens)))
