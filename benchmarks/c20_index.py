"""C20: a folder of 10,000,000 samples: opening it, the memory of a process, planning a step anywhere in the run.

The index is synthetic, with the columns of a real one: keys of 14 letters, captions of 160, sha256, 600 samples in each
of 16,667 shards, which are files of holes. Each time is of a process of its own, the index in the system's cache.
Opened for the first time on a machine the columns are made; after that they are mapped. Memory is what Linux counts as
private to one of two processes that have both opened the folder and planned steps (/proc/self/smaps_rollup); the mapped
columns that they share are not in it, the interpreter and PyTorch are. (The process that makes the columns is alone:
what it looked at of them is in its number.) A step is planned after one at another place of the same pass over the
data; the first one of a pass makes the order of that pass, and stands on a line of its own. Every process plans the
same 16 steps: what counts of each is the least of them, and of the steps the slowest.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import Row, main
from wanloom.data.index import INDEX, SCHEMA
from wanloom.data.loader import Plan
from wanloom.data.settings import BatchConfig, SourceConfig
from wanloom.data.shards import Dataset

PER_SHARD = 600
SAMPLE = 1_700_000  # bytes
BATCH = 250_000
TOKENS_PER_PACK = 65_536
STEPS = {"64 samples, one rank": (64, 1), "256 samples, 8 ranks": (256, 8), "1,024 samples, 64 ranks": (1024, 64)}
TURNS = 5
PATIENCE = 600.0  # seconds for a process


def measure(toy: bool) -> list[Row]:
    """Seconds and bytes of opening and planning."""
    number = 120_000 if toy else 10_000_000
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name) / "data", Path(name) / "cache"
        write_folder(folder, number)
        first = run_processes(folder, cache, 1)[0]
        found = [run_processes(folder, cache, 2) for _ in range(1 if toy else TURNS)]
    alike = [process for turn in found for process in turn]
    opened, private = [process["open"] for process in alike], [process["private"] for process in alike]
    what = f"{number:,} samples"
    rows = [
        Row("C20", f"opening {what}", "s", opened, target=5, at_most=True, limit="hashing the index file"),
        Row("C20", f"opening {what} for the first time on a machine: columns are made", "s", [first["open"]]),
        Row("C20", f"private memory of a process with {what} open", "bytes", private, target=2**29, at_most=True),
        Row("C20", f"private memory of the process that made the columns of {what}", "bytes", [first["private"]]),
        Row("C20", f"first step of a pass over {what}: its order", "s", [process["first"] for process in alike]),
    ]
    for name, (samples, _) in STEPS.items():
        slowest = max(min(of_step) for of_step in zip(*(process[name] for process in alike), strict=True))
        target = 0.005 if samples < 1024 else None
        rows.append(Row("C20", f"planning a step of {name}, of {what}", "s", [slowest], target=target, at_most=True))
    return rows


def write_folder(folder: Path, number: int) -> None:
    """An index of so many samples, and shards of nothing that are as long as it says."""
    (folder / "train").mkdir(parents=True)
    with pq.ParquetWriter(folder / INDEX, SCHEMA, compression="zstd") as writer:
        for start in range(0, number, BATCH):
            writer.write_batch(draw_batch(start, min(start + BATCH, number)))
    for shard in range(-(-number // PER_SHARD)):
        with (folder / shard_name(shard)).open("wb") as file:
            file.truncate((PER_SHARD + 1) * SAMPLE)


def shard_name(shard: int) -> str:
    return f"train/shard-{shard:06d}.tar"


def draw_batch(start: int, stop: int) -> pa.RecordBatch:
    """Rows of samples of eight sizes with captions of unequal length."""
    count, numbers = stop - start, np.arange(start, stop)
    random = np.random.default_rng(start)
    frames, height = random.choice([1, 5, 11, 21], count), random.choice([30, 60], count)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)[random.integers(0, 16, (count, 64))]
    ends = pa.py_buffer(np.arange(0, 64 * count + 1, 64, dtype=np.int32))
    columns: dict[str, Any] = {
        "key": [f"{place * 2_654_435_761 % 2**48:012x}-{place % 9}" for place in numbers.tolist()],
        "split": ["train"] * count,
        "shard": [shard_name(shard) for shard in (numbers // PER_SHARD).tolist()],
        "offset": numbers % PER_SHARD * SAMPLE + 1536,
        "size": np.full(count, SAMPLE - 2048),
        "frames": frames,
        "height": height,
        "width": np.full(count, 52),
        "channels": np.full(count, 16),
        "tokens": frames * height * 13,
        "text_len": random.integers(8, 226, count),
        "caption": [
            f"Clip {place}: someone walks along a street in the rain and looks at what is sold" * 2 for place in numbers
        ],
        "source": [f"clips/{place % 1000}/{place}.mp4" for place in numbers.tolist()],
        "sha256": pa.StringArray.from_buffers(count, ends, pa.py_buffer(digits)),
    }
    return pa.RecordBatch.from_arrays([pa.array(columns[name]) for name in SCHEMA.names], schema=SCHEMA)


def run_processes(folder: Path, cache: Path, number: int) -> list[dict[str, Any]]:
    """What so many processes found that had the folder open at the same time."""
    context = get_context("spawn")
    barrier, results = context.Barrier(number), context.Queue()
    words = (folder, cache, barrier, results)
    processes = [context.Process(target=open_and_plan, args=words) for _ in range(number)]
    for process in processes:
        process.start()
    found = [results.get(timeout=PATIENCE) for _ in processes]
    for process in processes:
        process.join()
    return found


def open_and_plan(folder: Path, cache: Path, barrier: Barrier, results: Any) -> None:
    """One process: seconds of opening, of the first step and of others, and its private bytes while all are open."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    found: dict[str, Any] = {}
    began = time.perf_counter()
    dataset = Dataset.open(folder)
    found["open"] = time.perf_counter() - began
    for name, (samples, ranks) in STEPS.items():
        batch = BatchConfig(samples=samples, tokens_per_pack=TOKENS_PER_PACK)
        plan = Plan([dataset], [SourceConfig(path=dataset.path)], batch, 0, lambda n: 4e4 * n + n * n, ranks)
        began = time.perf_counter()
        last = len(dataset.rows("train")) // samples - 1  # of the first pass
        plan.packs(last // 2)
        found["first"] = time.perf_counter() - began
        found[name] = list(seconds_of_steps(plan, [last * k // 17 for k in range(1, 17)]))
    barrier.wait(PATIENCE)
    found["private"] = private_bytes()
    barrier.wait(PATIENCE)
    results.put(found)


def seconds_of_steps(plan: Plan, steps: list[int]) -> Iterator[float]:
    for step in steps:
        began = time.perf_counter()
        plan.totals(plan.packs(step))
        yield time.perf_counter() - began


def private_bytes() -> int:
    """Memory of this process that no other has."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


if __name__ == "__main__":
    main(__spec__, measure)
