"""`wanloom train`: put a run together and start it, or go on with it where its newest checkpoint is."""

import argparse
import shlex
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import wanloom
from wanloom.cli import launch
from wanloom.cli.hints import generate_command
from wanloom.cli.train_checks import check, tell_outlook
from wanloom.terminal import Terminal, note, plural, say, show_log

if TYPE_CHECKING:  # torch is imported only when the command runs
    from collections.abc import Callable

    import torch

    from wanloom.data.loader import Plan, Source
    from wanloom.model.dit import WanDiT
    from wanloom.model.settings import DiTConfig
    from wanloom.parallel.mesh import Layout, Mesh
    from wanloom.runs.recipe import Run
    from wanloom.train.loop import Parts, RunState
    from wanloom.train.metrics import ProgressLine

HELP = """Train a model.

RECIPE is a shipped recipe (tiny, wan2.1-t2v-1.3b-one-gpu, wan2.1-t2v-1.3b, wan2.1-t2v-14b) or a YAML file; settings are
changed with key.path=value. `wanloom show RECIPE` prints them all, `wanloom show --explain` what they mean. The same
command again goes on from the newest checkpoint.

  wanloom train tiny data.path=prepared run_dir=runs/first
  wanloom train wan2.1-t2v-1.3b-one-gpu data.path=prepared run_dir=runs/second train.epochs=100 optimizer.lr=2e-5
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe or a YAML file")
    parser.add_argument("settings", metavar="key.path=value", nargs="*", help="settings that replace the recipe's")
    parser.add_argument(
        "--training-mode",
        choices=("pretrain", "finetune"),
        help="preset of noise levels and optimizer; without it, pretrain for init=random, finetune for init=pretrained",
    )
    parser.add_argument(
        "--mock",
        nargs="?",
        const="mix",
        metavar="SHAPES",
        help="made-up data (frames x height x width), such as 81x480x832,1x480x832*4; without SHAPES clips and images "
        "that fit the recipe",
    )
    launch.add_arguments(parser, restarts=True)


def run(arguments: argparse.Namespace) -> int:
    from wanloom.dist import rank, together, world_size
    from wanloom.files import lock_folder
    from wanloom.runs.effects import find_notes

    with together():
        config = check(arguments)
    run_dir = Path(config.run_dir or "")  # which `check` asked for
    taken = f"Another run is training in {run_dir}: wait for it or stop it, or choose another run_dir."
    with ExitStack() as held:
        with together():
            if rank() == 0:
                held.enter_context(lock_folder(run_dir, taken))
        for text in find_notes(config, arguments.recipe):
            note(text)
        stopped = start(config, run_dir)
    if stopped is None:
        return 0
    words = ["wanloom", "train", arguments.recipe, *arguments.settings]
    words += ["--training-mode", arguments.training_mode] if arguments.training_mode else []
    words += [f"--mock={arguments.mock}"] if arguments.mock else []
    if rank() == 0:
        how = shlex.join(words) if world_size() == 1 else "the same command again"
        say(f"Stopped by a signal, and saved. To go on: {how}")
    return 128 + stopped


def start(run: "Run", run_dir: Path) -> int | None:
    """Train to the end, or to a signal, whose number is returned."""
    from wanloom.checkpoint.saved import read_state
    from wanloom.checkpoint.writer import Checkpointer
    from wanloom.data.loader import Loader, Plan, open_sources
    from wanloom.dist import local_world_size, pick_device, rank, together, world_size
    from wanloom.files import write_atomic
    from wanloom.memory import enough_memory
    from wanloom.model.flops import train_flops
    from wanloom.objective.inputs import Objective
    from wanloom.parallel.mesh import Mesh, resolve_layout
    from wanloom.runs.empty_text import FILE, check_same, empty_text
    from wanloom.runs.memory import check_run
    from wanloom.runs.origin import check_origins, note_unhashed
    from wanloom.runs.recipe import dump_run, model_config, settle_steps
    from wanloom.train.loop import Settings, Trainer
    from wanloom.train.metrics import Metrics, ProgressLine
    from wanloom.train.peaks import find_peak
    from wanloom.train.step import build_batch

    show_log(Terminal(quiet=rank() > 0))  # opening the data may have something to say
    with together():
        config, device = model_config(run.model), pick_device()
        layout = resolve_layout(run.parallel, world_size(), config, run.batch.samples)
        sources = open_sources(run.data, config.in_channels, config.text_dim, config.text_slots)
        flops = partial(train_flops, config)
        plan = Plan(sources, run.data.resolved(), run.batch, run.seed, flops, layout.data_ranks)
        sizes = [len(index) for index in plan.indices]
        run = settle_steps(run, sum(sizes))
        check_effects(run, sources, device)
        kernel = choose_kernel(run, device)
        largest = max(int(index.tokens.max()) for index in plan.indices)
        helps = check_run(run, config, layout, largest, device, local_world_size())
    mesh = Mesh(layout, device)
    peak = find_peak(device, run.train.precision == "bf16")
    checkpointer = Checkpointer(run_dir, run.checkpoint)
    newest = checkpointer.last()
    with together():
        state = resume_state(run, newest, plan)
        progress = ProgressLine(state.step, run.train.steps, ranks=plan.ranks, quiet=rank() > 0)
        if state.step >= run.train.steps:
            progress.say(f"{run_dir} is complete at step {state.step}; a higher train.steps goes on from there.")
            return None
        show_log(progress.console)
        check_origins(run, progress.say)
        note_unhashed(sources, progress.say)
        where = describe_place(layout, device)
        progress.say(
            f"{run.model} from {run.init} weights on {where} in {run.train.precision}, attention by {kernel}: "
            f"{sum(sizes):,} samples, {run.batch.samples} of them a step."
        )
        tell_outlook(run, sizes, plan.shares(), peak.unknown, progress.say)
        if rank() == 0:
            write_atomic(run_dir / "run.yaml", dump_run(run).encode())
    with together():
        empty = empty_text(run, run_dir, config.text_dim, device) if rank() == 0 else None
    with together():
        empty = empty if rank() == 0 else empty_text(run, run_dir, config.text_dim, device)
        check_same(empty, read_state(newest) if newest else {}, run_dir / FILE)
    with enough_memory(f"hold {run.model}", helps):
        parts = build_parts(run, config, mesh, newest, state, plan, sources, progress, empty)
    drop = run.caption_dropout
    objective = Objective(run.flow, run.seed, run.batch.samples, drop, empty, config.in_channels, config.text_dim)
    assemble = partial(build_batch, objective=objective)
    settings = Settings(run.train, run.optimizer.lr, run.schedule, run.flow, run.clip_norm, run.log, peak.tflops, helps)
    metrics = Metrics(run_dir, state.step) if rank() == 0 else None
    with (
        enough_memory(f"train in packs of {run.batch.tokens_per_pack:,} tokens", helps),
        Loader(sources, plan, state.step, assemble, run.data.prefetch, mesh.data_rank) as batches,
    ):
        stopped = Trainer(parts, settings, state, batches, checkpointer, metrics, progress).run()
    if stopped is None:
        progress.say(f"Done: {checkpointer.last()}. To make a video: {generate_command(run_dir, plan.indices[0][0])}")
    return stopped


def check_effects(run: "Run", sources: "list[Source]", device: "torch.device") -> None:
    """Raises UserError for what is asked for and cannot be: a held-out loss of nothing, offloading to where it is."""
    from wanloom.errors import UserError

    if run.log.validate_every and not any(len(source.rows("val")) for source in sources):
        raise UserError(
            f"log.validate_every={run.log.validate_every} asks for a held-out loss, but the data has no val split: "
            "prepare it with a larger --val-fraction, or leave the setting out."
        )
    if run.offload and device.type == "cpu":
        raise UserError("offload=true has no effect on a CPU, whose memory is the host's already: leave it out.")


def describe_place(layout: "Layout", device: "torch.device") -> str:
    """Where a run computes."""
    where = device.type if layout.world == 1 else f"{layout.world} x {device.type} ({layout.describe()})"
    return where + count_threads(device)


def choose_kernel(run: "Run", device: "torch.device") -> str:
    """The attention kernel that runs. Raises UserError when the one that is asked for cannot."""
    import torch

    from wanloom.model.kernels import resolve_kernel

    return resolve_kernel(
        run.train.kernel, device.type, torch.bfloat16 if run.train.precision == "bf16" else torch.float32
    )


def resume_state(run: "Run", newest: Path | None, plan: "Plan") -> "RunState":
    """Where to go on. Raises UserError when the draws, the recipe or the data are not those of the checkpoint."""
    from wanloom.checkpoint.saved import read_recipe, read_state
    from wanloom.config import build_config
    from wanloom.errors import UserError
    from wanloom.keys import SCHEME
    from wanloom.runs.recipe import MAY_CHANGE, Run, changed_settings
    from wanloom.train.loop import RunState

    if newest is None:
        return RunState()
    stored = read_state(newest)
    if stored.get("draws") != SCHEME:
        raise UserError(
            f"{run.run_dir} was started by another version of wanloom, which drew other noise for the same seed: go on "
            "with that version, or give another run_dir to start anew."
        )
    recipe = read_recipe(newest)
    try:
        before = build_config(Run, recipe)  # settings that are newer than the run take their defaults
    except UserError as error:
        raise UserError(f"{newest}/run.yaml cannot be read: {error}") from error
    changed = changed_settings(before, run)
    if changed:
        pairs = "; ".join(f"{name} was {was}, now {now}" for name, (was, now) in changed.items())
        raise UserError(
            f"{run.run_dir} was started with other settings: {pairs}. Give the old values to go on, or start a new run "
            f"from its weights: init={run.run_dir} run_dir=ANOTHER. (What may change: {', '.join(MAY_CHANGE)}, as long "
            "as the samples are the same.)"
        )
    if (now := plan.fingerprint()).partition(":")[0] != stored["data"].rpartition(":")[0]:
        raise UserError(
            f"{run.run_dir} was started by another version of wanloom, which recorded its data otherwise: go on with "
            "that version, or give another run_dir to start anew."
        )
    if stored["data"] != now:
        raise UserError(
            f"The training data is not what {run.run_dir} was started with: other samples, lengths or weights. "
            "Restore it to go on, or give another run_dir to start anew."
        )
    return RunState(**{key: stored[key] for key in RunState.__dataclass_fields__ if key in stored})


def build_parts(
    run: "Run",
    config: "DiTConfig",
    mesh: "Mesh",
    newest: Path | None,
    state: "RunState",
    plan: "Plan",
    sources: "list[Source]",
    progress: "ProgressLine",
    empty: "torch.Tensor | None",
) -> "Parts":
    """Model, optimizer and average: new, from a pipeline, or as a checkpoint has them."""
    import torch

    from wanloom.checkpoint.writer import load_tensors
    from wanloom.evaluate.validation import build_validation
    from wanloom.keys import SCHEME
    from wanloom.runs.empty_text import sum_of
    from wanloom.runs.recipe import dump_run
    from wanloom.train.ema import Ema
    from wanloom.train.loop import Parts
    from wanloom.train.optim import AdamW

    model = build_model(run, config, mesh, fill=newest is None)
    optimizer = AdamW(model.named_parameters(), run.optimizer)
    bf16 = run.train.precision == "bf16"
    parts = Parts(
        model=model,
        mesh=mesh,
        optimizer=optimizer,
        ema=Ema(optimizer.named, run.ema.decay) if run.ema.decay else None,
        validate=build_validation(model, mesh, sources, run.batch.tokens_per_pack, bf16)
        if run.log.validate_every
        else None,
        facts={
            "model": config.model_dump(),
            "data": plan.fingerprint(),
            "draws": SCHEME,
            "empty_text": None if empty is None else sum_of(empty),
            "threads": torch.get_num_threads(),
            "versions": {"wanloom": wanloom.__version__, "torch": torch.__version__},
        },
        recipe=dump_run(run),
    )
    if newest is not None:
        load_tensors(newest, parts.tensors())
        optimizer.set_step_count(state.step)
        progress.say(f"Going on from {newest}.")
        note_threads(newest, mesh.device, progress.say)
    return parts


def count_threads(device: "torch.device") -> str:
    """How many threads compute, in words; nothing on a GPU."""
    import torch

    return f" with {plural(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""


def note_threads(checkpoint: Path, device: "torch.device", say: "Callable[[str], None]") -> None:
    """Say that sums are rounded otherwise from here on: another machine, or other settings, give other threads."""
    import torch

    from wanloom.checkpoint.saved import read_state

    before, now = read_state(checkpoint).get("threads"), torch.get_num_threads()
    if device.type == "cpu" and before not in (None, now):
        say(
            f"note: the number of threads was {before} and is {now}, so within rounding it is no longer the same: "
            f"OMP_NUM_THREADS={before} keeps every bit."
        )


def build_model(run: "Run", config: "DiTConfig", mesh: "Mesh", fill: bool) -> "WanDiT":
    """The part of the model that is this rank's, in fp32; without `fill` its values are left for a checkpoint."""
    import torch

    from wanloom.dist import together
    from wanloom.errors import UserError
    from wanloom.formats.pipeline import find_pipeline
    from wanloom.formats.transformer import load_dit
    from wanloom.model.dit import WanDiT
    from wanloom.model.init import init_weights
    from wanloom.parallel import params
    from wanloom.parallel.apply import apply_layout
    from wanloom.runs.recipe import split_init
    from wanloom.runs.trained import open_trained

    def apply(model: "WanDiT") -> None:
        apply_layout(model, mesh, run.train.precision == "bf16", run.recompute, run.offload, run.compile)

    if fill and run.init == "pretrained":
        path = find_pipeline(run.model, ("transformer",))
        return load_dit(path, device=mesh.device, kernel=run.train.kernel, apply=apply, fill=params.fill)
    if fill and run.init != "random":
        path, ema = split_init(run.init)
        with together():
            trained = open_trained(path, ema)
            if trained.config != config:
                raise UserError(f"{trained.path} has weights of another shape than those of {run.model}.")
        return trained.load_model(ema, torch.float32, mesh.device, run.train.kernel, apply)
    with torch.device("meta"):
        model = WanDiT(config, run.train.kernel)
    apply(model)
    model.to_empty(device=mesh.device)
    if fill:
        init_weights(model, run.seed, params.fill)
    return model
