"""What `wanloom train` finds wrong before torch is loaded, and what it says of a run before the first step.

In: the words of the command; later the plan of the run. Out: a `Run`, or a UserError within a second; a few sentences.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wanloom.checkpoint.saved import list_checkpoints
from wanloom.errors import UserError, nearest
from wanloom.formats.pipeline import check_name
from wanloom.runs.recipe import build_run, split_init
from wanloom.terminal import plural

if TYPE_CHECKING:
    from wanloom.runs.recipe import Run

OWN = {"checkpoints", "run.yaml", "metrics.jsonl", "tensorboard"}  # in the folder of a run
LOGS = (".log", ".out", ".err")  # what a shell or a scheduler may have put there before


def check(arguments: argparse.Namespace) -> "Run":
    """The run, as far as it can be checked without its data and model. Raises UserError."""
    run = build_run(arguments.recipe, arguments.settings, arguments.training_mode, arguments.mock)
    if run.run_dir is None:
        raise UserError("Say where checkpoints and metrics go: run_dir=FOLDER.")
    for source in run.data.resolved():
        check_folder(source.path) if not run.data.mock else None
    if not list_checkpoints(Path(run.run_dir)):  # a run that goes on has weights of its own
        check_init(run.init)
    check_name(run.model)
    if os.environ.get("RANK", "0") == "0":  # the others come when it is in use already
        check_run_dir(Path(run.run_dir))
    return run


def check_folder(path: str) -> None:
    """Raises UserError for a folder of data on this machine that is not there."""
    if "://" not in path and "::" not in path and not Path(path).exists():
        where = "" if Path(path).is_absolute() else f" in {Path.cwd()}: relative paths begin where the command runs"
        raise UserError(f"There is no folder '{path}'{where}.")


def check_init(init: str) -> None:
    """Raises UserError for weights that are none."""
    if init not in ("random", "pretrained") and not split_init(init)[0].is_dir():
        raise UserError(
            f"init is '{init}', which is neither random nor pretrained nor the folder of a run or checkpoint."
            f"{nearest(init, ('random', 'pretrained'))}"
        )


def check_run_dir(run_dir: Path) -> None:
    """Raises UserError for a folder that holds other things: checkpoints shall not be put among clips."""
    if not run_dir.is_dir():
        return
    names = sorted(path.name for path in run_dir.iterdir())
    foreign = [name for name in names if not name.startswith(".") and not name.endswith(LOGS)]
    if foreign and not OWN & set(names):
        raise UserError(
            f"'{run_dir}' is not empty and is no folder of a run (it holds '{foreign[0]}'): give another run_dir."
        )


def tell_outlook(
    run: "Run", sizes: Sequence[int], shares: Sequence[float], unknown: Sequence[str], say: Callable[[str], None]
) -> None:
    """How often the samples are passed over, when the first checkpoint comes, and of which GPUs no peak is known."""
    draws = run.train.steps * run.batch.samples
    passes = [draws * share / size for size, share in zip(sizes, shares, strict=True)]
    if len(passes) == 1:
        often = f"each sample {times(passes[0])}"
    else:
        parts = (f"{source.path} {times(many)}" for source, many in zip(run.data.resolved(), passes, strict=True))
        often = f"each sample of {', '.join(parts)}"
    first = f"step {run.checkpoint.every:,}" if run.checkpoint.every < run.train.steps else "the last step"
    soon = f" or {run.checkpoint.minutes:g} minutes" if run.checkpoint.minutes else ""
    steps = f"{plural(run.train.steps, 'step')} {'passes' if run.train.steps == 1 else 'pass'}"
    say(f"{steps} over {often}; the first checkpoint comes after {first}{soon}.")
    if run.compile == "block":
        say("compile=block: the first step takes minutes, in which its blocks are compiled and nothing is shown.")
    if unknown:
        say(f"The bf16 peak of {' and '.join(unknown)} is not known: the log has no MFU.")


def times(number: float) -> str:
    """`3 times`, `once`; below 10 with two digits."""
    text = f"{number:.2g}" if number < 9.95 else f"{number:,.0f}"
    return "once" if text == "1" else f"{text} times"
