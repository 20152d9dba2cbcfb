"""One device per process, a sentence when it cannot be had, and what several processes agree on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wanloom import cli, dist
from wanloom.dist import check_restarts, pick_device
from wanloom.errors import UserError

pytestmark = pytest.mark.slow


def test_the_device_is_what_there_is(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device() == torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "no GPU that torch can use"),
        ("cuda:1", "no GPU"),
        ("tpu9", "There is no device 'tpu9': give cpu, cuda, or one GPU such as cuda:1."),
        ("meta", "'meta'"),
    ],
)
def test_a_device_that_cannot_be_had(name, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        pick_device(name)


ROOT = Path(__file__).parents[1]


def torchrun(*words: str) -> subprocess.CompletedProcess:
    """Two processes that run a script (or `-m` a module), started as a user would."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_two_ranks_agree(tmp_path):
    result = torchrun("tests/two_ranks.py", "agree", str(tmp_path))
    assert result.returncode == 0, result.stderr
    zero, one = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    expected = [{"rank": 0, "text": "ä", "none": None}, {"rank": 1, "text": "ä" * 1001, "none": None}]
    assert zero["gathered"] == one["gathered"] == expected
    assert (zero["in a group"], one["in a group"]) == ([0], [1])
    assert zero["one"] == one["one"] == "On rank 1: no such file"
    assert zero["all"] == one["all"] == "bad"
    assert zero["none"] == one["none"] == "agreed"
    assert zero["system"] == one["system"] == "'x.tar' cannot be used: No such file or directory."
    assert (zero["same"], one["same"]) == (True, False)
    assert (zero["other"], one["other"]) == (True, True), "what rank 0 does not say, another does"


def test_a_mistake_of_all_is_said_once(tmp_path):
    words = ["--mock=1x64x64", f"run_dir={tmp_path / 'run'}", "train.stepz=3"]
    result = torchrun("-m", "wanloom", "train", "tiny", *words)
    said = [line for line in result.stderr.splitlines() if line.startswith("wanloom: ")]
    assert said == ["wanloom: There is no setting 'train.stepz'. Did you mean 'train.steps'?"], result.stderr
    assert result.returncode != 0 and "wanloom/cli" not in result.stderr
    assert result.stderr.count("exitcode  : 2") + result.stderr.count("exitcode  : -15") == 2, result.stderr


def test_ranks_that_torchrun_starts_again_meet_anew(tmp_path):
    """Its store outlives them, with the addresses and the counts of those before."""
    result = torchrun("--max-restarts=1", "tests/two_ranks.py", "come_back", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert sorted(json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)) == [1, 2]


def test_ctrl_c_ends_a_rank_that_waits_for_the_others(monkeypatch):
    """torch waits half an hour, and no handler of Python's is called in that time: the system must end it."""
    met = []

    def wait():
        met.append(signal.getsignal(signal.SIGINT))
        raise UserError("they do not come")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "_open_store", wait)
    with pytest.raises(UserError, match="do not come"), dist.process_group():
        pass
    assert met == [signal.SIG_DFL] and signal.getsignal(signal.SIGINT) == before


def test_several_machines_are_told_what_a_restart_needs(monkeypatch, capsys):
    environment = {"GROUP_WORLD_SIZE": "2", "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for key, value in (environment | {"TORCHELASTIC_MAX_RESTARTS": "3"}).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(cli, "_leave", lambda code: code)
    for rank, count in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["show", "tiny"]) == 2
        assert capsys.readouterr().err.count("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1") == count
    for key, value in (("GROUP_WORLD_SIZE", "1"), ("TORCHELASTIC_MAX_RESTARTS", "0")):
        with monkeypatch.context() as context:
            context.setenv(key, value)
            check_restarts()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    check_restarts()


def test_a_lost_rank_is_a_sentence():
    start = "import sys; from wanloom.cli.launch import run_processes as r; sys.exit(r(2, sys.argv[1:]))"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", start, "tests/two_ranks.py", "lose"]
    result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 7, "that of the rank that died"
    assert result.stderr == "wanloom: rank 0 has lost another rank, which ended or hangs and says why itself.\n"
