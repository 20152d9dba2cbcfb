"""A short run of a tiny model on any layout: what the workers do and what one process does.

The task has clips and images of four sizes with captions of unequal length, more than one pack a step, and weights that
are nowhere zero or one, so that a gradient that is wrong anywhere shows.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from wanloom.data.loader import Source
from wanloom.data.mock import MockDataset
from wanloom.data.settings import BatchConfig, DataConfig
from wanloom.dist import rank
from wanloom.evaluate.validation import build_validation
from wanloom.geometry import WAN_21
from wanloom.model.dit import WanDiT
from wanloom.model.settings import DiTConfig
from wanloom.objective.inputs import Input
from wanloom.objective.settings import FlowConfig
from wanloom.parallel import params
from wanloom.parallel.mesh import Mesh, resolve_layout
from wanloom.parallel.settings import ComputeConfig, ParallelConfig
from wanloom.runs.build import build_loader, build_parts, build_plan
from wanloom.runs.recipe import Run
from wanloom.train.loop import Parts
from wanloom.train.settings import EmaConfig, OptimizerConfig, TrainConfig
from wanloom.train.step import Batch, StepResult, train_step

# an eps that shows: a split norm that takes another one would be seen
MODEL = DiTConfig(dim=48, ffn_dim=80, num_heads=4, num_layers=3, text_dim=24, eps=1e-2)
SHAPES = "5x32x48,1x32x32*2,9x16x32,1x48x32"
SAMPLES, BUDGET, STEPS, LR = 10, 30, 3, 3e-4  # 4 packs a step, of unequal length
FLOW = FlowConfig()
CPU = torch.device("cpu")
SOURCES: list[Source] = [MockDataset(SHAPES, MODEL.text_dim, WAN_21, size=25, val_size=3)]
EMPTY = torch.randn(2, MODEL.text_dim, generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Case:
    """One layout, and what is done on it."""

    name: str
    world: int
    parallel: dict[str, Any] = field(default_factory=dict)
    samples: int = SAMPLES
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    fault: str = ""  # what is broken on purpose
    known: bool = False  # the first frame of each video is known: a segment at level 0, outside the loss
    model: DiTConfig = MODEL

    @property
    def is_plain(self) -> bool:
        """Whether nothing is recomputed, offloaded or compiled."""
        return self.compute == ComputeConfig(precision=self.compute.precision)


@dataclass
class Result:
    """What one rank has after the steps; tensors are its own parts."""

    gradients: dict[str, Tensor]  # of the first step, before clipping
    weights: dict[str, Tensor]  # after the last
    averages: dict[str, Tensor]
    facts: dict[str, Any]  # boxes of the tensors, losses, norms, keys


def initial(name: str, shape: torch.Size) -> Tensor:
    """Weights by name, the same on every layout."""
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")
    values = 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(key))
    return values + 1 if "norm" in name and name.endswith("weight") else values


def run_of(case: Case) -> Run:
    """What a recipe would say; the shape of the model is that of the case."""
    return Run(
        model="tiny",
        seed=7,
        data=DataConfig(mock=SHAPES),
        batch=BatchConfig(samples=case.samples, tokens_per_pack=BUDGET),
        train=TrainConfig(steps=STEPS),
        optimizer=OptimizerConfig(lr=LR, weight_decay=1.0),
        flow=FLOW,
        caption_dropout=0.3,
        ema=EmaConfig(decay=0.9),
        parallel=ParallelConfig(**case.parallel),
        compute=case.compute,
    )


def build_case(case: Case) -> Parts:
    """What a run of the case is made of, on this rank."""
    run = run_of(case)
    mesh = Mesh(resolve_layout(run.parallel, case.world, case.model, case.samples), CPU)
    plan = build_plan(run, MODEL, SOURCES, mesh.layout.data_ranks)
    parts = build_parts(run, case.model, mesh, plan, EMPTY, fill=False)
    assert parts.ema is not None
    averages = parts.ema.tensors()
    for name, param in parts.trained.items():
        params.fill(param, initial(name, param.shape))
        params.local(averages[name]).copy_(params.local(param.detach()))
    return parts


def with_known_frames(batch: Batch) -> Batch:
    """The first frame of each video without noise. For one data rank, which has all samples of the step."""
    inputs, left_out = list[Input](), 0
    for pack, target, sigma in batch.inputs:
        tokens, levels, lens = pack.tokens.clone(), list[float](), list[int]()
        for first, n, level in zip(accumulate((0, *pack.video_lens)), pack.video_lens, sigma.tolist(), strict=False):
            known = int((pack.positions[first : first + n, 0] == 0).sum())
            if known < n:
                tokens[first : first + known] -= level * target[first : first + known]
                left_out += known
            segments = [(known, 0.0), (n - known, level)] if known < n else [(n, level)]
            lens, levels = lens + [part for part, _ in segments], levels + [value for _, value in segments]
        inputs.append(Input(replace(pack, tokens=tokens, level_lens=tuple(lens)), target, torch.tensor(levels)))
    assert 0 < left_out < batch.totals.num_tokens
    return batch._replace(inputs=inputs, num_elements=batch.num_elements - left_out * batch.inputs[0].target.shape[1])


def take_steps(parts: Parts, case: Case, first: int, last: int) -> Iterator[tuple[Batch, StepResult]]:
    """Steps `first` to `last` (not taken); the caller sees each before its update. The very first is not clipped."""
    assert parts.ema is not None
    run, mesh = run_of(case), parts.mesh
    plan = build_plan(run, MODEL, SOURCES, mesh.layout.data_ranks)
    with build_loader(run, MODEL, SOURCES, plan, first, EMPTY, mesh.data_rank) as loader:
        for number, batch in zip(range(first, last), loader, strict=False):
            clip = None if number == 0 else 0.5
            batch = with_known_frames(batch) if case.known else batch
            yield batch, train_step(parts.model, parts.trained, parts.mesh, batch, FLOW, clip)
            parts.optimizer.step(LR)
            parts.ema.update(number)


def result_of(parts: Parts, gradients: dict[str, Tensor], facts: dict[str, Any]) -> Result:
    """What this rank has now, and where it belongs."""
    named = dict(parts.model.named_parameters())
    facts["rank"] = rank()
    facts["data_rank"] = parts.mesh.data_rank
    facts["boxes"] = {n: [[part.start, part.stop] for part in params.box_of(p)] for n, p in named.items()}
    facts["shapes"] = {n: list(p.shape) for n, p in named.items()}
    facts["dtypes"] = {n: str(p.dtype) for n, p in named.items()}
    facts["policies"] = {
        name: [str(policy.param_dtype), str(policy.reduce_dtype)]
        for name, module in parts.model.named_modules()
        if isinstance(module, FSDPModule) and (policy := module._get_fsdp_state()._mp_policy)
    }
    facts["missing"] = [n for n in named if n not in gradients]
    weights = {n: params.local(p).clone() for n, p in named.items()}
    assert parts.ema is not None
    averages = {n: params.local(t).clone() for n, t in parts.ema.tensors().items()}
    return Result(gradients, weights, averages, facts)


class Exchanges(TorchDispatchMode):
    """Counts what is sent while it is on, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional", "fsdp"):
            self.counts[func.__name__.split(".")[0].strip("_")] += 1
        return func(*args, **(kwargs or {}))


def run(case: Case, first: Callable[[WanDiT], None] = lambda model: None) -> Result:
    """Three steps of the case on this rank; `first` sees the model before them."""
    parts = build_case(case)
    first(parts.model)
    facts: dict[str, Any] = {"steps": [], "keys": [], "packs": [], "exchanges": []}
    gradients: dict[str, Tensor] = {}
    steps = take_steps(parts, case, 0, STEPS)
    for _ in range(STEPS):
        with Exchanges() if case.is_plain else nullcontext(Exchanges()) as exchanges:  # nothing is compiled under it
            batch, result = next(steps)
        facts["exchanges"].append(exchanges.counts)
        if not gradients:
            named = parts.model.named_parameters()
            gradients = {n: params.local(p.grad).clone() for n, p in named if p.grad is not None}
        facts["steps"].append([*result])
        facts["keys"].append([key for keys in batch.keys for key in keys])
        facts["packs"].append(len(batch.inputs))
    held_out = MockDataset(SHAPES, MODEL.text_dim, WAN_21, size=1, val_size=3)
    validate = build_validation(parts.model, parts.mesh, [held_out], BUDGET)
    assert validate is not None
    facts["val_loss"] = validate()
    return result_of(parts, gradients, facts)
