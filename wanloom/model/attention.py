"""Attention over packed samples: every sample attends to its own keys and to nothing else.

In: queries, keys and values of all samples one after the other, with their lengths. Out: the attended values in the
order of the queries. The one decision: a kernel is a name, `auto` becomes one of the names, which the commands print,
and a kernel that cannot run where it is asked for is an error; nothing falls back on another kernel quietly.

`sdpa`   scaled_dot_product_attention with the backend that PyTorch picks; runs everywhere.
`cudnn`  the same with the backend pinned to cuDNN, on Hopper 1.4x to 1.5x of a whole step over PyTorch's pick; half
         precision on CUDA only. Keys with a bias (a few hundred text keys) still go to the backend that PyTorch picks.
The `cudnn` branch has no CPU counterpart and is not covered by tests that run without a GPU. CUDA backends want the
bias in the dtype of the queries: in bf16 the folded text key then weighs up to 1.6% too much or too little. On the CPU
half-precision inputs are attended to in fp32, because the backward pass of CPU attention is 7 times slower in bf16.

Samples that are neighbours and equally long are one batch through views, without a copy. Short neighbours with unequal
numbers of keys are one batch too, their keys padded under a bias of -inf: below `BATCH_BELOW` queries a call costs more
than the work in it. Everything else is one call per sample.
"""

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wanloom.config import UserError, nearest
from wanloom.model.sequence import runs

Kernel = Literal["auto", "sdpa", "cudnn"]
KERNELS = get_args(Kernel)
BATCH_BELOW = 512  # queries per sample


@functools.cache
def resolve_kernel(name: str, device: str, dtype: torch.dtype) -> str:
    """The kernel that `name` stands for on this device type.

    Raises UserError for an unknown name and for a kernel that cannot run here.
    """
    if name not in KERNELS:
        raise UserError(
            f"There is no attention kernel '{name}'; known are {', '.join(KERNELS)}.{nearest(name, KERNELS)}"
        )
    half = dtype in (torch.bfloat16, torch.float16)
    able = device == "cuda" and half and torch.cuda.get_device_capability() >= (9, 0)
    if name == "auto":
        name = "cudnn" if able else "sdpa"
    elif name == "cudnn" and not (device == "cuda" and half):
        raise UserError(
            f"The attention kernel 'cudnn' needs a CUDA device and bf16, not {device} and "
            f"{str(dtype).removeprefix('torch.')}: choose 'auto' or 'sdpa'."
        )
    return name


class PackedAttention(nn.Module):
    """The attention core, without parameters: the one seam that context parallelism replaces."""

    def __init__(self, kernel: str = "auto") -> None:
        super().__init__()
        self.kernel = kernel

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_lens: Sequence[int],
        k_lens: Sequence[int],
        k_bias: Tensor | None = None,
    ) -> Tensor:
        """`q (T, H, D)`, `k`, `v (S, H, D)`, `k_bias (S,)` added to the logits of each key -> `(T, H, D)`."""
        kernel = resolve_kernel(self.kernel, q.device.type, q.dtype)
        groups = group(tuple(q_lens), tuple(k_lens))
        q_parts = split(q, [count * q_len for count, q_len, _ in groups])
        k_sizes = [sum(lens) for _, _, lens in groups]
        k_parts, v_parts = split(k, k_sizes), split(v, k_sizes)
        biases = [None] * len(groups) if k_bias is None else split(k_bias, k_sizes)
        out = [
            attend_batch(*parts, count=count, k_lens=lens, kernel=kernel)
            for parts, (count, _, lens) in zip(zip(q_parts, k_parts, v_parts, biases, strict=True), groups, strict=True)
        ]
        return out[0] if len(out) == 1 else torch.cat(out)


@functools.lru_cache(maxsize=64)
def group(q_lens: tuple[int, ...], k_lens: tuple[int, ...]) -> list[tuple[int, int, tuple[int, ...]]]:
    """(samples, queries of each, keys of each) of the calls to make; see the module's text."""
    out = []
    for run in runs(q_lens):
        (q_len,) = run.lens
        keys = k_lens[run.first : run.first + run.samples]
        if q_len < BATCH_BELOW:
            out.append((run.samples, q_len, keys))
        else:
            out += [(part.samples, q_len, part.lens * part.samples) for part in runs(keys)]
    return out


def padding(k_lens: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row of each padded key `(N*K,)`, and its bias `(N*K,)`: 0, or -inf where the key is none of the sample's."""
    width = max(k_lens)
    lens = torch.tensor(k_lens)[:, None]
    columns = torch.arange(width)[None]
    rows = (lens.cumsum(0) - lens) + columns.minimum(lens - 1)
    bias = torch.zeros(len(k_lens), width).masked_fill(columns >= lens, float("-inf"))
    return rows.flatten().to(device), bias.flatten().to(device)


def split(x: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """Views of neighbouring rows; one split, because its backward is one concatenation."""
    return (x,) if len(sizes) == 1 else x.split(sizes)


def attend_batch(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, count: int, k_lens: tuple[int, ...], kernel: str
) -> Tensor:
    """`count` samples with equally many queries: `q (count*Q, H, D)`, `k (sum(k_lens), H, D)` -> `(count*Q, H, D)`."""
    if len(set(k_lens)) > 1:
        rows, extra = padding(k_lens, k.device)
        k, v = k.index_select(0, rows), v.index_select(0, rows)
        bias = extra if bias is None else bias.index_select(0, rows) + extra
    dtype, on_cpu = q.dtype, q.device.type == "cpu"
    if on_cpu:
        q, k, v = q.float(), k.float(), v.float()
    if bias is not None:
        bias = bias.to(q.dtype)
    q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
    mask = None if bias is None else bias.view(count, 1, 1, -1).expand(-1, -1, q.shape[2], -1)
    if kernel == "cudnn" and mask is None:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            out = F.scaled_dot_product_attention(q, k, v)
    else:
        with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():  # it would round the inputs again
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(0, 1).to(dtype)
