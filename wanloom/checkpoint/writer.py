"""Checkpoints: RUN/checkpoints/step_0001000/, whole or not there at all.

In: named tensors, whole or spread over the ranks, the state of the run and its recipe. Out: a
torch.distributed.checkpoint folder of safetensors files (no pickle), state.json and run.yaml. The one decision: a
checkpoint is written beside its place by a background thread of every rank from a copy, each file and the folder
synced, then renamed by rank 0 when every rank is done; so a kill at any moment leaves the last whole one.
Tensors: `model.<name>`, `ema.<name>`, `optimizer.exp_avg.<name>`, `optimizer.exp_avg_sq.<name>`.
"""

import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from wanloom.checkpoint.pieces import Box, StoredPieces, share, write_pieces
from wanloom.checkpoint.saved import FOLDER, damaged, find_damage, list_checkpoints, seal, step_of
from wanloom.checkpoint.settings import CheckpointConfig
from wanloom.dist import gather, rank, together, world_size
from wanloom.errors import UserError, sentence_of
from wanloom.files import remove, write_atomic
from wanloom.parallel.params import local
from wanloom.threads import one_thread

PARTIAL = ".partial"
FILE_BYTES = 2**30  # of a file, and of its block of memory for the copies
ALIGN = 64  # bytes, of a tensor in the copy
WRITE_TIMEOUT = timedelta(hours=4)  # of the slowest rank's disk; a rank that is gone is noticed at once
SEEN_TIMEOUT = 10.0  # seconds until a folder of rank 0 must show on the other machines

# one process without a process group is meant, not forgotten
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


def load_tensors(checkpoint: Path, into: Mapping[str, Tensor]) -> None:
    """Fill the tensors in place, in their dtypes, each rank its pieces; all ranks call it, with names of their own.

    Raises UserError, the same on every rank, for a damaged checkpoint, or one of another model.
    """
    found = [damage for damage in gather(find_damage(checkpoint, rank(), world_size())) if damage]
    if found:
        raise UserError(gather(str(damaged(checkpoint, found[0])) if rank() == 0 else "")[0])
    with together():
        stored = _open_stored(checkpoint)
        wrong = [name for name, tensor in into.items() if not _fits(stored, name, tensor)]
        if wrong:
            names = ", ".join(sorted(wrong)[:5])
            raise UserError(f"{checkpoint} does not fit this model: {len(wrong)} tensors differ, such as {names}.")
        stored.fill({n: local(t) for n, t in into.items()}, {n: Box.of(t) for n, t in into.items()})


def _open_stored(checkpoint: Path) -> StoredPieces:
    try:
        return StoredPieces(checkpoint)
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise damaged(checkpoint, f"the headers of its files cannot be read ({error})") from error


def _fits(stored: StoredPieces, name: str, tensor: Tensor) -> bool:
    entry = stored.tensors.get(name)
    if entry is None or entry.size != tensor.shape:
        return False
    return entry.properties.dtype.is_floating_point == tensor.is_floating_point()


class Checkpointer:
    """Writes the checkpoints of a run in the background, one at a time, and keeps the newest.

    All ranks make one together and save together. Raises UserError when the ranks do not see the same `run_dir`.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig) -> None:
        self.run_dir = run_dir
        self.config = config
        self._group = _build_group()
        self._boxes: dict[str, Box] = {}
        self._files: dict[str, int] = {}
        self._staged: dict[str, Tensor] | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None
        self.last = self._open_folder()  # whole when it got its name; `load_tensors` checks whether it still is

    def _open_folder(self) -> Path | None:
        """Clear what a kill has left, see that it is one folder for all. Returns its newest checkpoint."""
        folder, token, newest = self.run_dir / FOLDER, None, None
        with together(self._group):
            if rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                for leftover in folder.glob(f"*{PARTIAL}"):
                    remove(leftover)
                token = folder / f"shared-{uuid.uuid4().hex}{PARTIAL}"
                token.mkdir()
                newest = next(reversed(list_checkpoints(self.run_dir)), None)
        told = gather([token and token.name, newest and newest.name], self._group)[0]
        try:
            with together(self._group):
                if not _appears(folder / told[0]):
                    raise UserError(
                        f"{self.run_dir} is not the same folder for all processes: run_dir must be on a disk that all "
                        "machines share."
                    )
        finally:
            if token is not None:
                token.rmdir()
        return folder / told[1] if told[1] else None

    @property
    def last_step(self) -> int | None:
        """The step of the newest checkpoint."""
        return None if self.last is None else step_of(self.last)

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """Agree on who writes which piece and take the memory for the copies; all ranks together, once, at the start.

        `save` does it when it was not done. The names, layouts and sizes stay the same from then on.
        """
        boxes = {name: Box.of(tensor) for name, tensor in tensors.items()}
        mine = {name: tensors[name] for name in share(boxes, self._group)}
        self._boxes = {name: boxes[name] for name in mine}
        self._files = split_files({name: local(tensor).nbytes for name, tensor in mine.items()})
        self._staged = allocate_copies({name: local(tensor) for name, tensor in mine.items()}, self._files)

    @torch.no_grad()
    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], recipe: str) -> None:
        """Copy the pieces and write them in the background; after the save before. Raises UserError if that failed.

        All ranks save the same step together. `state` and `recipe` count on rank 0.
        """
        self.wait()
        if self._staged is None:
            self.prepare(tensors)
        devices = set[torch.device]()
        with one_thread():
            for name, copy in (self._staged or {}).items():
                piece = local(tensors[name])
                copy.copy_(piece, non_blocking=True)
                devices.add(piece.device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        self._saving = self._pool.submit(self._write, step, dict(state), recipe)

    @property
    def failed(self) -> bool:
        """Whether the save in the background is known to have failed; `wait` then raises the reason.

        It asks nobody: other ranks may know a little later. They must agree on it before any of them calls `wait`.
        """
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def wait(self) -> None:
        """Wait until the last save is on disk. Raises UserError, the same on every rank, if it failed on any."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def describe_last(self) -> str:
        """One sentence on the newest whole checkpoint."""
        return f"The last whole checkpoint is {self.last}." if self.last else "No checkpoint was saved before."

    def close(self, wait: bool = True) -> None:
        """End the thread; an error of the save is raised by `wait`, not here.

        Without `wait` it is left to the end of the process: a rank that hangs would be waited for as long as one that
        writes to a slow disk.
        """
        self._pool.shutdown(wait=wait)

    def _write(self, step: int, state: dict[str, Any], recipe: str) -> None:
        partial = self.run_dir / FOLDER / f"step_{step:07d}{PARTIAL}"
        own = dict[str, dict[str, int]]()
        try:
            with together(self._group):
                if rank() == 0:
                    partial.mkdir(parents=True)  # the run folder may have been deleted
            with together(self._group):
                own = write_pieces(partial, self._staged or {}, self._boxes, self._files)
                sync_folder(partial)
            files = gather(own, self._group)
            with together(self._group):
                if rank() == 0:
                    state["files"] = {name: file for of_rank in files for name, file in of_rank.items()}
                    self._finish(partial, state, recipe)
        except (UserError, OSError) as error:
            if rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            again = "go on from there" if self.last else "begin anew, here or with run_dir on another disk"
            raise UserError(
                f"The checkpoint of step {step} could not be written: {sentence_of(error)} {self.describe_last()} Make "
                f"room, then start the same command again to {again}."
            ) from error
        self.last = partial.with_suffix("")

    def _finish(self, partial: Path, state: dict[str, Any], recipe: str) -> None:
        """Give a checkpoint its name, now that its files are there, and drop those that are too many."""
        write_atomic(partial / "run.yaml", recipe.encode())
        write_atomic(partial / "state.json", json.dumps(seal(state, recipe.encode()), indent=1).encode())
        sync_folder(partial)
        partial.rename(partial.with_suffix(""))
        sync_folder(partial.parent)
        for old in list_checkpoints(self.run_dir)[: -self.config.keep]:
            # a half deleted checkpoint must not look whole
            doomed = old.with_name(old.name + PARTIAL)
            old.rename(doomed)
            remove(doomed)


def _build_group() -> dist.ProcessGroup | None:
    """A group of all ranks for the threads: their exchanges must not mix with those of training."""
    if world_size() == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return group


def split_files(sizes: Mapping[str, int]) -> dict[str, int]:
    """Which file, from 1, each piece goes to, by its size in bytes."""
    out, file, total = {}, 1, 0
    for name, size in sizes.items():
        if total and total + size > FILE_BYTES:
            file, total = file + 1, 0
        out[name] = file
        total += size
    return out


def allocate_copies(pieces: Mapping[str, Tensor], files: Mapping[str, int]) -> dict[str, Tensor]:
    """A tensor on the host for each piece, one block of memory a file; pinned for pieces on a GPU."""
    # a block for each piece would cost up to twice the memory: pinned blocks have sizes of powers of two
    begins, totals = dict[str, int](), dict[int, int]()
    for name, piece in pieces.items():
        begins[name] = totals.get(files[name], 0)
        totals[files[name]] = begins[name] + -(-piece.nbytes // ALIGN) * ALIGN
    pinned = any(piece.is_cuda for piece in pieces.values())
    # written once, so that the first save does not wait for pages
    blocks = {file: torch.empty(n, dtype=torch.uint8, pin_memory=pinned).zero_() for file, n in totals.items()}
    out = {}
    for name, piece in pieces.items():
        block = blocks[files[name]][begins[name] : begins[name] + piece.nbytes]
        out[name] = block.view(piece.dtype).view(piece.shape)
    return out


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _appears(path: Path) -> bool:
    """Whether a path that rank 0 has made is here too; a network disk may show it a little later."""
    deadline = time.monotonic() + SEEN_TIMEOUT
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
