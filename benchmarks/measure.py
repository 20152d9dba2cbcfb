"""How every benchmark measures, and what it leaves behind.

In: functions to time, or numbers that were counted. Out: rows, as json in `results/`, and printed. The one decision:
what is compared runs in one process and takes turns, A B A B, because the speed of a machine drifts; a row keeps every
measured value, and a claim on seconds is judged by the ratio of the least, beside which stands that of the medians.

A benchmark is a module with `measure(toy) -> list[Row]` and ends with `main(__spec__, measure)`. `toy` is the same code
at sizes for the tests; its numbers are never kept.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from wanloom.files import write_atomic

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "diffusers", "transformers", "numpy", "av", "webdataset", "opencv-python-headless", "safetensors")
PACKAGES += ("torchao", "triton")
THREADS = 2
ROUNDS = 7  # at least so often does each take its turn
PATIENCE = 40.0  # seconds after which an unsteady peer is measured no longer
STEADY = 1.05  # the least of the first half of a peer's rounds over that of the second half, or the other way round


@dataclass(frozen=True)
class Row:
    """One claim: what a peer takes and what wanloom takes, in one unit; values in the order they were measured.

    A target is a lower bound of the ratio peer / wanloom, or of wanloom's own value where there is no peer, or an upper
    bound of that value.
    """

    claim: str  # C1
    what: str
    unit: str  # s, bytes, FLOPs; "" for a plain number
    ours: Sequence[float]
    peer: str = ""
    theirs: Sequence[float] = ()
    target: float | None = None
    at_most: bool = False  # the target is an upper bound of wanloom's own value
    limit: str = ""  # what theory allows
    checked: str = ""  # how the outputs were found equal before anything was timed
    note: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def ratio(self, of: Callable[[Sequence[float]], float] = min) -> float:
        """Peer / wanloom, of the least values or of what `of` makes of them."""
        return of(self.theirs) / of(self.ours)

    def is_met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.target is None:
            return None
        if self.at_most:
            return min(self.ours) <= self.target
        return (self.ratio() if self.theirs else min(self.ours)) >= self.target

    def is_steady(self) -> bool:
        """Whether the peer's least hardly differs between the halves of the rounds; single values are."""
        values = self.theirs or self.ours
        half = len(values) // 2
        if not half:
            return True
        first, second = min(values[:half]), min(values[half:])
        return max(first, second) <= STEADY * min(first, second)


def take_turns(functions: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of every call by name, in turns: A B A B, after one call of each. The peer comes first.

    Goes on while the peer's least differs between the halves, to three times the rounds or until patience ends.
    """
    for function in functions.values():
        function()
    taken: dict[str, list[float]] = {name: [] for name in functions}
    first = taken[next(iter(functions))]
    end = time.perf_counter() + PATIENCE
    while len(first) < rounds or (
        len(first) < 3 * rounds and time.perf_counter() < end and not Row("", "", "s", first).is_steady()
    ):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            taken[name].append(time.perf_counter() - began)
    return taken


def machine() -> dict[str, Any]:
    """What it runs on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    facts: dict[str, Any] = {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(memory, 1)}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def versions() -> dict[str, str]:
    """Of Python and of what is compared; packages that are not there are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe(row: Row, judge: bool = True) -> str:
    """A row as a line, with what its target says unless that is of another size."""
    values = f"wanloom {statistics.median(row.ours):.4g} {row.unit}".rstrip()
    if row.theirs:
        values = f"{row.peer} {statistics.median(row.theirs):.4g} {row.unit}, {values}"
        values += f"  {row.ratio():.3f}x (median {row.ratio(statistics.median):.3f}x)"
    if judge and row.target is not None:
        values += f"  target {'<=' if row.at_most else '>='} {row.target:g} {'met' if row.is_met() else 'MISSED'}"
    return f"{row.claim:4} {row.what}: {values}{'' if row.is_steady() else '  (unsteady)'}"


def main(spec: ModuleSpec | None, measure: Callable[[bool], list[Row]], threads: int = THREADS) -> None:
    """Run a benchmark as a command, with so many threads: print its rows and keep them in `results/NAME.json`."""
    assert spec is not None and measure.__doc__, "start it with python -m"
    parser = argparse.ArgumentParser(prog=f"python -m {spec.name}", description=measure.__doc__)
    parser.add_argument("--toy", action="store_true", help="tiny sizes, nothing kept: to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where the json goes")
    arguments = parser.parse_args()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {arguments.out} cannot be a folder: {error.strerror}")
    torch.set_num_threads(threads)
    before, began = os.getloadavg()[0], time.monotonic()
    try:
        rows = measure(arguments.toy)
    except KeyboardInterrupt:
        sys.exit("\nStopped; nothing is kept.")
    for row in rows:
        print(describe(row, judge=not arguments.toy), flush=True)
    if arguments.toy:
        print("tiny sizes, whatever the lines say: nothing is judged and nothing kept")
        return
    facts = {
        "command": f"python -m {spec.name}",
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(time.monotonic() - began, 1),
        "machine": machine(),
        "threads": threads,
        "load": [round(before, 2), round(os.getloadavg()[0], 2)],
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
    }
    write_atomic(arguments.out / f"{spec.name.split('.')[-1]}.json", (json.dumps(facts, indent=1) + "\n").encode())
