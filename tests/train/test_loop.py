"""What the loop makes of a window of steps."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wanloom.objective.flow import FlowConfig
from wanloom.train import loop
from wanloom.train.loop import RunState, Settings, TrainConfig, Trainer
from wanloom.train.metrics import LogConfig
from wanloom.train.optim import ScheduleConfig


@pytest.mark.parametrize("ranks", [1, 8])
def test_mfu_is_of_one_gpu_and_tokens_are_of_all(monkeypatch, ranks):
    """In 4 s all ranks did 6.4e15 FLOPs and 200 tokens: 1600 TFLOP/s, over the ranks, over a peak of 1000."""
    monkeypatch.setattr(loop, "world_size", lambda: ranks)
    means = dict.fromkeys(("loss", "weighted_loss", "grad_norm", "packing_efficiency", "balance"), 3.0)
    window = {"steps": 2, "tokens": 200, "flops": 6.4e15, "seconds": 4.0} | means
    settings = Settings(TrainConfig(steps=9), 1e-3, ScheduleConfig(), FlowConfig(), None, LogConfig(), 1000.0)
    parts: Any = SimpleNamespace(validate=None, mesh=SimpleNamespace(device=torch.device("cpu")))
    none: Any = None
    record = Trainer(parts, settings, RunState(step=2, window=window), [], none, None, none)._record()
    assert record is not None and record["loss"] == 1.5 and record["tokens_per_second"] == 50
    assert record["model_tflops_per_gpu"] == pytest.approx(1600 / ranks)
    assert record["mfu"] == pytest.approx(1.6 / ranks)
