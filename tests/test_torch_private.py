"""What torch does not promise is there, and takes and gives what is used of it."""

import inspect

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.placement_types import _StridedShard

from wanloom import torch_private

QKV, BACK = "query, key, value", "grad_out, query, key, value"
DROPOUT = "dropout_p, is_causal"
SEED = "philox_seed, philox_offset"
LENGTHS = "cum_seq_q, cum_seq_k, max_q, max_k"
# arguments in the order in which they are given, how many results are taken
OPERATORS = {
    "flash_cpu": (QKV, 2),
    "flash_cpu_backward": (f"{BACK}, out, logsumexp, {DROPOUT}", 3),
    "cudnn": (f"{QKV}, attn_bias, compute_log_sumexp", 2),
    "cudnn_backward": (f"{BACK}, out, logsumexp, {SEED}, attn_bias, {LENGTHS}, {DROPOUT}", 3),
    "flash": (QKV, 2),
    "flash_backward": (f"{BACK}, out, logsumexp, {LENGTHS}, {DROPOUT}, {SEED}", 3),
    "efficient": (f"{QKV}, attn_bias, compute_log_sumexp", 2),
    "efficient_backward": (
        f"grad_out_, query, key, value, attn_bias, out, logsumexp, {SEED}, dropout_p, grad_input_mask",
        4,
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_attention_takes_and_gives_what_the_kernels_use(name):
    schema = getattr(torch_private, name).default._schema
    wanted, results = OPERATORS[name]
    given = wanted.split(", ")
    assert [argument.name for argument in schema.arguments][: len(given)] == given
    needed = {argument.name for argument in schema.arguments if not argument.has_default_value()}
    assert needed <= set(given)
    assert [str(result.type) for result in schema.returns][:results] == ["Tensor"] * results


@pytest.mark.parametrize("name", ["flash_cpu", "flash_cpu_backward"])
def test_attention_on_the_cpu_takes_a_mask(name):
    (mask,) = (a for a in getattr(torch_private, name).default._schema.arguments if a.name == "attn_mask")
    assert mask.has_default_value()


def test_groups_and_the_store_are_found(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        assert torch_private.resolve_group(group.group_name) is group
        assert torch_private.default_store().add("number", 2) == 2
    finally:
        dist.destroy_process_group()


def test_what_compilation_asks_is_there():
    assert isinstance(torch_private.has_triton(), bool)
    assert isinstance(torch_private.find_cpp_compiler(), str)
    assert torch_private.symbols.use_duck_shape in (True, False)


def test_modes_and_trees_are_there():
    class Counting(torch_private.TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    with Counting() as mode:
        torch.ones(2).add(1)
    assert mode.calls == 2
    assert torch_private.tree_map_only(int, lambda n: n + 1, (1, "a", [2])) == (2, "a", [3])
    assert isinstance(torch_private.has_bf16_instructions(), bool)


def test_public_names_that_no_page_of_torch_describes_are_there():
    """They are used where their public classes are: checkpoint/pieces.py, parallel/fsdp.py and params.py."""
    inspect.signature(create_read_items_for_chunk_list).bind("name", "entry", ["chunk"])
    inspect.signature(FSDPModule.set_force_sum_reduction_for_comms).bind("module", True)
    assert _StridedShard(0, split_factor=2).split_factor == 2
