"""Checkpoints: how long training stands still for a save (C14); saving to the disk and loading (C15).

The peer is torch.save to one file, and torch.load with mmap=True and load_state_dict into a model that is there. The
state, 1.1 GB, is that of blocks of the 1.3B model under AdamW: weights and two moments, fp32. Both load it once before
anything is timed, and every tensor is equal to the bit.

C14 times the call of wanloom's checkpointer, which copies; memory for the copy is taken once at the start of a run.
torch.save is not made to wait for the disk. In C15 both wait (fsync); wanloom also makes checksums, writes its state
and removes the checkpoint before, the peer removes nothing. Loading reads files that are in the system's cache, in
both; wanloom's first reads every byte once to compare the checksums, a row tells what it takes without. What a load
needs beside the model is the peak of resident memory in a fresh process, above that with the model in it; without the
pages of mapped files, which the system takes back when it wants.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Event

import torch
from torch import Tensor, nn

from benchmarks.measure import Row, main, take_turns
from wanloom.checkpoint.pieces import Box, StoredPieces
from wanloom.checkpoint.saved import find_checkpoint
from wanloom.checkpoint.settings import CheckpointConfig
from wanloom.checkpoint.writer import Checkpointer, load_tensors

KINDS = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")


def shapes(toy: bool) -> dict[str, tuple[int, ...]]:
    """Of every tensor by name: two blocks of the 1.3B model are 1.1 GB with their moments."""
    dim, ffn = (64, 256) if toy else (1536, 8960)
    block = [*[(dim, dim), (dim,)] * 8, (ffn, dim), (ffn,), (dim, ffn), (dim,)]
    return {f"{kind}.blocks.{b}.{i}": shape for kind in KINDS for b in range(2) for i, shape in enumerate(block)}


class Holder(nn.Module):
    """A model that holds tensors by name, for load_state_dict."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "/"), tensor)


def load_theirs(path: Path, model: Holder) -> None:
    model.load_state_dict(torch.load(path, mmap=True, weights_only=True))


def save_theirs(state: dict[str, Tensor], path: Path, sync: bool) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def measure_saves(state: dict[str, Tensor], folder: Path) -> dict[str, list[float]]:
    """Seconds by what was done; leaves one checkpoint of each kind."""
    model = Holder(state).state_dict()
    held, step = [], 0
    with closing(Checkpointer(folder, CheckpointConfig(keep=1))) as checkpointer:
        checkpointer.prepare(state)

        def save_ours() -> None:
            nonlocal step
            step += 1
            began = time.perf_counter()
            checkpointer.save(step, state, {"step": step, "model": {}}, "")
            held.append(time.perf_counter() - began)
            checkpointer.wait()

        path = folder / "state.pt"

        def remove() -> None:
            path.unlink()

        seconds = take_turns(
            {
                "torch.save": lambda: save_theirs(model, path, False),
                "remove the first": remove,
                "torch.save, synced": lambda: save_theirs(model, path, True),
                "remove the second": remove,
                "wanloom": save_ours,
            }
        )
    save_theirs(model, path, True)
    return seconds | {"held": held[1:]}  # without that of the warm-up


def measure_loads(state: dict[str, Tensor], folder: Path) -> dict[str, list[float]]:
    """Seconds by what was done, after both were found to give what was saved."""
    into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    model, path, checkpoint = Holder(into), folder / "state.pt", find_checkpoint(folder)

    def fill() -> None:
        StoredPieces(checkpoint).fill(into, {name: Box.of(tensor) for name, tensor in into.items()})

    functions: dict[str, Callable[[], None]] = {
        "torch.load": lambda: load_theirs(path, model),
        "wanloom": lambda: load_tensors(checkpoint, into),
        "wanloom, no checksums": fill,
    }
    for function in functions.values():
        for tensor in into.values():
            tensor.zero_()
        function()
        assert all(torch.equal(into[name], tensor) for name, tensor in state.items())
    return take_turns(functions)


def own_memory() -> int:
    """Bytes of this process's memory that are not pages of files, now."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


def peak_of_load(folder: Path, ours: bool, toy: bool) -> int:
    """Bytes that a load held beside the model at its worst moment, looked at every millisecond; for a fresh process."""
    into = {name: torch.ones(shape) for name, shape in shapes(toy).items()}
    model, seen, done = Holder(into), [own_memory()], Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(own_memory())

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        load_tensors(find_checkpoint(folder), into) if ours else load_theirs(folder / "state.pt", model)
        seen.append(own_memory())
        done.set()
        watching.result()
    return max(seen) - seen[0]


def measure_memory(folder: Path, ours: bool, toy: bool) -> int:
    """`peak_of_load` in a process of its own."""
    code = (
        "import sys, pathlib; from benchmarks.c14_checkpoint import peak_of_load; "
        f"print(peak_of_load(pathlib.Path(sys.argv[1]), {ours}, {toy}))"
    )
    command, root = [sys.executable, "-c", code, str(folder)], Path(__file__).parents[1]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=root)
    return int(done.stdout.split()[-1])


def measure(toy: bool) -> list[Row]:
    """Saves, loads and the memory of a load."""
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes(toy).items()}
    size = sum(tensor.nbytes for tensor in state.values())
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        saves = measure_saves(state, folder)
        loads = measure_loads(state, folder)
        memory = {ours: measure_memory(folder, ours, toy) for ours in (False, True)}
    facts = {"bytes": size}
    equal = "loaded again, all bits equal"
    what = f"{size / 1e9:.1f} GB"
    loading = "torch.load(mmap=True) + load_state_dict"
    compares = min(loads["wanloom"]) - min(loads["wanloom, no checksums"])
    return [
        Row(
            "C14",
            f"training stands still for a save of {what}",
            "s",
            saves["held"],
            "torch.save, not synced",
            saves["torch.save"],
            target=8,
            limit="one copy in memory",
            checked=equal,
            note="the copy alone: the writing goes on beside the next steps",
            facts=facts,
        ),
        Row(
            "C15",
            f"save of {what}, both synced to the disk",
            "s",
            saves["wanloom"],
            "torch.save + fsync",
            saves["torch.save, synced"],
            target=1.7,
            limit="what the disk takes",
            checked=equal,
            note="both wait for one disk; wanloom also makes checksums and takes the copy",
            facts=facts,
        ),
        Row(
            "C15",
            f"load of {what} into a model, checksums compared",
            "s",
            loads["wanloom"],
            loading,
            loads["torch.load"],
            target=4,
            limit="one copy in memory and one checksum",
            checked=equal,
            note=f"torch.load compares nothing; comparing takes {compares:.2f} s of wanloom's time",
            facts=facts,
        ),
        Row(
            "C15",
            f"load of {what} into a model, nothing compared in either",
            "s",
            loads["wanloom, no checksums"],
            loading,
            loads["torch.load"],
            limit="one copy in memory",
            checked=equal,
            facts=facts,
        ),
        Row(
            "C15",
            f"memory that a load of {what} needs beside the model",
            "bytes",
            [memory[True]],
            loading,
            [memory[False]],
            target=0.1 * size,
            at_most=True,
            limit="nothing",
            facts=facts,
        ),
    ]


if __name__ == "__main__":
    main(__spec__, measure)
