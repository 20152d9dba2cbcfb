"""One of the processes that run all layouts: `worker.py RANK STORE OUT`. It takes part in the cases that need it."""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from layouts.cases import CASES, FAULTS
from layouts.runs import Case, Result, run
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule

from wanloom.model.dit import WanDiT
from wanloom.parallel import tensor
from wanloom.train import step

PATIENCE = timedelta(seconds=120)


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
    place, name, broken = {
        "sum_copies": (step, "sum_copies", lambda params, mesh: None),
        "all_reduce": (tensor, "sum_ranks", lambda x, group: x + (right(x, group) - x).detach()),
    }[case.fault]
    right = vars(place)[name]
    setattr(place, name, broken)
    try:
        return run(case)
    finally:
        setattr(place, name, right)


def main() -> None:
    number, address, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    host, port = address.split(":")
    store = dist.TCPStore(host, int(port), is_master=False, timeout=PATIENCE)
    for case in (*CASES, *FAULTS):
        if number >= case.world:
            continue
        os.environ.update(RANK=str(number), WORLD_SIZE=str(case.world))
        prefix = dist.PrefixStore(case.name, store)
        dist.init_process_group("gloo", store=prefix, rank=number, world_size=case.world, timeout=PATIENCE)
        write(run_with_fault(case) if case.fault else run(case), out / case.name, number)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
