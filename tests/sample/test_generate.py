"""Latents from text and noise: against diffusers' WanPipeline, alone and in packs of unequal requests."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from wanloom.codecs.text import TextCodec
from wanloom.codecs.vae import VaeCodec
from wanloom.config import build_config
from wanloom.errors import UserError
from wanloom.formats.transformer import load_dit
from wanloom.geometry import WAN_21
from wanloom.model.dit import WanDiT
from wanloom.sample import generate as sampling
from wanloom.sample.generate import Request, draw_request_noise, generate, plan_packs
from wanloom.sample.prompts import Prompt, fill_in
from wanloom.sample.settings import GenerateConfig
from wanloom.sample.solvers import build_scheduler

pytestmark = pytest.mark.slow

PROMPT = "A red circle moves to the left across a dark background."
NEGATIVE = "a cat in snow"


class Parts(NamedTuple):
    folder: Path
    model: WanDiT
    vae: VaeCodec
    text: dict[str, Tensor]


@pytest.fixture(scope="module")
def parts(tiny_pipeline) -> Parts:
    prompts = [PROMPT, NEGATIVE, "", "Something blue in the form of a square is going upwards."]
    states = TextCodec.load(tiny_pipeline, "cpu").encode(prompts)
    model = load_dit(tiny_pipeline).requires_grad_(False)
    return Parts(tiny_pipeline, model, VaeCodec.load(tiny_pipeline, "cpu"), dict(zip(prompts, states, strict=True)))


def make(parts: Parts, requests: list[Request], **settings) -> list[Tensor]:
    found = dict(generate(parts.model, requests, build_config(GenerateConfig, settings)))
    return [found[i] for i in range(len(requests))]


def request(parts: Parts, size: tuple[int, int, int], seed: int, prompt: str = PROMPT) -> Request:
    return Request(WAN_21.latents_shape(*size), seed, parts.text[prompt], parts.text[NEGATIVE])


def difference(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize(
    ("solver", "guidance", "size"),
    [("unipc", 5.0, (9, 48, 80)), ("unipc", 1.0, (1, 64, 32)), ("dpm++", 5.0, (5, 80, 48))],
)
def test_latents_and_frames_are_those_of_wan_pipeline(parts, solver, guidance, size):
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(parts.folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = build_scheduler(solver, 5.0)
    frames, height, width = size
    one = request(parts, size, 7)

    def theirs(output_type: str):
        return pipe(
            PROMPT,
            negative_prompt=NEGATIVE,
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=12,
            guidance_scale=guidance,
            latents=one.noise[None],
            output_type=output_type,
        ).frames[0]

    got = make(parts, [one], solver=solver, guidance=guidance, steps=12, shift=5.0)[0]
    want = theirs("latent")
    assert got.shape == want.shape == one.noise.shape
    assert want.std() > 0.5 and (want - one.noise).norm() > 0.3 * want.norm()  # it went somewhere
    assert difference(got, want) < 1e-3
    pixels = torch.from_numpy(theirs("np")).mul(255).round()
    shown = parts.vae.decode(got).float()
    assert shown.shape == pixels.shape == (frames, height, width, 3)
    assert (shown - pixels).abs().max() <= 1


def test_the_stock_grid_of_diffusers_is_not_ours(parts):
    # the parity above is not blind: another grid, or exact timesteps in place of whole ones, would be noticed
    one = request(parts, (9, 48, 80), 7)
    base = make(parts, [one], steps=12, shift=5.0, guidance=1.0)[0]
    other = make(parts, [one], steps=12, shift=5.1, guidance=1.0)[0]
    assert difference(other, base) > 3e-3


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_requests_of_any_size_in_one_pack_equal_each_alone(parts, guidance, monkeypatch):
    sizes = [(9, 48, 80), (1, 64, 64), (9, 48, 80), (5, 32, 96)]
    prompts = [PROMPT, NEGATIVE, "", PROMPT]
    requests = [request(parts, size, i, prompt) for i, (size, prompt) in enumerate(zip(sizes, prompts, strict=True))]
    settings = {"steps": 4, "guidance": guidance}
    together = make(parts, requests, **settings)
    for one, got in zip(requests, together, strict=True):
        want = make(parts, [one], **settings)[0]
        assert difference(got, want) < 1e-4
    monkeypatch.setattr(sampling, "TOKENS_PER_PACK", 130)
    in_two = make(parts, requests, **settings)
    assert max(difference(a, b) for a, b in zip(in_two, together, strict=True)) < 1e-4


def test_text_is_computed_once_a_pack_and_gives_the_same_bits(parts, monkeypatch):
    monkeypatch.setattr(sampling, "TOKENS_PER_PACK", 130)
    requests = [
        request(parts, size, i, text) for i, (size, text) in enumerate([((9, 48, 80), PROMPT), ((1, 64, 64), "")])
    ]
    requests.append(request(parts, (5, 32, 96), 2, NEGATIVE))
    settings = {"steps": 4, "guidance": 4.0}
    assert len(plan_packs(requests, GenerateConfig(**settings))) == 2
    block, calls = parts.model.blocks["1"].cross_attn, []
    modules = (parts.model.text_embedding, block.k, block.v, block.norm_k, block.q)
    hooks = [module.register_forward_hook(lambda module, *_: calls.append(module)) for module in modules]
    kept = make(parts, requests, **settings)
    for hook in hooks:
        hook.remove()
    assert [calls.count(module) for module in modules] == [2, 2, 2, 2, 8]
    monkeypatch.setattr(sampling, "build_text_kv", lambda *_: None)
    anew = make(parts, requests, **settings)
    assert all(torch.equal(a, b) for a, b in zip(kept, anew, strict=True))


def test_packs_keep_order_and_budget(parts, monkeypatch):
    requests = [request(parts, (9, 48, 80), i) for i in range(5)]  # 45 tokens each
    for budget, guidance, packs in (
        (100, 1.0, [[0, 1], [2, 3], [4]]),
        (180, 2.0, [[0, 1], [2, 3], [4]]),
        (1, 2.0, [[0], [1], [2], [3], [4]]),
    ):
        monkeypatch.setattr(sampling, "TOKENS_PER_PACK", budget)
        assert plan_packs(requests, GenerateConfig(guidance=guidance)) == packs
    monkeypatch.setattr(sampling, "TOKENS_PER_PACK", 200)
    steps: list[int] = []
    found = list(generate(parts.model, requests, GenerateConfig(steps=3), steps.append))
    assert [i for i, _ in found] == [0, 1, 2, 3, 4] and steps == [2, 2, 2, 2, 2, 2, 1, 1, 1]


def test_noise_is_drawn_for_the_pack_that_needs_it(parts, monkeypatch):
    """Of thousands of prompts it would be more than the memory of a machine."""
    drawn, real = list[int](), sampling.draw_request_noise
    monkeypatch.setattr(sampling, "draw_request_noise", lambda shape, seed: drawn.append(seed) or real(shape, seed))
    monkeypatch.setattr(sampling, "TOKENS_PER_PACK", 1)
    requests = [request(parts, (1, 16, 16), seed) for seed in (5, 6, 7)]
    made = generate(parts.model, requests, GenerateConfig(steps=1, guidance=1), done=(1,))
    assert drawn == []
    next(made)
    assert drawn == [5]
    assert len(list(made)) == 1 and drawn == [5, 7], "what is there is not made again"


def test_noise_depends_on_the_seed_alone():
    shape = WAN_21.latents_shape(17, 64, 48)
    assert shape == (16, 5, 8, 6)
    first = draw_request_noise(shape, 3)
    assert torch.equal(first, draw_request_noise(shape, 3)) and not torch.equal(first, draw_request_noise(shape, 4))
    assert abs(first.mean()) < 0.05 and abs(first.std() - 1) < 0.05
    seeds = (0, 1, 2, 3, 4, 5, 2**31, 2**32, 2**33, 2**63, -1)
    drawn = {seed: draw_request_noise(shape, seed).flatten() for seed in seeds}
    for one in seeds:
        for other in seeds:
            assert one == other or abs((drawn[one] * drawn[other]).mean()) < 0.1, (one, other)  # 4 sigma are 0.1


def test_each_prompt_has_the_next_seed_unless_its_line_has_one():
    """Neighbours and those two places apart alike: no two videos of a file have one noise."""
    prompts = [Prompt(prompt=f"p{i}") if i != 3 else Prompt(prompt="p3", seed=99) for i in range(6)]
    assert [prompt.seed for prompt in fill_in(prompts, 40, {})] == [40, 41, 42, 99, 44, 45]
    assert [prompt.seed for prompt in fill_in(prompts[:2], 2**40, {})] == [2**40, 2**40 + 1]


def test_what_a_prompt_has_is_not_replaced():
    """Also where it has what would be the default."""
    sizes = {"negative": "dark", "height": 32, "width": 48, "frames": 5}
    own = Prompt(prompt="x", negative="", seed=0, frames=1)
    first, second = fill_in([Prompt(prompt="y"), own], 7, sizes)
    assert first.model_dump() == {"prompt": "y", "seed": 7, **sizes}
    assert second.model_dump() == {"prompt": "x", "seed": 0, **sizes, "negative": "", "frames": 1}
    assert (first.name, second.name) == ("000-y-seed7", "001-x-seed0") and own.height == 0


def test_the_same_call_gives_the_same_bits(parts):
    requests = [request(parts, (5, 32, 32), i) for i in range(3)]
    first, second = make(parts, requests, steps=3), make(parts, requests, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((17, 60, 64), "height is 60, it must be a multiple of 16: try 48 or 64"),
        ((17, 64, 8), "width is 8, it must be a multiple of 16: try 16"),
        ((17, 64, 0), "width is 0, it must be a multiple of 16: try 16"),
        ((16, 64, 64), "frames is 16, it must be 4n.1: try 13 or 17"),
        ((0, 64, 64), "frames is 0, it must be 4n.1: try 1"),
    ],
)
def test_sizes_that_do_not_divide_name_the_nearest(size, message):
    with pytest.raises(UserError, match=message):
        WAN_21.latents_shape(*size)


def test_the_config_is_strict():
    for values in ({"steps": 2.5}, {"guidance": 0.5}, {"solver": "heun"}):
        with pytest.raises(UserError, match=next(iter(values))):
            build_config(GenerateConfig, values)
    assert json.loads(GenerateConfig().model_dump_json())["steps"] == 50
