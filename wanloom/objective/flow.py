"""Flow matching: how noise levels are drawn, what the model is asked for, and the loss as sums.

In: keyed uniforms, velocities and targets of a pack. Out: noise levels, the noisy latents and velocity target, the
loss as (weighted sum, plain sum). The one decision: a loss is a sum, divided once by the count of the
whole step, so the packing and the number of ranks do not change it. Every sampler is the inverse of a distribution
function applied to one uniform, so that stratifying that uniform over the step stratifies every sampler.
Rectified flow: Liu et al. 2022; logit-normal, mode and shift: Esser et al. 2024 (SD3).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from wanloom.objective.settings import FlowConfig


@dataclass(frozen=True)
class FlowLoss:
    """Sums over the elements of a pack, fp32 scalars."""

    weighted_sum: Tensor
    plain_sum: Tensor


def sample_sigma(config: FlowConfig, uniforms: Sequence[float], num_tokens: int) -> float:
    """The noise level in [0, 1] for two uniforms in [0, 1): one for the level, one for `mix_uniform_ratio`."""
    level, mix = uniforms
    u = level if mix < config.mix_uniform_ratio else _quantile(config, level)
    shift = config.shift
    if config.shift_tokens is not None:
        shift *= math.sqrt(num_tokens / config.shift_tokens)
    return shift * u / (1 + (shift - 1) * u)


def stratify(level: float, place: int, num_samples: int) -> float:
    """The uniform of the sample at `place` of a step, moved into the `place`-th of `num_samples` equal parts."""
    return (place + level) / num_samples


def _quantile(config: FlowConfig, u: float) -> float:
    if config.sampler == "uniform":
        return u
    if config.sampler == "logit_normal":
        z = NormalDist(config.logit_mean, config.logit_std).inv_cdf(min(max(u, 2**-53), 1 - 2**-53))
        return 1 / (1 + math.exp(-z))
    if config.sampler == "mode":
        # SD3's formula falls with u; 1 - u makes it rise like every other quantile
        v = 1 - u
        return min(max(1 - v - config.mode_scale * (math.cos(math.pi / 2 * v) ** 2 - 1 + v), 0.0), 1.0)
    values, distribution = _beta_table(config.beta_alpha, config.beta_beta)
    return float(np.interp(u, distribution, values))


@lru_cache(maxsize=4)
def _beta_table(alpha: float, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Values and distribution function of Beta(alpha, beta)."""
    # over x = sin^2(angle) the density is finite at both ends
    angle = np.linspace(0, np.pi / 2, 8193)
    density = np.sin(angle) ** (2 * alpha - 1) * np.cos(angle) ** (2 * beta - 1)
    mass = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    return np.sin(angle) ** 2, mass / mass[-1]


def noisy_and_velocity(clean: Tensor, noise: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """`(1 - sigma) * clean + sigma * noise` and the target `noise - clean`, both fp32."""
    return (1 - sigma) * clean + sigma * noise, noise - clean


def loss_weight(config: FlowConfig, sigma: Tensor) -> Tensor:
    """Weight of a sample in the loss, in the shape of `sigma`."""
    return 1 + config.shift * sigma if config.weighting == "linear" else torch.ones_like(sigma)


def flow_loss(velocity: Tensor, target: Tensor, sigma: Tensor, lens: Sequence[int], config: FlowConfig) -> FlowLoss:
    """Squared error of the velocity `(T, C)` of a pack with segments of `lens` tokens and noise levels `sigma (M,)`.

    A segment at level 0 is known: it counts in no sum, as its target is noise that the model cannot see.
    """
    error = (velocity.float() - target.float()).square().sum(dim=-1)
    counts = (sigma > 0).float()
    table = torch.stack([counts * loss_weight(config, sigma.float()), counts])
    # by host lengths: repeat_interleave with a device tensor of counts would wait for the device
    weight, count = torch.cat([w[:, None].expand(2, n) for w, n in zip(table.T, lens, strict=True)], dim=1)
    return FlowLoss((error * weight).sum(), (error.detach() * count).sum())
