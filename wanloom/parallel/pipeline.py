"""Pipeline parallelism: the blocks in stages, the packs of a step as micro-batches, one forward, one backward (1F1B).

In: a model, the mesh, the packs of a step. Out: gradients, or velocities. The one decision: stages exchange the whole
stream (residual, noise levels, modulation, context), so a parameter lives on one stage only, and both ends know every
shape from the pack itself; so packs may have any length, for which torch's own schedules (equal shapes) have no place.
Every exchange is with one neighbour and both directions are posted together, which NCCL needs. Schedule: Narayanan et
al. 2021 (PipeDream-Flush).
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from wanloom.model.dit import Stream, WanDiT
from wanloom.model.sequence import Pack
from wanloom.model.text import fold_text
from wanloom.parallel.mesh import Mesh

FIRST_STAGE = ("patch_embedding", "text_embedding", "time_embedding", "time_projection")
LAST_STAGE = ("head",)

Loss = Callable[[int, Tensor], Tensor]


def stage_blocks(num_layers: int, stages: int, stage: int) -> range:
    """The blocks of a stage; the first stages have one more where they do not divide."""
    size, more = divmod(num_layers, stages)
    first = stage * size + min(stage, more)
    return range(first, first + size + (stage < more))


def is_on_stage(name: str, blocks: range, stage: int, stages: int) -> bool:
    """Whether a stage has a parameter, or a module."""
    first, *rest = name.split(".")
    if first == "blocks":
        return int(rest[0]) in blocks
    return (first in FIRST_STAGE and stage == 0) or (first in LAST_STAGE and stage == stages - 1)


def apply_pipeline(model: WanDiT, mesh: Mesh) -> None:
    """Take away what is on other stages, in place."""
    stage, stages = mesh.place["pp"], mesh.layout.pp
    blocks = stage_blocks(model.config.num_layers, stages, stage)
    for name in (*(f"blocks.{i}" for i in model.blocks), *FIRST_STAGE, *LAST_STAGE):
        if not is_on_stage(name, blocks, stage, stages):
            parent, _, last = name.rpartition(".")
            delattr(model.get_submodule(parent), last)
    model.has_head = mesh.is_last_stage


class Flight(NamedTuple):
    """A pack between its forward and its backward pass on this stage."""

    received: Stream | None  # None on the first stage
    output: Tensor | Stream  # the loss on the last stage


def run_packs(model: WanDiT, mesh: Mesh, packs: Sequence[tuple[Pack, Tensor]], loss: Loss) -> None:
    """Forward and backward of every pack `(pack, sigma)`; `loss(i, velocity)` is called on the last stage."""
    stage = _Stage(model, mesh, packs)
    ahead = min(mesh.layout.pp - 1 - mesh.place["pp"], len(packs))
    flights: deque[Flight] = deque()

    def backward(flight: Flight, grads: Stream | None, is_last: bool) -> None:
        if isinstance(model, FSDPModule):  # copies of the model are summed once a step
            model.set_requires_all_reduce(is_last)
        stage.backward(flight, grads)

    for i in range(ahead):
        received = stage.exchange(receive_stream=i)[0]
        flights.append(stage.forward(i, received, loss))
        stage.exchange(send_stream=flights[-1])
    received = stage.exchange(receive_stream=ahead)[0] if ahead < len(packs) else None
    for i in range(ahead, len(packs)):
        flights.append(stage.forward(i, received, loss))
        _, grads = stage.exchange(send_stream=flights[-1], receive_grads=flights[0])
        gone = flights.popleft()
        following = i + 1 if i + 1 < len(packs) else None
        backward(gone, grads, is_last=following is None and not flights)
        received = stage.exchange(receive_stream=following, send_grads=gone)[0]
    while flights:
        gone = flights.popleft()
        backward(gone, stage.exchange(receive_grads=gone)[1], is_last=not flights)
        stage.exchange(send_grads=gone)


def predict(model: WanDiT, mesh: Mesh, pack: Pack, sigma: Tensor) -> Tensor | None:
    """The velocity of one pack, on the last stage; None on the others. Without gradients."""
    stage = _Stage(model, mesh, [(pack, sigma)])
    with torch.no_grad():
        flight = stage.forward(0, stage.exchange(receive_stream=0)[0], lambda _, velocity: velocity)
        stage.exchange(send_stream=flight)
    return flight.output if isinstance(flight.output, Tensor) else None


class _Stage:
    """The passes of one stage and its exchanges with its neighbours."""

    def __init__(self, model: WanDiT, mesh: Mesh, packs: Sequence[tuple[Pack, Tensor]]) -> None:
        self.model, self.mesh, self.packs = model, mesh, packs
        self.group = mesh.group("pp")

    def forward(self, index: int, received: Stream | None, loss: Loss) -> Flight:
        pack, sigma = self.packs[index]
        if received is not None and torch.is_grad_enabled():
            received = Stream(*(t.requires_grad_() for t in received))
        output = self.model(pack, sigma, received)
        return Flight(received, loss(index, output) if isinstance(output, Tensor) else output)

    def backward(self, flight: Flight, grads: Stream | None) -> None:
        if isinstance(flight.output, Tensor):
            flight.output.backward()
        elif grads is not None:  # what comes of parameters that are not trained has no gradient
            pairs = [(t, grad) for t, grad in zip(flight.output, grads, strict=True) if t.requires_grad]
            torch.autograd.backward([t for t, _ in pairs], [grad for _, grad in pairs])

    def exchange(
        self,
        send_stream: Flight | None = None,
        receive_stream: int | None = None,
        send_grads: Flight | None = None,
        receive_grads: Flight | None = None,
    ) -> tuple[Stream | None, Stream | None]:
        """Post at once what goes to and comes from the neighbours; returns (stream, gradients) as far as asked for."""
        ops: list[dist.P2POp] = []
        stream = grads = None
        place = self.mesh.place["pp"]
        if send_stream is not None and isinstance(send_stream.output, Stream):
            sent = [t.detach().contiguous() for t in send_stream.output]
            ops += [dist.P2POp(dist.isend, t, group=self.group, group_peer=place + 1) for t in sent]
        if receive_grads is not None and isinstance(receive_grads.output, Stream):
            grads = Stream(*(torch.empty_like(t) for t in receive_grads.output))
            ops += [dist.P2POp(dist.irecv, t, group=self.group, group_peer=place + 1) for t in grads]
        if receive_stream is not None and not self.mesh.is_first_stage:
            stream = self._empty(receive_stream)
            ops += [dist.P2POp(dist.irecv, t, group=self.group, group_peer=place - 1) for t in stream]
        if send_grads is not None and send_grads.received is not None:
            sent = [torch.zeros_like(t) if t.grad is None else t.grad for t in send_grads.received]
            ops += [dist.P2POp(dist.isend, t, group=self.group, group_peer=place - 1) for t in sent]
        for work in dist.batch_isend_irecv(ops) if ops else []:
            work.wait()
        return stream, grads

    def _empty(self, index: int) -> Stream:
        """Room for the stream of a pack, in the shapes that the stage before computes."""
        pack, sigma = self.packs[index]
        config, device = self.model.config, pack.tokens.device
        keys = len(fold_text(pack.text_lens, config.text_slots).rows)
        dtype = self.model.compute_dtype(device.type)
        return Stream(
            x=torch.empty(len(pack.tokens), config.dim, device=device),
            e=torch.empty(len(sigma), config.dim, device=device),
            modulation=torch.empty(len(sigma), 6, config.dim, device=device),
            context=torch.empty(keys, config.dim, dtype=dtype, device=device),
        )
