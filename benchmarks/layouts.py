"""Every layout of the processes that there are against one process, on this device: equality, seconds, memory.

    torchrun --nproc-per-node 8 -m benchmarks.layouts [--layers 4] [--out FILE]
    python -m benchmarks.layouts

One process runs the recompute policies, offload and compile. The model has the width of the 1.3B on GPUs, a tiny one on
CPUs; weights are random, packs are clips and images of unequal size. Each case is one forward and backward of all
packs: the gradient of every parameter is compared with that of one process without any of it, fp32 to 1e-5, bf16 to
6e-2 (the order of sums), by the norm of the difference. Prints a table, writes it as json, and ends with 1 when a case
is out of bounds. What CPUs cannot show is NCCL, the kernels of CUDA and bf16 on the wire.
"""

import argparse
import json
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wanloom.data.loader import Source
from wanloom.data.mock import MockDataset
from wanloom.data.settings import BatchConfig, DataConfig
from wanloom.dist import gather, pick_device, process_group, rank, world_size
from wanloom.errors import UserError
from wanloom.files import write_atomic
from wanloom.geometry import WAN_21
from wanloom.model.dit import WanDiT
from wanloom.model.kernels import resolve_kernel
from wanloom.model.settings import DiTConfig
from wanloom.objective.settings import FlowConfig
from wanloom.parallel import params
from wanloom.parallel.mesh import ONE_PROCESS, Mesh, resolve_layout
from wanloom.parallel.settings import ComputeConfig, ParallelConfig
from wanloom.runs.build import build_loader, build_model, build_plan
from wanloom.runs.recipe import Run
from wanloom.runs.trained import open_init
from wanloom.train.settings import OptimizerConfig, TrainConfig
from wanloom.train.step import Batch, forward_backward
from wanloom.variants import VARIANTS

BOUNDS = {False: 1e-5, True: 6e-2}  # by bf16
ROUNDS = 3
Case = tuple[str, dict[str, Any], dict[str, Any]]


def cases(world: int) -> list[Case]:
    """(name, settings of parallel, settings of compute) for so many processes."""
    if world == 1:
        policies = ("none", "cheap", "attention", "full")
        kept = [(f"recompute={p}", {}, {"recompute": p}) for p in policies]
        away = [(f"recompute={p} offload", {}, {"recompute": p, "offload_activations": True}) for p in policies]
        return [*kept, *away, ("compile=block", {}, {"compile": "block"})]
    layouts: list[dict[str, Any]] = [
        {},
        {"dp_replicate": world},
        {"cp": world, "context": "ulysses"},
        {"cp": world, "context": "ring"},
        {"cp": world},
        {"tp": world},
        {"pp": world},
    ]
    if world % 4 == 0:
        half = world // 2
        layouts += [{"dp_replicate": 2}, {"cp": half}, {"tp": 2}, {"tp": 2, "cp": half}, {"pp": 2}, {"pp": 2, "tp": 2}]
    named = [(" ".join(f"{k}={v}" for k, v in layout.items()) or "dp_shard", layout, {}) for layout in layouts]
    return [*named, ("dp_shard recompute=attention", {}, {"recompute": "attention"})]


def run_of(bf16: bool, options: dict[str, Any], samples: int = 1, budget: int = 1) -> Run:
    """What a recipe would say."""
    return Run(
        model="tiny",
        data=DataConfig(mock="some"),
        batch=BatchConfig(samples=samples, tokens_per_pack=budget),
        train=TrainConfig(steps=1),
        optimizer=OptimizerConfig(lr=1e-4),
        caption_dropout=0.0,
        compute=ComputeConfig(precision="bf16" if bf16 else "fp32", **options),
    )


def build(config: DiTConfig, mesh: Mesh, bf16: bool, options: dict[str, Any]) -> WanDiT:
    """The part of this rank, with the same weights everywhere; the head, which starts at zero, is drawn too."""
    run = run_of(bf16, options)
    model = build_model(run, config, mesh, open_init(run, config))
    for name, param in model.named_parameters():
        if name == "head.head.weight":
            drawn = 0.02 * torch.randn(param.shape, generator=torch.Generator().manual_seed(1))
            params.fill(param, drawn)
    return model


def read_batch(config: DiTConfig, mesh: Mesh, shapes: str, budget: int) -> Batch:
    """The packs of this data rank of one step; at least as many samples as ranks."""
    sources: list[Source] = [MockDataset(shapes, config.text_dim, WAN_21, size=1)]
    run = run_of(False, {}, max(len(sources[0].rows("train")), 2 * world_size()), budget)
    plan = build_plan(run, config, sources, mesh.layout.data_ranks)
    with build_loader(run, config, sources, plan, 0, None, mesh.data_rank) as loader:
        return next(iter(loader))


def measure(
    config: DiTConfig, mesh: Mesh, bf16: bool, options: dict[str, Any], data: tuple[str, int]
) -> dict[str, Any]:
    """Gradients of one step on this rank, its seconds (least of ROUNDS, the first not counted) and its peak memory."""
    torch._dynamo.reset()  # blocks that a case before has compiled
    model, batch = build(config, mesh, bf16, options), read_batch(config, mesh, *data)
    named = dict(model.named_parameters())
    on_gpu = mesh.device.type == "cuda"
    seconds, value = [], 0.0
    for _ in range(ROUNDS + 1):
        model.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        weighted, _ = forward_backward(model, named, mesh, batch, FlowConfig())
        loss = weighted.sum()
        if mesh.layout.world > 1:
            dist.all_reduce(loss)
        value = loss.item() / batch.num_elements
        seconds.append(time.perf_counter() - began)
    grads = {name: p.grad for name, p in named.items() if p.grad is not None}
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    return {"loss": value, "grads": grads, "named": named, "s": min(seconds[1:]), "gib": peak}


def farthest(found: dict[str, Any], reference: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative distance of a gradient from its reference, over this rank's parts, and whose it is."""
    worst = (0.0, "")
    for name, param in found["named"].items():
        whole = reference[name]
        part = params.local(found["grads"][name]).double() if name in found["grads"] else torch.zeros_like(whole)
        distance = ((part - whole[params.box_of(param)].double()).norm() / whole.double().norm()).item()
        worst = max(worst, (distance, name))
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = pick_device()
    on_gpu = device.type == "cuda"
    config = VARIANTS["wan2.1-t2v-1.3b" if on_gpu else "tiny"].shape.model_copy(update={"num_layers": arguments.layers})
    data = ("81x480x832,1x480x832*4,17x240x416*2", 32760) if on_gpu else ("9x64x96,1x64x64*3,5x48x64*2", 80)
    rows = []
    for bf16 in (True, False) if on_gpu else (False,):
        alone = Mesh(ONE_PROCESS, device)
        plain = measure(config, alone, bf16, {}, data)
        reference = {name: params.local(grad).cpu() for name, grad in plain["grads"].items()}
        for name, parallel, options in cases(world_size()):
            try:
                mesh = Mesh(resolve_layout(ParallelConfig(**parallel), world_size(), config), device)
            except UserError as error:
                rows.append({"case": name, "bf16": bf16, "left_out": str(error)})
                continue
            found = measure(config, mesh, bf16, options, data)
            found["grads"] = {n: params.local(g).cpu() for n, g in found["grads"].items()}
            distance, whose = max(gather(farthest(found, reference)))
            off = abs(found["loss"] / plain["loss"] - 1)
            rows.append({"case": name, "bf16": bf16, "loss_off": off, "gradient_off": distance, "of": whose})
            rows[-1] |= {"ok": max(distance, off) <= BOUNDS[bf16], "seconds": found["s"], "alone_seconds": plain["s"]}
            rows[-1] |= {"gib": found["gib"], "alone_gib": plain["gib"]}
            if rank() == 0:
                print(json.dumps(rows[-1]), flush=True)
    kernel = resolve_kernel("auto", device.type, torch.bfloat16 if on_gpu else torch.float32)
    facts = {"device": torch.cuda.get_device_name() if on_gpu else platform.processor(), "torch": torch.__version__}
    facts |= {"processes": world_size(), "kernel": kernel, "date": datetime.now(UTC).isoformat(), "rows": rows}
    if rank() == 0 and arguments.out:
        write_atomic(arguments.out, (json.dumps(facts, indent=1) + "\n").encode())
    return 0 if all(row.get("ok", True) for row in rows) else 1


if __name__ == "__main__":
    with process_group():
        code = main()
    sys.exit(code)
