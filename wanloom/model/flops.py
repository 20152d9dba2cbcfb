"""Model FLOPs per sample, in the convention of the published numbers.

In: a config and the number of video tokens of one sample. Out: floating-point operations, a multiply-add being two.
The one decision: it counts the model, not the machine: attention full and unmasked, all 512 text slots whether folded
or not, backward twice forward but for the gradients of frozen weights, nothing for recomputation. So tokens/s times
these FLOPs compares with what other trainers of Wan publish (165.9 GFLOP per token for the 14B at 37,440 tokens).
Modulation, norms and gates are below 0.1% and left out.
"""

from collections.abc import Collection
from typing import NamedTuple

from wanloom.model.dit import PATCH_SIZE, on_meta
from wanloom.model.settings import DiTConfig


class FrozenSizes(NamedTuple):
    """Numbers of weights that are not trained, by what they are multiplied with."""

    video: int  # each token of the video
    text: int  # each slot of the text
    sample: int  # the noise level, once for a sample


NOTHING_FROZEN = FrozenSizes(0, 0, 0)


def forward_flops(config: DiTConfig, video_tokens: int, text_slots: int = 512) -> int:
    """FLOPs of one forward pass over one sample; `text_slots` is the number of text keys, 512 by convention."""
    d, f, s, t = config.dim, config.ffn_dim, video_tokens, text_slots
    linears = 2 * s * (6 * d * d + 2 * d * f) + 2 * t * 2 * d * d  # video tokens; then keys and values of the text
    attention = 4 * s * s * d + 4 * s * t * d
    tokens = 2 * s * PATCH_SIZE * (config.in_channels + config.out_channels) * d
    text = 2 * t * (config.text_dim * d + d * d)
    time = 2 * (config.freq_dim * d + 7 * d * d)
    return config.num_layers * (linears + attention) + tokens + text + time


def train_flops(
    config: DiTConfig, video_tokens: int, text_slots: int = 512, frozen: FrozenSizes = NOTHING_FROZEN
) -> int:
    """FLOPs of forward and backward over one sample; the gradient of what is `frozen` is not computed."""
    products = video_tokens * frozen.video + text_slots * frozen.text + frozen.sample
    return 3 * forward_flops(config, video_tokens, text_slots) - 2 * products


def count_frozen(config: DiTConfig, trained: Collection[str] | None) -> FrozenSizes:
    """The matrices that are not among the `trained` parameters, by default none, by what they are multiplied with."""
    sizes = dict.fromkeys(FrozenSizes._fields, 0)
    for name, param in on_meta(config).named_parameters():
        if trained is not None and name not in trained and param.dim() == 2 and "modulation" not in name:
            of_text = name.startswith("text_embedding") or "cross_attn.k." in name or "cross_attn.v." in name
            sizes["text" if of_text else "sample" if name.startswith("time_") else "video"] += param.numel()
    return FrozenSizes(**sizes)
