"""The text of a pack: which of its states are keys, and their projection.

The model attends to as many slots as its config says, of which the unused are zero before the projection and so all
equal after it. n equal keys weigh in the softmax as one whose logit is larger by log(n): one key stands for them all.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wanloom.model.layers import Linear


class TextRows(NamedTuple):
    """The text keys of a pack: rows of its text states, of which one past the end stands for zeros."""

    rows: list[int]  # (S,)
    bias: list[float]  # (S,) added to the logits of each key
    lens: tuple[int, ...]  # keys of each sample


def fold_text(text_lens: Sequence[int], slots: int) -> TextRows:
    """Which text states are keys. Raises ValueError for a caption longer than the slots."""
    if max(text_lens) > slots:
        raise ValueError(f"a caption has {max(text_lens)} text states, the model has {slots} slots")
    rows, bias, first, zero_row = [], [], 0, sum(text_lens)
    for length in text_lens:
        rows += range(first, first + length)
        bias += [0.0] * length
        if length < slots:
            rows.append(zero_row)
            bias.append(math.log(slots - length))
        first += length
    return TextRows(rows, bias, tuple(length + (length < slots) for length in text_lens))


class TextEmbedding(nn.Sequential):
    """Text states to the width of the model."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__(Linear(text_dim, dim), nn.GELU(approximate="tanh"), Linear(dim, dim))

    def embed(self, text: Tensor, rows: list[int], dtype: torch.dtype) -> Tensor:
        """Text states `(L, text_dim)` -> the projected text `(S, dim)` of `rows`, as `fold_text` names them."""
        text = torch.cat([text, text.new_zeros(1, text.shape[1])]).to(dtype)
        return self(text).index_select(0, torch.tensor(rows, device=text.device))
