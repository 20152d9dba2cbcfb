"""What each of four ranks does for `test_context.py`: it attends over its part of every pack and writes what it got."""

import json
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from wanloom.parallel.context import ContextAttention
from wanloom.parallel.recompute import choose

TIMEOUT = timedelta(seconds=60)
# of each layout the ranks of the ring groups and of the Ulysses groups; a rank's part is its place in the sorted list
LAYOUTS = {
    "ulysses 2": ([], [[0, 1]]),
    "ring 2": ([[0, 1]], []),
    "ring 3": ([[0, 1, 2]], []),
    "ring 4": ([[0, 1, 2, 3]], []),
    "ulysses 2 x ring 2": ([[0, 2], [1, 3]], [[0, 1], [2, 3]]),
}


def groups_of(lists: list[list[int]]) -> dict[int, Any]:
    return {rank: group for ranks in lists for group in [dist.new_group(ranks, TIMEOUT)] for rank in ranks}


def attend_part(attend: ContextAttention, tensors: dict, name: str, lens: torch.Tensor, part: int, parts: int) -> dict:
    """Values and gradients of this rank's rows of a pack."""
    given = [tensors[f"{name}.{key}"].chunk(parts)[part] for key in ("q", "k", "v", "weight")]
    leaves = [x.clone().requires_grad_() for x in given[:3]]
    out = attend(*leaves, lens, lens)
    grads = torch.autograd.grad((out * given[3]).sum(), leaves)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def exchanges_when_kept(attend: ContextAttention, tensors: dict, name: str, lens: torch.Tensor, part: int) -> list[int]:
    """How often ranks exchange rows in forward and backward: recomputed with the operator kept, and all recomputed."""
    q, k, v = (tensors[f"{name}.{key}"].chunk(2)[part].clone().requires_grad_() for key in "qkv")
    counted, exchange = [], dist.batch_isend_irecv
    policy = partial(choose, "attention")

    dist.batch_isend_irecv = lambda ops: counted.append(1) or exchange(ops)
    found = []
    for extra in ({"context_fn": lambda: create_selective_checkpoint_contexts(policy)}, {}):
        counted.clear()
        out = checkpoint(lambda q, k, v: attend(q * 2, k, v, lens, lens).sin(), q, k, v, use_reentrant=False, **extra)
        out.sum().backward()
        found.append(len(counted))
    dist.batch_isend_irecv = exchange
    return found


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=TIMEOUT)
    torch.set_num_threads(1)
    rank, packs = dist.get_rank(), json.loads((folder / "packs.json").read_text())
    tensors = load_file(folder / "packs.safetensors")
    results, notes = {}, {}
    for layout, (rings, exchanges) in LAYOUTS.items():
        ring, ulysses = groups_of(rings).get(rank), groups_of(exchanges).get(rank)
        ranks = sorted({i for ranks in rings + exchanges for i in ranks})
        if rank not in ranks:
            continue
        attend, part = ContextAttention("auto", ring, ulysses), ranks.index(rank)
        for name, lens in packs.items():
            for key, value in attend_part(attend, tensors, name, torch.tensor(lens), part, len(ranks)).items():
                results[f"{layout}.{name}.{key}"] = value.contiguous()
        if layout == "ring 2":
            notes["exchanges"] = exchanges_when_kept(attend, tensors, "one", torch.tensor(packs["one"]), part)
    save_file(results, folder / f"rank{rank}.safetensors")
    (folder / f"rank{rank}.json").write_text(json.dumps(notes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
