"""How fast the tiny recipe trains on CPU cores that other processes use too, by how OpenMP's threads wait.

In: seconds of a turn, numbers of busy processes. Out: a table of tokens/s, the median over the rounds. The one
decision: the settings take turns (A B C A B C), each a fresh `wanloom train`, so that load that comes and goes meets
all of them; a turn's number is the median of its steps.

    .venv/bin/python tools/shared_cores.py --busy 0 1 2 --rounds 3
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

SETTINGS = {
    "threads spin, torch's default": {"GOMP_SPINCOUNT": "300000"},
    "threads sleep, wanloom's default": {},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
UNSET = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
WAIT = 60  # seconds for the first steps, libraries and all
WARM = 3  # steps that do not count
TASK = ["train", "tiny", "--mock", "17x64x64", "train.steps=1000000", "checkpoint.every=1000000", "log.every=1"]


def train(environment: dict[str, str], seconds: float) -> float:
    """Tokens per second of a run of that many seconds from its first steps on."""
    kept = {key: value for key, value in os.environ.items() if key not in UNSET}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "wanloom", *TASK, f"run_dir={folder}"]
        process = subprocess.Popen(command, env=kept | environment, stdout=subprocess.DEVNULL)
        try:
            metrics, end = Path(folder) / "metrics.jsonl", time.monotonic() + WAIT
            while count(metrics) <= WARM and time.monotonic() < end and process.poll() is None:
                time.sleep(0.1)
            time.sleep(seconds)
        finally:
            process.kill()
            process.wait()
        return statistics.median(speeds(metrics)[WARM:] or [0.0])


def count(metrics: Path) -> int:
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def speeds(metrics: Path) -> list[float]:
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return [json.loads(line)["tokens_per_second"] for line in lines if line.endswith("\n")]


def measure(busy: int, seconds: float, rounds: int) -> dict[str, float]:
    """Tokens per second of every setting beside `busy` processes that never sleep."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    found: dict[str, list[float]] = {name: [] for name in SETTINGS}
    try:
        for _ in range(rounds):
            for name, environment in SETTINGS.items():
                found[name].append(train(environment, seconds))
                load = " ".join(f"{value:.1f}" for value in os.getloadavg())
                print(f"beside {busy}: {name}: {found[name][-1]:,.0f} tokens/s (load {load})", flush=True)
    finally:
        for other in others:
            other.kill()
            other.wait()
    return {name: statistics.median(values) for name, values in found.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], help="numbers of busy processes (0 1 2)")
    parser.add_argument("--seconds", type=float, default=10, help="of a turn, after its first steps (10)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every setting (3)")
    arguments = parser.parse_args(argv)
    rows = {busy: measure(busy, arguments.seconds, arguments.rounds) for busy in arguments.busy}
    print("\n| beside | " + " | ".join(SETTINGS) + " |\n|---|" + "---|" * len(SETTINGS))
    for busy, row in rows.items():
        print(f"| {busy} busy processes | " + " | ".join(f"{row[name]:,.0f}" for name in SETTINGS) + " |")


if __name__ == "__main__":
    main()
