"""FSDP2: parameters, gradients and moments of a stage over (dp_replicate, fsdp).

In: a model and the mesh. Out: the model, its Linears sharded in place. The one decision: a block is one group, of which
bf16 runs gather bf16 values; its small fp32 parts (norms, modulation: 12 vectors of dim) are no part of the group, stay
whole on every rank, and have their gradients summed once a step with the other copied parameters. What is outside of
the blocks is gathered in fp32. Weights and the reduction are fp32, and nothing is divided by the number of ranks: the
loss was divided by the element count of the whole step, so ranks with fewer tokens weigh what they should.
"""

import warnings

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from wanloom.model.dit import WanDiT, keeps_fp32
from wanloom.parallel.mesh import Mesh

# a block's result is a view, which nothing changes in place
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)


def apply_fsdp(model: WanDiT, mesh: Mesh, bf16: bool) -> None:
    """Shard the model in place; nothing where there is one data rank and no context parallelism."""
    if mesh.fsdp_mesh is None:
        return
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bf16 else whole
    for block in model.blocks.values():
        kept = {p for name, p in block.named_parameters() if keeps_fp32(name)}
        fully_shard(block, mesh=mesh.fsdp_mesh, reshard_after_forward=True, mp_policy=half, ignored_params=kept)
        register_fsdp_forward_method(block, "text_kv")  # sampling asks for them once, block by block
    fully_shard(model, mesh=mesh.fsdp_mesh, reshard_after_forward=True, mp_policy=whole)
    register_fsdp_forward_method(model, "text_kv")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # else a factor becomes an operation that gloo lacks
