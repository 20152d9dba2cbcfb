"""What a run will be in numbers, before anything of it is loaded.

In: a run, the model's config and a layout. Out: plain values: what a rank holds, which ranks work together, packs and
FLOPs of a step, steps. The one decision: numbers here, words with who prints them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from wanloom.data.loader import Source, open_sources
from wanloom.model.dit import on_meta
from wanloom.model.settings import DiTConfig
from wanloom.parallel.memory import FP32, KEPT, States, activation_bytes, held_params, state_bytes
from wanloom.parallel.mesh import AXES, Layout
from wanloom.parallel.settings import Recompute
from wanloom.runs.build import build_plan
from wanloom.runs.found import model_geometry
from wanloom.runs.recipe import Run, settle_steps

STEPS_PLANNED = 20  # enough for a mean of packs per step


class ModelSize(NamedTuple):
    """The whole model."""

    parameters: int
    bytes: int  # with gradients, two moments and the average


class AxisRanks(NamedTuple):
    """The ranks that work together on an axis of a layout; of rank 0 as of any other."""

    axis: str
    ranks: list[int]
    is_inside: bool  # of a machine


@dataclass(frozen=True)
class RankMemory:
    """What the rank that has most holds."""

    parameters: int
    states: States
    tokens: int  # its part of a full pack
    activations: dict[Recompute, int]  # bytes of these tokens (an estimate), by what is recomputed


@dataclass(frozen=True)
class StepOutlook:
    """The data of a run, and a step in the mean of the first ones."""

    sources: Sequence[Source]
    shares: Sequence[float]  # of each source in the samples
    steps: int
    tokens: float
    packs: float
    fill: float  # of the tokens that its packs could hold
    flops: float
    balance: float  # how much longer it takes than with equal packs
    padding: float  # of the tokens that a rank computes, so that the ranks' parts of a pack are equal
    data_ranks: int


def plan_size(run: Run, config: DiTConfig) -> ModelSize:
    """How large the model is, and all that training holds of it from step to step."""
    params = sum(p.numel() for p in on_meta(config).parameters())
    return ModelSize(params, params * FP32 * (5 if run.ema.decay else 4))


def plan_axes(layout: Layout, per_node: int) -> list[AxisRanks]:
    """The axes that are used, with machines of `per_node` ranks."""
    found = []
    for axis, size in zip(AXES, layout.sizes, strict=True):
        if size > 1:
            others = {name: 0 for name in AXES if name != axis}
            group = [r for r in range(layout.world) if others.items() <= layout.coordinates(r).items()]
            found.append(AxisRanks(axis, group, per_node % (group[-1] + group[1]) == 0))
    return found


def plan_memory(run: Run, config: DiTConfig, layout: Layout) -> RankMemory:
    """What the rank that has most holds."""
    bf16, pack, model = run.compute.bf16, run.batch.tokens_per_pack, on_meta(config)
    firsts = range(0, layout.world, layout.world // layout.pp)  # of each stage: the other ranks hold as much, or less
    held = [held_params(model, layout, rank) for rank in firsts]
    states = [state_bytes(part, layout, bool(run.ema.decay), bf16) for part in held]
    most = max(states, key=lambda state: state.total)
    return RankMemory(
        parameters=sum(part.numel for part in held[states.index(most)].values()),
        states=most,
        tokens=-(-pack // (layout.cp * layout.tp)),
        activations={name: activation_bytes(config, layout, pack, name, bf16) for name in KEPT},
    )


def plan_steps(run: Run, config: DiTConfig, layout: Layout | None) -> StepOutlook:
    """The steps, planned from the index of the data alone. Raises UserError for data that cannot be trained on."""
    ranks, parts = (layout.data_ranks, layout.cp * layout.tp) if layout else (1, 1)
    channels = config.out_channels
    geometry = model_geometry(run.model, channels)
    sources = open_sources(run.data, geometry, channels, config.text_dim, config.text_slots)
    plan = build_plan(run, config, sources, ranks)
    run = settle_steps(run, sum(len(index) for index in plan.indices))
    steps = [plan.packs(step) for step in range(min(STEPS_PLANNED, run.train.steps))]
    totals = [plan.totals(packs) for packs in steps]
    num_packs, tokens = sum(len(packs) for packs in steps), sum(step.num_tokens for step in totals)
    lens = [sum(plan.tokens(position) for position in pack) for packs in steps for pack in packs]
    filler = sum(-length % parts or (0 if length else parts) for length in lens)
    return StepOutlook(
        sources=sources,
        shares=plan.shares(),
        steps=run.train.steps,
        tokens=tokens / len(steps),
        packs=num_packs / len(steps),
        fill=tokens / (num_packs * run.batch.tokens_per_pack),
        flops=sum(step.flops for step in totals) / len(steps),
        balance=sum(step.balance for step in totals) / len(steps),
        padding=filler / (tokens + filler),
        data_ranks=ranks,
    )
