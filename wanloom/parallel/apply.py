"""A layout applied to a model from outside, in one fixed order.

In: a WanDiT on the meta device, the mesh, how to recompute and compile. Out: the same model, changed in place, to be
given memory (`to_empty`) and values (`params.fill`). The one decision: the order is stages, tensor, context,
recomputation, compilation, offload, FSDP: each sees the module that those before it made, and none knows of the others.
"""

from wanloom.model.dit import WanDiT
from wanloom.parallel.compile import apply_compile
from wanloom.parallel.context import apply_context
from wanloom.parallel.fsdp import apply_fsdp
from wanloom.parallel.mesh import Mesh
from wanloom.parallel.offload import apply_offload
from wanloom.parallel.pipeline import apply_pipeline
from wanloom.parallel.recompute import apply_recompute
from wanloom.parallel.settings import Compile, Recompute
from wanloom.parallel.tensor import apply_tensor


def apply_layout(
    model: WanDiT,
    mesh: Mesh,
    bf16: bool,
    recompute: Recompute = "none",
    offload: bool = False,
    compile: Compile = "none",
) -> None:
    """Make the model the part of this rank; `bf16`: FSDP gathers the Linears of the blocks in bf16.

    Raises UserError when blocks are to be compiled and there is no compiler.
    """
    apply_pipeline(model, mesh)
    apply_tensor(model, mesh)
    apply_context(model, mesh)
    # a compiled block hands what it keeps to autograd, where the hooks of `apply_offload` see it
    apply_recompute(model, recompute, offload and compile == "none")
    apply_compile(model, compile, mesh.device)
    if offload:
        apply_offload(model)
    apply_fsdp(model, mesh, bf16)
