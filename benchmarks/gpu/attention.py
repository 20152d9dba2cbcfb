"""P1: attention alone, forward and backward: the kernels of wanloom by name, FlexAttention, varlen, cross-attention.

FLOPs of the forward are 4 S K H D, those of the backward 2.5 times as many (FlashAttention's way of counting). Outputs
and gradients of every kernel are compared with fp32 arithmetic at a small size before anything is timed, and which
kernel ran is read off the profiler.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.attention.varlen import varlen_attn

from benchmarks.gpu.instruments import Bench, Case, Line, distance, kernel_problem, left_out, rate, ratio
from benchmarks.gpu.models import config_of, size_of
from wanloom.model.attention import batch, rows
from wanloom.model.kernels import calls

TOKENS = (8190, 32760, 37440, 75600)
MODELS = ("14b", "1.3b")
KERNELS = ("flash", "cudnn", "efficient")
EXPECT = {"flash": ("370", "322"), "cudnn": (">= 595", ">= 516")}  # of long sequences
BOUND = 1e-2  # relative, of bf16 against fp32
FASTER = 1.5  # cuDNN over flash, both directions


def cases(bench: Bench) -> Iterator[Case]:
    yield Case("P1 equality", 5, partial(equality, bench))
    for tokens in TOKENS[:1] if bench.toy else TOKENS:
        for model in MODELS:
            heads, dim = shape_of(bench, model)
            cost = 14 * tokens**2 * heads * dim * 8 / 300e12
            for kernel in kernels_of(bench):
                if kernel == "efficient" and tokens > 32760:  # half as fast, and no candidate for these
                    continue
                run = partial(long, bench, kernel, model, tokens)
                yield Case(f"P1 {model} {tokens} {kernel}", 1 + cost, run)
    yield Case("P1 14b 32760 varlen", 8, partial(varlen, bench))
    yield Case("P1 14b 32760 flex", 45, partial(flex, bench))
    yield Case("P1 cross", 5, partial(cross, bench))


def ratios(bench: Bench) -> list[Line]:
    """cuDNN over flash, both directions together."""
    out = []
    for tokens in TOKENS:
        for model in MODELS:
            gate = FASTER if (model, tokens) == ("14b", 37440) else None
            names = [f"P1 {model} {tokens} {kernel} both" for kernel in ("cudnn", "flash")]
            out += ratio(bench, f"P1 {model} {tokens} cudnn / flash", *names, at_least=gate, expect="1.6")
    return out


def again_cases(bench: Bench) -> Iterator[Case]:
    """P7: the winner of P1 once more."""
    run = partial(long, bench, bench.kernel("cudnn"), "14b", 37440, "P7")
    yield Case("P7 attention again", 5, run)


def kernels_of(bench: Bench) -> Sequence[str]:
    """Those that there are on the device."""
    return KERNELS if bench.on_gpu else ("flash",)


def shape_of(bench: Bench, model: str) -> tuple[int, int]:
    """Heads and the width of one."""
    config = config_of(bench, model)
    return config.num_heads, config.dim // config.num_heads


def draw(bench: Bench, heads: int, dim: int, queries: int, keys: int, samples: int = 1) -> list[Tensor]:
    """q, k, v and the gradient of the values `(B, H, S, D)`, laid out as the model has them."""
    sizes = (queries, keys, keys, queries)
    return [bench.randn(samples, size, heads, dim, seed=i).transpose(1, 2) for i, size in enumerate(sizes)]


def lines_of(
    bench: Bench, name: str, flops: float, forward: Callable, backward: Callable, wanted: set[str], kernel: str = ""
) -> list[Line]:
    """Forward, backward, and both: FLOPs of the model (three times the forward) over their sum."""
    problem = kernel_problem(bench.kernels(lambda: (forward(), backward())), wanted)
    there, back = bench.time(forward), bench.time(backward)
    expect = EXPECT.get(kernel, ("", ""))
    both = [a + b for a, b in zip(there, back, strict=True)]
    return [
        rate(f"{name} forward", flops, there, expect=expect[0], problem=problem),
        rate(f"{name} backward", 2.5 * flops, back, expect=expect[1]),
        rate(f"{name} both", 3 * flops, both),
    ]


def long(bench: Bench, kernel: str, model: str, tokens: int, phase: str = "P1") -> Sequence[Line]:
    """Self-attention of one sample."""
    heads, dim = shape_of(bench, model)
    size = size_of(bench, tokens)
    q, k, v, grad = draw(bench, heads, dim, size, size)
    run = calls(kernel, bench.device.type, q.dtype, False)
    out, lse = run.forward(q, k, v, None)
    grad = grad.to(out.dtype)
    forward, backward = partial(run.forward, q, k, v, None), partial(run.backward, grad, q, k, v, None, out, lse)
    flops = 4 * size**2 * heads * dim
    return lines_of(bench, f"{phase} {model} {tokens} {kernel}", flops, forward, backward, {kernel}, kernel)


def equality(bench: Bench) -> Sequence[Line]:
    """Every kernel, with and without a bias, against softmax in fp32."""
    lines = []
    size, keys = (64, 48) if bench.toy else (1000, 700)
    for kernel in kernels_of(bench):
        for biased in (False, True):
            q, k, v, grad = draw(bench, 2, 32 if bench.toy else 128, size, keys, samples=2)
            bias = bench.randn(2, keys, seed=7, dtype=torch.float32).bfloat16().float() if biased else None
            run = calls(kernel, bench.device.type, q.dtype, biased)
            out, lse = run.forward(q, k, v, bias)
            grads = run.backward(grad.to(out.dtype), q, k, v, bias, out, lse)
            exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
            logits = exact[0] @ exact[1].transpose(-1, -2) * q.shape[-1] ** -0.5
            values = (logits if bias is None else logits + bias[:, None, None]).softmax(-1) @ exact[2]
            wanted = torch.autograd.grad(values, exact, grad.float())
            off = max(map(distance, (out, *grads), (values.detach(), *wanted)))
            name = f"P1 equality {kernel}{' with bias' if biased else ''}"
            problem = "" if off <= BOUND else f"off by {off:.1%}"
            lines.append(Line(name, off, "from fp32", at_most=BOUND, problem=problem))
    return lines


def by_autograd(
    bench: Bench, name: str, run: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: Sequence[Tensor], kind: str
) -> list[Line]:
    """Lines of a differentiable function of q, k and v `(B, H, S, D)`, compared with wanloom's `flash`."""
    q, k, v, grad = tensors
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = run(*inputs)
    forward, backward = partial(run, *inputs), partial(torch.autograd.grad, out, inputs, grad, retain_graph=True)
    flash = calls(bench.kernel("flash"), bench.device.type, grad.dtype, False)
    plain, lse = flash.forward(q, k, v, None)
    wanted = (plain, *flash.backward(grad.to(plain.dtype), q, k, v, None, plain, lse))
    off = max(map(distance, (out.detach(), *backward()), wanted))
    samples, heads, size, dim = grad.shape
    lines = lines_of(bench, name, 4 * samples * size**2 * heads * dim, forward, backward, {kind})
    problem = "" if off <= BOUND else f"off by {off:.1%} from flash"
    return [replace(lines[0], problem=", ".join(filter(None, [lines[0].problem, problem]))), *lines[1:]]


def varlen(bench: Bench) -> Sequence[Line]:
    """PyTorch's kernel for packed samples: one of 32760 tokens, and four that are equally long together."""
    if not bench.on_gpu:
        return left_out("P1 14b 32760 varlen", "runs on CUDA alone")
    heads, dim = shape_of(bench, "14b")
    size = size_of(bench, 32760)
    lines = []
    for docs in (1, 4):
        part = size // docs
        ends = torch.arange(0, size + 1, part, dtype=torch.int32, device=bench.device)

        def run(q: Tensor, k: Tensor, v: Tensor, ends: Tensor = ends, part: int = part, docs: int = docs) -> Tensor:
            return batch(varlen_attn(rows(q), rows(k), rows(v), ends, ends, part, part), docs)

        name = f"P1 14b 32760 varlen {docs}"
        lines += by_autograd(bench, name, run, draw(bench, heads, dim, part, part, docs), "flash")
    return lines


def flex(bench: Bench) -> Sequence[Line]:
    """FlexAttention, compiled, without a mask."""
    if not bench.on_gpu:
        return left_out("P1 14b 32760 flex", "has no backward on a CPU")
    heads, dim = shape_of(bench, "14b")
    size = size_of(bench, 32760)
    compiled = torch.compile(flex_attention)
    return by_autograd(bench, "P1 14b 32760 flex", compiled, draw(bench, heads, dim, size, size), "flex")


def cross(bench: Bench) -> Sequence[Line]:
    """A clip to 512 text keys, and 64 images to 80 keys and the folded one, which has a bias."""
    heads, dim = shape_of(bench, "14b")
    lines = []
    for name, tokens, samples, keys, biased in (("clip", 32760, 1, 512, False), ("images", 390, 64, 81, True)):
        size = size_of(bench, tokens)
        q, k, v, grad = draw(bench, heads, dim, size, keys, samples)
        bias = F.pad(torch.zeros(samples, keys - 1, device=bench.device), (0, 1), value=6.0) if biased else None
        for kernel in ("efficient",) if biased and bench.on_gpu else kernels_of(bench)[:2]:
            run = calls(kernel, bench.device.type, q.dtype, biased)
            out, lse = run.forward(q, k, v, bias)
            forward = partial(run.forward, q, k, v, bias)
            backward = partial(run.backward, grad.to(out.dtype), q, k, v, bias, out, lse)
            flops = 4 * samples * size * keys * heads * dim
            lines += lines_of(bench, f"P1 cross {name} {kernel}", flops, forward, backward, {kernel})
    return lines
