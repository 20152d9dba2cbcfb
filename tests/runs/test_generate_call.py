"""`wanloom.generate` in a program: the frames of the parts called by hand, and mistakes before anything is loaded."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import wanloom
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
from wanloom.sample.generate import Request, generate
from wanloom.sample.prompts import Prompt
from wanloom.sample.settings import GenerateConfig

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
