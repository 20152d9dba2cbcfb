"""What is wrong with the places that a run names, as far as it is known without torch, data and model."""

import os
from pathlib import Path

from wanloom.checkpoint.saved import list_checkpoints
from wanloom.errors import UserError, nearest
from wanloom.formats.pipeline import check_name
from wanloom.runs.recipe import Run, split_init

OWN = {"checkpoints", "run.yaml", "metrics.jsonl", "tensorboard"}  # in the folder of a run
LOGS = (".log", ".out", ".err")  # what a shell or a scheduler may have put there before


def check_places(run: Run) -> None:
    """Raises UserError when data, weights or model are not there, or `run_dir` cannot be what it shall be."""
    if run.run_dir is None:
        raise UserError("Say where checkpoints and metrics go: run_dir=FOLDER.")
    for source in run.data.resolved():
        check_folder(source.path) if not run.data.mock else None
    if not list_checkpoints(Path(run.run_dir)):  # a run that goes on has weights of its own
        check_init(run.init)
    check_name(run.model)
    if os.environ.get("RANK", "0") == "0":  # the others come when it is in use already
        check_run_dir(Path(run.run_dir))


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
