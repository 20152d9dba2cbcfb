"""Small runs of `wanloom train`, and what they leave."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from wanloom.checkpoint.saved import find_checkpoint, read_state
from wanloom.data.tar import END, tar_pair
from wanloom.train.records import read_metrics

TIMES = {"seconds", "tokens_per_second", "model_tflops_per_gpu", "peak_memory_gib"}


SMALL = [
    "tiny",
    "--mock=1x64x64,9x32x32,5x48x32",
    "batch.samples=4",
    "batch.tokens_per_pack=40",
    "ema.decay=0.9",
    "log.every=2",
    "compute.precision=fp32",
]


def words(run_dir: Path, *settings: str) -> list[str]:
    """The later of two settings of one name counts."""
    given = [*SMALL, f"run_dir={run_dir}", *settings]
    return ["train", *{word.partition("=")[0]: word for word in given}.values()]


def assert_same_bits(run_dir: Path, other: Path) -> None:
    """Everything in the newest checkpoints: weights, moments, average. (The files' headers are in no fixed order.)"""
    a, b = (load_file(next(find_checkpoint(path).glob("*.safetensors"))) for path in (run_dir, other))
    assert a.keys() == b.keys() and {name.split(".")[0] for name in a} == {"model", "ema", "optimizer"}
    assert all(torch.equal(a[name], b[name]) for name in a)
    states = [read_state(find_checkpoint(path)) for path in (run_dir, other)]
    assert all(states[0][key] == states[1][key] for key in ("step", "samples", "tokens", "data", "model"))


def losses(run_dir: Path) -> list[dict]:
    """The records without what a clock says."""
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(run_dir / "metrics.jsonl")]


def write_data(folder: Path, split: str = "train") -> None:
    """Four samples for the tiny model."""
    (folder / split).mkdir(parents=True)
    g = torch.Generator().manual_seed(0)
    latents, text = torch.randn(4, 16, 1, 4, 4, generator=g).bfloat16(), torch.randn(3, 64, generator=g)
    samples = [{"latents": latents[number], "text": text} for number in range(4)]
    pairs = [tar_pair(f"{split}-{number}", sample, {"caption": "x"}) for number, sample in enumerate(samples)]
    (folder / split / "shard-000000.tar").write_bytes(b"".join(pairs) + END)
