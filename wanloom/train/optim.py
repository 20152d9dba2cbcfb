"""AdamW and the learning rate of a step.

In: the named parameters of a model. Out: an optimizer whose state is kept by parameter name, and the learning rate as a
function of the step. The one decision: only matrices decay. Biases, norms and the modulation tables are scales and
offsets with no reason to be small. AdamW: Loshchilov and Hutter 2019.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from wanloom.parallel.params import like, local
from wanloom.train.settings import OptimizerConfig, ScheduleConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(config: ScheduleConfig, lr: float, step: int, num_steps: int) -> float:
    """The learning rate of step `step` (from 0) of `num_steps`."""
    if step < config.warmup_steps:
        return lr * (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return lr
    done = min((step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1), 1.0)
    left = 1 - done if config.kind == "linear" else (1 + math.cos(math.pi * done)) / 2
    return lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)


class AdamW:
    """torch's AdamW with its state by parameter name and the count of steps outside of it.

    Of a parameter that is split over ranks it sees the local values alone: an elementwise update needs no others.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], config: OptimizerConfig) -> None:
        self.named = named
        self._local = {name: nn.Parameter(local(p)) for name, p in self.named.items()}
        decay = [p for p in self._local.values() if p.dim() == 2]
        keep = [p for p in self._local.values() if p.dim() != 2]
        groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": keep, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        for param in self._local.values():
            self._adamw.state[param] = {
                "step": torch.zeros((), dtype=torch.float32, device=param.device),
                "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
            }

    def step(self, lr: float) -> None:
        """One update with this learning rate; the gradients are dropped afterwards."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        for name, param in self.named.items():
            self._local[name].data = local(param)  # FSDP may have moved it
            self._local[name].grad = None if param.grad is None else local(param.grad)
            param.grad = None
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """The moments as `exp_avg.<name>` and `exp_avg_sq.<name>`, not copied: to save them and to load into them."""
        return {
            f"{key}.{name}": like(self.named[name], self._adamw.state[p][key])
            for key in MOMENTS
            for name, p in self._local.items()
        }

    def set_step_count(self, count: int) -> None:
        """How many updates the moments have seen (bias correction)."""
        for param in self._local.values():
            self._adamw.state[param]["step"].fill_(count)
