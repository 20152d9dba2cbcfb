"""An exponential moving average of the weights.

In: the named parameters after each step. Out: their average, fp32, on the same device. The one decision: the decay
warms up as (1 + n) / (10 + n) until it reaches its value, so that short runs do not carry their first weights to the
end.
"""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from wanloom.config import Config


class EmaConfig(Config):
    """No average is kept unless `decay` is set."""

    decay: float | None = Field(default=None, gt=0, lt=1)


class Ema:
    """The average of `named`, which starts as a copy."""

    def __init__(self, named: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._params = list(named.values())
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in named.items()}

    @torch.no_grad()
    def update(self, count: int) -> None:
        """Move towards the weights; `count` updates of the optimizer came before the last one."""
        decay = min(self.decay, (1 + count) / (10 + count))
        for average, param in zip(self.tensors.values(), self._params, strict=True):
            average.lerp_(param, 1 - decay)
