"""Where a run goes on, and what must be as it was.

In: a run and its newest checkpoint. Out: the state to go on from, or a UserError that names what is another. The one
decision: the same command goes on, and a run that goes on is the same run: the draws, the data and every setting that
decides samples or steps must be equal.
"""

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from wanloom.checkpoint.saved import read_state
from wanloom.checkpoint.writer import load_tensors
from wanloom.config import leaves_of
from wanloom.data.loader import Plan
from wanloom.errors import UserError
from wanloom.keys import SCHEME
from wanloom.runs.recipe import Run, read_run
from wanloom.train.loop import Parts, RunState

# What a resumed run may change: it alters neither the samples nor the steps that are done. `train.steps` moves the end
# of a linear or cosine schedule; a kernel, a pack or a layout changes the rounding; data is known by its fingerprint.
MAY_CHANGE = (
    "run_dir",
    "train.steps",
    "train.epochs",
    "batch.tokens_per_pack",
    "checkpoint.*",
    "log.*",
    "data.*",
    "parallel.*",
    "compute.kernel",
    "compute.recompute",
    "compute.offload_activations",
    "compute.compile",
)


def find_state(run: Run, newest: Path | None, plan: Plan) -> RunState:
    """Where to go on. Raises UserError when the draws, the recipe or the data are not those of the checkpoint."""
    if newest is None:
        return RunState()
    stored = read_state(newest)
    if stored.get("draws") != SCHEME:
        raise UserError(
            f"{run.run_dir} was started by another version of wanloom, which drew other noise for the same seed: go on "
            "with that version, or give another run_dir to start anew."
        )
    check_settings(run, newest)
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


def check_settings(run: Run, newest: Path) -> None:
    """Raises UserError when a setting is not that of the checkpoint and may not change."""
    changed = changed_settings(read_run(newest), run)
    if refused := {name: pair for name, pair in changed.items() if not may_change(name)}:
        raise UserError(
            f"{run.run_dir} was started with other settings: {in_words(refused)}. Give the old values to go on, or "
            f"start a new run from its weights: init={run.run_dir} run_dir=ANOTHER. (What may change: "
            f"{', '.join(MAY_CHANGE)}, as long as the samples are the same.)"
        )


def changed_settings(old: Run, new: Run) -> dict[str, tuple[Any, Any]]:
    """The settings that differ between two runs: before and now, by name."""
    before, after = (dict(leaves_of(run.model_dump(mode="json"))) for run in (old, new))
    pairs = {key: (before.get(key), after.get(key)) for key in sorted(before.keys() | after.keys())}
    return {key: (was, now) for key, (was, now) in pairs.items() if was != now}


def may_change(name: str) -> bool:
    """Whether a setting may be another one when a run goes on."""
    return any(fnmatch(name, pattern) for pattern in MAY_CHANGE)


def in_words(changed: dict[str, tuple[Any, Any]]) -> str:
    """`train.steps was 4, now 9; log.every was 1, now 20`."""
    return "; ".join(f"{name} was {was}, now {now}" for name, (was, now) in changed.items())


def restore(parts: Parts, run: Run, checkpoint: Path, step: int, say: Callable[[str], None]) -> None:
    """Give the parts the values that they had; all ranks together. Raises UserError when the checkpoint is damaged."""
    stored = read_state(checkpoint)
    if stored.get("trained") != parts.facts.get("trained"):
        raise UserError(f"{checkpoint} is of a run that trains other parameters: give another run_dir to train these.")
    if stored.get("base") != parts.facts.get("base"):
        raise UserError(
            f"The weights that the run of {checkpoint} began with are other ones now, and it holds only the parameters "
            "that are trained: restore them to go on, or give another run_dir to start anew."
        )
    load_tensors(checkpoint, parts.tensors())
    parts.optimizer.set_step_count(step)
    changed = changed_settings(read_run(checkpoint), run)
    say(f"Going on from {checkpoint}{', with other settings: ' if changed else ''}{in_words(changed)}.")
    before, now = stored.get("threads"), torch.get_num_threads()
    if parts.mesh.device.type == "cpu" and before not in (None, now):  # another machine, or other settings
        say(
            f"note: the number of threads was {before} and is {now}, so within rounding it is no longer the same: "
            f"OMP_NUM_THREADS={before} keeps every bit."
        )
