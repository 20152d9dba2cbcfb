"""The network forward and backward on one video, against diffusers' transformer: C1 in fp32, C2 in bf16.

Both have the same random weights at the width of the 1.3B model, one block (two in bf16), and get one sample of 1560
tokens (13 frames of 240x416) with a caption of 80 states, which diffusers is given padded to 512. Velocity and every
gradient are compared first. Timed is forward and backward, from latents or tokens to the gradients of all weights.
Diffusers runs eager, as its users run it; compiled as a whole it has a row too. What is outside of the blocks is timed
alone, and the rows are for the 30 blocks of the published model: outside + 30 times a block. The floor is nothing but
the matrix products and the attention calls of wanloom's blocks, forward and backward.
"""

import torch
from diffusers import WanTransformer3DModel

from benchmarks.measure import Row, main, take_turns
from benchmarks.pair import (
    Samples,
    at_depth,
    build_pair,
    check_equal,
    draw_samples,
    run_ours,
    run_theirs,
    share_weights,
    without_blocks,
)
from wanloom.model.dit import WanDiT
from wanloom.model.kernels import dtypes
from wanloom.model.settings import DiTConfig
from wanloom.parallel.compile import apply_compile

DEPTH = 30
SHAPE, CAPTION = (4, 30, 52), 80  # 1560 tokens
CLAIMS = {
    "C1": (torch.float32, 1, 1.04),
    "C2": (torch.bfloat16, 2, 1.10),
}


def build_floor(config: DiTConfig, tokens: int, keys: int, dtype: torch.dtype):
    """A function that does the matrix products and attention of all blocks, forward and backward, and nothing else."""
    d, f = config.dim, config.ffn_dim
    products = [(tokens, d, d)] * 6 + [(keys, d, d)] * 2 + [(tokens, d, f), (tokens, f, d)]
    linears = {
        (rows, n, m): (torch.randn(rows, n).to(dtype), torch.randn(m, n).to(dtype), torch.randn(rows, m).to(dtype))
        for rows, n, m in set(products)
    }
    heads, wide = (config.num_heads, d // config.num_heads), dtypes("cpu", dtype)[0]
    attended = [
        [torch.randn(count, *heads).to(dtype) for count in (tokens, length, length)]
        + [torch.tensor([tokens]), torch.tensor([length])]
        for length in (tokens, keys)
    ]
    grad = torch.randn(tokens, *heads).to(wide)

    def run() -> None:
        for _ in range(config.num_layers):
            for size in products:
                x, weight, grad_out = linears[size]
                _ = x @ weight.T, grad_out @ weight, grad_out.T @ x
            for q, k, v, *lens in attended:
                out, lse = torch.ops.wanloom.attend(q, k, v, *lens, None, "auto")
                torch.ops.wanloom.attend_backward(grad, q, k, v, out, lse, *lens, None, "auto")

    return run


def compare(
    ours: WanDiT, theirs: WanTransformer3DModel, samples: Samples, more: dict
) -> tuple[str, dict[str, list[float]]]:
    """Check, then time: both, ours compiled, what is outside of the blocks of each, and more."""
    compiled = share_weights(ours)
    apply_compile(compiled, "block", torch.device("cpu"))
    checked = check_equal(ours, theirs, samples)
    check_equal(compiled, theirs, samples)
    ours_rest, theirs_rest = without_blocks(ours, theirs)
    functions = {
        "diffusers": run_theirs(theirs, samples),
        "eager": run_ours(ours, samples),
        "compiled": run_ours(compiled, samples),
        "diffusers, outside": run_theirs(theirs_rest, samples),
        "wanloom, outside": run_ours(ours_rest, samples),
    }
    return checked, take_turns(functions | more)


def rows_of(claim: str, toy: bool) -> list[Row]:
    dtype, blocks, target = CLAIMS[claim]
    shape = (2, 4, 6) if toy else SHAPE
    with torch.random.fork_rng():
        ours, theirs = build_pair("toy" if toy else "1.3B", blocks, dtype)
        samples = draw_samples(ours.config, [shape], [CAPTION], dtype)
        tokens = len(samples.pack.tokens)
        floor = build_floor(ours.config, tokens, CAPTION + 1, dtype)
    more = {"floor": floor, "diffusers, compiled": run_theirs(torch.compile(theirs), samples)}
    checked, taken = compare(ours, theirs, samples, more)

    def whole(name: str, outside: str) -> list[float]:
        return at_depth(taken[name], taken[f"{outside}, outside"], blocks, DEPTH)

    peer, eager = whole("diffusers", "diffusers"), whole("eager", "wanloom")
    compiled, theirs_compiled = whole("compiled", "wanloom"), whole("diffusers, compiled", "diffusers")
    limit = min(taken["diffusers"]) / min(taken["floor"])
    what = f"forward and backward, 1.3B, {tokens} tokens, {str(dtype).removeprefix('torch.')}"
    facts = {"blocks": blocks, "depth": DEPTH, **taken}
    ideal = f"{limit:.2f}x: matrix products and attention alone"
    shared = {"checked": checked, "unit": "s", "limit": ideal, "peer": "diffusers, eager"}
    return [
        Row(claim, f"{what}, compiled", ours=compiled, theirs=peer, target=target, facts=facts, **shared),
        Row(claim, f"{what}, eager", ours=eager, theirs=peer, **shared),
        Row(
            claim,
            f"{what}, both compiled",
            ours=compiled,
            theirs=theirs_compiled,
            **shared | {"peer": "diffusers, compiled"},
        ),
    ]


def measure(toy: bool) -> list[Row]:
    """Forward and backward of the network on one video, against diffusers."""
    return [row for claim in CLAIMS for row in rows_of(claim, toy)]


if __name__ == "__main__":
    main(__spec__, measure)
