"""Attention over packed samples: every sample attends to its own keys and to nothing else.

In: queries, keys and values of all samples one after the other, with their lengths. Out: the attended values in the
order of the queries. The one decision: all of it is one operator, `wanloom::attend`, whichever kernel runs below it.
So a policy of what to recompute names one operator, and a compiled block holds it as it is: the lengths are CPU tensors
whose values are read inside, and other lengths are the same graph.

Samples that are neighbours and equally long are one batch through views, without a copy. Short neighbours with unequal
numbers of keys are one batch too, their keys padded under a bias of -inf: below `BATCH_BELOW` queries a call costs more
than the work in it. Everything else is one call per sample.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from wanloom.model.kernels import Grads, calls, dtypes
from wanloom.model.sequence import runs

BATCH_BELOW = 512  # queries per sample


class Attend(Protocol):
    """The attention core, which has no parameters: all that context parallelism replaces, in self-attention.

    `q (T, H, D)`, `k`, `v (S, H, D)`, `k_bias (S,)` added to the logits of each key -> `(T, H, D)`. The lengths `(N,)`
    are int64 on the CPU: of what is here, or in a pack that is a part, of the whole sequence.
    """

    kernel: str

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, q_lens: Tensor, k_lens: Tensor, k_bias: Tensor | None
    ) -> Tensor: ...


class PackedAttention(nn.Module):
    """The attention core where all keys of a sample are here."""

    def __init__(self, kernel: str = "auto") -> None:
        super().__init__()
        self.kernel = kernel

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_lens: Tensor,
        k_lens: Tensor,
        k_bias: Tensor | None = None,
    ) -> Tensor:
        """As `Attend`. A sample may have no queries here, its keys are then not looked at.

        Raises UserError for a kernel that cannot run here, ValueError for lengths that do not sum to T and S, for a
        sample with queries and no keys, and for a bias that wants a gradient, which none gets.
        """
        return torch.ops.wanloom.attend(q, k, v, q_lens, k_lens, k_bias, self.kernel)[0].to(q.dtype)


class Group(NamedTuple):
    """Neighbouring samples that are one call."""

    samples: int
    q_len: int  # queries of each; 0 is no call
    k_lens: tuple[int, ...]


@functools.lru_cache(maxsize=64)
def group(q_lens: tuple[int, ...], k_lens: tuple[int, ...]) -> list[Group]:
    """The calls to make; see the module's text."""
    if any(queries and not keys for queries, keys in zip(q_lens, k_lens, strict=True)):
        raise ValueError(f"a sample has queries and no keys: {q_lens}, {k_lens}")
    out = []
    for run in runs(q_lens):
        (q_len,) = run.lens
        keys = k_lens[run.first : run.first + run.samples]
        if q_len < BATCH_BELOW:
            out.append(Group(run.samples, q_len, keys))
        else:
            out += [Group(part.samples, q_len, part.lens * part.samples) for part in runs(keys)]
    return out


class Padding(NamedTuple):
    """How unequal numbers of keys become one batch `(N, K)`, K the largest, and back."""

    rows: Tensor  # (N*K,) which key
    bias: Tensor  # (N, K) fp32: 0, or -inf where the key is none of the sample's
    kept: Tensor  # (S,) where each key went


@functools.lru_cache(maxsize=64)
def padding(k_lens: tuple[int, ...], device: torch.device) -> Padding:
    lens = torch.tensor(k_lens)[:, None]
    columns = torch.arange(max(k_lens))[None]
    rows = (lens.cumsum(0) - lens) + columns.minimum(lens - 1)
    bias = torch.zeros(rows.shape).masked_fill(columns >= lens, float("-inf"))
    kept = (columns < lens).flatten().nonzero()[:, 0]
    return Padding(rows.flatten().to(device), bias.to(device), kept.to(device))


def padding_of(part: Group, device: torch.device) -> Padding | None:
    return padding(part.k_lens, device) if len(set(part.k_lens)) > 1 else None


def split(x: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """Views of neighbouring rows; one split, because its backward is one concatenation."""
    return (x,) if len(sizes) == 1 else x.split(sizes)


def split_groups(
    groups: list[Group], queries: list[Tensor], k: Tensor, v: Tensor, k_bias: Tensor | None
) -> Iterator[tuple[Group, Sequence[Tensor], Tensor, Tensor, Tensor | None]]:
    """For each group its part of every tensor."""
    q_sizes, k_sizes = [part.samples * part.q_len for part in groups], [sum(part.k_lens) for part in groups]
    if sum(q_sizes) != len(queries[0]) or sum(k_sizes) != len(k):
        raise ValueError(f"lengths sum to {sum(q_sizes)}, {sum(k_sizes)}, not {len(queries[0])}, {len(k)}")
    by_group = zip(*(split(x, q_sizes) for x in queries), strict=True)
    biases = [None] * len(groups) if k_bias is None else split(k_bias, k_sizes)
    return zip(groups, by_group, split(k, k_sizes), split(v, k_sizes), biases, strict=True)


def join(parts: list[Tensor]) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def batch(x: Tensor, samples: int) -> Tensor:
    """Rows `(N*S, H, ...)` -> `(N, H, S, ...)`, a view."""
    return x.unflatten(0, (samples, -1)).transpose(1, 2)


def rows(x: Tensor) -> Tensor:
    """`(N, H, S, ...)` -> rows `(N*S, H, ...)`."""
    return x.transpose(1, 2).flatten(0, 1)


def batch_keys(
    part: Group, padded: Padding | None, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values `(N, H, K, D)` and the bias `(N, K)` of a group."""
    if padded is not None:
        k, v = k.index_select(0, padded.rows), v.index_select(0, padded.rows)
        bias = padded.bias if bias is None else bias.index_select(0, padded.rows).view_as(padded.bias) + padded.bias
    elif bias is not None:
        bias = bias.unflatten(0, (part.samples, -1))
    return batch(k, part.samples), batch(v, part.samples), bias


def packed_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lens: Sequence[int],
    k_lens: Sequence[int],
    k_bias: Tensor | None,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Values `(T, H, D)` and the log-sum-exp of the logits `(T, H)`; nothing is recorded for a backward pass."""
    outs, lses = [], []
    for part, (q_part,), k_part, v_part, bias in split_groups(group(tuple(q_lens), tuple(k_lens)), [q], k, v, k_bias):
        if part.q_len:
            k_part, v_part, bias = batch_keys(part, padding_of(part, k.device), k_part, v_part, bias)
            run = calls(kernel, q.device.type, q.dtype, bias is not None).forward
            out, lse = run(batch(q_part, part.samples), k_part, v_part, bias)
            outs.append(rows(out))
            lses.append(rows(lse))
    return join(outs), join(lses)


def packed_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_lens: Sequence[int],
    k_lens: Sequence[int],
    k_bias: Tensor | None,
    kernel: str,
) -> Grads:
    """Gradients of q, k and v, given the values and the log-sum-exp over all keys, of which `k` may be a part."""
    groups = group(tuple(q_lens), tuple(k_lens))
    grads = [], [], []
    for part, queries, k_part, v_part, bias in split_groups(groups, [grad_out, q, out, lse], k, v, k_bias):
        if not part.q_len:
            grads[1].append(torch.zeros_like(k_part))
            grads[2].append(torch.zeros_like(v_part))
            continue
        padded = padding_of(part, k.device)
        k_part, v_part, bias = batch_keys(part, padded, k_part, v_part, bias)
        run = calls(kernel, q.device.type, q.dtype, bias is not None).backward
        grad_part, q_part, out_part, lse_part = (batch(x, part.samples) for x in queries)
        dq, dk, dv = map(rows, run(grad_part, q_part, k_part, v_part, bias, out_part, lse_part))
        if padded is not None:
            dk, dv = dk.index_select(0, padded.kept), dv.index_select(0, padded.kept)
        for found, value in zip(grads, (dq, dk, dv), strict=True):
            found.append(value)
    return join(grads[0]), join(grads[1]), join(grads[2])


def shapes(q: Tensor) -> tuple[Tensor, Tensor]:
    """Values and log-sum-exp without content."""
    out, lse = dtypes(q.device.type, q.dtype)
    return q.new_empty(q.shape, dtype=out), q.new_empty(q.shape[:2], dtype=lse)


@torch.library.custom_op("wanloom::attend", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, q_lens: Tensor, k_lens: Tensor, k_bias: Tensor | None, kernel: str
) -> tuple[Tensor, Tensor]:
    """Values `(T, H, D)` and log-sum-exp `(T, H)`; see PackedAttention."""
    return packed_forward(q, k, v, q_lens.tolist(), k_lens.tolist(), k_bias, kernel)


@torch.library.custom_op("wanloom::attend_backward", mutates_args=())
def attend_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_lens: Tensor,
    k_lens: Tensor,
    k_bias: Tensor | None,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    lens = q_lens.tolist(), k_lens.tolist()
    return packed_backward(grad_out.contiguous(), q, k, v, out, lse, *lens, k_bias, kernel)


@attend.register_fake
def _(q, k, v, q_lens, k_lens, k_bias, kernel):
    return shapes(q)


@attend_backward.register_fake
def _(grad_out, q, k, v, out, lse, q_lens, k_lens, k_bias, kernel):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def keep_for_backward(ctx, inputs, output) -> None:
    if ctx.needs_input_grad[5]:
        raise ValueError("the bias of the keys wants a gradient; attention has none for it")
    *tensors, ctx.kernel = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def backward_of_attend(ctx, grad_out, _):
    if grad_out is None:
        return (None,) * 7
    q, k, v, q_lens, k_lens, k_bias, out, lse = ctx.saved_tensors
    grads = torch.ops.wanloom.attend_backward(grad_out, q, k, v, out, lse, q_lens, k_lens, k_bias, ctx.kernel)
    return *grads, None, None, None, None


attend.register_autograd(backward_of_attend, setup_context=keep_for_backward)

# the operators whose results are worth keeping where the rest of a block is recomputed
ATTENTION_OPS = (torch.ops.wanloom.attend.default,)
