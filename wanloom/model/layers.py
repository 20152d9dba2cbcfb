"""The leaves of the model: every parameter is one of theirs.

Where ranks share a layer, each has a part of its parameters and of its result. What gives the part of a parameter that
is here, and what makes the whole of the parts of a result, is set from outside: `values` and `exchange`. So layers that
multiply in another way need no class for each way to be split.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]


def unsplit(param: Tensor) -> Tensor:
    return param


class Linear(nn.Linear):
    """`exchange(product) + bias`; without an exchange the bias is part of the product, as one operator."""

    values: Change = staticmethod(unsplit)
    exchange: Change | None = None

    def product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """What the weight makes of the input."""
        return F.linear(input, self.values(self.weight), bias)

    def forward(self, input: Tensor) -> Tensor:
        bias = self.values(self.bias)
        if self.exchange is None:
            return self.product(input, bias)
        out = self.exchange(self.product(input, None))
        return out + bias.to(out.dtype)


class Linear32(Linear):
    """A Linear that computes in fp32, under autocast and with half-precision weights too."""

    def product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight.float(), None if bias is None else bias.float())


class RMSNorm(nn.Module):
    """RMS norm over all heads together, fp32 in and out; of some heads the exchange gives the squares of all."""

    values: Change = staticmethod(unsplit)
    exchange: Change | None = None

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.dim, self.eps = dim, eps

    def forward(self, x: Tensor) -> Tensor:
        x, weight = x.float(), self.values(self.weight).float()
        if self.exchange is None:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        squares = self.exchange(x.square().sum(-1, keepdim=True))
        return x * torch.rsqrt(squares / self.dim + self.eps) * weight


class LayerNorm(nn.LayerNorm):
    """Affine layer norm, fp32 in and out."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class Modulation(nn.Module):
    """A learned table `(1, n, dim)`, added to what the time embedding gives; a leaf, so that wrappers see it."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, rows, dim) / dim**0.5)

    def forward(self, e: Tensor) -> tuple[Tensor, ...]:
        """`e (M, rows or 1, dim)` -> `rows` tensors `(M, dim)`."""
        return (self.weight.float() + e).unbind(1)
