"""Checkpoints of many ranks: any layout reads what any other wrote, and one rank's failure is the run's."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoint_ranks import SHAPES, STATE, begin_run, full
from saved_weights import load_weights

from wanloom.checkpoint.saved import find_checkpoint, list_checkpoints
from wanloom.checkpoint.settings import CheckpointConfig
from wanloom.checkpoint.writer import Checkpointer, load_tensors

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("checkpoint_ranks.py")
RANKS, TIMEOUT = 4, 150  # seconds, on a machine that does other things too


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What four ranks leave behind that have gone through all cases; two of them were killed at the end."""
    folder = tmp_path_factory.mktemp("ranks")
    begin_run(folder / "begun")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    logs = [folder / f"log-{rank}" for rank in range(RANKS)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            words = [sys.executable, "-W", "error", str(SCRIPT), str(rank), str(folder)]
            processes.append(subprocess.Popen(words, env=environment, stdout=file, stderr=file))
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)
    codes = [process.poll() for process in processes]
    for process in processes:
        process.kill()
        process.wait()
    texts = "\n".join(f"--- {log.name}\n{log.read_text()}" for log in logs)
    assert codes == [0, -signal.SIGKILL, -signal.SIGKILL, 0], texts
    return folder


@pytest.mark.parametrize("name", ["fsdp", "fsdp3", "hsdp", "fsdp_tp", "tp", "pp"])
def test_one_process_reads_what_many_ranks_wrote(folder, name):
    checkpoint = find_checkpoint(folder / name)
    weights = {name: full(name) for name in (*SHAPES, "scalar")}
    config, loaded = load_weights(checkpoint, ema=False)
    assert config.model_dump() == STATE["model"] and loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    average = load_weights(checkpoint, ema=True)[1]
    assert average.keys() == SHAPES.keys()
    assert all(torch.equal(average[name], -2 * weights[name]) for name in SHAPES)


@pytest.mark.parametrize("name", ["kill-0", "kill-1"])
def test_a_kill_of_one_rank_leaves_the_last_whole_checkpoint(folder, name):
    run_dir = folder / name
    partial = run_dir / "checkpoints" / "step_0000002.partial"
    assert len(list(partial.glob("*.safetensors"))) == 2 and not (partial / "state.json").exists()
    assert [path.name for path in list_checkpoints(run_dir)] == ["step_0000001"]
    tensors = {f"model.{name}": torch.zeros(shape) for name, shape in SHAPES.items()}
    load_tensors(find_checkpoint(run_dir), tensors)
    assert all(torch.equal(tensors[f"model.{name}"], full(name)) for name in SHAPES)
    checkpointer = Checkpointer(run_dir, CheckpointConfig())
    checkpointer.close()
    assert checkpointer.last == find_checkpoint(run_dir) and not partial.exists()
