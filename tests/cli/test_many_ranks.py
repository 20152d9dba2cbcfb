"""`wanloom train` as several processes: one is killed, hangs or has a full disk, and the run goes on, on fewer too."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from wanloom.checkpoint.saved import list_checkpoints
from wanloom.cli import main
from wanloom.train.records import read_metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
WORDS = ["train", "tiny", "--mock=1x64x64,9x32x32,5x48x32", "batch.samples=4", "batch.tokens_per_pack=40"]
WORDS += ["ema.decay=0.9", "log.every=1", "checkpoint.every=3"]
# the rank of argv[1] writes its second checkpoint to a disk that is full
FULL = """
import os, resource, sys
from wanloom.cli import main
from wanloom.checkpoint import writer
write, limits = writer.write_pieces, [resource.RLIM_INFINITY, 1000]
def write_pieces(*words):
    if os.environ["RANK"] == sys.argv[1]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.pop(0), resource.RLIM_INFINITY))
    return write(*words)
writer.write_pieces = write_pieces
sys.exit(main(sys.argv[2:]))
"""
# and here it stands still instead; what waits for it in training gives up after seconds
HANG = """
import os, signal, sys
from datetime import timedelta
from wanloom import dist
from wanloom.cli import main
from wanloom.checkpoint import writer
dist.TIMEOUT = timedelta(seconds=10)
write, number = writer.write_pieces, []
def write_pieces(*words):
    number.append(1)
    if len(number) == 2 and os.environ["RANK"] == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGSTOP)
    return write(*words)
writer.write_pieces = write_pieces
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def ranks():
    """Starts the ranks of a run without a launcher, the store on rank 0; what is left of them is killed at the end."""
    started = []

    def begin(count: int, *words: str) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "PYTHONPATH": str(ROOT)}
        for rank in map(str, range(count)):
            command = [sys.executable, *words]
            of_rank = env | {"RANK": rank, "LOCAL_RANK": rank}
            started.append(
                subprocess.Popen(command, env=of_rank, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        return started[-count:]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def ends(processes: list[subprocess.Popen]) -> tuple[list[int], str]:
    """Exit codes, and what all have said on stderr."""
    said = [process.communicate(timeout=120)[1] for process in processes]
    return [process.returncode for process in processes], "".join(said)


def test_a_killed_process_changes_no_bit(tmp_path, monkeypatch):
    """The short form of tools/soak.py."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("RANK", raising=False)
    command = [sys.executable, "tools/soak.py", str(tmp_path), "--kills=1", "--steps=18", "--seed=1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    log = tmp_path / "killed.log"
    assert result.returncode == 0, result.stdout + result.stderr + (log.read_text() if log.exists() else "")
    assert "1 kills, 1 restarts, 18 steps on 2 processes" in result.stdout
    assert "Weights, moments, average, records: the same bits." in result.stdout
    assert "Going on from " in log.read_text(), "it was killed after a checkpoint"


def test_a_full_disk_of_one_rank_stops_all_and_fewer_go_on(ranks, tmp_path):
    words = [*WORDS, "train.steps=12"]
    assert main([*words, f"run_dir={tmp_path / 'one'}"]) == 0
    run_dir = tmp_path / "many"
    codes, said = ends(ranks(2, "-c", FULL, "1", *words, f"run_dir={run_dir}"))
    assert codes == [2, 2] and said.count("\n") == 1, said
    assert said.startswith("wanloom: The checkpoint of step 6 could not be written: On rank 1: File too large."), said
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_0000003"]
    assert main([*words, f"run_dir={run_dir}"]) == 0
    records = [read_metrics(path / "metrics.jsonl") for path in (run_dir, tmp_path / "one")]
    assert [r["step"] for r in records[0]] == list(range(1, 13))
    for got, wanted in zip(*records, strict=True):
        for key in ("loss", "weighted_loss", "grad_norm"):
            assert got[key] == pytest.approx(wanted[key], rel=1e-5), (got["step"], key)
        # the first three steps stayed those of two ranks
        per_token = [r["model_tflops_per_gpu"] / r["tokens_per_second"] for r in (got, wanted)]
        assert per_token[0] * (2 if got["step"] <= 3 else 1) == pytest.approx(per_token[1], rel=1e-6)


def test_a_rank_that_hangs_is_not_waited_for_by_the_save(ranks, tmp_path):
    """The exchanges of a save have hours, those of training minutes."""
    first, second = ranks(2, "-c", HANG, "1", *WORDS, "train.steps=100000", f"run_dir={tmp_path}")
    code, said = ends([first])
    assert code == [1]
    assert said == "wanloom: rank 0 has lost another rank, which ended or hangs and says why itself.\n"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_0000003"]
    assert second.poll() is None, "it is left to the launcher"


def test_what_may_not_change_is_said_once(ranks, tmp_path, tiny_pipeline):
    """Other settings, and another model under the old name."""
    transformer = tmp_path / "model" / "transformer"
    transformer.mkdir(parents=True)
    config = json.loads((tiny_pipeline / "transformer" / "config.json").read_text())
    (transformer / "config.json").write_text(json.dumps(config))
    words = [*WORDS, f"run_dir={tmp_path / 'run'}", f"model={tmp_path / 'model'}", "train.steps=1"]
    assert main(words) == 0
    words = ["-m", "wanloom", *words[:-1], "train.steps=2"]
    others = ranks(2, *words, "optimizer.lr=1", "parallel.cp=2", "seed=3")
    codes, said = ends(others)
    assert codes == [2, 2] and said.count("\n") == 1, said
    assert "was started with other settings: optimizer.lr was" in said
    assert "(What may change: run_dir, train.steps, " in said and "parallel.*" in said
    (transformer / "config.json").write_text((transformer / "config.json").read_text().replace("256", "128"))
    codes, said = ends(ranks(2, *words))
    assert codes == [2, 2] and said.count("\n") == 1, said
    assert "step_0000001 does not fit this model: " in said
