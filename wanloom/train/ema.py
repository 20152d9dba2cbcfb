"""An exponential moving average of the weights.

In: the named parameters after each step. Out: their average, fp32, on the same device. The one decision: the decay
warms up as (1 + n) / (10 + n) until it reaches its value, so that short runs do not carry their first weights to the
end.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from wanloom.parallel.params import like, local


class Ema:
    """The average of `named`, which starts as a copy."""

    def __init__(self, named: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._params = dict(named)
        self._averages = {name: local(p).clone() for name, p in named.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The average by parameter name, laid out as the parameters are, not copied."""
        return {name: like(self._params[name], average) for name, average in self._averages.items()}

    @torch.no_grad()
    def update(self, count: int) -> None:
        """Move towards the weights; `count` updates of the optimizer came before the last one."""
        decay = min(self.decay, (1 + count) / (10 + count))
        for name, average in self._averages.items():
            average.lerp_(local(self._params[name]), 1 - decay)
