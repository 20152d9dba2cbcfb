"""Prompts to frames: everything between what is asked and the videos, for the command, for notebooks and in training.

In: prompts, and what is asked for all of them. Out: frames `(F, H, W, 3)` uint8 of each, with all that repeats it. The
one decision: `plan_generation` fills in and checks everything before anything is loaded; defaults belong to the model
that is named, and several processes must have come to the same. `Generation.load` reads the parts, the text encoder
first, which is gone before the transformer comes; `make_frames` takes parts that are in memory, whoever has read them.
Of several processes the first encodes and decodes, all share the denoising.
"""

import hashlib
import platform
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import wanloom
from wanloom.codecs.identity import encoder_identity
from wanloom.codecs.vae import VaeCodec
from wanloom.config import build_config
from wanloom.dist import check_alike, gather, pick_device, process_group, rank, together, world_size
from wanloom.errors import UserError
from wanloom.files import folder_for_one
from wanloom.geometry import Geometry
from wanloom.memory import check_memory, enough_memory
from wanloom.model.dit import WanDiT
from wanloom.model.kernels import resolve_kernel
from wanloom.model.sequence import grid_of
from wanloom.model.settings import DiTConfig
from wanloom.parallel.mesh import Layout, Mesh, resolve_layout
from wanloom.parallel.settings import ParallelConfig
from wanloom.runs.asked import Asked, check_asked, check_negative, how_to_sample
from wanloom.runs.model_files import ModelFiles, Placing, encode_texts, find_files, find_geometry, load_model
from wanloom.runs.results import find_done, write_result
from wanloom.sample.generate import Request, generate
from wanloom.sample.prompts import Prompt, fill_in
from wanloom.sample.settings import GenerateConfig, read_defaults
from wanloom.signals import StopSignal
from wanloom.terminal import note, plural

PACKAGES = ("torch", "diffusers", "transformers", "av")  # whose versions the frames may depend on
SAME_FILES = " Give all processes the same files, and one checkpoint by its own folder while its run goes on."
Shape = tuple[int, int, int, int]  # of latents, (C, F, H, W)


class LoadedParts(NamedTuple):
    """What a video is made with, in memory."""

    model: WanDiT  # the part of this process
    mesh: Mesh
    vae: VaeCodec | None  # on the first process
    text: Mapping[str, Tensor]  # states by prompt


@dataclass(frozen=True)
class Generation:
    """All that is decided before anything is loaded."""

    prompts: list[Prompt]  # complete
    shapes: list[Shape]  # of their latents
    fps: int
    config: GenerateConfig
    files: ModelFiles
    place: Placing

    @cached_property
    def facts(self) -> list[dict[str, Any]]:
        """All that repeats a video, for each prompt."""
        shared = describe(self.config, self.fps, self.files, self.place)
        return [{"name": prompt.name, **prompt.model_dump(), **shared} for prompt in self.prompts]

    @property
    def helps(self) -> list[str]:
        """What makes the largest video take less memory, the best first."""
        largest = max(self.prompts, key=lambda prompt: prompt.frames * prompt.height * prompt.width)
        helps = ["a smaller `height` and `width`"]
        if largest.frames > 1:
            helps.insert(largest.height * largest.width > 1280 * 720, f"fewer `frames` than {largest.frames}")
        on_gpu = self.place.device.type == "cuda"
        if self.place.precision == "fp32" and on_gpu:
            helps.append("`precision=bf16`")
        elif self.config.guidance != 1:
            helps.append("`guidance=1`, which is half of the work")
        if on_gpu:
            helps.append("`nproc` to spread it over several GPUs")
        return helps[:3]

    def load(self, tell: Callable[[str], None] = lambda line: None) -> LoadedParts:
        """The parts, on every process; `tell` gets a line on each step."""
        began = time.monotonic()
        helps = ["`precision=bf16`"] if self.place.precision == "fp32" else self.helps
        with enough_memory("load the model", helps):
            has_negative = self.config.guidance != 1
            prompts = dict.fromkeys(prompt.prompt for prompt in self.prompts)
            negatives = dict.fromkeys(prompt.negative for prompt in self.prompts) if has_negative else {}
            text = encode_texts(self.files, self.place, list(prompts | negatives))
            took = time.monotonic() - began
            both = ", negative ones included" if has_negative else ""
            tell(f"text: {plural(len(text), 'prompt')} encoded{both}, {took:.1f} s with loading")
            mesh = Mesh(self.place.layout, self.place.device)
            model = load_model(self.files, self.place, mesh)
            with together():
                vae = VaeCodec.load(self.files.pipeline, self.place.device) if rank() == 0 else None
        tell(f"model: loaded, {time.monotonic() - began - took:.1f} s")
        return LoadedParts(model, mesh, vae, text)

    def make(
        self,
        parts: LoadedParts | None = None,
        done: Collection[int] = (),
        on_step: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[Tensor | None, dict[str, Any]]]:
        """Yields frames and facts of every prompt that is not `done`, in order, each as soon as its pack is there.

        `on_step` gets the number of videos that moved a step. On all processes but the first there are no frames.
        """
        doing = f"make {len(self.prompts)} of {self.prompts[0].width}x{self.prompts[0].height}"
        with process_group():  # not with the plan: nobody can tell whether what is planned is ever made
            parts = parts or self.load()
            with enough_memory(doing, self.helps):
                made = make_frames(parts, self.prompts, self.shapes, self.config, done, on_step, self.helps)
                yield from ((frames, {} if frames is None else self.facts[i]) for i, frames in made)

    def write(
        self, parts: LoadedParts, out: Path, done: Collection[int], stop: StopSignal, on_step: Callable[[int], None]
    ) -> Iterator[tuple[Path | None, float]]:
        """As `make`, and writes the files of each: yields the first, and seconds since its last step.

        Raises KeyboardInterrupt for `stop`, which waits while files are written: all of a video are there or none.
        """
        mark = time.monotonic()  # when the last step was done, or the last result

        def moved(number: int) -> None:
            nonlocal mark
            mark = time.monotonic()
            on_step(number)
            if stop.has_cut:  # and a library has swallowed what was raised
                raise KeyboardInterrupt

        for frames, facts in self.make(parts, done, moved):
            path = None
            with together():
                if frames is not None:
                    stop.is_patient = True
                    path = write_result(out, frames, facts)
                    stop.is_patient = False
            yield path, time.monotonic() - mark
            if stop.received:
                raise KeyboardInterrupt
            mark = time.monotonic()


@contextmanager
def hold_results(out: Path, facts: list[dict[str, Any]], overwrite: bool) -> Iterator[list[int]]:
    """The folder of the results, for this call alone; yields which of them are there already.

    Raises UserError, on all processes, when another call has the folder, or other files are in the way.
    """
    taken = f"Another `wanloom generate` writes into {out}: wait for it, or give another `out`."
    with ExitStack() as held:
        done = []
        with together():
            if rank() == 0:
                held.enter_context(folder_for_one(out, taken))
                done = find_done(out, facts, overwrite)
        yield gather(done)[0]


def make_frames(
    parts: LoadedParts,
    prompts: Sequence[Prompt],
    shapes: Sequence[Shape],
    config: GenerateConfig,
    done: Collection[int] = (),
    on_step: Callable[[int], None] | None = None,
    helps: Sequence[str] = (),
) -> Iterator[tuple[int, Tensor | None]]:
    """Yields (index of the prompt, frames) with a model that is in memory; every process of its mesh calls it.

    Raises UserError for what would be a black video, and when the memory does not suffice to decode.
    """
    text = parts.text
    requests = [
        Request(shape, prompt.seed, text[prompt.prompt], text.get(prompt.negative, text[prompt.prompt]))
        for prompt, shape in zip(prompts, shapes, strict=True)  # the negative one is not read without guidance
    ]
    for i, latents in generate(parts.model, requests, config, on_step, parts.mesh, done):
        with together():
            frames = decode(parts.vae, prompts[i], latents, helps) if parts.vae else None
        yield i, frames


def decode(vae: VaeCodec, prompt: Prompt, latents: Tensor, helps: Sequence[str]) -> Tensor:
    """The frames of one prompt."""
    try:
        with enough_memory(f"decode {prompt.frames} frames of {prompt.width}x{prompt.height}", helps):
            return vae.decode(latents)
    except UserError as error:
        raise UserError(f"'{prompt.name}' cannot be decoded: {error}") from error


def start(
    prompts: str | Prompt | Sequence[str | Prompt], settings: Mapping[str, Any]
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Frames and facts of prompts, on the first of several ranks. Raises UserError, at once, for what cannot be."""
    several = [prompts] if isinstance(prompts, str | Prompt) else prompts
    words = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    complete = [Prompt(prompt=one) if isinstance(one, str) else one for one in several]
    asked = build_config(Asked, words)
    with process_group():
        generation = plan_generation(complete, asked)
    return ((frames, facts) for frames, facts in generation.make() if frames is not None)


def plan_generation(prompts: Sequence[Prompt], asked: Asked) -> Generation:
    """Fill in the defaults. Raises UserError, on all processes, for what can be seen to be wrong."""
    check_asked(prompts, asked)
    with together():
        files = find_files(asked)
        own = read_defaults(files.pipeline, files.weights.config)
        config = how_to_sample(asked, own)
        check_negative(prompts, asked, config.guidance)  # the guidance may be the model's
        sizes = {name: getattr(asked, name) or getattr(own, name) for name in ("height", "width", "frames")}
        if None in sizes.values():
            raise UserError(
                f"'{files.name}' is of no known size, so nothing can be assumed: give `height`, `width` and `frames`."
            )
        complete = fill_in(prompts, asked.seed, {"negative": asked.negative or "", **sizes})
        geometry = find_geometry(files)
        shapes = [shape_of(prompt, geometry) for prompt in complete]
        place = place_model(asked, config.guidance, files.weights.config)
        generation = Generation(complete, shapes, asked.fps or geometry.fps, config, files, place)
        check_room(generation)
    words = hashlib.sha256(repr(complete).encode()).hexdigest()[:16]
    own = {"the list of prompts": words, "the transformer": files.weights.identity}
    own |= {"the device": place.device.type, "the precision": place.precision, "the kernel": place.kernel}
    check_alike(own, "videos", SAME_FILES)  # each has read the files by itself
    return generation


def shape_of(prompt: Prompt, geometry: Geometry) -> Shape:
    """Of its latents. Raises UserError for a size that cannot be, with the line that asks for it."""
    if not prompt.prompt.strip():
        note(f"the prompt of '{prompt.name}' is empty, so it shows anything.")
    try:
        return geometry.latents_shape(prompt.frames, prompt.height, prompt.width)
    except UserError as error:
        raise UserError(f"{prompt.where}: {error}" if prompt.where else str(error)) from error


def place_model(asked: Asked, guidance: float, model: DiTConfig) -> Placing:
    """Where it is computed. Raises UserError for a device, a kernel or processes that cannot."""
    if world_size() > 1 and ":" in (asked.device or ""):
        raise UserError(f"`device={asked.device}` is one device, and each process takes its own: leave it out.")
    device = pick_device(asked.device)
    precision = asked.precision or ("bf16" if device.type == "cuda" else "fp32")
    layout = share_work(asked.tp, asked.cfg_parallel, guidance, model)
    kernel = resolve_kernel(asked.kernel, device.type, torch.bfloat16 if precision == "bf16" else torch.float32)
    return Placing(layout, device, precision, kernel)


def share_work(tp: int, branches: int | None, guidance: float, model: DiTConfig) -> Layout:
    """How the processes share the work: the branches are data ranks, and what is left shares the tokens."""
    world = world_size()
    if world % tp:
        raise UserError(f"`tp={tp}` does not divide the number of processes, which is {world}: `nproc` changes it.")
    if branches == 2 and guidance == 1:
        raise UserError(
            "`cfg_parallel=2` has no effect with `guidance=1`, which has one branch: leave one of them out."
        )
    ranks = world // tp
    if branches is None:
        branches = 1 if guidance == 1 or ranks % 2 else 2
    if ranks % branches:
        raise UserError(
            f"`cfg_parallel=2` needs two groups of equal size, which {world} processes with `tp={tp}` are not: use "
            "another number of processes, or `cfg_parallel=1`."
        )
    try:
        return resolve_layout(ParallelConfig(dp_shard=branches, cp=ranks // branches, tp=tp), world, model)
    except UserError as error:
        raise UserError(re.sub(r"parallel\.(tp=\d+)", r"`\1`", str(error))) from error


def check_room(generation: Generation) -> None:
    """Raises UserError when the largest video cannot be made in the memory there is: nothing is loaded yet."""
    pixels = [prompt.frames * prompt.height * prompt.width for prompt in generation.prompts]
    largest = pixels.index(max(pixels))
    prompt, (frames, rows, columns) = generation.prompts[largest], grid_of(generation.shapes[largest])
    place, model = generation.place, generation.files.weights.config
    tokens = frames * rows * columns * (1 if generation.config.guidance == 1 else 2)
    # the residual stream, its normed copy, and the hidden layer of the feed-forward
    denoising = tokens * (8 * model.dim + place.dtype.itemsize * model.ffn_dim) // place.layout.world
    decoding = pixels[largest] * 3 * (4 + 4 + 1)  # fp32 pixels, those before they grew, bytes
    doing = f"make {prompt.frames} frames of {prompt.width}x{prompt.height}"
    check_memory(max(denoising, decoding), str(place.device), doing, generation.helps)


def describe(config: GenerateConfig, fps: int, files: ModelFiles, place: Placing) -> dict[str, Any]:
    """What the facts of all videos of a call share."""
    layout = place.layout
    return {
        **config.model_dump(),
        "fps": fps,
        "model": files.name,
        "checkpoint": str(files.checkpoint.resolve()) if files.checkpoint else None,
        "step": files.weights.step,
        "ema": files.ema,
        "identity": {
            "transformer": files.weights.identity,
            "text_encoder": encoder_identity(files.pipeline, "text-encoder"),
            "vae": encoder_identity(files.pipeline, "vae"),
        },
        "precision": place.precision,
        "kernel": place.kernel,
        "device": place.device.type if layout.world > 1 else str(place.device),
        "processes": {
            "number": layout.world,
            "cfg_parallel": layout.data_ranks,
            "cp_ring": layout.cp_ring,
            "cp_ulysses": layout.cp_ulysses,
            "tp": layout.tp,
        },
        "versions": {
            "wanloom": wanloom.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
    }
