"""C6: bytes that elementwise kernels move per token, and how many there are, for one block forward and backward; bf16.

The peer is diffusers' block in eager mode: every operator that is no view, no matrix product and no attention is a
kernel, its bytes are those of its inputs and outputs; counted under fake tensors, nothing is computed. RMS norm is one
operator, as on a GPU; on a CPU it is several, with which it is 5.63 MB in 231 kernels. A compiled block, wanloom's as
with compile=block or diffusers' under torch.compile, is run: the kernels are those of the compiler's own list, its
bytes its own estimate (every buffer that a kernel reads or writes, once). All are of the larger of two numbers of
tokens less the smaller, so weights and text are in none. One sample unless it is said. Gradients of compiled blocks are
compared with eager ones in tests/parallel/test_compile.py.

The sums over the samples of a pack are an operator of wanloom's own and count with what they read. Attention gives bf16
in the row with the target, as on a GPU; the CPU kernel computes in fp32, which costs four kernels that convert.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch
import torch._inductor.config as inductor
from torch import Tensor
from torch._inductor import metrics
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.c05_activations import (
    TOY,
    attention_in_bf16,
    build_block,
    build_peer_block,
    draw_conditions,
    draw_for_peer,
    norm_in_one,
)
from benchmarks.measure import Row, main
from benchmarks.pair import WIDTHS
from wanloom.model.settings import DiTConfig

TOKENS = (128, 256)
HEAVY = ("mm", "scaled_dot_product", "empty")  # parts of the names of what is no elementwise kernel
LOG = logging.getLogger("torch._inductor.compile_fx.__inductor_metrics")  # at INFO the compiler lists its kernels
BOTH = (
    "Wanloom's residual stream and modulation are fp32, as in the original; diffusers rounds the stream to bf16, which "
    "halves its bytes."
)


class Elementwise(TorchDispatchMode):
    """Counts operators that move bytes and compute little."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        places = {t.untyped_storage()._cdata for t in inputs}
        is_view = not func._schema.is_mutable and all(t.untyped_storage()._cdata in places for t in outputs)
        if outputs and not is_view and not any(part in func.__name__ for part in HEAVY):
            self.kernels += 1
            self.nbytes += sum(t.numel() * t.element_size() for t in [*inputs, *outputs])
        return out


def count_peer(shape: dict[str, int]) -> tuple[int, float]:
    """Kernels, and bytes per token, of diffusers' eager block."""
    found = []
    with FakeTensorMode():
        block = build_peer_block(shape)
        for tokens in TOKENS:
            inputs = draw_for_peer(shape, tokens)
            with Elementwise() as seen:
                out = block(*inputs)
                out.backward(torch.empty_like(out))
            found.append(seen)
            block.zero_grad()
    few, many = found
    return many.kernels, (many.nbytes - few.nbytes) / (TOKENS[1] - TOKENS[0])


def is_own_sum(node: BaseSchedulerNode) -> bool:
    return isinstance(node, ExternKernelSchedulerNode) and "sum_segments" in str(node.node)


def count_kernels(run: Callable[[], object]) -> tuple[int, int]:
    """Elementwise kernels that the compiler makes while `run` runs, and their bytes."""
    level = LOG.level
    metrics.reset()
    LOG.setLevel(logging.INFO)
    try:
        with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
            run()
    finally:
        LOG.setLevel(level)
    outside = (ExternKernelSchedulerNode, NopKernelSchedulerNode)
    sizes = [size for node, size in metrics.nodes_num_elem if not isinstance(node, outside) or is_own_sum(node)]
    return len(sizes), 4 * sum(sizes)  # sizes are in values of 4 bytes


def compile_block(shape: dict[str, int], lens: tuple[int, ...], half_attention: bool) -> tuple[int, int]:
    """Kernels of wanloom's block as the compiler makes it, and their bytes, for samples of so many tokens."""
    config = DiTConfig(num_layers=1, **shape)
    torch._dynamo.reset()

    def run() -> None:
        x = torch.randn(sum(lens), config.dim, requires_grad=True)
        out = build_block(config)(x, draw_conditions(config, lens))
        out.backward(torch.randn_like(out))

    with attention_in_bf16() if half_attention else nullcontext():
        return count_kernels(run)


def compile_peer(shape: dict[str, int], tokens: int) -> tuple[int, int]:
    """Kernels of diffusers' block as the compiler makes it, and their bytes, for one sample of so many tokens."""
    torch._dynamo.reset()

    def run() -> None:
        block = build_peer_block(shape)
        block.compile()
        out = block(*draw_for_peer(shape, tokens))
        out.backward(torch.randn_like(out))

    return count_kernels(run)


def per_token(compile: Callable[[int], tuple[int, int]]) -> tuple[int, float]:
    """Kernels, and bytes per token, from those of few tokens and of more."""
    few, many = (compile(tokens) for tokens in TOKENS)
    return many[0], (many[1] - few[1]) / (TOKENS[1] - TOKENS[0])


def compare(
    name: str, ours: tuple[int, float], theirs: tuple[int, float], is_claim: bool = False, **more: Any
) -> list[Row]:
    """A row of bytes and one of kernels."""
    what, limit, kernel = (
        "forward and backward",
        "865,000 with a bf16 stream",
        "a fused loop nest counts as one kernel.",
    )
    peer, note = more.pop("peer", "diffusers, eager"), more.pop("note")
    return [
        Row(
            "C6",
            f"elementwise bytes of a block per token, {what}, {name}",
            "bytes",
            [ours[1]],
            peer,
            [theirs[1]],
            1.2e6 if is_claim else None,
            at_most=True,
            limit=limit,
            note=note,
            **more,
        ),
        Row(
            "C6",
            f"elementwise kernels of a block, {name}",
            "",
            [ours[0]],
            peer,
            [theirs[0]],
            40 if is_claim else None,
            at_most=True,
            note=f"{note} With the CPU's compiler {kernel}",
            **more,
        ),
    ]


def measure(toy: bool) -> list[Row]:
    """Elementwise bytes and kernels of one block, forward and backward."""
    shape = TOY if toy else WIDTHS["14B"]
    on_cpu = count_peer(shape)
    with norm_in_one():
        theirs = count_peer(shape)
    more = {
        "note": f"On a CPU, where RMS norm is several operators, it is {on_cpu[1]:,.0f} bytes in {on_cpu[0]} kernels.",
        "facts": {"diffusers, eager, on a CPU": {"kernels": on_cpu[0], "bytes": on_cpu[1]}},
    }
    single = per_token(lambda tokens: compile_block(shape, (tokens,), True))
    wide = per_token(lambda tokens: compile_block(shape, (tokens,), False))
    packed = per_token(lambda tokens: compile_block(shape, (tokens // 2,) * 2, True))
    compiled = per_token(partial(compile_peer, shape))
    return [
        *compare("attention in bf16", single, theirs, is_claim=True, **more),
        *compare("attention in bf16, both compiled", single, compiled, peer="diffusers, compiled", note=BOTH),
        *compare("attention in fp32, as on a CPU", wide, theirs, **more),
        *compare("attention in bf16, a pack of two samples", packed, theirs, **more),
    ]


if __name__ == "__main__":
    main(__spec__, measure)
