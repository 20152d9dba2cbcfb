"""Checkpoints: RUN/checkpoints/step_0001000/, whole or not there at all.

In: named tensors, the state of the run and its recipe. Out: a torch.distributed.checkpoint folder of safetensors files
(no pickle), state.json and run.yaml. The one decision: a checkpoint is written beside its place by a background thread
from a copy, each file and the folder synced, then renamed; so a kill at any moment leaves the last whole one. Every
file's size and checksum is in state.json, and a damaged one is named, never skipped quietly.
Tensors: `model.<name>`, `ema.<name>`, `optimizer.exp_avg.<name>`, `optimizer.exp_avg_sq.<name>`.
"""

import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from wanloom.config import Config, UserError, build_config
from wanloom.files import write_atomic
from wanloom.model.dit import DiTConfig

FOLDER = "checkpoints"
PARTIAL = ".partial"
FILE_BYTES = 4 * 2**30  # a file is put together in memory before it is written
NAME = re.compile(r"step_\d{7,}")

# one process without a process group is meant, not forgotten
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


class CheckpointConfig(Config):
    """When to save and how many to keep; the last step is always saved."""

    every: int = Field(default=500, gt=0)  # steps
    keep: int = Field(default=2, ge=1)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folder = run_dir / FOLDER
    found = [p for p in folder.iterdir() if NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def find_checkpoint(path: Path) -> Path:
    """The newest checkpoint of a run folder, or the checkpoint folder itself. Raises UserError if there is none."""
    if (path / "state.json").is_file():
        return path
    if not path.is_dir():
        raise UserError(f"There is no folder {path}: give a run folder or one of its checkpoints.")
    found = list_checkpoints(path)
    if not found:
        raise UserError(
            f"{path} holds no checkpoint: give the folder of a run that has saved one (run_dir of the run)."
        )
    return found[-1]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state of the run at this checkpoint. Raises UserError when state.json is missing or broken."""
    try:
        return json.loads((checkpoint / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise _damaged(checkpoint, f"state.json cannot be read ({error})") from error


def load_tensors(checkpoint: Path, into: Mapping[str, Tensor]) -> None:
    """Fill the tensors in place. Raises UserError for a damaged checkpoint, or one of another model."""
    damage = find_damage(checkpoint)
    if damage:
        raise _damaged(checkpoint, damage)
    stored = stored_tensors(checkpoint)
    missing = sorted(set(into) - set(stored))
    wrong = [name for name in into if name in stored and tuple(stored[name].size) != tuple(into[name].shape)]
    if missing or wrong:
        names = ", ".join((missing + wrong)[:5])
        raise UserError(
            f"{checkpoint} does not fit this model: {len(missing + wrong)} tensors differ, such as {names}."
        )
    load(dict(into), storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)


def load_weights(checkpoint: Path, ema: bool) -> tuple[DiTConfig, dict[str, Tensor]]:
    """The model's config and its weights by parameter name, or their average. `checkpoint` is a checkpoint folder."""
    config = build_config(DiTConfig, read_state(checkpoint)["model"])
    damage = find_damage(checkpoint)
    if damage:
        raise _damaged(checkpoint, damage)
    prefix = "ema." if ema else "model."
    stored = stored_tensors(checkpoint)
    state = {
        name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype)
        for name in sorted(stored)
        if name.startswith(prefix)
    }
    if not state:
        raise UserError(f"{checkpoint} has no averaged weights: the run was trained without ema.decay.")
    load(state, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    return config, {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def stored_tensors(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    """Size and type of every tensor in a checkpoint, from the headers of its files."""
    stored = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    return {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words with the file's name, or None; reads every file."""
    try:
        files = json.loads((checkpoint / "state.json").read_text())["files"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        return f"state.json cannot be read ({error})"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if _checksum(path) != expected["crc32"]:
            return f"the content of {name} has changed"
    return None


def _damaged(checkpoint: Path, damage: str) -> UserError:
    found = list_checkpoints(checkpoint.parent.parent)
    older = takewhile(lambda p: p.name != checkpoint.name, found)
    whole = next((p for p in reversed(list(older)) if find_damage(p) is None), None)
    advice = (
        f"The one before it, {whole}, is whole: to go on from there, delete {checkpoint} and start again."
        if whole
        else "There is no older whole checkpoint."
    )
    return UserError(f"The checkpoint {checkpoint} is damaged: {damage}. {advice}")


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            value = zlib.crc32(block, value)
    return value


class Checkpointer:
    """Writes the checkpoints of a run in the background, one at a time, and keeps the newest."""

    def __init__(self, run_dir: Path, config: CheckpointConfig) -> None:
        self.run_dir = run_dir
        self.config = config
        self._staged: dict[str, Tensor] = {}
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Future[None]] | None = None
        (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
        for leftover in (run_dir / FOLDER).glob(f"*{PARTIAL}"):
            shutil.rmtree(leftover)

    def last(self) -> Path | None:
        """The newest checkpoint; it was whole when it got its name, `load_tensors` checks whether it still is."""
        found = list_checkpoints(self.run_dir)
        return found[-1] if found else None

    @torch.no_grad()
    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], recipe: str) -> None:
        """Copy the tensors and write them in the background; after the save before. Raises UserError if that failed."""
        self.wait()
        if self._staged.keys() != tensors.keys():
            self._staged = {name: torch.empty_like(t, device="cpu") for name, t in tensors.items()}
        for name, tensor in tensors.items():
            self._staged[name].copy_(tensor)
        self._saving = step, self._pool.submit(self._write, step, dict(state), recipe)

    def check(self) -> None:
        """Raises UserError if the save in the background has failed."""
        if self._saving is not None and self._saving[1].done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is on disk. Raises UserError if it failed."""
        if self._saving is None:
            return
        (step, saving), self._saving = self._saving, None
        try:
            saving.result()
        except (OSError, CheckpointException) as error:
            shutil.rmtree(self._partial(step), ignore_errors=True)
            reason = _reason(error)
            raise UserError(
                f"The checkpoint of step {step} could not be written: {reason}. {self.describe_last()} Make room or "
                "choose another disk for run_dir, then start the same command again to go on from there."
            ) from error

    def describe_last(self) -> str:
        """One sentence on the newest whole checkpoint."""
        last = self.last()
        return f"The last whole checkpoint is {last}." if last else "No checkpoint was saved before."

    def close(self) -> None:
        """Wait for the thread; an error of the save is raised by `wait`, not here."""
        self._pool.shutdown(wait=True)

    def _partial(self, step: int) -> Path:
        return self.run_dir / FOLDER / f"step_{step:07d}{PARTIAL}"

    def _write(self, step: int, state: dict[str, Any], recipe: str) -> None:
        partial = self._partial(step)
        partial.mkdir()
        writer = HuggingFaceStorageWriter(str(partial), split_files(self._staged), save_distributed=True)
        save(dict(self._staged), storage_writer=writer, no_dist=True)
        files = sorted(partial.glob("*.safetensors"))
        state["files"] = {p.name: {"bytes": p.stat().st_size, "crc32": _checksum(p)} for p in files}
        write_atomic(partial / "run.yaml", recipe.encode())
        write_atomic(partial / "state.json", json.dumps(state, indent=1).encode())
        sync_folder(partial)
        partial.rename(partial.with_suffix(""))
        sync_folder(partial.parent)
        for old in list_checkpoints(self.run_dir)[: -self.config.keep]:
            # a half deleted checkpoint must not look whole
            doomed = old.with_name(old.name + PARTIAL)
            old.rename(doomed)
            shutil.rmtree(doomed)


def split_files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Which file, from 1, each tensor goes to."""
    out, file, size = {}, 1, 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > FILE_BYTES:
            file, size = file + 1, 0
        out[name] = file
        size += tensor.nbytes
    return out


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: OSError | CheckpointException) -> str:
    if isinstance(error, CheckpointException):
        causes = [wrapped[0] for wrapped in error.failures.values()]
        first = causes[0]
        return first.strerror or str(first) if isinstance(first, OSError) else str(first)
    return error.strerror or str(error)
