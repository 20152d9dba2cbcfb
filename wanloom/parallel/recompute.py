"""Recomputation: what of a block is kept until its backward pass, and what is computed again there.

In: a WanDiT and the name of a policy. Out: the same model, the forward of its blocks changed in place. The one
decision: a policy says which operators keep their results; the block's input is kept always, everything else runs
again. The names of parameters stay, and FSDP's hooks run outside: a block that runs again finds its weights gathered.

`full`       nothing but the input of the block.
`attention`  self-attention too, with its log-sum-exp: its forward runs once.
`cheap`      self-attention and every matrix product; norms, rotation, modulation and GELU run again.

Cross-attention runs again under each of them: it has a few hundred keys, so it is about 1% of a step or less, and its
result is as many bytes as that of self-attention, which has tens of thousands. What attention exchanges between ranks
is kept by both. Tensor parallelism gathers tokens again, and `cheap` keeps its products before they are summed over the
ranks. The bytes are in `memory.kept_bytes`. Source: Chen et al. 2016, arXiv 1604.06174; selective: Korthikanti et al.
2022, arXiv 2205.05198.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from wanloom.model.attention import ATTENTION_OPS
from wanloom.model.dit import Block, Conditions, WanDiT
from wanloom.parallel.context import CONTEXT_OPS
from wanloom.parallel.offload import offloading_contexts
from wanloom.parallel.settings import Recompute

ATTEND = (*ATTENTION_OPS, *CONTEXT_OPS)
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
KEEPS = {"full": (), "attention": ATTEND, "cheap": (*ATTEND, *PRODUCTS)}  # by policy, results of these operators
K_BIAS = 5  # which argument of ATTENTION_OPS; text keys have one, self-attention has none


def keeps(policy: str, op: Any, args: tuple[Any, ...]) -> bool:
    """Whether the result of a call of an operator is kept."""
    if op in ATTENTION_OPS and args[K_BIAS] is not None:
        return False
    return op in KEEPS[policy]


def choose(policy: str, _: Any, op: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keeps(policy, op, args) else CheckpointPolicy.PREFER_RECOMPUTE


def apply_recompute(model: WanDiT, policy: Recompute, offload: bool) -> None:
    """Recompute what the policy does not keep, in place; with `offload` what it keeps waits in host memory."""
    if policy == "none":
        return
    if offload:
        contexts = partial(offloading_contexts, partial(keeps, policy))
    else:
        contexts = partial(create_selective_checkpoint_contexts, partial(choose, policy))
    for block in model.blocks.values():
        assert isinstance(block, Block)
        block.forward = partial(run_again, block.forward, contexts)


def run_again(forward: Any, contexts: Any, x: Tensor, cond: Conditions) -> Tensor:
    """The forward of a block, whose backward runs it again. A block draws no random numbers."""
    return checkpoint(forward, x, cond, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)  # pyright: ignore[reportReturnType]
