"""P0: what the device can do at all: copy, matrix products in bf16, and row by row scaled ones in fp8."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from benchmarks.gpu.instruments import Bench, Case, Line, distance, left_out, rate

TOKENS = (8190, 32760, 75600)
WIDTHS = ((5120, 5120), (5120, 13824), (13824, 5120), (1536, 1536), (1536, 8960))  # in, out
FP8_BOUND = 5e-2  # of products of rounded numbers, relative to bf16's


def cases(bench: Bench) -> Iterator[Case]:
    yield Case("P0 copy", 3, partial(copy, bench))
    for tokens in TOKENS:
        yield Case(f"P0 gemm {tokens}", 6, partial(products, bench, tokens))


def copy(bench: Bench) -> Sequence[Line]:
    """Bytes read and written."""
    source = bench.randn(2**16 if bench.toy else 2**30, dtype=torch.float32)
    target = torch.empty_like(source)
    seconds = bench.time(lambda: target.copy_(source))
    return [rate("P0 copy", 2 * source.nbytes, seconds, "TB/s", expect="4.3")]


def products(bench: Bench, tokens: int) -> Sequence[Line]:
    """Every width of the two models, bf16 and fp8."""
    lines = []
    for inner, outer in WIDTHS:
        name = f"P0 gemm {tokens} x {inner} -> {outer}"
        m, k, n = (
            (max(16, size // 64 // 16 * 16) for size in (tokens, inner, outer)) if bench.toy else (tokens, inner, outer)
        )
        a, b = bench.randn(m, k), bench.randn(n, k, seed=1)
        flops = 2 * m * k * n
        seconds = bench.time(lambda a=a, b=b: a @ b.T)
        lines.append(rate(f"{name} bf16", flops, seconds, expect="650-790"))
        lines += fp8(bench, name, a, b, lines[-1].value or 0)
    return lines


def fp8(bench: Bench, name: str, a: torch.Tensor, b: torch.Tensor, bf16: float) -> Sequence[Line]:
    """The product alone: casts and scales are made before."""
    name = f"{name} fp8"
    if bench.on_gpu and torch.cuda.get_device_capability() < (8, 9):
        return left_out(name, "this GPU has no fp8")
    (qa, sa), (qb, sb) = rows_as_fp8(a), rows_as_fp8(b)
    run = partial(torch._scaled_mm, qa, qb.T, sa, sb.T.contiguous(), out_dtype=torch.bfloat16, use_fast_accum=True)
    try:
        off = distance(run(), a @ b.T)
    except RuntimeError:
        if bench.on_gpu:
            raise
        return left_out(name, "not on this CPU")
    problem = "" if off <= FP8_BOUND else f"off by {off:.1%} from bf16"
    seconds = bench.time(run)
    found = rate(name, 2 * a.shape[0] * a.shape[1] * b.shape[0], seconds, problem=problem)
    times = (found.value or 0) / bf16
    return [found, Line(f"{name} / bf16", times, "x", expect="1.4-1.7")]


def rows_as_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values in e4m3 and the scale of each row `(rows, 1)`, by which they are multiplied again."""
    scale = x.abs().amax(1, keepdim=True).float() / torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale).to(torch.float8_e4m3fn), scale
