"""`wanloom train` where disk, data, memory or numbers fail: no step is lost, and the reason is said."""

import json
import os
import resource
import sys

import pytest
from saved_weights import load_weights
from train_runs import SMALL, assert_same_bits, words, write_data

from wanloom import memory
from wanloom.checkpoint.saved import find_checkpoint, list_checkpoints
from wanloom.cli import main
from wanloom.runs import build, train
from wanloom.train import loop
from wanloom.train.loop import Trainer

pytestmark = pytest.mark.slow


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(tmp_path, capsys):
    assert main(words(tmp_path, "train.steps=2")) == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        code = main(words(tmp_path, "train.steps=50", "checkpoint.every=1"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert code == 2
    assert "The checkpoint of step 3 could not be written: File too large." in error
    assert "The last whole checkpoint is" in error and "step_0000002" in error
    assert main(words(tmp_path, "train.steps=3")) == 0
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_0000002", "step_0000003"]


def at_step(monkeypatch, step: int, action) -> None:
    """Do something between two steps of a run."""
    report = Trainer._report

    def report_and_act(self, record) -> None:
        report(self, record)
        if self.state.step == step:
            action()

    monkeypatch.setattr(Trainer, "_report", report_and_act)


@pytest.mark.parametrize("split", ["train", "val"])
def test_data_that_vanishes_costs_no_step(tmp_path, monkeypatch, capsys, split):
    data, run_dir = tmp_path / "data", tmp_path / "run"
    write_data(data)
    write_data(data, "val")
    settings = [f"data.path={data}", "checkpoint.every=100", "caption_dropout=0", "log.validate_every=2"]
    command = ["train", *SMALL[:1], *SMALL[2:], *settings, "train.steps=12"]
    at_step(monkeypatch, 3, lambda: (data / split).rename(tmp_path / "away"))
    assert main([*command, f"run_dir={run_dir}"]) == 2
    error = capsys.readouterr().err
    step = find_checkpoint(run_dir)
    assert f"in {data}/{split}/shard-000000.tar cannot be read" in error
    assert f"was saved before the run ended: {step}." in error and error.count("\n") == 1
    assert int(step.name.removeprefix("step_")) >= 3
    (tmp_path / "away").rename(data / split)
    monkeypatch.undo()
    for folder in (run_dir, tmp_path / "whole"):
        assert main([*command, f"run_dir={folder}"]) == 0
    assert_same_bits(run_dir, tmp_path / "whole")


def test_a_run_folder_that_vanishes_costs_no_step(tmp_path, monkeypatch, capsys):
    run_dir, settings = tmp_path / "run", ["train.steps=8", "checkpoint.every=100"]
    at_step(monkeypatch, 3, lambda: run_dir.rename(tmp_path / "moved"))
    assert main(words(run_dir, *settings)) == 2
    error = capsys.readouterr().err
    assert f"{run_dir}/metrics.jsonl is no longer there: it was moved or deleted while the run went on." in error
    assert f"Step 4 was saved before the run ended: {run_dir}/checkpoints/step_0000004." in error
    monkeypatch.undo()
    assert main(words(run_dir, *settings)) == 0
    assert main(words(tmp_path / "whole", *settings)) == 0
    assert_same_bits(run_dir, tmp_path / "whole")


def test_a_log_that_nobody_reads_any_more_costs_no_step(tmp_path, monkeypatch, capsys):
    """As below `| head -1`."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream, monkeypatch.context() as context:
        context.setattr(sys, "stdout", stream)
        at_step(context, 3, lambda: os.close(reader))
        assert main(words(tmp_path, "train.steps=8", "checkpoint.every=100")) == 2
    assert "no longer be printed (Broken pipe), so it saved step 5 and ended." in capsys.readouterr().err
    assert find_checkpoint(tmp_path).name == "step_0000005"


@pytest.mark.parametrize("place", ["train_step", "build_batch"])
def test_a_step_that_memory_does_not_suffice_for_costs_none(tmp_path, monkeypatch, capsys, place):
    """In the passes over the model, and where samples are read; what torch says is its own sentence."""
    module = loop if place == "train_step" else build
    original, number = getattr(module, place), []

    def fail(*words, **options):
        number.append(1)
        if len(number) == 4:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return original(*words, **options)

    monkeypatch.setattr(module, place, fail)
    assert main(words(tmp_path, "train.steps=9", "checkpoint.every=100")) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "wanloom: The memory of this machine is not enough to take step 4. What helps, the best first:"
    )
    assert "compute.recompute=full (about 0.0 GiB less)" in error and error.count("\n") == 1
    assert f"Step 3 was saved before the run ended: {tmp_path}/checkpoints/step_0000003." in error
    monkeypatch.undo()
    assert main(words(tmp_path, "train.steps=4")) == 0


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(tmp_path, tiny_pipeline, monkeypatch, capsys):
    """The 14B on a CPU: 266 GiB for its states, and 213 GiB for the copies of a checkpoint."""
    folder = tmp_path / "model" / "transformer"
    folder.mkdir(parents=True)
    config = json.loads((tiny_pipeline / "transformer" / "config.json").read_text())
    config |= {"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 450 << 30)
    monkeypatch.setattr(train, "build_parts", None)
    run_dir, model = tmp_path / "run", f"model={tmp_path / 'model'}"
    assert main([*words(run_dir, "train.steps=1"), model]) == 2
    error = capsys.readouterr().err
    assert "is not enough to train " in error and ", which takes at least 4" in error and " of 450 GiB. What h" in error
    assert not (run_dir / "run.yaml").exists()


def test_a_run_that_diverges_stops_before_the_weights_are_harmed(tmp_path, capsys):
    settings = ["train.steps=9", "optimizer.lr=1e37", "checkpoint.every=1", "schedule.warmup_steps=0"]
    assert main(words(tmp_path, *settings)) == 2
    error = capsys.readouterr().err
    assert "of step 2 is not finite, with the samples mock-0" in error
    assert "last whole checkpoint is" in error and "step_0000001" in error
    _, weights = load_weights(find_checkpoint(tmp_path), ema=False)
    assert all(w.isfinite().all() for w in weights.values())
