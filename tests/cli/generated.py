"""Small calls of `wanloom generate`, and what they write."""

import json
from pathlib import Path

import torch

from wanloom.checkpoint.settings import CheckpointConfig
from wanloom.checkpoint.writer import Checkpointer
from wanloom.cli import main
from wanloom.formats.transformer import load_dit

SMALL = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "2", "--device", "cpu"]


def save_checkpoint(run_dir: Path, pipeline: Path, ema: bool, change=lambda name, value: value) -> None:
    model = load_dit(pipeline)
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        for prefix in ("model.", "ema.") if ema else ("model.",):
            moved = value + 0.02 * torch.randn(value.shape, generator=generator)
            tensors[prefix + name] = change(prefix + name, moved)
    saver = Checkpointer(run_dir, CheckpointConfig())
    state = {"step": 30, "model": model.config.model_dump()}
    recipe = {"model": str(pipeline), "ema": {"decay": 0.9 if ema else None}}
    saver.save(30, tensors, state, json.dumps(recipe))  # JSON is YAML
    saver.wait()
    saver.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def expect_mistake(capsys, words: list[str], message: str) -> None:
    assert main(["generate", *words]) == 2
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1].startswith("wanloom: ") and message in printed.splitlines()[-1], printed


def out_at(folder: Path) -> list[str]:
    return ["--out", str(folder / "out")]
