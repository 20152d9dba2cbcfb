"""Threads of the CPU: they sleep while they wait, and how many there are is written down."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("given", "found"), [({}, "0"), ({"GOMP_SPINCOUNT": "1234"}, "1234")])
@pytest.mark.skipif(sys.platform != "linux", reason="OMP_DISPLAY_ENV is of the OpenMP of torch's Linux builds")
def test_threads_sleep_while_they_wait_unless_asked_otherwise(given, found):
    """Told by OpenMP itself, when a command has imported torch."""
    env = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | given
    env |= {"OMP_DISPLAY_ENV": "VERBOSE"}
    command = [sys.executable, "-m", "wanloom", "show", "tiny"]
    result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and f"GOMP_SPINCOUNT = '{found}'" in result.stderr
