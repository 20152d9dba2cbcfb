"""A layout applied to a model from outside, in one fixed order.

In: a WanDiT on the meta device, the mesh, how it computes. Out: the same model, changed in place, to be given memory
(`to_empty`) and values (`params.fill`). The one decision: the order is stages, tensor, context, recomputation,
compilation, offload, precision, FSDP: each sees the module that those before it made, and none knows of the others.
"""

import torch

from wanloom.model.dit import WanDiT
from wanloom.parallel.compile import apply_compile
from wanloom.parallel.context import apply_context
from wanloom.parallel.fsdp import apply_fsdp
from wanloom.parallel.mesh import Mesh
from wanloom.parallel.offload import apply_offload
from wanloom.parallel.pipeline import apply_pipeline
from wanloom.parallel.recompute import apply_recompute
from wanloom.parallel.settings import ComputeConfig
from wanloom.parallel.tensor import apply_tensor


def apply_layout(model: WanDiT, mesh: Mesh, compute: ComputeConfig) -> None:
    """Make the model the part of this rank, which computes as `compute` says.

    Raises UserError when blocks are to be compiled and there is no compiler.
    """
    apply_pipeline(model, mesh)
    apply_tensor(model, mesh)
    apply_context(model, mesh)
    # a compiled block hands what it keeps to autograd, where the hooks of `apply_offload` see it
    is_offloaded = compute.offload_activations and compute.compile == "none"
    apply_recompute(model, compute.recompute, is_offloaded)
    apply_compile(model, compute.compile, mesh.device)
    if compute.offload_activations:
        apply_offload(model)
    if compute.bf16:
        apply_autocast(model, mesh.device)
    apply_fsdp(model, mesh, compute.bf16)


def apply_autocast(model: WanDiT, device: torch.device) -> None:
    """Compute in bf16 from fp32 weights, in place, whoever calls the model."""
    for name in ("forward", "text_kv", "compute_dtype"):
        # one for each: a context that is entered again before it is left forgets what was before it
        half = torch.autocast(device.type, torch.bfloat16)
        setattr(model, name, half(getattr(model, name)))
