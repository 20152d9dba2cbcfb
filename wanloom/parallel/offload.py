"""Offload: what a block keeps for its backward pass waits in host memory.

In: a WanDiT. Out: the same model, the forward of its blocks changed in place. The one decision: what is kept goes as it
is kept, whoever keeps it: autograd (all of an eager or compiled block, the input of a recomputed one) through hooks,
and the results that selective recomputation keeps through contexts of our own, since PyTorch's have no place for it.
Parameters, what is made of them alone, and what all blocks share stay where they are: they are there anyway.

On CUDA the copies run on a stream of their own, into pinned memory, and a backward pass asks for the tensors before the
one it needs, in the reverse of the order in which they went. Not tried with CUDA. On the CPU they are plain copies.
"""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wanloom.model.dit import Block, Conditions, WanDiT
from wanloom.torch_private import TorchDispatchMode, tree_map_only

SMALL = 1 << 16  # bytes; to copy fewer costs more than they do
AHEAD = 16  # tensors that a backward pass asks for in advance; about those of a block

Keeps = Callable[[Any, tuple[Any, ...]], bool]


class Parcel:
    """A tensor in host memory, on its way there or back."""

    last: weakref.ref[Any] | None = None

    def __init__(self, tensor: Tensor) -> None:
        self.device = tensor.device
        self.returned: tuple[Tensor, torch.cuda.Event] | None = None
        self.before, Parcel.last = Parcel.last, weakref.ref(self)
        if not tensor.is_cuda:
            self.host = tensor.clone()
            return
        self.host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        stream = copy_stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not used again before the copy is done

    def ask(self) -> None:
        """Start the way back."""
        if self.returned is None:
            stream, arrived = copy_stream(self.device), torch.cuda.Event()
            with torch.cuda.stream(stream):
                tensor = self.host.to(self.device, non_blocking=True)
            arrived.record(stream)
            self.returned = tensor, arrived

    def open(self) -> Tensor:
        """The tensor, on its device."""
        if self.device.type != "cuda":
            return self.host
        self.ask()
        assert self.returned is not None
        (tensor, arrived), self.returned = self.returned, None
        current = torch.cuda.current_stream(self.device)
        current.wait_event(arrived)
        tensor.record_stream(current)
        parcel = self.before and self.before()
        for _ in range(AHEAD):
            if parcel is None:
                break
            parcel.ask()
            parcel = parcel.before and parcel.before()
        return tensor


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def send(tensor: Tensor) -> Tensor | Parcel:
    """What takes the place of a tensor."""
    return Parcel(tensor) if tensor.nbytes >= SMALL else tensor


def take(held: Tensor | Parcel) -> Tensor:
    """The tensor again."""
    return held.open() if isinstance(held, Parcel) else held


def made_of_parameters(tensor: Tensor) -> bool:
    """Whether it is a parameter, or follows from one alone: a view, the part that is here, a copy in another dtype."""
    if isinstance(tensor, nn.Parameter):
        return True
    node = tensor.grad_fn
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return isinstance(getattr(node, "variable", None), nn.Parameter)


def apply_offload(model: WanDiT) -> None:
    """Let what autograd saves of every block wait in host memory, in place."""
    for block in model.blocks.values():
        assert isinstance(block, Block)
        block.forward = partial(run_sending, block.forward)


def run_sending(forward: Callable[[Tensor, Conditions], Tensor], x: Tensor, cond: Conditions) -> Tensor:
    """The forward of a block."""
    device = x.device  # the graph holds `pack`, which must not hold `x`
    shared = {t.untyped_storage().data_ptr() for t in cond if isinstance(t, Tensor)}

    def pack(tensor: Tensor) -> Tensor | Parcel:
        stays = tensor.device != device or made_of_parameters(tensor)
        return tensor if stays or tensor.untyped_storage().data_ptr() in shared else send(tensor.detach())

    with torch.autograd.graph.saved_tensors_hooks(pack, take):
        return forward(x, cond)


class Sending(TorchDispatchMode):
    """Lets the results of operators that are kept wait in host memory."""

    def __init__(self, keeps: Keeps, held: dict[Any, deque[Any]]) -> None:
        super().__init__()
        self.keeps, self.held = keeps, held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.keeps(func, args):
            # detached: what is returned will know its graph, and the graph knows what is held
            self.held[func].append(tree_map_only(Tensor, lambda t: send(t.detach()), out))
        return out


class Taking(TorchDispatchMode):
    """Gives these results where the operators run again, in the same order."""

    def __init__(self, keeps: Keeps, held: dict[Any, deque[Any]]) -> None:
        super().__init__()
        self.keeps, self.held = keeps, held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.keeps(func, args):
            return tree_map_only((Tensor, Parcel), take, self.held[func].popleft())
        return func(*args, **(kwargs or {}))


def offloading_contexts(keeps: Keeps) -> tuple[Sending, Taking]:
    """For `checkpoint`: as `create_selective_checkpoint_contexts`, with what is kept in host memory."""
    held: dict[Any, deque[Any]] = defaultdict(deque)
    return Sending(keeps, held), Taking(keeps, held)
