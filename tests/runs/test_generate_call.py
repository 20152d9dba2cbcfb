"""`wanloom.generate` in a program: the frames of the parts called by hand, and mistakes before anything is loaded."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import wanloom
from wanloom.cli.launch import run_processes
from wanloom.codecs.text import TextCodec
from wanloom.codecs.vae import VaeCodec
from wanloom.config import build_config
from wanloom.errors import UserError
from wanloom.formats.transformer import load_dit
from wanloom.geometry import WAN_21
from wanloom.parallel.mesh import ONE_PROCESS, Mesh
from wanloom.runs import generate as runs_generate
from wanloom.runs.asked import Asked
from wanloom.runs.generate import LoadedParts, make_frames, plan_generation
from wanloom.sample import generate as sampling
from wanloom.sample.generate import Request, generate
from wanloom.sample.prompts import Prompt
from wanloom.sample.settings import GenerateConfig

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = {"height": 32, "width": 48, "frames": 5, "steps": 2, "guidance": 3.0, "device": "cpu"}


def parts_of(pipeline: Path, *texts: str) -> LoadedParts:
    states = TextCodec.load(pipeline, "cpu").encode(list(texts))
    model = load_dit(pipeline).requires_grad_(False)
    return LoadedParts(
        model, Mesh(ONE_PROCESS, CPU), VaeCodec.load(pipeline, "cpu"), dict(zip(texts, states, strict=True))
    )


def by_hand(parts: LoadedParts, sizes: list[tuple[int, int, int]], seeds: list[int], texts: list[str]) -> list[Tensor]:
    assert parts.vae
    requests = [
        Request(WAN_21.latents_shape(*size), seed, parts.text[text], parts.text["dark"])
        for size, seed, text in zip(sizes, seeds, texts, strict=True)
    ]
    made = generate(parts.model, requests, GenerateConfig(steps=2, guidance=3.0))
    return [parts.vae.decode(latents) for _, latents in made]


@pytest.mark.slow
def test_frames_are_those_of_the_parts_called_by_hand(tiny_pipeline):
    asked = ["a red circle", Prompt(prompt="snow", seed=3, frames=1)]
    made = list(wanloom.generate(asked, model=str(tiny_pipeline), negative="dark", seed=8, **SMALL))
    parts = parts_of(tiny_pipeline, "a red circle", "snow", "dark")
    want = by_hand(parts, [(5, 32, 48), (1, 32, 48)], [8, 3], ["a red circle", "snow"])
    assert [frames.shape for frames, _ in made] == [(5, 32, 48, 3), (1, 32, 48, 3)]
    assert all(torch.equal(frames, other) for (frames, _), other in zip(made, want, strict=True))
    told = [[facts[key] for key in ("name", "prompt", "negative", "seed", "frames", "steps")] for _, facts in made]
    assert told == [
        ["000-a-red-circle-seed8", "a red circle", "dark", 8, 5, 2],
        ["001-snow-seed3", "snow", "dark", 3, 1, 2],
    ]
    assert json.loads(json.dumps(made[0][1])) == made[0][1] and made[0][1]["model"] == str(tiny_pipeline)


@pytest.mark.slow
def test_a_model_in_memory_is_used_as_it_is(tiny_pipeline):
    """As in training, whose weights are on no disk."""
    parts = parts_of(tiny_pipeline, "x", "dark")
    with torch.no_grad():
        parts.model.head.head.weight.mul_(0.9)
    prompts = [Prompt(prompt="x", negative="dark", seed=5, height=32, width=48, frames=5)]
    (want,) = by_hand(parts, [(5, 32, 48)], [5], ["x"])
    config = GenerateConfig(steps=2, guidance=3.0)
    ((index, frames),) = make_frames(parts, prompts, [WAN_21.latents_shape(5, 32, 48)], config)
    assert index == 0 and frames is not None and torch.equal(frames, want)
    ((loaded, _),) = wanloom.generate(prompts, model=str(tiny_pipeline), **SMALL)
    assert not torch.equal(loaded, want)
    generation = plan_generation(prompts, build_config(Asked, {"model": str(tiny_pipeline), **SMALL}))
    ((again, _),) = generation.make(parts)
    assert again is not None and torch.equal(again, want)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ("x", {"stepps": 3}, "There is no setting 'stepps'. Did you mean 'steps'?"),
        ("x", {"steps": "3"}, "The setting 'steps' is '3': it must be a whole number."),
        ("x", {"ema": True}, "`ema` asks for the averaged weights of a run: give the run with `checkpoint`."),
        ("x", {"guidance": 1, "negative": "y"}, "`negative` has no effect with `guidance=1`"),
        ("x", {"height": 33, "width": 32}, "The height is 33, it must be a multiple of 16: try 32 or 48."),
        ("x", {"checkpoint": Path("nowhere")}, "There is no folder nowhere"),
        ([], {}, "There is no prompt"),
    ],
)
def test_mistakes_come_with_the_call_and_before_anything_is_loaded(monkeypatch, prompts, settings, message):
    monkeypatch.setattr(runs_generate, "find_files", lambda _: pytest.fail("looked for files first"))
    with pytest.raises(UserError) as raised:
        wanloom.generate(prompts, **settings)
    assert str(raised.value).startswith(message)


def branch_by_branch(model, branches, text_kv, tokens, sigma, guidance, mesh) -> Tensor:
    """As `guided_velocity`, with a call of the model for each branch: what two processes do, to the bit."""
    count, texts, velocities = len(branches.video_lens) // 2, branches.text.split(branches.text_lens), []
    own = {name: getattr(branches, name)[:count] for name in ("video_lens", "level_lens", "sequence_lens")}
    own |= {"tokens": tokens, "positions": branches.positions[: len(tokens)]}
    for half in (slice(0, count), slice(count, None)):
        alone = replace(branches, text=torch.cat(texts[half]), text_lens=branches.text_lens[half], **own)
        velocities.append(model(alone, torch.full((count,), sigma)))
    prompt, negative = velocities
    return negative + guidance * (prompt - negative)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "by hand"])
def test_two_ranks_make_the_bytes_of_one(tiny_pipeline, tmp_path, launcher, monkeypatch):
    """Called twice, and a call that is never iterated leaves nothing joined; the second rank gets nothing."""
    for name, value in {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    script = [__file__, str(tiny_pipeline), str(tmp_path)]
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *script]
        subprocess.run(command, check=True, timeout=120)
    else:
        assert run_processes(2, script) == 0
    made = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    monkeypatch.setattr(sampling, "guided_velocity", branch_by_branch)
    want = {facts["name"]: frames for seed in (0, 8) for frames, facts in make_two(tiny_pipeline, seed)}
    assert made[0].keys() == want.keys() and len(want) == 4 and not made[1]
    assert all(torch.equal(made[0][name], frames) for name, frames in want.items())


def make_two(pipeline: Path | str, seed: int) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    return wanloom.generate(["a red circle", "snow"], model=str(pipeline), seed=seed, **SMALL)


def be_rank(pipeline: str, out: Path) -> None:
    """One of two ranks: what it gets, in a file of its own."""
    torch.set_num_threads(1)
    make_two(pipeline, 0)
    got = {facts["name"]: frames for seed in (0, 8) for frames, facts in make_two(pipeline, seed)}
    save_file(got, out / f"{os.environ['RANK']}.safetensors")


if __name__ == "__main__":
    be_rank(sys.argv[1], Path(sys.argv[2]))
