"""Tensor and sequence parallelism: every layer split over the ranks of `tp`, every token's residual on one of them.

In: a WanDiT (on the meta device or with values) and the mesh. Out: the same model, changed in place: its split
parameters are DTensors over `tp` under their old names. The one decision: activations are plain local tensors, and
every exchange has its adjoint in the backward pass (gather and reduce-scatter, all-reduce and all-reduce), so the
gradient of a copied parameter is the plain sum of what its copies get. QK-norm spans all heads: its sum of squares is
reduced over the ranks, one number a token, and no heads are gathered. Megatron-LM: Shoeybi et al. 2019; sequence
parallel: Korthikanti et al. 2022.
"""

from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from wanloom.model.dit import RMSNorm, WanDiT
from wanloom.parallel.mesh import Mesh
from wanloom.parallel.plan import BLOCK, ROOT, Style


class AllReduce(torch.autograd.Function):
    """Sum over the ranks, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum(grads[0], ctx.group), None


def _sum(x: Tensor, group: ProcessGroup) -> Tensor:
    return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group))


def gather_tokens(x: Tensor, group: ProcessGroup) -> Tensor:
    """`(T/tp, dim)` of every rank -> `(T, dim)`."""
    return collectives.wait_tensor(collectives.all_gather_tensor_autograd(x.contiguous(), 0, group))


def scatter_tokens(x: Tensor, group: ProcessGroup) -> Tensor:
    """`(T, dim)`, a part of the sum on every rank -> the sum `(T/tp, dim)` of the rank's own tokens."""
    return collectives.wait_tensor(collectives.reduce_scatter_tensor_autograd(x.contiguous(), "sum", 0, group))


def values(param: Tensor) -> Tensor:
    """The part of a split parameter that is here, for the forward pass."""
    return param.to_local() if isinstance(param, DTensor) else param


class ColumnLinear(nn.Module):
    """A Linear of which this rank has some of the outputs."""

    def __init__(self, linear: nn.Linear, mesh: DeviceMesh) -> None:
        super().__init__()
        self.weight = split_param(linear.weight, mesh, 0)
        self.bias = split_param(linear.bias, mesh, 0)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, values(self.weight), values(self.bias))


class RowLinear(nn.Module):
    """A Linear of which this rank has some of the inputs; with `tokens` every rank keeps its own tokens, else all."""

    def __init__(self, linear: nn.Linear, mesh: DeviceMesh, tokens: bool) -> None:
        super().__init__()
        self.weight = split_param(linear.weight, mesh, 1)
        self.bias = linear.bias
        self.group = mesh.get_group()
        self.tokens = tokens

    def forward(self, input: Tensor) -> Tensor:
        part = F.linear(input, values(self.weight))
        whole = scatter_tokens(part, self.group) if self.tokens else AllReduce.apply(part, self.group)
        return whole + self.bias.to(whole.dtype)


class SplitRMSNorm(nn.Module):
    """An RMS norm over all heads of which this rank has some; fp32 in and out."""

    def __init__(self, norm: RMSNorm, mesh: DeviceMesh) -> None:
        super().__init__()
        self.weight = split_param(norm.weight, mesh, 0)
        self.eps = norm.eps
        self.dim = norm.weight.numel()
        self.group = mesh.get_group()

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        squares = AllReduce.apply(x.square().sum(-1, keepdim=True), self.group)
        return x * torch.rsqrt(squares / self.dim + self.eps) * values(self.weight).float()


def split_param(param: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    """The rank's part of a parameter, as a DTensor."""
    part = param.detach().chunk(mesh.size(), dim)[mesh.get_local_rank()].clone()
    whole = DTensor.from_local(part, mesh, [Shard(dim)], run_check=False, shape=param.shape, stride=param.stride())
    return nn.Parameter(whole)


def apply_tensor(model: WanDiT, mesh: Mesh) -> None:
    """Split the layers of the model over `tp`, in place."""
    if mesh.tp_mesh is None:
        return
    for name, style in ROOT.items():
        if hasattr(model, name.split(".")[0]):
            _apply(model, name, style, mesh.tp_mesh)
    for block in model.blocks.values():
        for name, style in BLOCK.items():
            _apply(block, name, style, mesh.tp_mesh)


def _apply(parent: nn.Module, name: str, style: Style, mesh: DeviceMesh) -> None:
    module: Any = parent.get_submodule(name)
    if style == "gather":
        group = mesh.get_group()

        def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            whole = gather_tokens(args[0], group)
            # self-attention gets the same tokens as context
            return (whole, *(whole if other is args[0] else other for other in args[1:]))

        module.register_forward_pre_hook(gather)
        return
    holder, _, child = name.rpartition(".")
    new = {
        "column": lambda: ColumnLinear(module, mesh),
        "row": lambda: RowLinear(module, mesh, tokens=True),
        "row_all": lambda: RowLinear(module, mesh, tokens=False),
        "norm": lambda: SplitRMSNorm(module, mesh),
    }[style]()
    parent.get_submodule(holder)._modules[child] = new
