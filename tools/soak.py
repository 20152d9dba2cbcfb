"""Kill processes of a run again and again, and see that it ends as if nothing had happened.

In: how many kills, steps and processes. Out: a table of where the kills hit, and exit code 0 when the weights, moments
and average are equal to the bit, and the records too, to those of a run that was left alone. The one decision: the
launcher alone starts the run again (`--max-restarts`); this program does nothing but kill. Linux only: it finds the
processes in /proc.

    python tools/soak.py soak --kills 10
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from wanloom.checkpoint.saved import FOLDER, find_checkpoint, list_checkpoints
from wanloom.train.records import FILE, read_metrics

TIMES = {"seconds", "tokens_per_second", "model_tflops_per_gpu", "peak_memory_gib"}
SETTINGS = ["tiny", "--mock=1x64x64,9x32x32,5x48x32", "batch.samples=4", "batch.tokens_per_pack=40", "ema.decay=0.9"]
WHEN = ("step", "save", "save", "start")  # what a process that is killed does; each in turn
HEAD = ("second", "meant for", "rank", "last record", "newest checkpoint", "one without its name")
PATIENCE = 300.0  # seconds, for the next step


@dataclass
class Kill:
    """One kill, and where it hit."""

    seconds: float  # since the start of the run
    when: str
    rank: int
    step: int  # the last record
    checkpoint: str  # the newest
    partial: int | None  # files of the one that was being written

    def cells(self) -> tuple[str, ...]:
        partial = "" if self.partial is None else f"{self.partial} files"
        return f"{self.seconds:.1f}", self.when, str(self.rank), str(self.step), self.checkpoint, partial


class Victim:
    """A run that is killed."""

    def __init__(self, run_dir: Path, words: list[str], restarts: int, seed: int) -> None:
        self.run_dir, self.random = run_dir, random.Random(seed)
        self.began = time.monotonic()
        self.process = start(run_dir, [*words, f"--max-restarts={restarts}"])

    def ranks(self) -> dict[int, int]:
        """The living processes by rank."""
        found = {}
        for path in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in path.read_text().split():
                try:
                    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    is_dead = ") Z " in Path(f"/proc/{pid}/stat").read_text()
                except OSError:  # it has ended
                    continue
                found |= {int(e[5:]): int(pid) for e in environment if e.startswith(b"RANK=") and not is_dead}
        return found

    def step(self) -> int:
        """Of the last record."""
        records = read_metrics(self.run_dir / FILE)
        return int(records[-1]["step"]) if records else 0

    def partials(self) -> list[Path]:
        """The checkpoint that is being written."""
        return list((self.run_dir / FOLDER).glob("step_*.partial"))

    def wait_for(self, what) -> None:
        """Until `what()`. Ends the program when the run has ended before, or takes too long."""
        deadline = time.monotonic() + PATIENCE
        while not what():
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"soak: the run has ended (exit code {self.process.poll()}) or hangs, at step {self.step()}.")
            time.sleep(0.001)

    def kill(self, when: str, step: int, count: int) -> Kill:
        """Kill one of `count` processes: in a step from `step` on, in a save after that, or while they start."""
        self.wait_for(lambda: len(self.ranks()) == count)
        before = set(self.ranks().values())
        if when == "start":
            time.sleep(self.random.uniform(0, 6))
        else:
            self.wait_for(lambda: self.step() >= step)
            if when == "save":
                self.wait_for(self.partials)
            time.sleep(self.random.uniform(0, 0.5 if when == "step" else 0.1))
        rank = self.random.randrange(count)
        os.kill(self.ranks()[rank], signal.SIGKILL)
        names = [path.name for path in list_checkpoints(self.run_dir)[-1:]]
        files = [len(list(path.glob("*.safetensors"))) for path in self.partials()]
        found = Kill(time.monotonic() - self.began, when, rank, self.step(), "".join(names), next(iter(files), None))
        self.wait_for(lambda: not before & set(self.ranks().values()))
        return found


def start(run_dir: Path, words: list[str]) -> subprocess.Popen:
    """The run, whose words go to a file beside its folder."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with run_dir.with_suffix(".log").open("w") as log:
        command = [sys.executable, "-m", "wanloom", "train", *words, f"run_dir={run_dir}"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=env, stdout=log, stderr=log)


def differences(run_dir: Path, other: Path) -> list[str]:
    """What is not the same to the bit in two runs of one layout."""
    out = []
    ends = [find_checkpoint(path) for path in (run_dir, other)]
    names = [sorted(path.name for path in end.glob("*.safetensors")) for end in ends]
    if ends[0].name != ends[1].name or names[0] != names[1]:
        return [f"{ends[0]} with {names[0]}, {ends[1]} with {names[1]}"]
    for name in names[0]:
        a, b = (load_file(end / name) for end in ends)
        out += [
            key
            for key in sorted(a.keys() | b.keys())
            if key not in a or key not in b or not torch.equal(a[key], b[key])
        ]
    records = [
        [{key: value for key, value in record.items() if key not in TIMES} for record in read_metrics(path / FILE)]
        for path in (run_dir, other)
    ]
    return out + ([] if records[0] == records[1] else ["the records"])


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows as Markdown; the first is the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def read_words() -> argparse.Namespace:
    """What to do. Ends the program when the folder is not empty."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="an empty folder, or one that is made")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists() and any(arguments.out.iterdir()):
        parser.error(f"{arguments.out} is not empty")
    return arguments


def main() -> int:
    arguments = read_words()
    out, kills, steps, count = arguments.out.resolve(), arguments.kills, arguments.steps, arguments.nproc
    words = [*SETTINGS, f"train.steps={steps}", "checkpoint.every=4", "log.every=1", f"--nproc={count}"]
    began = time.monotonic()
    if start(out / "whole", words).wait():
        sys.exit(f"soak: the run that is left alone failed: {out / 'whole.log'}")
    alone = time.monotonic() - began
    victim, found = Victim(out / "killed", words, kills, arguments.seed), list[Kill]()
    try:
        for number in range(kills):
            # evenly over the run, with a save and a few steps after the last
            step = (number + 1) * (steps - 8) // (kills + 1)
            found.append(victim.kill(WHEN[number % len(WHEN)], step, count))
        code = victim.process.wait(timeout=PATIENCE)
    finally:
        victim.process.terminate()
    seconds = time.monotonic() - victim.began
    wrong = differences(out / "killed", out / "whole")
    restarts = (out / "killed.log").read_text().count("starting all processes again")
    print(table([HEAD, *(kill.cells() for kill in found)]))
    print(
        f"\n{kills} kills, {restarts} restarts, {steps} steps on {count} processes: {seconds:.0f} s instead of "
        f"{alone:.0f} s, exit code {code}."
    )
    print(f"Not the same: {', '.join(wrong[:5])}" if wrong else "Weights, moments, average, records: the same bits.")
    return int(bool(wrong) or code != 0 or restarts != kills)


if __name__ == "__main__":
    sys.exit(main())
