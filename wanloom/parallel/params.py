"""Parameters as a layout has them: local tensors, and which ranks hold the same values.

In: parameters, plain or DTensors of FSDP and tensor parallelism. Out: their local parts, sums over the ranks that hold
copies, norms over all. The one decision: after the backward pass everything is local tensors: the optimizer, the
average and the norm are elementwise, so they need no distributed tensor, and only the exchange at the end of a step
has to know who holds what. A tensor is split over the axes of its DTensor's mesh and copied over the others.
"""

import itertools
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils import get_total_norm

from wanloom.parallel.mesh import PARAM_AXES, Mesh


def local(tensor: Tensor) -> Tensor:
    """The values of this rank, sharing memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def like(tensor: Tensor, values: Tensor) -> Tensor:
    """Local values as a tensor laid out as another one is."""
    if not isinstance(tensor, DTensor):
        return values
    return DTensor.from_local(
        values, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def split_axes(tensor: Tensor) -> set[str]:
    """The mesh axes over which the ranks hold different parts."""
    if not isinstance(tensor, DTensor):
        return set()
    names = tensor.device_mesh.mesh_dim_names or ()
    return {name for name, place in zip(names, tensor.placements, strict=True) if not isinstance(place, Replicate)}


def box_of(tensor: Tensor) -> tuple[slice, ...]:
    """Where the local values lie in the whole tensor.

    Axes cut one after the other, each in equal parts of which the last are smaller: first those of tensor parallelism,
    then FSDP, whose placement then has a split factor, cuts their parts. torch's own answer differs between versions.
    """
    box = [slice(0, size) for size in tensor.shape]
    if isinstance(tensor, DTensor):
        places = tensor.device_mesh.get_coordinate() or []
        cuts = list(zip(places, tensor.device_mesh.shape, tensor.placements, strict=True))
        late = [cut for cut in cuts if hasattr(cut[2], "split_factor")]
        for index, size, placement in [cut for cut in cuts if cut not in late] + late[::-1]:
            if isinstance(placement, Replicate):
                continue
            dim = placement.dim  # pyright: ignore[reportAttributeAccessIssue]
            length = box[dim].stop - box[dim].start
            width = -(-length // size)
            start = box[dim].start + min(index * width, length)
            box[dim] = slice(start, box[dim].start + min((index + 1) * width, length))
    return tuple(box)


@torch.no_grad()
def fill(tensor: Tensor, whole: Tensor) -> None:
    """Set a tensor, of which there may be a part here, from all of its values."""
    if tensor.shape != whole.shape:
        raise ValueError(f"values {tuple(whole.shape)} for a tensor {tuple(tensor.shape)}")
    local(tensor).copy_(whole[box_of(tensor)])


def is_owner(tensor: Tensor, mesh: Mesh) -> bool:
    """Whether this rank is the one that counts these values; of the ranks with copies the first does."""
    return not any(mesh.param_place[axis] for axis in PARAM_AXES if axis not in split_axes(tensor))


@torch.no_grad()
def sum_copies(params: Iterable[nn.Parameter], mesh: Mesh) -> None:
    """Add up the gradients of every parameter over the ranks that hold a copy of it and have not been summed yet.

    FSDP sums over the axes of its mesh itself; what it does not manage (the fp32 parts of the blocks) and what tensor
    parallelism does not split gets the rest here, once for a step, in one exchange for all.
    """

    def missing(param: nn.Parameter) -> tuple[str, ...]:
        managed = param.device_mesh.mesh_dim_names or () if isinstance(param, DTensor) else ()
        return tuple(axis for axis in PARAM_AXES if mesh.param_group(axis) and axis not in managed)

    for axes, group in itertools.groupby(sorted(params, key=missing), key=missing):
        if axes:
            # every rank adds the same parameters, whichever of them its own packs have reached
            grads = [local(param.grad if param.grad is not None else _zero_grad(param)) for param in group]
            _all_reduce_flat(grads, [mesh.param_group(axis) for axis in axes])


def _zero_grad(param: nn.Parameter) -> Tensor:
    param.grad = torch.zeros_like(param)
    return param.grad


def _all_reduce_flat(tensors: Sequence[Tensor], groups: Sequence[dist.ProcessGroup | None]) -> None:
    flat = torch.cat([t.flatten() for t in tensors])
    for group in groups:
        dist.all_reduce(flat, group=group)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def grad_norm(params: Iterable[nn.Parameter], mesh: Mesh) -> Tensor:
    """The norm over all gradients of all ranks; one value, the same on every rank."""
    grads = [local(p.grad) for p in params if p.grad is not None and is_owner(p, mesh)]
    norm = get_total_norm([g for g in grads if g.numel()])
    if mesh.layout.world == 1:
        return norm
    squares = norm.to(mesh.device).square()
    dist.all_reduce(squares)
    return squares.sqrt()
