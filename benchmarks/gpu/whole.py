"""P3: whole models, a whole step: forward, backward and AdamW.

The 1.3B at 480p in fp32 states under autocast, as `wanloom train` has it, without clipping. The 14B at 480p with its
weights in bf16 and frozen but for norms and modulation tables: what a LoRA costs without its own small products.
(wanloom has no adapters yet.) The 14B at 240p, every weight, gradient and moment in bf16.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks.gpu.instruments import Bench, Case, Line, difference_problem, kernel_problem, taken
from benchmarks.gpu.models import (
    Input,
    build_model,
    config_of,
    draw_input,
    grid_of,
    measure_step,
)
from wanloom.model.dit import WanDiT, keeps_fp32
from wanloom.model.flops import forward_flops, train_flops
from wanloom.model.settings import DiTConfig
from wanloom.train.optim import AdamW
from wanloom.train.settings import OptimizerConfig

SMALL = {"cheap": ("1.75-1.8 s, 68 GiB", 2.1), "none": ("1.75 s, 102 GiB", 2.1)}
GIB = 135.0
LR = 1e-5


def cases(bench: Bench) -> Iterator[Case]:
    for recompute in SMALL:
        yield Case(f"P3 1.3b 32760 {recompute}", 25, partial(small, bench, recompute))
    yield Case("P3 14b 8190 bf16", 45, partial(large, bench))
    yield Case("P3 14b 32760 frozen", 80, partial(frozen, bench))


def small(bench: Bench, recompute: str) -> Sequence[Line]:
    """A full step of the 1.3B."""
    config = config_of(bench, "1.3b")
    model = build_model(bench, config, "cudnn", recompute=recompute, compile=bench.compile)
    name, (expect, gate) = f"P3 1.3b 32760 {recompute}", SMALL[recompute]
    lines = train(bench, name, model, draw_input(bench, config, [grid_of(bench, 32760)]), expect, gate)
    others = [bench.found[f"P3 1.3b 32760 {other}"] for other in SMALL if f"P3 1.3b 32760 {other}" in bench.found]
    problems = [difference_problem(lines[0].facts, other.facts) for other in others if other.value]
    return with_problems(lines, problems)


def large(bench: Bench) -> Sequence[Line]:
    """A full step of the 14B, all of it in bf16."""
    config = config_of(bench, "14b")
    options = {"recompute": "attention", "compile": bench.compile}
    model = build_model(bench, config, "cudnn", torch.bfloat16, **options)
    data = draw_input(bench, config, [grid_of(bench, 8190)])
    return train(bench, "P3 14b 8190 bf16", model, data, "1.6 s + AdamW, 90-115 GiB", None)


def frozen(bench: Bench) -> Sequence[Line]:
    """A step of the 14B of which little is trained."""
    config = config_of(bench, "14b")
    options = {"recompute": "attention", "compile": bench.compile}
    model = build_model(bench, config, "cudnn", torch.bfloat16, **options)
    for name, param in model.named_parameters():
        param.requires_grad_(name.startswith("blocks.") and keeps_fp32(name))
    data = draw_input(bench, config, [grid_of(bench, 32760)])
    return train(bench, "P3 14b 32760 frozen", model, data, "9 s, 61 GiB", None)


def train(bench: Bench, name: str, model: WanDiT, data: Input, expect: str, at_most: float | None) -> list[Line]:
    """Seconds and memory of a step."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = AdamW(trained, OptimizerConfig(lr=LR))
    found, seconds, names = measure_step(bench, model, [data], partial(optimizer.step, LR))
    flops = needed_flops(model.config, sum(data.pack.video_lens), len(trained) < len(list(model.parameters())))
    found["model_tflops"] = flops / statistics.median(seconds) / 1e12
    problems = [kernel_problem(names, {bench.kernel("cudnn"), bench.kernel("efficient")})]
    problems += [] if math.isfinite(found["loss"]) else ["the loss is not finite"]
    lines = [taken(name, seconds, expect=expect, at_most=at_most, facts=found)]
    if found["gib"] is not None:
        lines.append(Line(f"{name} memory", found["gib"], "GiB", expect=expect, at_most=GIB))
    return with_problems(lines, problems)


def needed_flops(config: DiTConfig, tokens: int, is_frozen: bool) -> int:
    """Of a step; frozen weights need no gradients: two passes' worth for every product, three for attention."""
    if not is_frozen:
        return train_flops(config, tokens)
    attention = config.num_layers * 4 * tokens * config.dim * (tokens + config.text_slots)
    return 2 * forward_flops(config, tokens) + attention


def with_problems(lines: list[Line], problems: Sequence[str]) -> list[Line]:
    """The same lines, the first with what was wrong."""
    said = ", ".join(filter(None, [lines[0].problem, *problems]))
    return [replace(lines[0], problem=said), *lines[1:]]
