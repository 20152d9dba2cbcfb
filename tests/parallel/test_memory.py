"""What is said of a rank's memory before the start is what the layout then gives it."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from wanloom.model.dit import WanDiT
from wanloom.model.settings import DiTConfig
from wanloom.parallel import memory
from wanloom.parallel.apply import apply_layout
from wanloom.parallel.memory import activation_bytes, held_params, kept_bytes, state_bytes
from wanloom.parallel.mesh import Layout, Mesh
from wanloom.parallel.settings import ComputeConfig
from wanloom.variants import VARIANTS

# 24 does not divide by 5, and 3 layers do not by 2
SMALL = DiTConfig(dim=24, ffn_dim=40, num_heads=4, num_layers=3, text_dim=12, freq_dim=6)
LAYOUTS = [
    Layout(),
    Layout(dp_shard=5),
    Layout(dp_replicate=2, dp_shard=2, cp_ring=2),
    Layout(dp_replicate=3),
    Layout(tp=4),
    Layout(pp=2, dp_shard=2, cp_ulysses=2, tp=2),
    Layout(pp=3),
]


def build(config: DiTConfig) -> WanDiT:
    with torch.device("meta"):
        return WanDiT(config)


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
def test_every_rank_holds_what_is_said(layout):
    model = build(SMALL)
    for rank in range(layout.world):
        if layout.world > 1:  # groups that exchange nothing
            dist.init_process_group("fake", rank=rank, world_size=layout.world, store=FakeStore())
        try:
            made = build(SMALL)
            apply_layout(made, Mesh(layout, torch.device("cpu")), ComputeConfig())
            locals_ = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in made.named_parameters()}
        finally:
            if layout.world > 1:
                dist.destroy_process_group()
        said = {name: part.numel for name, part in held_params(model, layout, rank).items()}
        assert said == {name: tensor.numel() for name, tensor in locals_.items()}


@pytest.mark.parametrize("layout", [*LAYOUTS, Layout(2, 2, 4, 2, 2, 2)], ids=Layout.describe)
def test_all_ranks_together_hold_the_model(layout):
    model = build(SMALL if layout.world < 64 else VARIANTS["tiny"].shape)
    total = {name: 0.0 for name, _ in model.named_parameters()}
    for rank in range(layout.world):
        for name, part in held_params(model, layout, rank).items():
            total[name] += part.numel / part.copies
    assert total == pytest.approx({name: param.numel() for name, param in model.named_parameters()})


def test_states_of_one_process_and_of_many():
    model = build(SMALL)
    number = sum(p.numel() for p in model.parameters())
    one = state_bytes(held_params(model, Layout(), 0), Layout(), has_average=True, bf16=False)
    assert one.total == 20 * number and one.working == 0
    layout = Layout(dp_shard=4)
    first = state_bytes(held_params(model, layout, 0), layout, has_average=False, bf16=True)
    assert first.average == 0 and first.moments == 2 * first.parameters
    block = sum(p.numel() for p in model.blocks["0"].parameters())
    kept = sum(p.numel() for n, p in model.blocks["0"].named_parameters() if "norm" in n or "modulation" in n)
    outside = number - 3 * block + 3 * 48  # the head's table (1, 2, 24) is padded to four rows
    # two blocks in bf16, the gradients of one in bf16 and in fp32, the rest of the model in fp32
    assert first.working == (block - kept) * (2 * 2 + 2 + 4) + outside * 4


def test_recomputing_more_keeps_less():
    config = VARIANTS["wan2.1-t2v-14b"].shape
    sizes = [kept_bytes(config, recompute, bf16=True) for recompute in memory.KEPT]
    d, f, lse = config.dim, config.ffn_dim, 4 * config.num_heads
    assert sizes == [4 * d, 6 * d + lse, 20 * d + 2 * f + lse, 58 * d + 4 * f + 2 * lse]
    whole = activation_bytes(config, Layout(), 32760, "none", bf16=True)
    assert activation_bytes(config, Layout(cp_ring=8), 32760, "none", bf16=True) == whole / 8
    stages = activation_bytes(config, Layout(pp=4), 32760, "full", bf16=True)
    assert stages == activation_bytes(config, Layout(), 32760, "full", bf16=True), "fewer blocks, more packs under way"
