"""`wanloom train`: the words of a run, and what is said at its end."""

import argparse
import shlex
import sys

from wanloom.cli import launch
from wanloom.cli.hints import generate_command
from wanloom.runs.checks import check_places
from wanloom.runs.recipe import MIX, MODES, build_run
from wanloom.terminal import Outlet, Terminal, say

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
        choices=MODES,
        help="preset of noise levels and optimizer; without it, pretrain for init=random, finetune for init=pretrained",
    )
    parser.add_argument(
        "--mock",
        nargs="?",
        const=MIX,
        metavar="SHAPES",
        help="made-up data (frames x height x width), such as 81x480x832,1x480x832*4; without SHAPES clips and images "
        "that fit the recipe",
    )
    launch.add_arguments(parser, restarts=True)


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for a run that cannot be, as far as it is known without its data and model."""
    check_places(build_run(arguments.recipe, arguments.settings, arguments.training_mode, arguments.mock))


def run(arguments: argparse.Namespace) -> int:
    from wanloom.dist import rank, world_size
    from wanloom.runs.train import train_recipe

    ended = train_recipe(arguments.recipe, arguments.settings, arguments.training_mode, arguments.mock)
    if rank() == 0 and ended.stopped is not None:
        words = ["wanloom", "train", arguments.recipe, *arguments.settings]
        words += ["--training-mode", arguments.training_mode] if arguments.training_mode else []
        words += [f"--mock={arguments.mock}"] if arguments.mock else []
        how = shlex.join(words) if world_size() == 1 else "the same command again"
        say(f"Stopped by a signal, and saved. To go on: {how}")
    elif rank() == 0 and ended.taken:
        hint = generate_command(ended.run_dir, ended.sample, ended.geometry, ended.averaged)
        terminal = Terminal(file=Outlet(sys.stdout))  # all is saved: a pipe that is closed now is no mistake
        terminal.print(f"Done: {ended.checkpoint}. To make a video: {hint}", soft_wrap=True)
    return 128 + ended.stopped if ended.stopped is not None else 0
