"""What a checkpoint holds, whatever model it is of."""

from pathlib import Path

import torch
from torch import Tensor

from wanloom.checkpoint.pieces import StoredPieces
from wanloom.checkpoint.saved import read_state
from wanloom.checkpoint.writer import load_tensors
from wanloom.config import build_config
from wanloom.model.settings import DiTConfig


def stored(checkpoint: Path) -> dict[str, Tensor]:
    """All of its tensors. Raises UserError for damage."""
    load_tensors(checkpoint, {})
    entries = StoredPieces(checkpoint).tensors.items()
    found = {name: torch.full(entry.size, torch.nan).to(entry.properties.dtype) for name, entry in entries}
    load_tensors(checkpoint, found)
    return found


def load_weights(checkpoint: Path, ema: bool) -> tuple[DiTConfig, dict[str, Tensor]]:
    """The model's config and its weights by parameter name, or their average."""
    prefix = "ema." if ema else "model."
    tensors = stored(checkpoint).items()
    weights = {name.removeprefix(prefix): tensor for name, tensor in tensors if name.startswith(prefix)}
    return build_config(DiTConfig, read_state(checkpoint)["model"]), weights
