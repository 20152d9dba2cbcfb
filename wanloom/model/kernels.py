"""Attention kernels: by name, each a forward with log-sum-exp and a backward that is given it.

In: queries, keys and values `(B, H, S, D)`, and a bias per key `(B, K)` fp32 or None. Out: the attended values and the
log-sum-exp of the logits `(B, H, S)`. The one decision: the backward takes `out` and `lse` as they are handed over, so
that keys may be attended to in parts, and whoever merges the parts gives every part the whole's. A kernel is a name,
`auto` becomes one of the names, which the commands print, and a kernel that cannot run where it is asked for is an
error; nothing falls back on another kernel quietly.

`flash`      FlashAttention-2: on the CPU, and on CUDA from Ampere on in half precision.
`cudnn`      cuDNN's, on Hopper 1.4x to 1.5x of a whole step over `flash`; half precision on CUDA only.
`efficient`  the memory-efficient one; every CUDA device, fp32 too.

On CUDA only `efficient` takes a bias: keys with one (a few hundred text keys) go to it under every name. It wants the
bias in the dtype of the queries: in bf16 the folded text key then weighs up to 1.6% too much or too little. On the CPU
half precision is computed in fp32, and the values come out in fp32, which the backward needs for small gradients: in
bf16 that of the keys' bias is 3 times as far off. A bf16 backward would be 1.45x faster on processors with bf16
instructions, but 1.3x slower with AVX-512 alone and 8x slower with AVX2.

They are PyTorch's own operators. Without a GPU the CUDA ones are tested on meta tensors only: arguments and shapes.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wanloom import torch_private
from wanloom.errors import UserError
from wanloom.model.settings import check_kernel_name

HALF = (torch.bfloat16, torch.float16)
LSE_BLOCK = 32  # `efficient` reads the log-sum-exp in blocks of so many queries
BIAS_BLOCK = 16  # and wants the rows of the bias at multiples of so many values

Grads = tuple[Tensor, Tensor, Tensor]


class Calls(NamedTuple):
    """`forward(q, k, v, bias) -> out, lse` and `backward(grad_out, q, k, v, bias, out, lse) -> grads of q, k, v`."""

    forward: Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor], Grads]


@functools.cache
def resolve_kernel(name: str, device: str, dtype: torch.dtype) -> str:
    """The kernel that `name` stands for on this device type.

    Raises UserError for an unknown name and for a kernel that cannot run here.
    """
    check_kernel_name(name)
    half, found = dtype in HALF, f"not {device} and {str(dtype).removeprefix('torch.')}"
    if device != "cuda":
        if name not in ("auto", "flash"):
            wanted = "a CUDA device" if name == "efficient" else "a CUDA device and bf16"
            raise UserError(f"The attention kernel '{name}' needs {wanted}, {found}: choose 'auto' or 'flash'.")
        return "flash"
    generation = torch.cuda.get_device_capability()[0]
    if name == "auto":
        return "efficient" if not half or generation < 8 else "cudnn" if generation >= 9 else "flash"
    if name != "efficient" and (not half or generation < 8):
        raise UserError(
            f"The attention kernel '{name}' needs bf16 on an Ampere GPU or a newer one, {found} on a GPU of compute "
            f"capability {generation}: choose 'auto' or 'efficient'."
        )
    return name


def calls(kernel: str, device: str, dtype: torch.dtype, biased: bool) -> Calls:
    """What runs under this name. Raises UserError as `resolve_kernel` does."""
    name = resolve_kernel(kernel, device, dtype)
    if device != "cuda":
        return CPU
    return CUDA["efficient" if biased else name]


def dtypes(device: str, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """Of the values and of the log-sum-exp that come out for queries of `dtype`."""
    wide = torch.float32 if dtype in HALF else dtype
    return (wide if device == "cpu" else dtype), wide


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.float() if x.dtype in HALF else x for x in tensors)


def cpu_mask(bias: Tensor | None, q: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(q.dtype)[:, None, None].expand(-1, -1, q.shape[2], -1)


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v = widen(q, k, v)
    return torch_private.flash_cpu(q, k, v, attn_mask=cpu_mask(bias, q))


def cpu_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor
) -> Grads:
    dtype = q.dtype
    q, k, v = widen(q, k, v)
    grads = torch_private.flash_cpu_backward(grad_out, q, k, v, out, lse, 0.0, False, attn_mask=cpu_mask(bias, q))
    return tuple(grad.to(dtype) for grad in grads)


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch_private.cudnn(q, k, v, bias, True)
    return out, lse.view(q.shape[:3])


def cudnn_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor
) -> Grads:
    # cuDNN's plan is found by the strides of q, k and v alone: those of the rest must be the same every time
    lse = lse.contiguous().view(lse.shape + (1,) * (cudnn_lse_dims(q.device.type) - 3))
    seed = torch.empty((), dtype=torch.int64, device=q.device)  # of dropout, of which there is none
    return torch_private.cudnn_backward(
        grad_out, q, k, v, out, lse, seed, seed, bias, None, None, q.shape[2], k.shape[2], 0.0, False
    )


@functools.cache
def cudnn_lse_dims(device: str) -> int:
    """3 for `(B, H, S)` or 4 for `(B, H, S, 1)`: versions of PyTorch differ, so the one that runs is asked."""
    x = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    return torch_private.cudnn(x, x, x, None, True)[1].dim()


def flash_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch_private.flash(q, k, v)
    return out, lse


def flash_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor
) -> Grads:
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout, of which there is none
    return torch_private.flash_backward(
        grad_out, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, False, seed, seed[0]
    )


def efficient_mask(bias: Tensor | None, q: Tensor) -> Tensor | None:
    if bias is None:
        return None
    keys = bias.shape[1]
    padded = F.pad(bias.to(q.dtype), (0, -keys % BIAS_BLOCK))
    return padded[:, None, None, :keys].expand(-1, q.shape[1], q.shape[2], -1)


def efficient_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch_private.efficient(q, k, v, efficient_mask(bias, q), True)
    return out, lse[:, :, : q.shape[2]]


def efficient_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor
) -> Grads:
    lse = F.pad(lse, (0, -q.shape[2] % LSE_BLOCK), value=float("inf")).contiguous()
    seed = torch.empty((), dtype=torch.int64, device=q.device)  # of dropout, of which there is none
    *grads, _ = torch_private.efficient_backward(
        grad_out, q, k, v, efficient_mask(bias, q), out, lse, seed, seed, 0.0, [True, True, True, False]
    )
    return tuple(grads)


CPU = Calls(cpu_forward, cpu_backward)
CUDA = {
    "cudnn": Calls(cudnn_forward, cudnn_backward),
    "flash": Calls(flash_forward, flash_backward),
    "efficient": Calls(efficient_forward, efficient_backward),
}
