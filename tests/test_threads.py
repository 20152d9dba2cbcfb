"""Threads of the CPU: they sleep while they wait, and how many there are is written down."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wanloom.prepare.settings import PrepareConfig
from wanloom.threads import count_cores

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(("given", "found"), [({}, "0"), ({"GOMP_SPINCOUNT": "1234"}, "1234")])
@pytest.mark.skipif(sys.platform != "linux", reason="OMP_DISPLAY_ENV is of the OpenMP of torch's Linux builds")
def test_threads_sleep_while_they_wait_unless_asked_otherwise(given, found):
    """Told by OpenMP itself, when torch is imported after the command line has looked at the environment."""
    env = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | given
    env |= {"OMP_DISPLAY_ENV": "VERBOSE"}
    code = "import sys, wanloom.cli; code = wanloom.cli.main(['no-such-command']); import torch; sys.exit(code - 2)"
    result = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and f"GOMP_SPINCOUNT = '{found}'" in result.stderr


@pytest.mark.parametrize(("cores", "local", "workers"), [(2, "1", 1), (9, "1", 4), (64, "1", 8), (64, "16", 2)])
def test_workers_are_counted_by_the_cores_that_may_be_used(monkeypatch, cores, local, workers):
    """A container or taskset gives some of the machine's cores, and os.cpu_count tells all of them."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert count_cores() == cores and PrepareConfig().workers == workers
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert count_cores() == 1000
