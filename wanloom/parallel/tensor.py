"""Tensor and sequence parallelism: every layer split over the ranks of `tp`, every token's residual on one of them.

In: a WanDiT (on the meta device or with values) and the mesh. Out: the same model, changed in place: its split
parameters are DTensors over `tp` under their old names. The one decision: activations are plain local tensors, and
every exchange has its adjoint in the backward pass (gather and reduce-scatter, all-reduce and all-reduce), so the
gradient of a copied parameter is the plain sum of what its copies get. QK-norm spans all heads: its sum of squares is
reduced over the ranks, one number a token, and no heads are gathered. What is not in `TABLE` is copied to every rank
and works on the rank's own tokens; the sum of its gradients is taken once at the end of a step (params.sum_copies).
Megatron-LM: Shoeybi et al. 2019; sequence parallel: Korthikanti et al. 2022.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from wanloom.model.dit import WanDiT
from wanloom.model.layers import Linear, RMSNorm
from wanloom.parallel.mesh import Mesh
from wanloom.torch_private import resolve_group

# torch before 2.13 has them under the names that it has deprecated since
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Split(NamedTuple):
    """The dims over which the parameters of a layer are cut, and what its result needs where it is a part of a sum.

    `tokens` leaves every rank the sum of its own tokens, `all` the sum of all rows.
    """

    dims: dict[str, int]
    exchange: Literal["", "tokens", "all"] = ""


COLUMN = Split({"weight": 0, "bias": 0})  # a Linear by its outputs
ROW = Split({"weight": 1}, "tokens")  # by its inputs
NORM = Split({"weight": 0}, "all")  # an RMS norm over all heads: one number a token is summed
ATTENTION = {"q": COLUMN, "k": COLUMN, "v": COLUMN, "norm_q": NORM, "norm_k": NORM, "o": ROW}
TABLE = {
    "text_embedding.0": COLUMN,
    "text_embedding.2": ROW._replace(exchange="all"),
    **{f"blocks.N.self_attn.{name}": split for name, split in ATTENTION.items()},
    **{f"blocks.N.cross_attn.{name}": split for name, split in ATTENTION.items()},
    "blocks.N.ffn.0": COLUMN,
    "blocks.N.ffn.2": ROW,
}
# these are given the tokens of all ranks
GATHERING = {"blocks.N.self_attn", "blocks.N.cross_attn", "blocks.N.ffn"}


def row_of(module: str) -> str:
    """The name of a module, as the table has it."""
    return re.sub(r"^blocks\.\d+", "blocks.N", module)


def split_dim(parameter: str) -> int | None:
    """The dim over which a parameter is cut; None for one that every rank has."""
    module, _, name = parameter.rpartition(".")
    split = TABLE.get(row_of(module))
    return split.dims.get(name) if split else None


@torch.library.custom_op("wanloom::sum_ranks", mutates_args=())
def sum_ranks(x: Tensor, group: str) -> Tensor:
    """The sum over the ranks; the gradient is summed too."""
    out = x.contiguous().clone()
    dist.all_reduce(out, group=resolve_group(group))
    return out


@torch.library.custom_op("wanloom::gather_tokens", mutates_args=())
def gather_tokens(x: Tensor, group: str) -> Tensor:
    """`(T/tp, dim)` of every rank -> `(T, dim)`."""
    ranks = resolve_group(group)
    out = x.new_empty(dist.get_world_size(ranks) * len(x), *x.shape[1:])
    ALL_GATHER(out, x.contiguous(), group=ranks)
    return out


@torch.library.custom_op("wanloom::scatter_tokens", mutates_args=())
def scatter_tokens(x: Tensor, group: str) -> Tensor:
    """`(T, dim)`, a part of the sum on every rank -> the sum `(T/tp, dim)` of the rank's own tokens."""
    ranks = resolve_group(group)
    out = x.new_empty(len(x) // dist.get_world_size(ranks), *x.shape[1:])
    REDUCE_SCATTER(out, x.contiguous(), group=ranks)
    return out


@sum_ranks.register_fake
def _(x, group):
    return x.new_empty(x.shape)


@gather_tokens.register_fake
def _(x, group):
    return x.new_empty(dist.get_world_size(resolve_group(group)) * x.shape[0], *x.shape[1:])


@scatter_tokens.register_fake
def _(x, group):
    return x.new_empty(x.shape[0] // dist.get_world_size(resolve_group(group)), *x.shape[1:])


def keep_group(ctx, inputs, output) -> None:
    ctx.group = inputs[1]


def adjoint_is(operator: Callable[[Tensor, str], Tensor]) -> Callable[..., tuple[Tensor, None]]:
    return lambda ctx, grad: (operator(grad, ctx.group), None)


sum_ranks.register_autograd(adjoint_is(sum_ranks), setup_context=keep_group)
gather_tokens.register_autograd(adjoint_is(scatter_tokens), setup_context=keep_group)
scatter_tokens.register_autograd(adjoint_is(gather_tokens), setup_context=keep_group)


EXCHANGES = {"tokens": scatter_tokens, "all": sum_ranks}


def values(param: Tensor) -> Tensor:
    """The part of a parameter that is here."""
    return param.to_local() if isinstance(param, DTensor) else param


def apply_tensor(model: WanDiT, mesh: Mesh) -> None:
    """Split the layers of the model over `tp`, in place."""
    if mesh.tp_mesh is None:
        return
    group = mesh.tp_mesh.get_group().group_name
    # the same objects in every block, else a compiler would make code for each
    exchanges = {name: partial(exchange, group=group) for name, exchange in EXCHANGES.items()}
    for name, module in model.named_modules():
        if split := TABLE.get(row_of(name)):
            assert isinstance(module, Linear | RMSNorm)
            for param, dim in split.dims.items():
                module.register_parameter(param, split_param(module.get_parameter(param), mesh.tp_mesh, dim))
            module.values, module.exchange = values, exchanges.get(split.exchange)
        if row_of(name) in GATHERING:
            module.register_forward_pre_hook(partial(gather, group))


def split_param(param: nn.Parameter, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    """The rank's part of a parameter, as a DTensor."""
    part = param.detach().chunk(mesh.size(), dim)[mesh.get_local_rank()].clone()
    whole = DTensor.from_local(part, mesh, [Shard(dim)], run_check=False, shape=param.shape, stride=param.stride())
    return nn.Parameter(whole, param.requires_grad)


def gather(group: str, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before a module: the tokens of all ranks in place of this one's."""
    whole = gather_tokens(args[0], group)
    # self-attention gets the same tokens as context
    return (whole, *(whole if other is args[0] else other for other in args[1:]))
