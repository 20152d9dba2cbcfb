"""What one GPU does with the model, in eight phases; needs torch and what wanloom's model needs, no data, no weights.

    python -m benchmarks.gpu [--phases P0,P2] [--minutes 8] [--out FILE]
    python -m benchmarks.gpu --toy          # everything once at tiny sizes, on a CPU too

P0 ceilings, P1 attention, P2 a block step by step, P3 whole models, P4 packing, P5 fp8, P6 sampling, P7 repeats. In all
about 20 minutes of an H200. After every case the json is written; a case that is in it is not measured again, so with
`--minutes 8` the same command goes on where it stopped, on the same machine. A case that would not end in time is not
begun. At the end: one table of all that is in the file; on an H200 with what was expected of it and the bounds.

Random weights and data, drawn on the device; CUDA events; 3 calls to warm up (the first compiles), the median of 5 (of
3 where a call takes over 7 s). Every variant's loss and gradients are compared with the plain one's, and which
attention kernel ran is read off the profiler. Ends with 1 when a case failed, its numbers are not the plain one's or
another kernel ran; a missed bound is only told.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

try:
    import torch

    from benchmarks.gpu import attention, ceilings, ladder, packing, sampling, whole
    from benchmarks.gpu.instruments import Bench, Case, Line, as_dict
    from benchmarks.measure import RESULTS, machine, versions
    from wanloom.errors import UserError
    from wanloom.files import write_atomic
except ModuleNotFoundError as missing:
    sys.exit(f"benchmarks.gpu needs the package {missing.name}: install it (pip install {missing.name}).")


class Phase(NamedTuple):
    """What it measures, and the lines that follow from several."""

    cases: Callable[[Bench], Iterator[Case]]
    ratios: Callable[[Bench], list[Line]]


def none(_: Bench) -> list[Line]:
    return []


def again(bench: Bench) -> Iterator[Case]:
    yield from ladder.again_cases(bench)
    yield from attention.again_cases(bench)


PHASES = {
    "P0": Phase(ceilings.cases, none),
    "P1": Phase(attention.cases, attention.ratios),
    "P2": Phase(ladder.cases, ladder.ratios),
    "P3": Phase(whole.cases, none),
    "P4": Phase(packing.cases, packing.ratios),
    "P5": Phase(ladder.fp8_cases, ladder.fp8_ratios),
    "P6": Phase(sampling.cases, sampling.ratios),
    "P7": Phase(again, ladder.again_ratios),
}


class Results:
    """The json: facts of the machine, and the lines of every case."""

    def __init__(self, path: Path | None, bench: Bench) -> None:
        self.path = path
        self.cases: dict[str, Any] = {}
        self.facts = {"command": f"python -m benchmarks.gpu{' --toy' * bench.toy}", "machine": machine()}
        self.facts |= {"versions": versions(), "device": device_facts()}
        if path and path.is_dir():
            sys.exit(f"{path} is a folder: name a file with --out.")
        if path and path.is_file():
            try:
                kept = json.loads(path.read_text())
                self.cases = dict(kept["cases"])
            except (ValueError, TypeError, KeyError) as error:
                sys.exit(f"{path} is damaged or of another kind ({error}): delete it or choose another with --out.")
            if other := [name for name, fact in self.facts.items() if kept.get(name) != fact]:
                sys.exit(f"{path} was measured with another {', '.join(other)}: choose another file with --out.")
        for case in self.cases.values():
            bench.found |= {line["name"]: Line(**line) for line in case["lines"]}

    def is_done(self, name: str) -> bool:
        """Failed ones are tried again."""
        return name in self.cases and "failed" not in self.cases[name]

    def add(self, name: str, lines: list[Line], seconds: float, failed: str) -> None:
        """Keep what a case found."""
        clocks = ask_driver("clocks.sm,clocks.mem,temperature.gpu,power.draw")
        self.cases[name] = {"seconds": round(seconds, 1), "clocks": clocks, "lines": [as_dict(line) for line in lines]}
        if failed:
            self.cases[name]["failed"] = failed
        if self.path:
            facts = self.facts | {"date": datetime.now(UTC).isoformat(timespec="seconds"), "cases": self.cases}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, (json.dumps(facts, indent=1) + "\n").encode())


def device_facts() -> dict[str, Any]:
    """Versions below torch, and what the device can do."""
    if not torch.cuda.is_available():
        return {}
    gib = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    facts: dict[str, Any] = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "memory_gib": gib}
    return facts | {"capability": list(torch.cuda.get_device_capability()), **ask_driver("driver_version")}


def ask_driver(asked: str) -> dict[str, str]:
    """Values that nvidia-smi reads, as they are now; none without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={asked}", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.splitlines()
    return dict(zip(asked.split(","), said[0].split(", "), strict=False)) if said else {}


def run_case(bench: Bench, results: Results, case: Case) -> None:
    """Measure it; a failure is written down, and the next one begins."""
    began, failed, lines = time.monotonic(), "", []
    try:
        lines = list(case.run())
    except torch.OutOfMemoryError:
        lines = [Line(case.name, None, "", problem="out of memory")]
    # what may fail on a machine nobody has tried; a programming error stops the run, and the cases before it are kept
    except (RuntimeError, ImportError, OSError, UserError, AssertionError) as error:
        traceback.print_exc()
        failed = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        lines = [Line(case.name, None, "", problem=failed)]
    lines = judged(bench, lines)
    bench.found |= {line.name: line for line in lines}
    bench.clear()
    seconds = time.monotonic() - began
    results.add(case.name, lines, seconds, failed)
    for line in lines:
        print(f"{describe(line)}   [{seconds:.0f} s]", flush=True)


def judged(bench: Bench, lines: list[Line]) -> list[Line]:
    """What is expected of an H200, and its bounds, say nothing of another device or of the toy."""
    if bench.is_h200:
        return lines
    return [replace(line, expect="", at_least=None, at_most=None) for line in lines]


def describe(line: Line) -> str:
    """A line of the table."""
    value = "" if line.value is None else f"{line.value:.4g} {line.unit}"
    gib = f"{line.facts['gib']:.1f} GiB" if line.facts.get("gib") else ""
    bounds = [f">= {line.at_least:.4g}"] if line.at_least is not None else []
    bounds += [f"<= {line.at_most:.4g}"] if line.at_most is not None else []
    verdict = {True: "pass", False: "FAIL", None: ""}[line.passes()]
    said = f"PROBLEM: {line.problem}" if line.problem else line.note
    cells = (
        f"{line.name:44}",
        f"{value:>18}",
        f"{gib:>10}",
        f"{line.expect:24}",
        f"{' '.join(bounds):10}",
        f"{verdict:4}",
    )
    return " ".join((*cells, said)).rstrip()


def table(bench: Bench) -> list[Line]:
    """Everything there is, phase by phase, the ratios after what they are made of."""
    lines = []
    for name, phase in PHASES.items():
        lines += [line for line in bench.found.values() if line.name.startswith(f"{name} ")]
        lines += judged(bench, phase.ratios(bench))
    return lines


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--phases", default=",".join(PHASES), metavar="P0,P1", help="only these, in this order")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing that would end later")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, nothing kept: to see that it runs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the json; results/gpu_DEVICE.json without it")
    arguments = parser.parse_args(words)
    arguments.phases = arguments.phases.split(",")
    if unknown := [name for name in arguments.phases if name not in PHASES]:
        parser.error(f"there is no phase {unknown[0]}; there are {', '.join(PHASES)}")
    if not arguments.toy and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use; --toy runs on a CPU")
    return arguments


def main(words: list[str] | None = None) -> int:
    """1 when a line has a problem; a missed bound is none."""
    arguments, began = parse(words), time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)  # of so little work more threads make more
    bench = Bench(device, arguments.toy)
    path = arguments.out
    if path is None and not arguments.toy:
        words_of = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().removeprefix("NVIDIA ").lower())
        path = RESULTS / f"gpu_{words_of}.json"
    results = Results(path, bench)
    left = []
    for case in (case for name in arguments.phases for case in PHASES[name].cases(bench)):
        if results.is_done(case.name):
            continue
        if time.monotonic() - began + case.seconds > 60 * arguments.minutes:
            left.append(case.name)
            continue
        run_case(bench, results, case)
    lines = table(bench)
    print("\n" + "\n".join(describe(line) for line in lines))
    if not bench.is_h200:
        print("\nExpectations and bounds are those of an H200: nothing is judged here.")
    if left:
        print(f"\nLeft for a later call, {len(left)}: {', '.join(left)}")
    wrong = [line.name for line in lines if line.problem]
    missed = [line.name for line in lines if line.passes() is False]
    print(f"\n{len(lines)} lines, {len(wrong)} with a problem, {len(missed)} out of bounds. {path or ''}".rstrip())
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
