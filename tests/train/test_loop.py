"""What the loop makes of a window of steps."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from wanloom.checkpoint.settings import CheckpointConfig
from wanloom.data.loader import Totals
from wanloom.objective.settings import FlowConfig
from wanloom.train import loop
from wanloom.train.loop import Routine, RunState, Settings, Trainer
from wanloom.train.settings import LogConfig, ScheduleConfig, TrainConfig
from wanloom.train.step import Cause, NonFiniteError, StepResult


@pytest.mark.parametrize("ranks", [1, 8])
def test_mfu_is_of_one_gpu_and_tokens_are_of_all(monkeypatch, ranks):
    """In 4 s all ranks did 6.4e15 FLOPs and 200 tokens: 1600 TFLOP/s, over the ranks, over a peak of 1000."""
    monkeypatch.setattr(loop, "world_size", lambda: ranks)
    means = dict.fromkeys(("loss", "weighted_loss", "grad_norm", "packing_efficiency", "balance"), 3.0)
    window = {"steps": 2, "tokens": 200, "flops": 6.4e15, "seconds": 4.0} | means
    settings = Settings(TrainConfig(steps=9), 1e-3, ScheduleConfig(), FlowConfig(), None, LogConfig(), 1000.0)
    parts: Any = SimpleNamespace(mesh=SimpleNamespace(device=torch.device("cpu")))
    none: Any = None
    record = Trainer(parts, settings, RunState(step=2, window=window), [], none, (), none)._record()
    assert record is not None and record["loss"] == 1.5 and record["tokens_per_second"] == 50
    assert record["model_tflops_per_gpu"] == pytest.approx(1600 / ranks)
    assert record["mfu"] == pytest.approx(1.6 / ranks)


def test_a_record_is_of_all_steps_since_the_one_before(monkeypatch):
    """Records every three steps, nine steps of unlike losses, tokens and seconds: means, sums, and nothing twice."""
    losses = [1.0, 2.0, 6.0, 5.0, 5.0, 8.0, 7.0, 7.0, 1.0]
    tokens = [10, 20, 30, 40, 50, 60, 70, 80, 90]
    seconds = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    clock = iter(np.cumsum(seconds, dtype=float))
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    settings = Settings(TrainConfig(steps=9), 1e-3, ScheduleConfig(), FlowConfig(), None, LogConfig(every=3), None)
    parts: Any = SimpleNamespace(mesh=SimpleNamespace(device=torch.device("cpu")))
    none: Any = None
    trainer = Trainer(parts, settings, RunState(), [], none, (), none)
    trainer._tick = 0.0
    records = []
    for loss, count in zip(losses, tokens, strict=True):
        batch: Any = SimpleNamespace(totals=Totals(2, count, count * 1e12, loss / 10, loss + 1))
        trainer._count(batch, StepResult(2 * loss, loss, 3 * loss))
        records.append(trainer._record())
    assert [record is not None for record in records] == [False, False, True] * 3
    for window, record in enumerate(records[2::3]):
        part = slice(3 * window, 3 * window + 3)
        mean = sum(losses[part]) / 3
        assert record is not None and record["step"] == 3 * window + 3
        assert record["loss"] == pytest.approx(mean) and record["weighted_loss"] == pytest.approx(2 * mean)
        assert record["grad_norm"] == pytest.approx(3 * mean)
        assert record["packing_efficiency"] == pytest.approx(mean / 10) and record["balance"] == pytest.approx(mean + 1)
        speed = sum(tokens[part]) / sum(seconds[part])
        assert record["tokens_per_second"] == pytest.approx(speed)
        assert record["model_tflops_per_gpu"] == pytest.approx(speed)
        assert record["samples"] == 6 * (window + 1) and record["tokens"] == sum(tokens[: part.stop])
        assert record["seconds"] == pytest.approx(sum(seconds[: part.stop]))
    assert trainer.state.window == {}


def test_routines_are_called_at_their_steps_and_their_time_is_no_speed(monkeypatch):
    """Two of them, every 2 and every 3 steps; each takes 100 s, of which no record knows."""
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    called: list[tuple[str, int]] = []

    def routine(name: str) -> Any:
        def call(step: int) -> dict[str, float]:
            now[0] += 100.0
            called.append((name, step))
            return {name: 10.0 * step}

        return call

    settings = Settings(TrainConfig(steps=7), 1e-3, ScheduleConfig(), FlowConfig(), None, LogConfig(every=100), None)
    parts: Any = SimpleNamespace(mesh=SimpleNamespace(device=torch.device("cpu")))
    none: Any = None
    routines = (Routine(2, routine("a")), Routine(3, routine("b")))
    trainer = Trainer(parts, settings, RunState(), [], none, (), none, routines)
    trainer._tick, records = 0.0, {}
    for step in range(1, 8):
        now[0] += 1.0
        batch: Any = SimpleNamespace(totals=Totals(1, 10, 1.0, 1.0, 1.0))
        trainer._count(batch, StepResult(1.0, 1.0, 1.0))
        if (record := trainer._record()) is not None:
            records[step] = record
    assert called == [("a", 2), ("b", 3), ("a", 4), ("a", 6), ("b", 6)]
    found = {step: {name: value for name, value in record.items() if name in "ab"} for step, record in records.items()}
    assert found == {2: {"a": 20}, 3: {"b": 30}, 4: {"a": 40}, 6: {"a": 60, "b": 60}, 7: {}}
    assert all(record["tokens_per_second"] == 10 for record in records.values())


def test_the_average_follows_every_update(monkeypatch):
    """First the weights move, at the rate of their step; then the average hears how many updates came before."""
    done: list[tuple[str, float]] = []
    monkeypatch.setattr(loop, "train_step", lambda *_: StepResult(1.0, 1.0, 1.0))
    schedule = ScheduleConfig(kind="linear", warmup_steps=2)
    settings = Settings(TrainConfig(steps=6), 1.0, schedule, FlowConfig(), None, LogConfig())
    optimizer = SimpleNamespace(step=lambda lr: done.append(("weights", lr)))
    average = SimpleNamespace(update=lambda count: done.append(("average", count)))
    parts: Any = SimpleNamespace(model=None, trained={}, mesh=None, optimizer=optimizer, ema=average)
    none: Any = None
    trainer = Trainer(parts, settings, RunState(), [], none, (), none)
    for step in range(4):
        trainer.state.step = step
        trainer._update(none)
    assert [count for what, count in done if what == "average"] == [0, 1, 2, 3]
    assert [what for what, _ in done] == ["weights", "average"] * 4
    assert [rate for what, rate in done if what == "weights"] == [0.5, 1.0, 1.0, 0.75]


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (
            Cause(["head.weight"], []),
            "because 1 of the model's weights were not before it, such as head.weight:",
        ),
        (
            Cause([], ["a", "b"]),
            "because the latents or text states of these samples are not: a, b. The we",
        ),
        (
            Cause([], []),
            "with the samples a, b, c. Weights and samples are finite: it is the computing",
        ),
    ],
)
def test_a_loss_that_is_not_finite_tells_weights_from_samples(cause, words):
    none: Any = None
    checkpointer: Any = SimpleNamespace(describe_last=lambda: "The last whole checkpoint is x.", run_dir=none)
    trainer = Trainer(none, none, RunState(), [], checkpointer, (), none)
    said = str(trainer._explain(NonFiniteError("loss", 6, ["a", "b", "c"], cause)))
    assert said.startswith(f"The loss of step 7 is not finite, {words}") and "The last whole checkpoint is x." in said


def test_minutes_are_counted_from_the_last_save(monkeypatch):
    """Steps of 25 s, a save every minute: after the third step, and then after every third again."""
    seconds = iter(range(0, 10_000, 25))
    now = [float(next(seconds))]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    settings = Settings(TrainConfig(steps=99), 1e-3, ScheduleConfig(), FlowConfig(), None, LogConfig(), None)
    saved: list[int] = []
    checkpointer: Any = SimpleNamespace(
        config=CheckpointConfig(minutes=1), save=lambda step, tensors, state, recipe: saved.append(step)
    )
    parts: Any = SimpleNamespace(facts={}, recipe="", tensors=dict)
    none: Any = None
    trainer = Trainer(parts, settings, RunState(), [], checkpointer, (), none)
    trainer._saved = now[0]
    for _ in range(9):
        now[0] = float(next(seconds))
        trainer.state.step += 1
        if trainer._is_due():
            trainer._save()
    assert saved == [3, 6, 9]
