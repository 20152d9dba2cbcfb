"""What differs between the segments of a pack, applied to their tokens: shift and scale of a norm, and gates.

In: tokens `(T, dim)` and tables `(M, dim)`, one row per segment. Out: tokens. The one decision: two forms of the same
thing. Eager goes run by run, on views, and never has a table written out per token. A compiled block takes the row of
each token by its index, which the compiler puts into its kernels, and other lengths are the same graph; the gradient of
a table is summed segment by segment, as additions by index would come in any order and wait for each other. A pack of
one segment, which is a graph of its own, has one row for all, and its gradients are sums that the compiler fuses.
The compiled form is spelt in plain products: `addcmul` there keeps its product, in fp32, for the backward pass.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wanloom.model.attention import split
from wanloom.model.sequence import runs


class TokenLayout(NamedTuple):
    """Which tokens belong to which segment. No numbers beside tensors: a compiled graph would be for these alone."""

    lens: Tensor  # (M,) int64 on the CPU
    rows: Tensor  # (T,) int64, the segment of each token


def build_layout(lens: Sequence[int], device: torch.device) -> TokenLayout:
    """From the tokens of each segment; 0 is allowed."""
    host = torch.tensor(lens)
    return TokenLayout(host, torch.repeat_interleave(host, output_size=sum(lens)).to(device))


def modulate_norm(x: Tensor, shift: Tensor, scale: Tensor, layout: TokenLayout, eps: float) -> Tensor:
    """`layer_norm(x) * (1 + scale) + shift` with one scale and shift per segment: `x (T, dim)`, `scale (M, dim)`."""
    scale, shape = scale + 1, x.shape[-1:]
    if torch.compiler.is_compiling():
        return F.layer_norm(x, shape, eps=eps) * spread(scale, layout) + spread(shift, layout)
    segments, tokens = sizes_of_runs(tuple(layout.lens.tolist()))
    rows = zip(split(x, tokens), split(shift, segments), split(scale, segments), segments, strict=True)
    out = []
    for part, offset, factor, count in rows:
        if not len(part):  # the segments have no token here
            continue
        if count == 1:  # as the norm's own affine: one pass over memory, and nothing more kept for the backward pass
            out.append(F.layer_norm(part, shape, factor[0], offset[0], eps))
        else:
            normed = F.layer_norm(part, shape, eps=eps).unflatten(0, (count, -1))
            out.append(torch.addcmul(offset[:, None], normed, factor[:, None]).flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)


def add_gated(x: Tensor, y: Tensor, gate: Tensor, layout: TokenLayout) -> Tensor:
    """`x + y * gate` with one gate per segment: `x`, `y (T, dim)`, `gate (M, dim)`."""
    if torch.compiler.is_compiling():
        return x + y * spread(gate, layout)
    segments, tokens = sizes_of_runs(tuple(layout.lens.tolist()))
    out = []
    for x_part, y_part, factor in zip(split(x, tokens), split(y, tokens), split(gate, segments), strict=True):
        if not len(x_part):
            continue
        shape = (factor.shape[0], -1)
        out.append(torch.addcmul(x_part.unflatten(0, shape), y_part.unflatten(0, shape), factor[:, None]).flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)


@functools.lru_cache(maxsize=64)
def sizes_of_runs(lens: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Segments and tokens of every run of neighbours that are equally long; each block asks three times."""
    found = list(runs(lens))
    return [run.samples for run in found], [run.samples * run.lens[0] for run in found]


def spread(table: Tensor, layout: TokenLayout) -> Tensor:
    """The row of each token: `(M, dim)` -> `(T, dim)`, or `(1, dim)` as it is."""
    return table if len(table) == 1 else Spread.apply(table, layout.rows, layout.lens)


class Spread(torch.autograd.Function):
    """Rows by index; their gradients summed segment by segment."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, lens: Tensor) -> Tensor:
        ctx.save_for_backward(lens)
        return table.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.wanloom.sum_segments(grads[0], *ctx.saved_tensors), None, None


@torch.library.custom_op("wanloom::sum_segments", mutates_args=())
def sum_segments(x: Tensor, lens: Tensor) -> Tensor:
    """The sum over the tokens of each segment: `(T, dim)`, lens `(M,)` on the CPU -> `(M, dim)`."""
    segments, tokens = sizes_of_runs(tuple(lens.tolist()))
    parts = zip(segments, tokens, split(x, tokens), strict=True)
    return torch.cat([part.unflatten(0, (count, size // count)).sum(1) for count, size, part in parts])


@sum_segments.register_fake
def _(x, lens):
    return x.new_empty(lens.shape[0], x.shape[1])
