"""What it costs that a compiled block takes packs of any length: against one compiled for a single length. C17.

The way around it would be to pad every pack to its budget and to compile for that length alone. That costs the FLOPs of
the padding; the way of wanloom costs what code for unknown sizes loses. So the peer is wanloom's own block, compiled
with `dynamic=False` at the very length; nobody else's code is compared. One block at the width of the 1.3B model,
forward and backward, packs of three samples. Compared before timing: outputs and the gradients of the input. The
kernels are those of the compiler's own list, and their bytes its own estimate, as in c06. Graphs are counted over packs
of five lengths.
"""

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.c05_activations import TOY, draw_conditions
from benchmarks.c06_traffic import count_kernels
from benchmarks.measure import Row, main, take_turns
from benchmarks.pair import WIDTHS, relative
from wanloom.model.dit import Block, Conditions, WanDiT, cast_weights
from wanloom.model.settings import DiTConfig
from wanloom.parallel.compile import apply_compile

CASES = ((torch.float32, 390), (torch.bfloat16, 390), (torch.float32, 1560))
PEER = "a block compiled for one length"
FIVE = ((300, 40, 50), (100, 290, 3), (700, 800, 60), (64, 66), (390, 390, 390, 390))
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
Forward = Callable[[Tensor, Conditions], Tensor]


def build_block(config: DiTConfig, dtype: torch.dtype) -> tuple[WanDiT, Block]:
    """A model of one block, and the block."""
    torch.manual_seed(0)
    model = WanDiT(config)
    cast_weights(model, dtype)
    block = model.blocks["0"]
    assert isinstance(block, Block)
    return model, block


def compiled(config: DiTConfig, dtype: torch.dtype, any_length: bool) -> Forward:
    """The block as compile=block makes it, or for the first length that it meets."""
    model, block = build_block(config, dtype)
    if any_length:
        apply_compile(model, "block", torch.device("cpu"))
        return block
    return torch.compile(block.forward, fullgraph=True, dynamic=False)


def conditions(config: DiTConfig, dtype: torch.dtype, lens: tuple[int, ...]) -> tuple[Tensor, Conditions]:
    """The residual stream of samples of so many tokens, and what belongs to it."""
    torch.manual_seed(1)
    cond = draw_conditions(config, lens, text=64)
    assert isinstance(cond.context, Tensor)
    context = cond.context.detach().to(dtype).requires_grad_()
    return torch.randn(sum(lens), config.dim, requires_grad=True), cond._replace(context=context, dtype=dtype)


def passes(forward: Forward, x: Tensor, cond: Conditions) -> Callable[[], tuple[Tensor, Tensor]]:
    """One forward and backward; gives the output and the gradient of the stream."""

    def run() -> tuple[Tensor, Tensor]:
        x.grad = None
        out = forward(x, cond)
        out.square().sum().backward()
        assert x.grad is not None
        return out.detach(), x.grad

    return run


def length_row(config: DiTConfig, dtype: torch.dtype, tokens: int) -> Row:
    """Seconds of both ways at one length."""
    lens = (tokens // 2, tokens // 3, tokens - tokens // 2 - tokens // 3)
    x, cond = conditions(config, dtype, lens)
    torch._dynamo.reset()
    runs, kernels, results = {}, {}, {}
    for name in ("one length", "wanloom"):
        run = passes(compiled(config, dtype, name == "wanloom"), x, cond)
        kernels[name] = count_kernels(run)
        runs[name], results[name] = run, run()
    off = max(relative(a, b) for a, b in zip(results["wanloom"], results["one length"], strict=True))
    assert off <= BOUNDS[dtype], off
    taken = take_turns(runs)
    counts = "; ".join(f"{name}: {n} kernels, {nbytes:,} bytes" for name, (n, nbytes) in kernels.items())
    facts = {name: {"kernels": n, "bytes": nbytes} for name, (n, nbytes) in kernels.items()}
    return Row(
        "C17",
        f"a compiled block, {tokens} tokens, forward and backward, {str(dtype).removeprefix('torch.')}",
        "s",
        taken["wanloom"],
        PEER,
        taken["one length"],
        limit="1; padding a pack to its budget costs its FLOPs: 0.95x where a pack fills 95% of it",
        checked=f"output and gradient of the stream within {off:.0e}, relative norm",
        note=f"elementwise, {counts}",
        facts=facts,
    )


def count_graphs(any_length: bool) -> int:
    """Graphs that packs of five lengths make of a small block."""
    config = DiTConfig(num_layers=1, **TOY)
    torch._dynamo.reset()
    counters.clear()
    with patch.object(torch, "compile", partial(torch.compile, backend="eager")):  # the graphs, without code for them
        forward = compiled(config, torch.float32, any_length)
    for lens in FIVE:
        passes(forward, *conditions(config, torch.float32, lens))()
    return counters["stats"]["unique_graphs"]


def graphs_row() -> Row:
    """Graphs over five lengths."""
    ours, theirs = count_graphs(True), count_graphs(False)
    return Row("C17", "graphs of a block over packs of five lengths", "", [ours], PEER, [theirs], 1, True, "1")


def measure(toy: bool) -> list[Row]:
    """A compiled block for any length against one for a single length: seconds, kernels, bytes, graphs."""
    config = DiTConfig(num_layers=1, **(TOY if toy else WIDTHS["1.3B"]))
    cases = ((torch.float32, 24), (torch.bfloat16, 24)) if toy else CASES
    return [graphs_row(), *(length_row(config, *case) for case in cases)]


if __name__ == "__main__":
    main(__spec__, measure)
