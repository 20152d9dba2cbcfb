"""A process of a run is killed, and the run ends as if it had not been: the short form of tools/soak.py."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_killed_process_changes_no_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("RANK", raising=False)
    command = [sys.executable, "tools/soak.py", str(tmp_path), "--kills=1", "--steps=18", "--seed=1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    log = tmp_path / "killed.log"
    assert result.returncode == 0, result.stdout + result.stderr + (log.read_text() if log.exists() else "")
    assert "1 kills, 1 restarts, 18 steps on 2 processes" in result.stdout
    assert "Weights, moments, average, records: the same bits." in result.stdout
    assert "Going on from " in log.read_text(), "it was killed after a checkpoint"
