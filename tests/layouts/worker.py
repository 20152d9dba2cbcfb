"""One of the processes that run the layouts: `worker.py RANK STORE OUT CASE ...`. It is in the cases that need it."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from layouts.cases import ANOTHER, CASES, FAULTS, RESUMED, SAVED
from layouts.resume import be_another, go_on, save
from layouts.runs import Case, Result, run
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule

from wanloom.model.dit import WanDiT
from wanloom.parallel import tensor
from wanloom.train import step

PATIENCE = timedelta(seconds=300)


def write(result: Result, folder: Path, number: int) -> None:
    """The tensors, then the facts: where these are, all is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("gradients", "weights", "averages"):
        tensors = {name: value.contiguous() for name, value in getattr(result, kind).items()}
        save_file(tensors, folder / f"{kind}-{number}.safetensors")
    (folder / f"facts-{number}.json").write_text(json.dumps(result.facts))


def run_with_fault(case: Case) -> Result:
    """The run with one thing broken, which is mended afterwards."""
    if case.fault == "divide":

        def divide(model: WanDiT) -> None:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_gradient_divide_factor(float(case.world))

        return run(case, divide)
    one_way = {"all": lambda x, group: x + (tensor.sum_ranks(x, group) - x).detach()}
    place, name, broken = {
        "sum_copies": (step, "sum_copies", lambda params, mesh: None),
        "all_reduce": (tensor, "EXCHANGES", tensor.EXCHANGES | one_way),
    }[case.fault]
    right = vars(place)[name]
    setattr(place, name, broken)
    try:
        return run(case)
    finally:
        setattr(place, name, right)


@contextmanager
def ranks_of(case: Case, name: str, number: int, store: dist.Store) -> Iterator[bool]:
    """A block for the ranks of a case, joined to one another; False for the others."""
    if number >= case.world:
        yield False
        return
    os.environ.update(RANK=str(number), WORLD_SIZE=str(case.world))
    if case.world > 1:
        prefix = dist.PrefixStore(name, store)
        dist.init_process_group("gloo", store=prefix, rank=number, world_size=case.world, timeout=PATIENCE)
    yield True
    if case.world > 1:
        dist.destroy_process_group()


def main() -> None:
    number, address, out, names = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:]
    torch.set_num_threads(1)
    host, port = address.split(":")
    store = dist.TCPStore(host, int(port), is_master=False, timeout=PATIENCE)
    for case in (*CASES, *FAULTS):
        if case.name not in names:
            continue
        with ranks_of(case, case.name, number, store) as joined:
            if joined:
                write(run_with_fault(case) if case.fault else run(case), out / case.name, number)
    for saved in SAVED:
        if saved.name not in names:
            continue
        folder = out / saved.name
        with ranks_of(saved, saved.name, number, store) as joined:
            if joined:
                save(saved, folder)
        for case in (*RESUMED, ANOTHER):
            # no rank begins before it has saved, and the save of a rank ends when that of all has
            with ranks_of(case, f"{saved.name}/{case.name}", number, store) as joined:
                if joined:
                    write((be_another if case is ANOTHER else go_on)(case, folder), folder / case.name, number)


if __name__ == "__main__":
    main()
