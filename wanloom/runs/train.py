"""A training run from its recipe to its last step, or to where it is stopped.

In: a recipe and settings, or a `Run`. Out: checkpoints, metrics and run.yaml in its run_dir, sentences on the terminal,
and how it ended. The one decision: this is the one way of a training run: the command and a notebook call it, alone or
as one of several ranks.
"""

import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wanloom.checkpoint.saved import read_state
from wanloom.checkpoint.writer import Checkpointer
from wanloom.data.index import Row
from wanloom.data.loader import Plan, Source, open_sources
from wanloom.dist import local_world_size, pick_device, rank, together, world_size
from wanloom.errors import UserError
from wanloom.files import lock_folder, write_atomic
from wanloom.geometry import Geometry
from wanloom.memory import enough_memory
from wanloom.model.dit import on_meta
from wanloom.model.kernels import resolve_kernel
from wanloom.model.settings import DiTConfig
from wanloom.parallel.mesh import Mesh, resolve_layout
from wanloom.runs.build import build_loader, build_parts, build_plan, build_routines
from wanloom.runs.checks import check_places
from wanloom.runs.effects import find_notes
from wanloom.runs.empty_text import FILE, check_same, empty_text
from wanloom.runs.found import model_geometry
from wanloom.runs.layers import Recipe
from wanloom.runs.memory import check_run
from wanloom.runs.origin import check_origins, note_unhashed
from wanloom.runs.recipe import Run, build_run, dump_run, model_config, settle_steps
from wanloom.runs.resume import find_state, restore
from wanloom.terminal import Terminal, note, plural, show_log
from wanloom.train.loop import Settings, Trainer
from wanloom.train.peaks import find_peak
from wanloom.train.progress import ProgressLine
from wanloom.train.records import Records
from wanloom.train.trackers import TensorBoard

Say = Callable[[str], None]


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    run_dir: Path
    step: int
    taken: int  # steps of this start; none when the run was complete
    checkpoint: Path  # the newest
    stopped: signal.Signals | None  # by what, before its last step
    sample: Row  # the first that it was trained on
    geometry: Geometry | None  # of its latents, where it is known
    averaged: bool  # whether an average of the weights was kept


def train_recipe(
    recipe: Recipe,
    settings: Sequence[str] | Mapping[str, Any] = (),
    training_mode: str | None = None,
    mock: str | None = None,
) -> Ended:
    """Train what `build_run` makes of these. Raises UserError, the same on every rank, for a mistake."""
    with together():
        run = build_run(recipe, settings, training_mode, mock)
    for text in find_notes(run, recipe):
        note(text)
    return train(run)


def train(run: Run, names: Collection[str] | None = None) -> Ended:
    """Train to the end, or to a signal; from the newest checkpoint of `run_dir` where there is one.

    `names` are the parameters that are trained, by default all: the others stay as `init` has them and are in no
    checkpoint. Every rank calls it. Raises UserError, the same on every rank, for what cannot be.
    """
    with together():
        check_places(run)
    run_dir = Path(run.run_dir or "")  # which `check_places` asked for
    taken = f"Another run is training in {run_dir}: wait for it or stop it, or choose another run_dir."
    with ExitStack() as held:
        with together():
            if rank() == 0:
                held.enter_context(lock_folder(run_dir, taken))
        return _train(run, run_dir, names)


def _train(run: Run, run_dir: Path, names: Collection[str] | None) -> Ended:
    show_log(Terminal(quiet=rank() > 0))  # opening the data may have something to say
    with together():
        config, device = model_config(run.model), pick_device()
        geometry = model_geometry(run.model, config.out_channels)
        layout = resolve_layout(run.parallel, world_size(), config, run.batch.samples)
        sources = open_sources(run.data, geometry, config.out_channels, config.text_dim, config.text_slots)
        plan = build_plan(run, config, sources, layout.data_ranks, names)
        run = settle_steps(run, sum(len(index) for index in plan.indices))
        check_effects(run, sources, device)
        largest = max(int(index.tokens.max()) for index in plan.indices)
        helps = check_run(run, config, layout, largest, device, local_world_size(), names)
    mesh = Mesh(layout, device)
    peak = find_peak(device, run.compute.bf16)
    checkpointer = Checkpointer(run_dir, run.checkpoint)
    newest = checkpointer.last
    with together():
        state = find_state(run, newest, plan)
        first, averaged = state.step, run.ema.decay is not None
        progress = ProgressLine(first, run.train.steps, ranks=plan.ranks, quiet=rank() > 0)
        if newest is not None and first >= run.train.steps:
            progress.say(f"{run_dir} is complete at step {first}; a higher train.steps goes on from there.")
            return Ended(run_dir, first, 0, newest, None, plan.indices[0][0], geometry, averaged)
        show_log(progress.console)
        tell_run(run, mesh, sources, plan, first, peak.unknown, progress.say)
        tell_trained(config, names, progress.say)
        if rank() == 0:
            write_atomic(run_dir / "run.yaml", dump_run(run).encode())
    empty = share_empty_text(run, run_dir, config.text_dim, device, newest)
    with enough_memory(f"hold {run.model}", helps):
        parts = build_parts(run, config, mesh, plan, empty, newest is None, names)
        if newest is not None:
            restore(parts, run, newest, first, progress.say)
    settings = Settings(run.train, run.optimizer.lr, run.schedule, run.flow, run.clip_norm, run.log, peak.tflops, helps)
    trackers = [Records(run_dir, first), TensorBoard(run_dir, first)] if rank() == 0 else []
    routines = build_routines(run, parts, sources)
    with (
        enough_memory(f"train in packs of {run.batch.tokens_per_pack:,} tokens", helps),
        build_loader(run, config, sources, plan, first, empty, mesh.data_rank) as batches,
    ):
        stopped = Trainer(parts, settings, state, batches, checkpointer, trackers, progress, routines).run()
    checkpoint = checkpointer.last
    assert checkpoint is not None, "the trainer saves at its end"
    return Ended(run_dir, state.step, state.step - first, checkpoint, stopped, plan.indices[0][0], geometry, averaged)


def check_effects(run: Run, sources: Sequence[Source], device: torch.device) -> None:
    """Raises UserError for what is asked for and cannot be: a held-out loss of nothing, offloading to where it is."""
    if run.log.validate_every and not any(len(source.rows("val")) for source in sources):
        raise UserError(
            f"log.validate_every={run.log.validate_every} asks for a held-out loss, but the data has no val split: "
            "prepare it with a larger `val_fraction`, or leave the setting out."
        )
    if run.compute.offload_activations and device.type == "cpu":
        raise UserError(
            "compute.offload_activations=true has no effect on a CPU, whose memory is the host's already: leave it out."
        )
    choose_kernel(run, device)


def choose_kernel(run: Run, device: torch.device) -> str:
    """The attention kernel that runs. Raises UserError when the one that is asked for cannot."""
    dtype = torch.bfloat16 if run.compute.bf16 else torch.float32
    return resolve_kernel(run.compute.kernel, device.type, dtype)


def share_empty_text(
    run: Run, run_dir: Path, text_dim: int, device: torch.device, newest: Path | None
) -> torch.Tensor | None:
    """The states of the empty caption, which the first rank makes and the others read; those of the checkpoint."""
    with together():
        empty = empty_text(run, run_dir, text_dim, device) if rank() == 0 else None
    with together():
        empty = empty if rank() == 0 else empty_text(run, run_dir, text_dim, device)
        check_same(empty, read_state(newest) if newest else {}, run_dir / FILE)
    return empty


def tell_run(
    run: Run, mesh: Mesh, sources: Sequence[Source], plan: Plan, done: int, unknown: Sequence[str], say: Say
) -> None:
    """What is trained on what and where, before the first step. Raises UserError for data of another model."""
    check_origins(run, say)
    note_unhashed(sources, say)
    sizes = [len(index) for index in plan.indices]
    where = mesh.layout.describe_on(device := mesh.device)
    where += f" with {plural(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    say(
        f"{run.model} from {run.init} weights on {where} in {run.compute.precision}, attention by "
        f"{choose_kernel(run, device)}: {sum(sizes):,} samples, {run.batch.samples} of them a step."
    )
    tell_outlook(run, sizes, plan.shares(), done, unknown, say)


def tell_trained(config: DiTConfig, names: Collection[str] | None, say: Say) -> None:
    """How much of the model is trained."""
    sizes = {name: param.numel() for name, param in on_meta(config).named_parameters()}
    trained = sum(size for name, size in sizes.items() if names is None or name in names)
    say(f"Trains {trained / 1e6:,.2f} M of {sum(sizes.values()) / 1e6:,.2f} M parameters.")


def tell_outlook(
    run: Run, sizes: Sequence[int], shares: Sequence[float], done: int, unknown: Sequence[str], say: Say
) -> None:
    """How often the samples are passed over, when a checkpoint comes, and of which GPUs no peak is known."""
    draws = run.train.steps * run.batch.samples
    passes = [draws * share / size for size, share in zip(sizes, shares, strict=True)]
    if len(passes) == 1:
        often = f"each sample {times(passes[0])}"
    else:
        parts = (f"{source.path} {times(many)}" for source, many in zip(run.data.resolved(), passes, strict=True))
        often = f"each sample of {', '.join(parts)}"
    saved = (done // run.checkpoint.every + 1) * run.checkpoint.every
    when = f"step {saved:,}" if saved < run.train.steps else "the last step"
    soon = f" or {run.checkpoint.minutes:g} minutes" if run.checkpoint.minutes else ""
    steps = f"{plural(run.train.steps, 'step')} {'passes' if run.train.steps == 1 else 'pass'}"
    say(f"{steps} over {often}; the {'next' if done else 'first'} checkpoint comes after {when}{soon}.")
    if run.compute.compile == "block":
        say("compute.compile=block: the first step takes minutes, in which blocks are compiled and nothing is shown.")
    if unknown:
        say(f"The bf16 peak of {' and '.join(unknown)} is not known: the log has no MFU.")


def times(number: float) -> str:
    """`3 times`, `once`; below 10 with two digits."""
    text = f"{number:.2g}" if number < 9.95 else f"{number:,.0f}"
    return "once" if text == "1" else f"{text} times"
