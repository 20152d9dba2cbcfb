"""Checkpoints of a few small tensors."""

import torch

from wanloom.checkpoint.settings import CheckpointConfig
from wanloom.checkpoint.writer import Checkpointer
from wanloom.model.settings import DiTConfig

CONFIG = DiTConfig(dim=8, ffn_dim=8, num_heads=1, num_layers=1)


def build_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    names = [f"{kind}.{name}" for kind in ("model", "ema", "optimizer.exp_avg") for name in ("a.weight", "b")]
    return {name: torch.randn(9, 5, generator=g) if "a" in name else torch.randn(7, generator=g) for name in names}


def save_steps(run, steps, keep=5, tensors=None) -> None:
    checkpointer = Checkpointer(run, CheckpointConfig(every=1, keep=keep))
    for step in steps:
        state = {"step": step, "model": CONFIG.model_dump()}
        checkpointer.save(step, tensors or build_tensors(step), state, f"seed: {step}\n")
    checkpointer.wait()
    checkpointer.close()
