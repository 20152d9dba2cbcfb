"""How long training is held up by a save: the copy that wanloom's checkpointer takes, against torch.save.

    python benchmarks/c14_checkpoint.py [--gigabytes 1.1] [--rounds 7] [--folder FOLDER]

The state is that of a model of equal blocks with AdamW: weights and two moments, fp32. They take turns. torch.save
leaves the bytes to the system's cache; synced it waits for the disk, as the checkpointer's thread does. Prints
seconds, the least and the median.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from wanloom.train.checkpoint import CheckpointConfig, Checkpointer

NAMES = ("torch.save", "torch.save, synced", "wanloom, held up", "wanloom, on disk")
DIM, FFN = 1536, 8960  # of the 1.3B model


def build_state(gigabytes: float) -> dict[str, Tensor]:
    """Tensors as a block has them, until there are so many bytes (10^9 of them a gigabyte)."""
    shapes = [*[(DIM, DIM), (DIM,)] * 8, (FFN, DIM), (FFN,), (DIM, FFN), (DIM,)]
    out, total = {}, 0.0
    while total < gigabytes * 1e9:
        for i, shape in enumerate(shapes):
            for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
                tensor = torch.randn(shape)
                out[f"{kind}.blocks.{len(out)}.{i}"] = tensor
                total += tensor.nbytes
    return out


def save_synced(state: dict[str, Tensor], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def seconds(block) -> float:
    began = time.perf_counter()
    block()
    return time.perf_counter() - began


def longest_stop(checkpointer: Checkpointer, state: dict[str, Tensor], step: int) -> float:
    """The longest time that the thread of training cannot go on while the other one writes."""
    checkpointer.save(step, state, {"step": step, "model": {}}, "")
    longest, last, before = 0.0, time.perf_counter(), checkpointer.last()
    while checkpointer.last() == before:
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    checkpointer.wait()
    return longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    state = build_state(arguments.gigabytes)
    size = sum(tensor.nbytes for tensor in state.values()) / 1e9
    saves: dict[str, list[float]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        checkpointer = Checkpointer(Path(folder), CheckpointConfig(keep=1))
        prepare = seconds(lambda: checkpointer.prepare(state))
        for i in range(arguments.rounds):
            path = Path(folder) / "state.pt"
            saves["torch.save"].append(seconds(lambda path=path: torch.save(state, path)))
            path.unlink()
            saves["torch.save, synced"].append(seconds(lambda path=path: save_synced(state, path)))
            path.unlink()
            fixed = {"step": i, "model": {}}
            held = seconds(lambda i=i, fixed=fixed: checkpointer.save(i, state, fixed, ""))
            saves["wanloom, held up"].append(held)
            saves["wanloom, on disk"].append(held + seconds(checkpointer.wait))
        stop = longest_stop(checkpointer, state, arguments.rounds)
        checkpointer.close()
    print(f"{size:.2f} GB, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}")
    print(f"memory for the copy, once at the start: {prepare:.3f} s")
    print(f"longest stop of the other thread while a save is written: {stop:.3f} s")
    for name, taken in saves.items():
        print(f"{name:18} first {taken[0]:.3f}  least {min(taken):.3f}  median {statistics.median(taken):.3f} s")
    held = saves["wanloom, held up"]
    for name in NAMES[:2]:
        least, median = min(saves[name]) / min(held), statistics.median(saves[name]) / statistics.median(held)
        print(f"{name} / wanloom, held up: least {least:.1f}, median {median:.1f}")


if __name__ == "__main__":
    main()
