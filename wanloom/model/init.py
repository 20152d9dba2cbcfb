"""The weights of a new model."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from wanloom.keys import keyed_normal, keyed_uniform
from wanloom.model.dit import PATCH_SIZE, WanDiT

Fill = Callable[[Tensor, Tensor], object]  # sets a parameter, or the part of it that is here, from all of its values


@torch.no_grad()
def init_weights(model: WanDiT, seed: int, fill: Fill = Tensor.copy_) -> None:
    """Random weights in the original's way, in place; each parameter's draws depend on its name and the seed alone.

    Linears Xavier-uniform with zero bias; text and time embedding N(0, 0.02); tables N(0, 1/dim); the head zero, so
    that a new model's velocity is zero; the patch embedding's bias is a convolution's, uniform in +-1/sqrt(fan in).
    `fill(parameter, values)` sets a parameter of which there may be a part here.
    """
    for name, param in model.named_parameters():
        shape, key = tuple(param.shape), (seed, "init", name)
        if "norm" in name:
            value = torch.full(shape, float(name.endswith("weight")))
        elif "modulation" in name:
            value = keyed_normal(shape, *key).mul_(shape[-1] ** -0.5)
        elif name == "patch_embedding.bias":
            value = _draw_within((model.config.in_channels * PATCH_SIZE) ** -0.5, shape, key)
        elif name.endswith("bias") or name == "head.head.weight":
            value = torch.zeros(shape)
        elif name.startswith(("text_embedding", "time_embedding")):
            value = keyed_normal(shape, *key).mul_(0.02)
        else:
            value = _draw_within(math.sqrt(6 / (shape[0] + shape[1])), shape, key)  # Xavier
        fill(param, value)


def _draw_within(bound: float, shape: tuple[int, ...], key: tuple[str | int, ...]) -> Tensor:
    """Uniform in +-bound, fp32."""
    return keyed_uniform(shape, *key).mul_(2 * bound).sub_(bound)
