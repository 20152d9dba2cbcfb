"""What a run is made of: data, model, optimizer, average.

In: a run, the model's config, the mesh. Out: each part, built once, in one place; what `wanloom train` runs is what
tests and benchmarks run.
"""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import wanloom
from wanloom.data.loader import Loader, Plan, Source
from wanloom.dist import together
from wanloom.evaluate.validation import build_validation
from wanloom.keys import SCHEME
from wanloom.model.dit import WanDiT, materialise
from wanloom.model.flops import count_frozen, train_flops
from wanloom.model.settings import DiTConfig
from wanloom.objective.inputs import Objective
from wanloom.parallel.apply import apply_layout
from wanloom.parallel.mesh import Mesh
from wanloom.runs.empty_text import sum_of
from wanloom.runs.recipe import Run, dump_run
from wanloom.runs.trained import Init, open_init
from wanloom.train.ema import Ema
from wanloom.train.loop import Parts, Routine
from wanloom.train.optim import AdamW
from wanloom.train.step import Batch, build_batch


def build_plan(
    run: Run, config: DiTConfig, sources: list[Source], data_ranks: int, names: Collection[str] | None = None
) -> Plan:
    """Which samples make a step in which `names` are trained. Raises UserError when one fits in no pack."""
    flops = partial(train_flops, config, frozen=count_frozen(config, names))
    return Plan(sources, run.data.resolved(), run.batch, run.seed, flops, data_ranks)


def build_objective(run: Run, config: DiTConfig, empty: Tensor | None) -> Objective:
    """How a sample becomes input and target; `empty` is the empty caption."""
    sizes = config.out_channels, config.text_dim
    return Objective(run.flow, run.seed, run.batch.samples, run.caption_dropout, empty, *sizes)


def build_loader(
    run: Run, config: DiTConfig, sources: list[Source], plan: Plan, start_step: int, empty: Tensor | None, rank: int
) -> Loader[Batch]:
    """The steps of a data rank from `start_step` on, as the model takes them."""
    assemble = partial(build_batch, objective=build_objective(run, config, empty))
    return Loader(sources, plan, start_step, assemble, run.data.prefetch, rank)


def build_model(run: Run, config: DiTConfig, mesh: Mesh, init: Init | None) -> WanDiT:
    """The part of the model that is this rank's, in fp32; without `init` its values are left for a checkpoint."""
    apply = partial(apply_layout, mesh=mesh, compute=run.compute)
    make = partial(materialise, device=mesh.device, kernel=run.compute.kernel, apply=apply)
    return init.load_model(make) if init else make(config)


def build_parts(
    run: Run,
    config: DiTConfig,
    mesh: Mesh,
    plan: Plan,
    empty: Tensor | None,
    fill: bool = True,
    names: Collection[str] | None = None,
) -> Parts:
    """Model, optimizer and average as they are at the first step; without `fill` they wait for a checkpoint.

    `names` are the parameters that are trained, by default all: a checkpoint holds no others.
    """
    with together():
        init = open_init(run, config) if fill or names is not None else None
        part = {} if init is None or names is None else {"trained": sorted(names), "base": init.identity}
    model = build_model(run, config, mesh, init)
    trained = choose_trained(model, names)
    return Parts(
        model=model,
        trained=trained,
        mesh=mesh,
        optimizer=AdamW(trained, run.optimizer),
        ema=Ema(trained, run.ema.decay) if run.ema.decay else None,
        facts=describe_parts(config, plan, empty) | part,
        recipe=dump_run(run),
    )


def choose_trained(model: WanDiT, names: Collection[str] | None) -> dict[str, nn.Parameter]:
    """The parameters of this rank that are trained, by name; the others get no gradient. Before the first forward."""
    for name, param in model.named_parameters():
        param.requires_grad_(names is None or name in names)
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def build_routines(run: Run, parts: Parts, sources: list[Source]) -> list[Routine]:
    """What the loop does now and then: the loss on the held-out samples, where it is asked for."""
    if not run.log.validate_every:
        return []
    validate = build_validation(parts.model, parts.mesh, sources, run.batch.tokens_per_pack)
    return [Routine(run.log.validate_every, lambda _: {"val_loss": validate()})] if validate else []


def describe_parts(config: DiTConfig, plan: Plan, empty: Tensor | None) -> dict[str, Any]:
    """What every checkpoint says beside the tensors: what a run that goes on must have in common with it."""
    return {
        "model": config.model_dump(),
        "data": plan.fingerprint(),
        "draws": SCHEME,
        "empty_text": None if empty is None else sum_of(empty),
        "threads": torch.get_num_threads(),
        "versions": {"wanloom": wanloom.__version__, "torch": torch.__version__},
    }
