"""`wanloom show`: what a recipe, a run or a prepared folder holds, without weights and without a GPU."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wanloom.data.loader import Source
    from wanloom.model.dit import DiTConfig
    from wanloom.recipes.run import Run

HELP = """Print what a recipe, a run or a prepared folder holds.

  wanloom show tiny data.path=prepared     every setting, with parameters, data and FLOPs; itself a valid recipe
  wanloom show runs/first                  how far a run is, and its checkpoints
  wanloom show prepared                    samples, sizes and captions of a training set
"""
NUM_CAPTIONS = 3
STEPS_PLANNED = 20  # enough for a mean of packs per step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help="a recipe, a YAML file, a run folder or a prepared folder")
    parser.add_argument("settings", metavar="key.path=value", nargs="*", help="settings that replace the recipe's")
    parser.add_argument("--training-mode", choices=("pretrain", "finetune"), help="as for `wanloom train`")
    parser.add_argument("--mock", metavar="SHAPES", help="as for `wanloom train`")


def run(arguments: argparse.Namespace) -> int:
    from wanloom.config import UserError
    from wanloom.recipes.run import load_run, recipe_names, use_mock

    path = Path(arguments.target)
    if arguments.target in recipe_names() or not path.is_dir():
        show_recipe(load_run(arguments.target, use_mock(arguments.settings, arguments.mock), arguments.training_mode))
        return 0
    if arguments.settings or arguments.mock or arguments.training_mode:
        raise UserError(f"{path} is a folder: settings can only be given for a recipe.")
    if (path / "checkpoints").is_dir():
        show_run(path)
    else:
        show_data(path)
    return 0


def show_recipe(run: "Run") -> None:
    """The resolved settings as YAML, and what follows from them as YAML comments."""
    import torch

    from wanloom.model.dit import WanDiT
    from wanloom.recipes.run import dump_run, model_config

    config = model_config(run.model)
    with torch.device("meta"):
        params = sum(p.numel() for p in WanDiT(config).parameters())
    copies = 5 if run.ema.decay else 4  # weights, gradients, two moments, average
    print(dump_run(run), end="")
    print(f"# parameters: {params:,}; with gradients, moments and average {params * 4 * copies / 2**30:.2f} GiB")
    if run.data.path or run.data.sources or run.data.mock:
        show_plan(run, config)
    else:
        print("# data: none given; add data.path=FOLDER to see samples, packs and FLOPs of a step")


def show_plan(run: "Run", config: "DiTConfig", ranks: int = 1) -> None:
    """Samples, packs and FLOPs of a step over `ranks` data ranks, planned from the index alone."""
    from wanloom.data.loader import Plan, open_sources
    from wanloom.model.flops import train_flops

    sources = open_sources(run.data, config.in_channels, config.text_dim, config.text_slots)
    plan = Plan(sources, run.data.resolved(), run.batch, run.seed, lambda tokens: train_flops(config, tokens), ranks)
    for source, weight in zip(sources, plan.shares(), strict=True):
        print(f"# data: {describe(source)}, {weight:.0%} of the samples")
    steps = [plan.packs(step) for step in range(min(STEPS_PLANNED, run.train.steps))]
    totals = [plan.totals(packs) for packs in steps]
    num_packs = sum(len(packs) for packs in steps)
    tokens = sum(step.num_tokens for step in totals)
    flops = sum(step.flops for step in totals)
    efficiency = tokens / (num_packs * run.batch.tokens_per_pack)
    print(f"# step: {run.batch.samples} samples, {tokens / len(steps):,.0f} tokens, {num_packs / len(steps):.1f} packs")
    print(f"# packs: {efficiency:.1%} full; step: {flops / len(steps) / 1e12:,.3f} model TFLOP")
    if ranks > 1:
        balance = sum(step.balance for step in totals) / len(steps)
        print(f"# ranks: {ranks}, balance {balance:.3f}: how much longer a step takes than with equal packs")
    print(f"# run: {run.train.steps:,} steps, {run.train.steps * run.batch.samples:,} samples")


def describe(source: "Source") -> str:
    """One line on a source."""
    train, val = source.rows("train"), source.rows("val")
    return (
        f"{source.path}: {len(train):,} samples to train on, {len(val):,} held out, {int(train.tokens.sum()):,} tokens"
    )


def show_run(path: Path) -> None:
    """How far a run is, and its checkpoints."""
    from wanloom.train.metrics import FILE, format_seconds, read_metrics
    from wanloom.train.saved import list_checkpoints, read_state

    records = read_metrics(path / FILE)
    if records:
        last = records[-1]
        print(f"last record: step {last['step']}, loss {last['loss']:.4f}, {last['tokens_per_second']:,.0f} tokens/s")
        held_out = [record for record in records if "val_loss" in record]
        if held_out:
            print(f"held-out loss: {held_out[-1]['val_loss']:.4f} at step {held_out[-1]['step']}")
    for checkpoint in list_checkpoints(path):
        state = read_state(checkpoint)
        size = sum(file["bytes"] for file in state["files"].values()) / 2**30
        seen = f"{state['samples']:,} samples, {state['tokens']:,} tokens"
        print(f"{checkpoint}: {seen}, {format_seconds(state['seconds'])} of training, {size:.2f} GiB")
    if not list_checkpoints(path):
        print(f"{path} has no checkpoint yet.")


def show_data(path: Path) -> None:
    """Samples, sizes and captions of a prepared folder."""
    from wanloom.config import UserError
    from wanloom.data.shards import Dataset

    source = Dataset.open(path)
    print(describe(source))
    index = source.rows("train")
    shapes: dict[tuple[int, ...], int] = {}
    for shape in index.shapes.tolist():
        shapes[tuple(shape[1:])] = shapes.get(tuple(shape[1:]), 0) + 1
    for (frames, height, width), count in sorted(shapes.items(), key=lambda item: -item[1]):
        pixels = f"{4 * (frames - 1) + 1} frames of {height * 8} x {width * 8}"
        print(f"  {count:,} x {pixels} ({frames * height * width // 4:,} tokens)")
    for i in range(min(NUM_CAPTIONS, len(index))):
        print(f"  {index[i].key}: {index[i].caption}")
    settings = path / "prepare.json"
    if settings.is_file():
        try:
            used = json.loads(settings.read_text(encoding="utf-8"))["settings"].items()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{settings} is damaged: restore it or prepare the folder again.") from error
        print("  prepared with: " + ", ".join(f"{name} {value}" for name, value in used if value is not None))
