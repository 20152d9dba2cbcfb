"""What a layout asks of each rank, before anything is started: which parameters it holds, and how much memory that is.

In: a model on the meta device, a layout, a rank. Out: numbers and bytes. The one decision: what a rank holds follows
from the rules that the code applies: the stages, the table of tensor parallelism, FSDP's equal parts of the first dim;
a test compares it with the model that `apply_layout` makes. Bytes of activations are an estimate: what the backward
pass of a block keeps, without the allocator's slack and the kernels' workspace.
"""

import math
from collections.abc import Collection
from typing import NamedTuple

from wanloom.model.dit import WanDiT, keeps_fp32
from wanloom.model.settings import DiTConfig
from wanloom.parallel.mesh import Layout
from wanloom.parallel.pipeline import is_on_stage, stage_blocks
from wanloom.parallel.settings import Recompute
from wanloom.parallel.tensor import split_dim

FP32 = 4  # bytes; of weights, gradients, both moments and the average


class Kept(NamedTuple):
    """What a block keeps of a token until its backward pass."""

    streams: int  # values of dim in fp32
    halves: int  # values of dim in the dtype of the Linears
    hidden: int  # values of ffn_dim in that dtype
    attentions: int  # attentions of which the log-sum-exp is kept, one fp32 value a head
    gathers: int  # values of dim of which tensor parallelism keeps all of the group's
    exchanges: int  # values of dim more where Ulysses exchanges them


# By what is recomputed: all but the input, all but self-attention, all but it and Linears, nothing. The last is
# that of the CPU; a fused RMS norm, as on CUDA, keeps three streams fewer.
KEPT: dict[Recompute, Kept] = {
    "full": Kept(1, 0, 0, 0, 0, 0),
    "attention": Kept(1, 1, 0, 1, 0, 4),
    "cheap": Kept(1, 8, 1, 1, 3, 4),
    "none": Kept(9, 11, 2, 2, 3, 1),
}


class Held(NamedTuple):
    """A parameter as a rank has it."""

    numel: int
    copies: int  # how many ranks of the run have the very same values
    in_block: bool
    is_sharded: bool  # FSDP gathers it


class States(NamedTuple):
    """Bytes that a rank holds from step to step, and what it needs beside them within one."""

    parameters: int
    gradients: int
    moments: int
    average: int
    working: int  # whole values and gradients of the blocks at work, and of what is outside of the blocks

    @property
    def total(self) -> int:
        """All of them at their peak."""
        return sum(self)


def held_params(model: WanDiT, layout: Layout, rank: int) -> dict[str, Held]:
    """The parameters of the whole `model` that a rank holds a part of, by name; the last parts may be empty."""
    place = layout.coordinates(rank)
    blocks = stage_blocks(model.config.num_layers, layout.pp, place["pp"])
    cp_rank = place["cp_ring"] * layout.cp_ulysses + place["cp_ulysses"]
    index = place["dp_shard"] * layout.cp + cp_rank
    held = {}
    for name, param in model.named_parameters():
        if not is_on_stage(name, blocks, place["pp"], layout.pp):
            continue
        shape, copies = list(param.shape), layout.dp_replicate
        dim = split_dim(name) if layout.tp > 1 else None
        if dim is None:
            copies *= layout.tp
        else:
            shape[dim] //= layout.tp
        in_block = name.startswith("blocks.")
        is_sharded = layout.dp_replicate * layout.fsdp > 1 and not (in_block and keeps_fp32(name))
        if is_sharded:
            part = -(-shape[0] // layout.fsdp)
            shape[0] = min(max(shape[0] - index * part, 0), part)
        else:
            copies *= layout.fsdp
        held[name] = Held(math.prod(shape), copies, in_block, is_sharded)
    return held


def state_bytes(
    held: dict[str, Held], layout: Layout, has_average: bool, bf16: bool, names: Collection[str] | None = None
) -> States:
    """Bytes of a rank that holds these parameters; those of `names` are trained, by default all."""
    own = FP32 * sum(part.numel for part in held.values())
    trained = FP32 * sum(part.numel for name, part in held.items() if names is None or name in names)
    average = trained if has_average else 0
    return States(own, trained, 2 * trained, average, working_bytes(held, layout, bf16))


def working_bytes(held: dict[str, Held], layout: Layout, bf16: bool) -> int:
    """What the passes over the blocks need beside the stored fp32 weights and gradients."""
    item = 2 if bf16 else FP32
    sharded = [(name, part.numel * layout.fsdp, part.in_block) for name, part in held.items() if part.is_sharded]
    if not sharded:  # torch.autocast keeps a bf16 copy of the weights that it has met
        return 2 * sum(part.numel for part in held.values() if part.in_block) if bf16 else 0
    blocks: dict[str, int] = {}
    for name, numel, in_block in sharded:
        if in_block:
            number = name.split(".")[1]
            blocks[number] = blocks.get(number, 0) + numel
    block, outside = max(blocks.values()), sum(numel for _, numel, in_block in sharded if not in_block)
    # one at work, the next one gathered ahead, and the gradient of one in both precisions
    return block * (3 * item + FP32) + outside * FP32


def kept_bytes(config: DiTConfig, recompute: Recompute, bf16: bool, tp: int = 1, ulysses: int = 1) -> int:
    """Bytes that a block keeps for each token of a rank's residual stream."""
    kept, item = KEPT[recompute], 2 if bf16 else FP32
    halves = kept.halves + kept.gathers * (tp - 1) + kept.exchanges * (ulysses > 1)
    values = config.dim * (kept.streams * FP32 + halves * item)
    return values + kept.hidden * config.ffn_dim * item + kept.attentions * config.num_heads * FP32


def activation_bytes(config: DiTConfig, layout: Layout, tokens_per_pack: int, recompute: Recompute, bf16: bool) -> int:
    """Bytes of activations on the rank that has most: a full pack, or as many as a first stage has under way."""
    tokens = -(-tokens_per_pack // (layout.cp * layout.tp))
    blocks = len(stage_blocks(config.num_layers, layout.pp, 0))
    split = layout.tp, layout.cp_ulysses
    at_work = 0 if recompute == "none" else kept_bytes(config, "none", bf16, *split)
    return tokens * (layout.pp * blocks * kept_bytes(config, recompute, bf16, *split) + at_work)
