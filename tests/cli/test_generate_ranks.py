"""`wanloom generate` as several processes: one video, written once, and each mistake said once."""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from generated import save_checkpoint
from PIL import Image

import wanloom.dist
from wanloom.cli import generate, main
from wanloom.cli.words import Parser
from wanloom.errors import UserError
from wanloom.media.write import read_mp4
from wanloom.runs.asked import Asked, check_asked
from wanloom.runs.generate import place_model, plan_generation, share_work
from wanloom.sample.prompts import Prompt
from wanloom.variants import VARIANTS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SMALL = ["--height", "32", "--width", "48", "--frames", "5", "--device", "cpu"]
LOADING = "wanloom generate: loading PyTorch takes some seconds.\n"  # of the launcher


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened).astype(int)


def test_two_processes_make_the_same_and_one_writes(tiny_pipeline, tmp_path):
    save_checkpoint(tmp_path / "run", tiny_pipeline, ema=True)
    words = ["generate", "--checkpoint", str(tmp_path / "run"), "--ema", "--prompt", "a red circle", "--prompt", "snow"]
    words += [*SMALL, "--steps", "3", "--out"]
    assert main([*words, str(tmp_path / "one")]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["tests/cli/two_generate.py", str(tmp_path), *words, str(tmp_path / "two")]
    result = subprocess.run(command, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert f"{tiny_pipeline} on 2 x cpu (dp_shard 2) in fp32" in result.stdout and result.stdout.count("text: ") == 1
    assert (tmp_path / "0.txt").read_text().split("\n") == ["text encoder", "transformer", "VAE", "write", "write", ""]
    assert (tmp_path / "1.txt").read_text() == "transformer\n"
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())
    for one in (tmp_path / "one").glob("*.png"):
        assert np.abs(picture(one) - picture(tmp_path / "two" / one.name)).max() <= 1
        films = [read_mp4(folder / f"{one.stem}.mp4").astype(int) for folder in (one.parent, tmp_path / "two")]
        assert films[0].shape == films[1].shape == (5, 32, 48, 3)
        assert np.abs(films[0] - films[1]).mean() < 0.5  # a pixel that rounds the other way can move its block
        note = json.loads((tmp_path / "two" / f"{one.stem}.json").read_text())
        assert note["processes"] == {"number": 2, "cfg_parallel": 2, "cp_ring": 1, "cp_ulysses": 1, "tp": 1}
        assert note["command"].endswith("--device cpu --nproc 2 --tp 1 --cfg-parallel 2")
        assert json.loads(one.with_suffix(".json").read_text())["processes"]["number"] == 1
        again = argparse.ArgumentParser()
        generate.add_arguments(again)
        again.parse_args(shlex.split(note["command"])[2:])


def test_a_mistake_of_the_first_is_said_once(tiny_pipeline, tmp_path):
    (tmp_path / "000-x.png").write_bytes(b"mine")
    words = ["--model", str(tiny_pipeline), "--prompt", "x", *SMALL, "--out", str(tmp_path), "--nproc", "2"]
    command = [sys.executable, "-m", "wanloom", "generate", *words]
    result = subprocess.run(command, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=120)
    said = f"1 of the files are there already, made otherwise, such as {tmp_path / '000-x.png'}: give another"
    assert result.returncode == 2
    assert result.stderr.removeprefix(LOADING) == f"wanloom: {said} --seed or --out, or --overwrite.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["000-x.png"]


def test_ctrl_c_is_a_sentence(tiny_pipeline, tmp_path):
    words = ["--model", str(tiny_pipeline), "--prompt", "x", *SMALL, "--out", str(tmp_path), "--steps", "900000"]
    command = [sys.executable, "-m", "wanloom", "generate", *words, "--solver", "euler", "--precision", "bf16"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, "--nproc", "2"], env=ENV, cwd=ROOT, **pipes)
    assert process.stdout is not None
    try:
        while not process.stdout.readline().startswith("model: "):
            assert process.poll() is None
        time.sleep(2)  # in the midst of denoising; what is said does not depend on how far it is
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    errors = errors.removeprefix(LOADING)
    assert errors == f"\n0 of 1 are written to {tmp_path}; the same command makes the rest.\nwanloom: Stopped.\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("world", "asked", "axes"),
    [
        (1, Asked(), ""),
        (2, Asked(), "dp_shard 2"),
        (2, Asked(guidance=1), "cp_ulysses 2"),
        (2, Asked(cfg_parallel=1), "cp_ulysses 2"),
        (2, Asked(tp=2), "tp 2"),
        (3, Asked(), "cp_ring 3"),
        (8, Asked(), "dp_shard 2 x cp_ulysses 4"),
        (16, Asked(tp=2), "dp_shard 2 x cp_ring 2 x cp_ulysses 2 x tp 2"),
        (6, Asked(tp=2), "cp_ring 3 x tp 2"),
    ],
)
def test_the_layout_is_what_the_processes_allow(monkeypatch, world, asked, axes):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    layout = share_work(asked.tp, asked.cfg_parallel, asked.guidance or 5.0, VARIANTS["tiny"].shape)
    assert layout.describe() == (axes or "one process") and layout.world == world


@pytest.mark.parametrize(
    ("world", "words", "message"),
    [
        (1, ["--tp", "2"], "--tp 2 does not divide the number of processes, which is 1: --nproc changes it."),
        (3, ["--tp", "3"], "--tp 3 does not divide the 4 heads of the model."),
        (2, ["--tp", "0"], "--tp is 0"),
        (3, ["--cfg-parallel", "2"], "--cfg-parallel 2 needs two groups of equal size, which 3 processes with --tp 1"),
        (2, ["--cfg-parallel", "2", "--tp", "2"], "which 2 processes with --tp 2 are not"),
        (2, ["--cfg-parallel", "2", "--guidance", "1"], "--cfg-parallel 2 has no effect with --guidance 1"),
        (2, ["--device", "cuda:1"], "--device cuda:1 is one device, and each process takes its own"),
    ],
)
def test_a_layout_that_cannot_be_is_one_sentence(monkeypatch, world, words, message):
    parser = Parser("generate", None)
    generate.add_arguments(parser)
    asked = generate.read(parser.parse_args(["--prompt", "x", *words]))[1]
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(UserError) as raised, parser.naming_options():
        check_asked([Prompt(prompt="x")], asked)
        place_model(asked, asked.guidance or 5.0, VARIANTS["tiny"].shape)
    assert message in str(raised.value)


def test_processes_that_would_make_something_else_are_noticed(tiny_pipeline, monkeypatch):
    asked = Asked(model=str(tiny_pipeline), height=32, width=48, frames=5, device="cpu")
    assert plan_generation([Prompt(prompt="x")], asked).place.device == torch.device("cpu")
    other = {"the transformer": "of another step"}
    monkeypatch.setattr(wanloom.dist, "gather", lambda own: [own, own, own | other])
    said = "Rank 2 would make other videos than rank 0: the transformer is of another step, on rank 0 "
    with pytest.raises(UserError, match=f"^{said}.*. Give all processes the same files"):
        plan_generation([Prompt(prompt="x")], asked)
