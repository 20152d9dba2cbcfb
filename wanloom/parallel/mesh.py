"""The device mesh: how many ranks each kind of parallelism takes, checked before anything is built.

In: the `parallel` settings, the model's shape, the size of a step and the number of processes. Out: a `Layout` of plain
numbers, and on torch.distributed the `Mesh` with a process group for every axis. The one decision: one order for all,
from the slowest links to the fastest: `pp, dp_replicate, dp_shard, cp_ring, cp_ulysses, tp`; a layout that cannot
be is one sentence that says which number does not divide which. A data rank is a place on (dp_replicate, dp_shard):
its `pp * cp * tp` processes work on the same packs.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from wanloom.errors import UserError
from wanloom.model.settings import DiTConfig
from wanloom.parallel.settings import ParallelConfig

AXES = ("pp", "dp_replicate", "dp_shard", "cp_ring", "cp_ulysses", "tp")
PARAM_AXES = ("dp_replicate", "fsdp", "tp")  # parameters of a stage are laid out over these; fsdp = dp_shard x cp
LEFT = -1  # this axis takes what the others leave


@dataclass(frozen=True)
class Layout:
    """The size of every axis."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp_ring: int = 1
    cp_ulysses: int = 1
    tp: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """In the order of AXES."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def world(self) -> int:
        """The number of processes."""
        return math.prod(self.sizes)

    @property
    def cp(self) -> int:
        """The parts of a packed sequence."""
        return self.cp_ring * self.cp_ulysses

    @property
    def data_ranks(self) -> int:
        """How many packs are worked on at a time."""
        return self.dp_replicate * self.dp_shard

    @property
    def fsdp(self) -> int:
        """Over how many ranks FSDP splits a parameter."""
        return self.dp_shard * self.cp

    def coordinates(self, rank: int) -> dict[str, int]:
        """The place of a rank on every axis."""
        return dict(zip(AXES, map(int, np.unravel_index(rank, self.sizes)), strict=True))

    def describe(self) -> str:
        """The axes that are used, such as `dp_shard 4 x cp_ulysses 2`."""
        return " x ".join(f"{a} {n}" for a, n in zip(AXES, self.sizes, strict=True) if n > 1) or "one process"

    def describe_on(self, device: torch.device) -> str:
        """What computes, such as `8 x cuda (dp_shard 8)`."""
        return str(device) if self.world == 1 else f"{self.world} x {device.type} ({self.describe()})"


def resolve_layout(config: ParallelConfig, world: int, model: DiTConfig, num_samples: int | None = None) -> Layout:
    """The size of every axis for `world` processes; `num_samples` is that of a step, None where nothing is trained.

    Raises UserError when the numbers do not fit the processes, the heads, the layers or the step.
    """
    fixed = {"cp": config.cp, "tp": config.tp, "pp": config.pp}
    dp = {"dp_replicate": config.dp_replicate, "dp_shard": config.dp_shard}
    if 0 in dp.values() or list(dp.values()).count(LEFT) > 1:
        raise UserError("parallel.dp_replicate and parallel.dp_shard are at least 1, and only one of them may be -1.")
    known = math.prod(fixed.values()) * math.prod(size for size in dp.values() if size != LEFT)
    said = ", ".join(f"{name}={size}" for name, size in {**dp, **fixed}.items())
    if world % known or (LEFT not in dp.values() and world != known):
        raise UserError(
            f"parallel.* ({said}) takes {'a multiple of ' if LEFT in dp.values() else ''}{known} processes, but there "
            f"{'is 1' if world == 1 else f'are {world}'}: start as many with `nproc` or torchrun, or change parallel.*."
        )
    dp = {name: world // known if size == LEFT else size for name, size in dp.items()}
    check_model(config, model)
    ulysses = context_degree(config, model)
    layout = Layout(config.pp, dp["dp_replicate"], dp["dp_shard"], config.cp // ulysses, ulysses, config.tp)
    if num_samples is not None and num_samples < layout.data_ranks:
        raise UserError(
            f"A step of batch.samples={num_samples} samples cannot be spread over {layout.data_ranks} data ranks "
            f"(dp_replicate {layout.dp_replicate} x dp_shard {layout.dp_shard}): raise batch.samples to at least "
            f"{layout.data_ranks}, or use more of parallel.cp."
        )
    return layout


def check_model(config: ParallelConfig, model: DiTConfig) -> None:
    """Raises UserError when the model cannot be split as asked."""
    if model.num_heads % config.tp:
        raise UserError(f"parallel.tp={config.tp} does not divide the {model.num_heads} heads of the model.")
    for name, size in (("dim", model.dim), ("ffn_dim", model.ffn_dim)):
        if size % config.tp:
            raise UserError(f"parallel.tp={config.tp} does not divide the model's {name} of {size}.")
    if config.pp > model.num_layers:
        raise UserError(f"parallel.pp={config.pp} stages are more than the {model.num_layers} blocks of the model.")


def context_degree(config: ParallelConfig, model: DiTConfig) -> int:
    """How many of the `cp` ranks exchange heads (Ulysses); the rest of them is a ring."""
    heads = model.num_heads // config.tp
    if config.cp_ulysses is not None:
        if config.context != "auto":
            raise UserError(f"parallel.cp_ulysses is for parallel.context=auto, not {config.context}: leave one out.")
        if config.cp % config.cp_ulysses:
            raise UserError(f"parallel.cp_ulysses={config.cp_ulysses} does not divide parallel.cp={config.cp}.")
        degree = config.cp_ulysses
    elif config.context == "ring":
        degree = 1
    elif config.context == "ulysses":
        degree = config.cp
    else:
        degree = math.gcd(config.cp, heads)
    if heads % degree:
        per = f"{heads} heads" if config.tp == 1 else f"{heads} heads that parallel.tp={config.tp} leaves on a rank"
        raise UserError(
            f"Ulysses over {degree} ranks does not divide the {per}: use parallel.context=auto, which takes "
            f"{math.gcd(config.cp, heads)} x ring {config.cp // math.gcd(config.cp, heads)}."
        )
    return degree


class Mesh:
    """The process groups of a layout. Building it is a collective: every rank does, in the same order.

    Two device meshes over the same ranks: parameters are laid out over (pp, dp_replicate, fsdp, tp), where fsdp is
    dp_shard and cp in one, and tokens over AXES.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        self.device = device
        self.place = layout.coordinates(dist.get_rank() if layout.world > 1 else 0)
        self._params: DeviceMesh | None = None
        self._tokens: DeviceMesh | None = None
        if layout.world > 1:
            sizes = (layout.pp, layout.dp_replicate, layout.fsdp, layout.tp)
            self._params = init_device_mesh(device.type, sizes, mesh_dim_names=("pp", *PARAM_AXES))
            self._tokens = init_device_mesh(device.type, layout.sizes, mesh_dim_names=AXES)

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The process group of one of AXES, or None where the axis has one rank."""
        return self._tokens[axis].get_group() if self._tokens and getattr(self.layout, axis) > 1 else None

    def param_group(self, axis: str) -> dist.ProcessGroup | None:
        """The process group of one of PARAM_AXES, or None where the axis has one rank."""
        return self._params[axis].get_group() if self._params and getattr(self.layout, axis) > 1 else None

    @property
    def param_place(self) -> dict[str, int]:
        """The place on PARAM_AXES."""
        fsdp = self.place["dp_shard"] * self.layout.cp + self.cp_rank
        return {"dp_replicate": self.place["dp_replicate"], "fsdp": fsdp, "tp": self.place["tp"]}

    @property
    def tp_mesh(self) -> DeviceMesh | None:
        """Over which the layers are split; None where tp is 1."""
        return self._params["tp"] if self._params and self.layout.tp > 1 else None

    @property
    def fsdp_mesh(self) -> DeviceMesh | None:
        """What `fully_shard` takes: (dp_replicate, fsdp), or fsdp alone; None where nothing is sharded or copied."""
        if self._params is None or self.layout.dp_replicate * self.layout.fsdp == 1:
            return None
        return self._params["fsdp" if self.layout.dp_replicate == 1 else ("dp_replicate", "fsdp")]

    @property
    def data_rank(self) -> int:
        """Which of the layout's data ranks this process belongs to."""
        return self.place["dp_replicate"] * self.layout.dp_shard + self.place["dp_shard"]

    @property
    def cp_rank(self) -> int:
        """Which part of a packed sequence this process attends from."""
        return self.place["cp_ring"] * self.layout.cp_ulysses + self.place["cp_ulysses"]

    @property
    def is_first_stage(self) -> bool:
        """Whether the embeddings are here."""
        return self.place["pp"] == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether the head and the loss are here."""
        return self.place["pp"] == self.layout.pp - 1


ONE_PROCESS = Layout()
