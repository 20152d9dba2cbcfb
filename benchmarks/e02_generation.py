"""E2: seconds for a generated video or image, prompt to frames, against diffusers' WanPipeline.

Both have the tiny pipeline with the same weights, prompt, negative prompt, noise, solver (UniPC, shift 5), number of
steps and guidance, in fp32. First the latents are found equal to 1e-3, and the pictures to 1 of 255 levels, as rounding
to levels may fall to the other side. The timed region is all of it: text encoding, steps, VAE decoding. Four images at
once are one pack for wanloom and a batch for WanPipeline.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Row, main, take_turns
from wanloom.codecs.text import TextCodec
from wanloom.codecs.vae import VaeCodec
from wanloom.formats.pipeline import find_pipeline
from wanloom.formats.transformer import load_dit
from wanloom.geometry import WAN_21
from wanloom.parallel.mesh import ONE_PROCESS, Mesh
from wanloom.runs.generate import LoadedParts, make_frames
from wanloom.sample.generate import Request, draw_request_noise, generate
from wanloom.sample.prompts import Prompt
from wanloom.sample.settings import GenerateConfig
from wanloom.sample.solvers import build_scheduler

PROMPT = "A red circle moves to the left across a dark background."
NEGATIVE = "a cat in snow"
GUIDANCE, SHIFT = 5.0, 5.0
BOUND = 1e-3
LEVELS = 1.0
Size = tuple[int, int, int]  # frames, height, width


def build_ours(steps: int, count: int, size: Size) -> Callable[[bool], list[Tensor]]:
    """Makes latents, or frames `(F, H, W, 3)`, as `wanloom generate` does with a model in memory."""
    folder = find_pipeline("tiny", ("transformer", "vae", "text_encoder", "tokenizer"))
    codec, model = TextCodec.load(folder, "cpu"), load_dit(folder)
    mesh, vae = Mesh(ONE_PROCESS, torch.device("cpu")), VaeCodec.load(folder, "cpu")
    config = GenerateConfig(steps=steps, guidance=GUIDANCE, shift=SHIFT)
    frames, height, width = size
    of_each = {"prompt": PROMPT, "negative": NEGATIVE, "frames": frames, "height": height, "width": width}
    prompts = [Prompt(**of_each, seed=seed) for seed in range(count)]
    shapes = [WAN_21.latents_shape(*size)] * count

    def run(decode: bool) -> list[Tensor]:
        text = dict(zip((PROMPT, NEGATIVE), codec.encode([PROMPT, NEGATIVE]), strict=True))
        if decode:
            parts = LoadedParts(model, mesh, vae, text)
            return [made for _, made in make_frames(parts, prompts, shapes, config) if made is not None]
        requests = [Request(shape, seed, text[PROMPT], text[NEGATIVE]) for seed, shape in enumerate(shapes)]
        return [latents for _, latents in generate(model, requests, config)]

    return run


def build_theirs(steps: int, noises: list[Tensor], size: Size) -> Callable[[bool], Any]:
    """The same by WanPipeline."""
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(find_pipeline("tiny", ("transformer", "vae", "text_encoder", "tokenizer")))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = build_scheduler("unipc", SHIFT)
    frames, height, width = size

    def run(decode: bool) -> Any:
        return pipe(
            [PROMPT] * len(noises),
            negative_prompt=[NEGATIVE] * len(noises),
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            latents=torch.stack(noises),
            output_type="np" if decode else "latent",
        ).frames

    return run


def compare(what: str, size: Size, count: int, steps: int, rounds: int) -> Row:
    """Seconds of one video."""
    noises = [draw_request_noise(WAN_21.latents_shape(*size), seed) for seed in range(count)]
    ours, theirs = build_ours(steps, count, size), build_theirs(steps, noises, size)
    off = 0.0
    for got, want in zip(ours(False), theirs(False), strict=True):
        off = max(off, ((got - want).abs().max() / want.abs().max()).item())
    assert off < BOUND, off
    pictures = torch.stack(ours(True)).float()
    levels = (pictures - (torch.from_numpy(theirs(True)) * 255).round()).abs().max().item()
    assert levels <= LEVELS, levels
    taken = take_turns({"WanPipeline": lambda: theirs(True), "wanloom": lambda: ours(True)}, rounds)
    each = {name: [seconds / count for seconds in values] for name, values in taken.items()}
    checked = f"latents within {off:.1e}, pictures within {levels:g} of 255 levels"
    return Row("E2", what, "s", each["wanloom"], "WanPipeline", each["WanPipeline"], checked=checked)


def measure(toy: bool) -> list[Row]:
    """Seconds of a video and of an image, the tiny pipeline, equal steps."""
    steps, rounds = (2, 2) if toy else (20, 7)
    rows = [compare("an image of 64x64", (1, 64, 64), 1, steps, rounds)]
    if not toy:
        rows.append(compare("a video of 17 frames of 96x160", (17, 96, 160), 1, steps, rounds))
        rows.append(compare("each of four images of 64x64", (1, 64, 64), 4, steps, rounds))
    return rows


if __name__ == "__main__":
    main(__spec__, measure)
