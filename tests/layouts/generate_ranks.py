"""What each of four ranks does for `test_generate_layouts.py`: it makes the same latents in every layout.

Each is made with the text's keys kept over the steps and without, and must have the same bits. A layout of fewer ranks
leaves the last ones out.
"""

import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from wanloom.geometry import WAN_21
from wanloom.parallel.mesh import ONE_PROCESS, Layout, Mesh
from wanloom.runs.model_files import ModelFiles, Placing, load_model
from wanloom.runs.trained import open_published
from wanloom.sample import generate as sampling
from wanloom.sample.generate import Request, generate
from wanloom.sample.settings import GenerateConfig

CPU = torch.device("cpu")
SIZES = ((9, 48, 80), (1, 48, 48), (9, 48, 80), (5, 80, 80))  # 45, 9, 45 and 50 tokens
TEXT_LENS, NEGATIVE_LENS = (5, 1, 9, 5), (2, 7, 2, 1)
sampling.TOKENS_PER_PACK = 230  # guidance then has two packs, of 99 and 50 tokens a branch; without, one of 149


class Case(NamedTuple):
    layout: Layout
    guidance: float
    precision: str = "fp32"


CASES = {
    "cfg 2": Case(Layout(dp_shard=2), 5.0),
    "cfg 2 in bf16": Case(Layout(dp_shard=2), 5.0, "bf16"),
    "cp 2": Case(Layout(cp_ulysses=2), 1.0),
    "cp 2, both branches in one pack": Case(Layout(cp_ulysses=2), 5.0),
    "tp 2": Case(Layout(tp=2), 5.0),
    "ring 3": Case(Layout(cp_ring=3), 1.0),
    "ring 2 x ulysses 2": Case(Layout(cp_ring=2, cp_ulysses=2), 5.0),
    "cfg 2 x cp 2": Case(Layout(dp_shard=2, cp_ulysses=2), 5.0),
    "cfg 2 x cp 2 in bf16": Case(Layout(dp_shard=2, cp_ulysses=2), 5.0, "bf16"),
    "cfg 2 x tp 2": Case(Layout(dp_shard=2, tp=2), 5.0),
    "cp 2 x tp 2": Case(Layout(cp_ulysses=2, tp=2), 1.0),
}


def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(8)
    return [
        Request(
            WAN_21.latents_shape(*size),
            i,
            *(torch.randn(length, 64, generator=generator) for length in lens),
        )
        for i, (size, *lens) in enumerate(zip(SIZES, TEXT_LENS, NEGATIVE_LENS, strict=True))
    ]


def make(folder: Path, case: Case, layout: Layout = ONE_PROCESS) -> Iterator[dict[str, torch.Tensor]]:
    """The latents of every request, by its number: first as sampling makes them, then with the text read every step."""
    files = ModelFiles(str(folder), folder, open_published(folder), ema=False)
    mesh = Mesh(layout, CPU)
    model = load_model(files, Placing(layout, CPU, case.precision, "auto"), mesh)
    config = GenerateConfig(solver="euler", steps=4, guidance=case.guidance)
    for build in (sampling.build_text_kv, lambda *_: None):
        with patch.object(sampling, "build_text_kv", build):
            found = dict(generate(model, requests(), config, mesh=mesh))
        yield {str(i): latents.contiguous() for i, latents in found.items()}


def main(pipeline: Path, out: Path) -> None:
    torch.set_num_threads(1)
    rank, found = int(os.environ["RANK"]), {}
    for name, case in CASES.items():
        world = case.layout.world
        if rank >= world:
            continue
        store = f"file://{out}/store {name}"
        dist.init_process_group("gloo", store, timeout=timedelta(seconds=60), rank=rank, world_size=world)
        kept, anew = make(pipeline, case, case.layout)
        for number, latents in kept.items():
            assert torch.equal(latents, anew[number]), f"{name}: text kept over the steps gives other bits"
            found[f"{name}.{number}"] = latents
        dist.destroy_process_group()
    save_file(found, out / f"rank{rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
