"""Deliberate breaks of the numeric paths, and whether the tests that must notice them do.

In: the list `MUTANTS` of `breaks.py`: a file, a text in it, what is put in its place, and the tests that must fail.
Out: a line a break, and exit code 0 when each was noticed. The one decision: a break is made in a copy of the tree, so
that nothing is left behind; before any, the named tests must pass in the copy as it is. One that no test can notice
says why it is the same program. A break that makes its tests hang is noticed too.

    python tools/mutants.py            all of them, a quarter of an hour on two cores
    python tools/mutants.py packing    those whose file or text has this word
"""

import argparse
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
from breaks import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
PARTS = ("wanloom", "tests", "benchmarks", "tools", "pyproject.toml")
LOADED = ("torch", "diffusers.pipelines.wan.pipeline_wan", "transformers.models.umt5.modeling_umt5")  # before all tests
QUIET = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # what is loaded before cannot be rewritten
PATIENCE = 300.0  # seconds for the tests of one break


def run_tests(tree: Path, tests: tuple[str, ...], patience: float = PATIENCE) -> tuple[bool, str]:
    """Whether the tests pass in a tree, and the last line that they print."""
    output = tree / "output.txt"
    process = get_context("fork").Process(target=run_here, args=(tree, tests, output))
    process.start()
    process.join(patience)
    if process.exitcode is None:
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
        process.join()
        return False, f"no end after {patience:.0f} s"
    printed = output.read_text(encoding="utf-8", errors="replace")
    if process.exitcode not in (0, 1):  # of pytest itself: a test that is not there proves nothing
        raise SystemExit(f"The tests {', '.join(tests)} cannot be run:\n{printed}")
    lines = printed.strip().splitlines()
    return process.exitcode == 0, next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1])


def run_here(tree: Path, tests: tuple[str, ...], output: Path) -> None:
    """The tests in this process, which is a copy of one that has the large libraries loaded and nothing of the tree."""
    os.setsid()
    file = output.open("w", encoding="utf-8")  # for as long as this process lives
    sys.stdout = sys.stderr = file
    for stream in (1, 2):
        os.dup2(file.fileno(), stream)
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    sys.dont_write_bytecode = True
    os.environ["PYTHONPATH"] = str(tree)  # of what the tests start
    before = sys.modules.get("wanloom")
    code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--no-header", *QUIET, "--durations=0", *tests])
    module = sys.modules.get("wanloom")
    if module is not before and not str(getattr(module, "__file__", "")).startswith(str(tree)):
        code = 70  # another tree was tested
    file.flush()
    os._exit(code)


def apply(tree: Path, mutant: Mutant) -> str:
    """Break a file of the tree; returns its text of before."""
    path = tree / mutant.file
    before = path.read_text(encoding="utf-8")
    if before.count(mutant.text) != 1:
        raise SystemExit(f"'{mutant.text}' is {before.count(mutant.text)} times in {mutant.file}: mend the list.")
    path.write_text(before.replace(mutant.text, mutant.replacement), encoding="utf-8")
    return before


def main() -> int:
    """How many breaks no test noticed."""
    parser = argparse.ArgumentParser(description="Break the code on purpose and see that its tests notice.")
    parser.add_argument("words", nargs="*", help="only breaks whose file or text has one of these words")
    words = parser.parse_args().words
    chosen = [m for m in MUTANTS if not words or any(word in f"{m.file} {m.text}" for word in words)]
    missed = 0
    for module in LOADED:
        importlib.import_module(module)
    assert "wanloom" not in sys.modules
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for part in PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, tree / part)
        tests = tuple(dict.fromkeys(test for mutant in chosen for test in mutant.tests))
        passed, last = run_tests(tree, tests, 10 * PATIENCE) if tests else (True, "")
        if not passed:
            raise SystemExit(f"The tests do not pass before anything is broken: {last}")
        for number, mutant in enumerate(chosen, 1):
            began, before = time.monotonic(), apply(tree, mutant)
            passed, last = run_tests(tree, mutant.tests) if mutant.tests else (True, mutant.same)
            (tree / mutant.file).write_text(before, encoding="utf-8")
            missed += passed and not mutant.same
            verdict = "noticed" if not passed else "the same" if mutant.same else "NOT NOTICED"
            seconds = time.monotonic() - began
            change = f"{mutant.text.strip()} -> {mutant.replacement.strip() or 'nothing'}"
            print(f"{number}/{len(chosen)} {verdict}, {seconds:.0f} s: {mutant.file}: {change}\n    {last}", flush=True)
    print(f"{len(chosen)} breaks, {missed} not noticed")
    return missed


if __name__ == "__main__":
    sys.exit(main())
