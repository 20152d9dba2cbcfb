"""Seconds to compile, by depth: wanloom compiles one block, a whole-model torch.compile all of them. C17.

Each measurement is a process of its own with an empty cache, so nothing of another one is found again. Timed is the
first forward and backward of a compiled model, less the second, which compiles nothing. Narrow models: the code that
is made does not depend on the width. The peers are diffusers' transformer under `torch.compile(model)` and under its
own `compile_repeated_blocks(fullgraph=True)`, which compiles one block too. Either peer compiles for one length alone,
wanloom for any; see c17_lengths. The claim is that wanloom's time does not grow with the depth: the ratio
of 8 blocks to 2.
"""

import os
import subprocess
import sys
import tempfile
import time

import torch

from benchmarks.measure import THREADS, Row, main
from benchmarks.pair import build_pair, draw_samples, run_ours, run_theirs
from wanloom.parallel.compile import apply_compile

DEPTHS = (2, 4, 8)
PEERS = {"model": "diffusers, torch.compile(model)", "repeated": "diffusers, compile_repeated_blocks(fullgraph=True)"}
ONE_LENGTH = "the graph of the peer is for one length, that of wanloom for any"


def compile_seconds(side: str, blocks: int) -> float:
    """In this process."""
    ours, theirs = build_pair("toy", blocks)
    shapes = [(2, 8, 8), (1, 4, 6)] if side == "wanloom" else [(2, 8, 8)]
    samples = draw_samples(ours.config, shapes, [9, 5][: len(shapes)], torch.float32)
    if side == "wanloom":
        apply_compile(ours, "block", torch.device("cpu"))
        run = run_ours(ours, samples)
    elif side == "repeated":
        theirs.compile_repeated_blocks(fullgraph=True)
        run = run_theirs(theirs, samples)
    else:
        run = run_theirs(torch.compile(theirs), samples)
    began = time.perf_counter()
    run()
    first = time.perf_counter() - began
    began = time.perf_counter()
    run()
    return first - (time.perf_counter() - began)


def in_a_fresh_process(side: str, blocks: int) -> float:
    with tempfile.TemporaryDirectory() as cache:
        words = [sys.executable, "-m", "benchmarks.c17_compile", side, str(blocks)]
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        return float(subprocess.run(words, env=env, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure(toy: bool) -> list[Row]:
    """Seconds to compile at several depths, with cold caches, against diffusers compiled in both ways."""
    depths = (1, 2) if toy else DEPTHS
    ends = (depths[0], depths[-1])  # of the peers, which take minutes
    runs = [("wanloom", n) for n in depths] + [(side, n) for side in PEERS for n in ends]
    seconds = {run: in_a_fresh_process(*run) for run in runs}
    rows = [
        Row("C17", f"compiling {n} blocks", "s", [seconds["wanloom", n]], peer, [seconds[side, n]], note=ONE_LENGTH)
        for side, peer in PEERS.items()
        for n in ends
    ]
    growth = {side: seconds[side, depths[-1]] / seconds[side, depths[0]] for side in ("wanloom", *PEERS)}
    note = "; ".join(f"{peer} grows {growth[side]:.2f}-fold" for side, peer in PEERS.items())
    note += "; wanloom " + ", ".join(f"{n} blocks {seconds['wanloom', n]:.1f} s" for n in depths)
    what = f"compiling {depths[-1]} blocks over {depths[0]}"
    return [*rows, Row("C17", what, "", [growth["wanloom"]], target=1.1, at_most=True, limit="1", note=note)]


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in ("wanloom", *PEERS):  # a process of `in_a_fresh_process`
        torch.set_num_threads(THREADS)
        print(compile_seconds(sys.argv[1], int(sys.argv[2])))
    else:
        main(__spec__, measure)
