"""`wanloom train` goes on: after a kill and a stop to the same bits, or it says why not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from train_runs import SMALL, assert_same_bits, losses, words

from wanloom.checkpoint.saved import find_checkpoint, read_state
from wanloom.cli import main
from wanloom.errors import UserError
from wanloom.keys import SCHEME
from wanloom.runs.trained import load_run
from wanloom.train.records import read_metrics

pytestmark = pytest.mark.slow


def write_state(checkpoint: Path, state: dict) -> None:
    """As the version wrote it that had no sums of state.json and run.yaml."""
    older = {key: value for key, value in state.items() if key not in ("crc32", "recipe")}
    (checkpoint / "state.json").write_text(json.dumps(older))


def start(arguments: list[str]) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "wanloom", *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(what, process: subprocess.Popen) -> None:
    """Until `what()`; fails when the process ends before."""
    while not what():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.004)


def test_killed_stopped_and_resumed_it_ends_with_the_same_bits(tmp_path, capfd):
    """SIGKILL while a checkpoint is written, with steps and records past the one before; SIGTERM; then to the end."""
    settings = ["train.steps=30", "checkpoint.every=4", "log.every=3"]
    assert main(words(tmp_path / "whole", *settings)) == 0
    run_dir = tmp_path / "killed"

    process = start(words(run_dir, *settings))
    wait_for(lambda: any(run_dir.glob("checkpoints/step_0000008.partial/*.safetensors")), process)
    process.kill()
    process.communicate()
    left = list(run_dir.glob("checkpoints/*.partial"))
    killed_at = read_state(find_checkpoint(run_dir))["step"]
    assert 4 <= killed_at < read_metrics(run_dir / "metrics.jsonl")[-1]["step"]

    logs = set(run_dir.glob("tensorboard/*"))
    process = start(words(run_dir, *settings))
    # the first record after the start
    wait_for(lambda: any(p.stat().st_size > 250 for p in set(run_dir.glob("tensorboard/*")) - logs), process)
    process.send_signal(signal.SIGTERM)
    out = process.communicate()[0]
    assert process.returncode == 143
    assert not set(left) & set(run_dir.glob("checkpoints/*.partial"))
    assert (
        "Going on from" in out and f"step_{killed_at:07d}" in out and "SIGTERM: finishing this step and saving" in out
    )
    assert "To go on: wanloom train tiny batch.samples=4" in out and "--mock" in out

    stopped = read_state(find_checkpoint(run_dir))["step"]
    assert main(words(run_dir, *settings)) == 0
    assert f"step_{stopped:07d}" in capfd.readouterr().out
    assert_same_bits(run_dir, tmp_path / "whole")
    assert losses(run_dir) == losses(tmp_path / "whole")


def test_what_may_change_and_what_may_not(tmp_path, capsys):
    assert main(words(tmp_path, "train.steps=2")) == 0
    assert main(words(tmp_path, "train.steps=2")) == 0
    assert "is complete at step 2" in capsys.readouterr().out
    assert main(words(tmp_path, "train.steps=3", "optimizer.lr=1", "seed=4", "log.every=7")) == 2
    error = capsys.readouterr().err
    assert (
        "started with other settings: optimizer.lr was 0.002, now 1.0; seed was 0, now 4." in error
        and "log.every" not in error.split(".")[0]
    )
    assert main(["train", "tiny", "--mock=1x64x64", f"run_dir={tmp_path}", *SMALL[2:], "train.steps=3"]) == 2
    assert "The training data is not what" in capsys.readouterr().err
    changed = ["train.steps=3", "batch.tokens_per_pack=99", "checkpoint.keep=1", "log.every=1"]
    assert main(words(tmp_path, *changed)) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "step 3/3" in out and "step_0000002, with other settings: batch.tokens_per_pack was" in out
    assert "train.steps was 2, now 3." in out and "the next checkpoint comes after the last step" in out


def test_a_run_of_before_a_setting_was_added_goes_on(tmp_path, capsys):
    """Old files lack the new names; what they say of all others must still be the same."""
    assert main(words(tmp_path, "train.steps=2")) == 0
    checkpoint = find_checkpoint(tmp_path)
    recipe, state = yaml.safe_load((checkpoint / "run.yaml").read_text()), read_state(checkpoint)
    del recipe["optimizer"]["eps"], recipe["flow"]["shift_tokens"], recipe["compute"]["kernel"], state["window"]
    (checkpoint / "run.yaml").write_text(yaml.safe_dump(recipe))
    write_state(checkpoint, state)
    assert main(words(tmp_path, "train.steps=3", "optimizer.eps=1e-7")) == 2
    error = capsys.readouterr().err
    assert "started with other settings: optimizer.eps was 1e-08, now 1e-07." in error and "checkpoint.*" in error
    write_state(checkpoint, state | {"data": "0" * 32})  # before it had the text's lengths
    assert main(words(tmp_path, "train.steps=3")) == 2
    assert "started by another version of wanloom, which recorded its data" in capsys.readouterr().err
    write_state(checkpoint, state)
    assert main(words(tmp_path, "train.steps=3")) == 0
    newest = find_checkpoint(tmp_path)
    with (newest / "run.yaml").open("a") as file:
        file.write("old_name: 3\nrecompute: none\n")
    assert main(words(tmp_path, "train.steps=4")) == 2
    assert f"The checkpoint {newest} is damaged: run.yaml has " in capsys.readouterr().err
    write_state(newest, state | json.loads((newest / "state.json").read_text()))
    assert main(words(tmp_path, "train.steps=4")) == 2
    error = capsys.readouterr().err
    assert "run.yaml cannot be read: There is no setting 'old_name'" in error
    assert "There is no setting 'recompute'. It is now 'compute.recompute'." in error
    assert f"start a new run from its weights: init={newest} run_dir=ANOTHER." in error
    with pytest.raises(UserError, match=r"It is now 'compute\.recompute'"):
        load_run(tmp_path)
    assert main(words(tmp_path / "anew", f"init={newest}", "train.steps=1")) == 0


def test_another_number_of_threads_is_noted(tmp_path, capsys):
    """It rounds sums otherwise: the bits are those of a run that was never stopped with the same threads only."""
    assert main(words(tmp_path, "train.steps=1")) == 0
    assert " on cpu with 1 thread in fp32" in capsys.readouterr().out
    assert main(words(tmp_path, "train.steps=2")) == 0
    assert "note: the number" not in capsys.readouterr().out
    torch.set_num_threads(2)
    try:
        assert main(words(tmp_path, "train.steps=3")) == 0
    finally:
        torch.set_num_threads(1)
    out = capsys.readouterr().out
    assert " on cpu with 2 threads in fp32" in out and "note: the number of threads was 1 and is 2" in out
    assert read_state(find_checkpoint(tmp_path))["threads"] == 2


@pytest.mark.parametrize("draws", [None, "torch's"])
def test_a_run_of_other_draws_does_not_go_on(tmp_path, capsys, draws):
    """The first version had torch's generator and said nothing of it: half a run of each is neither."""
    assert main(words(tmp_path, "train.steps=1")) == 0
    checkpoint = find_checkpoint(tmp_path)
    state = read_state(checkpoint)
    assert state["draws"] == SCHEME
    state["draws"] = draws
    write_state(checkpoint, {key: value for key, value in state.items() if value})
    assert main(words(tmp_path, "train.steps=2")) == 2
    assert "another version of wanloom, which drew other noise for the same seed" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named_and_not_skipped(tmp_path, capsys):
    assert main(words(tmp_path, "train.steps=2", "checkpoint.every=1")) == 0
    file = next(find_checkpoint(tmp_path).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    assert main(words(tmp_path, "train.steps=3")) == 2
    error = capsys.readouterr().err
    assert f"{file.name} has" in error and "step_0000001, is whole" in error
