"""A run that is saved in one layout and goes on in another, and checkpoints that do not fit: what the workers do.

Saving, loading and the count of steps are those of `wanloom train`.
"""

from pathlib import Path
from typing import Any

import torch
from layouts.runs import Case, Result, build_case, result_of, take_steps

from wanloom.checkpoint.saved import find_checkpoint, read_state
from wanloom.checkpoint.settings import CheckpointConfig
from wanloom.checkpoint.writer import Checkpointer, load_tensors
from wanloom.errors import UserError
from wanloom.parallel.params import local

SAVED_AT, LAST = 3, 8


def save(case: Case, folder: Path) -> None:
    """The first steps, and a checkpoint of them."""
    parts = build_case(case)
    checkpointer = Checkpointer(folder, CheckpointConfig())
    for _ in take_steps(parts, case, 0, SAVED_AT):
        pass
    checkpointer.save(SAVED_AT, parts.tensors(), {"step": SAVED_AT, **parts.facts}, parts.recipe)
    checkpointer.wait()
    checkpointer.close()


def go_on(case: Case, folder: Path) -> Result:
    """The other steps, from the checkpoint in `folder`, in the layout of `case`."""
    parts, checkpoint = build_case(case), find_checkpoint(folder)
    for tensor in parts.tensors().values():
        local(tensor).fill_(torch.nan)  # nothing but the checkpoint's values may count
    load_tensors(checkpoint, parts.tensors())
    step = read_state(checkpoint)["step"]
    parts.optimizer.set_step_count(step)
    facts: dict[str, Any] = {"steps": [[*result] for _, result in take_steps(parts, case, step, LAST)]}
    return result_of(parts, {}, facts)


def run_whole() -> Result:
    """All steps on one process, undisturbed."""
    case = Case("one process", 1)
    parts = build_case(case)
    facts: dict[str, Any] = {"steps": [[*result] for _, result in take_steps(parts, case, 0, LAST)]}
    return result_of(parts, {}, facts)


def be_another(case: Case, folder: Path) -> Result:
    """What a model of other dims is told of the checkpoint in `folder`."""
    parts = build_case(case)
    try:
        load_tensors(find_checkpoint(folder), parts.tensors())
    except UserError as error:
        return result_of(parts, {}, {"sentence": str(error)})
    raise AssertionError("another model was loaded")
