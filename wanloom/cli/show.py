"""`wanloom show`: what a recipe, a run or a prepared folder holds, without weights and without a GPU."""

import argparse
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from wanloom.config import expand_home
from wanloom.errors import UserError, nearest
from wanloom.formats.pipeline import check_name
from wanloom.memory import GIB
from wanloom.runs.checks import check_folder
from wanloom.runs.effects import find_notes
from wanloom.runs.layers import recipe_names
from wanloom.runs.recipe import MIX, MODES, Run, build_run
from wanloom.terminal import Terminal, note, plural, say, show_log

if TYPE_CHECKING:
    from wanloom.data.loader import Source
    from wanloom.parallel.mesh import Layout
    from wanloom.runs.planner import AxisRanks, RankMemory, StepOutlook

HELP = """Print what a recipe, a run or a prepared folder holds.

  wanloom show tiny data.path=prepared     every setting, with parameters, data and FLOPs; itself a valid recipe
  wanloom show runs/first                  how far a run is, and its checkpoints
  wanloom show prepared                    samples, sizes and captions of a training set
  wanloom show prepared --page             pictures of its samples as training will see them: page.html
  wanloom show --explain                   every setting with what it means
  wanloom show --explain optimizer.lr      what one of them means, or those of a section such as optimizer
  wanloom show wan2.1-t2v-14b --world 64   the layout of 64 processes, and what each of them holds
"""
NUM_CAPTIONS = 3
PER_NODE = 8
AXIS_WORDS = {
    "pp": "stages of blocks, packs pass through them",
    "dp_replicate": "copies of the model, their gradients are summed once a step",
    "dp_shard": "parts of every parameter (over cp too), gathered block by block; every rank has its own packs",
    "cp_ring": "parts of a packed sequence, keys and values go round",
    "cp_ulysses": "parts of a packed sequence, exchanged for heads in attention",
    "tp": "parts of every layer",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", metavar="TARGET", nargs="?", help="a recipe, a YAML file, a run folder or a prepared folder"
    )
    parser.add_argument("settings", metavar="key.path=value", nargs="*", help="settings that replace the recipe's")
    parser.add_argument("--training-mode", choices=MODES, help="as for `wanloom train`")
    parser.add_argument("--mock", nargs="?", const=MIX, metavar="SHAPES", help="as for `wanloom train`")
    parser.add_argument("--world", type=int, metavar="N", help="show the layout of a recipe over N processes")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="what every setting means, or with a TARGET such as data.path or data that one or those of that section",
    )
    parser.add_argument("--per-node", type=int, metavar="N", help="processes of a machine, for --world (8)")
    parser.add_argument(
        "--page", action="store_true", help="of a prepared folder: write a page with its latents decoded"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="for --page: its file (page.html)")
    parser.add_argument("--model", help="for --page: the model that the folder was prepared for, where it is not found")


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for words that do not go together, settings that are none and a target that is not there."""
    if arguments.explain:
        return check_explain(arguments)
    if arguments.target is None:
        raise UserError("`wanloom show` needs TARGET, a recipe, a YAML file, a run folder or a prepared folder.")
    check_options(arguments)
    path = Path(expand_home(arguments.target))
    if arguments.target not in (names := recipe_names()) and not path.exists():
        beside = [str(other) for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
        raise UserError(
            f"There is no recipe, file or folder '{path}'.{nearest(str(path), [*names, *beside])} "
            f"The recipes are {', '.join(names)}."
        )
    return check_recipe(arguments) if is_recipe(arguments.target) else check_target(arguments, path)


def check_options(arguments: argparse.Namespace) -> None:
    """Raises UserError for options that are wrong whatever the target is."""
    for name in ("world", "per_node"):
        if (number := getattr(arguments, name)) is not None and number < 1:
            raise UserError(f"--{name.replace('_', '-')} is {number}: it counts from 1.")
    if arguments.per_node and not arguments.world:
        raise UserError("--per-node is for a layout: say with --world how many processes there are.")
    if (arguments.model or arguments.out) and not arguments.page:
        raise UserError("--model and --out are for the page of a prepared folder: give --page too.")


def check_recipe(arguments: argparse.Namespace) -> None:
    """Raises UserError for a recipe that cannot be shown."""
    if arguments.page:
        raise UserError(f"--page is for a prepared folder, which '{arguments.target}' is not.")
    run = read_recipe(arguments)
    check_name(run.model)
    if run.data.path or run.data.sources:
        for source in run.data.resolved():
            check_folder(source.path)


def check_target(arguments: argparse.Namespace, path: Path) -> None:
    """Raises UserError for what cannot be shown of a folder."""
    if arguments.page and arguments.settings:
        raise UserError(f"'{arguments.settings[0]}' is one word too many: --out FILE says where the page goes.")
    if arguments.settings or arguments.mock or arguments.training_mode or arguments.world:
        raise UserError(f"{path} is a folder: settings can only be given for a recipe.")
    if arguments.page and (path / "checkpoints").is_dir():
        raise UserError(f"--page is for a prepared folder, '{path}' is a run.")
    if arguments.model:
        check_name(arguments.model, ("vae",))


def check_explain(arguments: argparse.Namespace) -> None:
    """Raises UserError for what has no effect beside --explain, and for a setting that is none."""
    from wanloom.cli.explain import explain_settings

    if arguments.settings or arguments.target in recipe_names():
        raise UserError(
            "--explain takes one name, of a setting or a section, such as optimizer, or none: the meanings are the "
            "same in every recipe."
        )
    others = ("training_mode", "mock", "world", "per_node", "page", "out", "model")
    if given := [name for name in others if getattr(arguments, name)]:
        raise UserError(
            f"--{given[0].replace('_', '-')} has no effect beside --explain, which is of all settings: leave it out."
        )
    explain_settings(Run, arguments.target)


def is_recipe(target: str) -> bool:
    """Whether a target that is there is a recipe, not a folder of something."""
    return target in recipe_names() or not Path(expand_home(target)).is_dir()


def read_recipe(arguments: argparse.Namespace) -> Run:
    return build_run(arguments.target, arguments.settings, arguments.training_mode, arguments.mock)


def run(arguments: argparse.Namespace) -> int:
    if arguments.explain:
        from wanloom.cli.explain import explain_settings

        say(explain_settings(Run, arguments.target), end="")
        return 0
    check(arguments)
    path = Path(expand_home(arguments.target))
    show_log(Terminal(stderr=True))
    if is_recipe(arguments.target):
        recipe = read_recipe(arguments)
        for text in find_notes(recipe, arguments.target):
            note(text)
        show_recipe(recipe, arguments.world, arguments.per_node or PER_NODE)
    elif (path / "checkpoints").is_dir():
        show_run(path)
    elif arguments.page:
        show_page(path, arguments.out or Path("page.html"), arguments.model)
    else:
        show_data(path)
    return 0


def show_recipe(run: Run, world: int | None, per_node: int) -> None:
    """The resolved settings as YAML, and what follows from them as YAML comments."""
    from wanloom.parallel.mesh import resolve_layout
    from wanloom.runs import planner
    from wanloom.runs.recipe import dump_run, model_config

    config = model_config(run.model)
    layout = resolve_layout(run.parallel, world, config, run.batch.samples) if world else None
    size = planner.plan_size(run, config)
    say(dump_run(run), end="")
    say(f"# parameters: {size.parameters:,}; with gradients, moments and average {size.bytes / GIB:.2f} GiB")
    if layout:
        show_layout(layout, planner.plan_axes(layout, per_node), per_node)
        show_memory(run, planner.plan_memory(run, config, layout))
    if run.data.path or run.data.sources or run.data.mock:
        show_steps(run, planner.plan_steps(run, config, layout), bool(layout))
    else:
        say("# data: none given; add data.path=FOLDER to see samples, packs and FLOPs of a step")


def show_layout(layout: "Layout", axes: "list[AxisRanks]", per_node: int) -> None:
    """The axes that are used, and which ranks work together with rank 0 on each."""
    say(f"# layout of {layout.world}: {layout.describe()}; data ranks: {layout.data_ranks}")
    for axis, group, is_inside in axes:
        size = len(group)
        ranks = ", ".join(map(str, group)) if size <= 4 else f"{group[0]}, {group[1]}, ... {group[-1]}"
        where = "inside a machine" if is_inside else "across machines"
        say(f"#   {axis} {size}: {AXIS_WORDS[axis]}; rank 0 with {ranks}, {where} of {per_node}")


def show_memory(run: Run, memory: "RankMemory") -> None:
    """What the rank that has most holds, in GiB."""
    states = memory.states
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in states._asdict().items() if size)
    say(f"# a rank holds at most {memory.parameters:,} parameters, {states.total / GIB:.2f} GiB: {parts}")
    sizes = ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory.activations.items())
    say(
        f"# activations on a rank, {memory.tokens:,} tokens of a pack of {run.batch.tokens_per_pack:,}, in GiB "
        f"(estimate), by what is recomputed: {sizes}"
    )


def show_steps(run: Run, step: "StepOutlook", has_layout: bool) -> None:
    """Samples, packs and FLOPs of a step; and how even they are over a layout."""
    for source, weight in zip(step.sources, step.shares, strict=True):
        say(f"# data: {describe(source)}, {weight:.0%} of the samples")
    say(f"# step: {run.batch.samples} samples, {step.tokens:,.0f} tokens, {step.packs:.1f} packs")
    say(f"# packs: {step.fill:.1%} full; step: {step.flops / 1e12:,.3f} model TFLOP")
    if has_layout:
        say(
            f"# data rank: {step.packs / step.data_ranks:.1f} packs and {step.tokens / step.data_ranks:,.0f} tokens a "
            f"step; balance {step.balance:.3f} (how much longer a step takes than with equal packs), padding "
            f"{step.padding:.3%}"
        )
    say(f"# run: {step.steps:,} steps, {step.steps * run.batch.samples:,} samples")


def describe(source: "Source") -> str:
    """One line on a source."""
    train, val = source.rows("train"), source.rows("val")
    return (
        f"'{source.path}' has {plural(len(train), 'sample')} to train on, {len(val):,} held out, "
        f"{plural(int(train.tokens.sum()), 'token')}"
    )


def show_run(path: Path) -> None:
    """How far a run is, and its checkpoints."""
    from wanloom.checkpoint.saved import list_checkpoints, read_state
    from wanloom.train.progress import format_seconds
    from wanloom.train.records import FILE, read_metrics

    records = read_metrics(path / FILE)
    if records:
        last = records[-1]
        say(f"last record: step {last['step']}, loss {last['loss']:.4f}, {last['tokens_per_second']:,.0f} tokens/s")
        held_out = [record for record in records if "val_loss" in record]
        if held_out:
            say(f"held-out loss: {held_out[-1]['val_loss']:.4f} at step {held_out[-1]['step']}")
    for checkpoint in list_checkpoints(path):
        state = read_state(checkpoint)
        size = sum(file["bytes"] for file in state["files"].values()) / GIB
        seen = f"{state['samples']:,} samples, {state['tokens']:,} tokens"
        say(f"{checkpoint}: {seen}, {format_seconds(state['seconds'])} of training, {size:.2f} GiB")
    if not list_checkpoints(path):
        say(f"{path} has no checkpoint yet.")


def show_page(path: Path, file: Path, model: str | None) -> None:
    """Write the page of a prepared folder."""
    from wanloom.data.shards import Dataset
    from wanloom.report.data import write_page

    source = Dataset.open(path)
    write_page(source, file, model, describe(source), lambda done, count: say(f"decoded {done} of {count}"))
    say(str(file.resolve()))


def show_data(path: Path) -> None:
    """Samples, sizes and captions of a prepared folder."""
    from wanloom.data.shards import Dataset
    from wanloom.model.dit import PATCH_SIZE
    from wanloom.runs.origin import read_geometry, read_settings

    source = Dataset.open(path)
    geometry = read_geometry(source.path)
    say(describe(source))
    index = source.rows("train")
    say("  sizes are width x height, captions those of the first samples")
    for shape, count in index.count_shapes().items():
        frames, height, width = geometry.video_shape(*shape)
        tokens = math.prod(shape) // PATCH_SIZE
        say(f"  {count:,} x {plural(frames, 'frame')} of {width}x{height} ({tokens:,} tokens)")
    for i in range(min(NUM_CAPTIONS, len(index))):
        say(f"  {index[i].key}: {index[i].caption}")
    if len(index) > NUM_CAPTIONS:
        more = plural(len(index) - NUM_CAPTIONS, "sample")
        say(f"  and {more} more: `wanloom show {shlex.quote(str(path))} --page` draws them")
    if used := read_settings(source.path):
        say("  prepared with: " + ", ".join(f"{name} {value}" for name, value in used.items() if value is not None))
