"""`wanloom generate`: prompts to videos, with everything that repeats them beside each."""

import argparse
import gc
import json
import platform
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import wanloom
from wanloom.cli import launch
from wanloom.config import UserError, build_config

if TYPE_CHECKING:  # torch is imported only when the command runs
    import torch
    from torch import Tensor

    from wanloom.codecs.vae import VaeCodec
    from wanloom.model.dit import DiTConfig, WanDiT
    from wanloom.recipes.trained import Trained
    from wanloom.sample.generate import GenerateConfig
    from wanloom.sample.prompts import Job, PromptLine

HELP = """Make videos, or images with --frames 1, from prompts.

  wanloom generate --checkpoint runs/first --prompt "A red circle moves to the left."
  wanloom generate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts prompts.txt --out videos

Each prompt gives NNN-words.mp4 (H.264), a contact sheet NNN-words.png and NNN-words.json with everything that is needed
to make it again; an image gives the .png and the .json. Small videos share calls of the model: the same call gives the
same bytes again, a video made alone equals the one made in company within rounding.
"""


class Sizes(NamedTuple):
    """What a model makes when nothing else is asked for."""

    height: int
    width: int
    frames: int
    shift: float | None  # None is left to GenerateConfig


# by the name of the config in model/dit.py: tiny as the demo trains it, the others as Wan's own code has them
DEFAULTS = {
    "tiny": Sizes(64, 64, 17, 3.0),
    "wan2.1-t2v-1.3b": Sizes(480, 832, 81, 5.0),
    "wan2.1-t2v-14b": Sizes(720, 1280, 81, 5.0),
}
PARTS = ("text_encoder", "tokenizer", "vae")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="`tiny`, a diffusers folder or a hub name; default: that of the checkpoint's run, else tiny")
    add("--checkpoint", type=Path, metavar="RUN_OR_STEP", help="trained weights: a run (its newest) or one checkpoint")
    add("--ema", action="store_true", help="the averaged weights of the checkpoint")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    prompts.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a text file with one prompt a line, or .jsonl with `prompt` and, where wanted, `negative`, `seed`, "
        "`height`, `width`, `frames`",
    )
    sizes = ", ".join(f"{s.height}x{s.width}x{s.frames} for {name}" for name, s in DEFAULTS.items())
    add("--height", type=int, help=f"pixels, a multiple of 16; default {sizes}")
    add("--width", type=int, help="pixels, a multiple of 16")
    add("--frames", type=int, help="4n+1; 1 makes an image")
    add("--fps", type=int, default=16, help="frames a second of the file, default 16")
    # without a default here: what is not given is left to GenerateConfig, or to the model
    add("--steps", type=int, help="default 50")
    add("--solver", choices=("unipc", "dpm++", "euler"), help="default unipc")
    add("--shift", type=float, help="more of the steps at high noise; default 5, for tiny 3")
    add("--guidance", type=float, help="default 5; 1 leaves the negative prompt out and halves the work")
    add("--negative", help="what not to show; default: the empty prompt (Wan's own code has a long Chinese one)")
    add("--seed", type=int, default=0, help="of the first prompt, each next one has one more; default 0")
    add(
        "--precision",
        choices=("fp32", "bf16"),
        help="of transformer and text encoder; default bf16 on a GPU, else fp32",
    )
    add("--kernel", default="auto", help="of attention: cudnn, flash, efficient or auto, the default")
    add("--device", help="such as cpu or cuda:1; default: the first GPU where there is one")
    add("--out", type=Path, default=Path("generated"), help="folder, default: generated")
    add("--overwrite", action="store_true", help="replace files of the same name")
    launch.add_arguments(parser, restarts=False)


class Plan(NamedTuple):
    """All that is decided before anything is computed."""

    pipeline: Path
    model_name: str
    trained: "Trained | None"
    ema: bool
    model_config: "DiTConfig"
    config: "GenerateConfig"
    jobs: "list[Job]"
    fps: int
    device: "torch.device"
    precision: str
    kernel: str
    out: Path

    @property
    def dtype(self) -> "torch.dtype":
        import torch

        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def run(arguments: argparse.Namespace) -> int:
    began = time.monotonic()
    plan = build_plan(arguments)
    check_outputs(plan, arguments.overwrite)
    print(
        f"{plan.model_name} on {plan.device} in {plan.precision}, attention by {plan.kernel}: "
        f"{len(plan.jobs)} to make with {plan.config.steps} steps of {plan.config.solver}",
        flush=True,
    )
    text, text_identity = encode_texts(plan)
    took = time.monotonic() - began
    print(f"text: {len(text)} prompts encoded, negative ones included, {took:.1f} s with loading", flush=True)
    model, vae = load_model(plan)
    facts = describe(plan, text_identity, vae.identity)
    denoise, decode = make_all(plan, model, vae, text, facts)
    print(
        f"{len(plan.jobs)} in {plan.out}: denoising {denoise:.1f} s, decoding and writing {decode:.1f} s, "
        f"all {time.monotonic() - began:.1f} s"
    )
    return 0


def build_plan(arguments: argparse.Namespace) -> Plan:
    """Read the prompts and fill in the defaults. Raises UserError for what can be seen to be wrong."""
    import torch

    from wanloom.assets import find_pipeline
    from wanloom.dist import pick_device
    from wanloom.model.kernels import resolve_kernel
    from wanloom.model.weights import read_config
    from wanloom.recipes.trained import open_trained
    from wanloom.sample.generate import latents_shape
    from wanloom.sample.prompts import PromptLine, build_jobs, read_prompts
    from wanloom.sample.solvers import build_solver

    check_arguments(arguments)
    trained = open_trained(arguments.checkpoint, arguments.ema) if arguments.checkpoint else None
    name = arguments.model or (trained.model if trained else "tiny")
    pipeline = find_pipeline(name, PARTS if trained else (*PARTS, "transformer"))
    model_config = trained.config if trained else read_config(pipeline)
    sizes = fill_sizes(arguments, model_config, name)
    config = read_config_of(arguments, sizes.shift)
    lines = read_prompts(arguments.prompts) if arguments.prompts else [PromptLine(prompt=p) for p in arguments.prompt]
    check_negative(arguments, config, lines)
    jobs = build_jobs(lines, arguments.negative or "", arguments.seed, sizes.height, sizes.width, sizes.frames)
    for job in jobs:
        latents_shape(model_config.in_channels, job.frames, job.height, job.width)
    build_solver(config.solver, config.steps, config.shift)
    device = pick_device(arguments.device)
    precision = arguments.precision or ("bf16" if device.type == "cuda" else "fp32")
    return Plan(
        pipeline=pipeline,
        model_name=str(Path(name).resolve()) if name != "tiny" and Path(name).exists() else name,
        trained=trained,
        ema=arguments.ema,
        model_config=model_config,
        config=config,
        jobs=jobs,
        fps=arguments.fps,
        device=device,
        precision=precision,
        kernel=resolve_kernel(arguments.kernel, device.type, torch.bfloat16 if precision == "bf16" else torch.float32),
        out=arguments.out,
    )


def check_arguments(arguments: argparse.Namespace) -> None:
    if arguments.ema and not arguments.checkpoint:
        raise UserError("--ema asks for the averaged weights of a run: give the run with --checkpoint.")
    if arguments.fps < 1:
        raise UserError(f"--fps is {arguments.fps}, it must be at least 1.")


def read_config_of(arguments: argparse.Namespace, shift: float | None) -> "GenerateConfig":
    """How to sample; what was not given keeps the default of the config."""
    from wanloom.sample.generate import GenerateConfig

    asked = {name: getattr(arguments, name) for name in ("solver", "steps", "guidance")} | {"shift": shift}
    return build_config(GenerateConfig, {name: value for name, value in asked.items() if value is not None})


def check_negative(arguments: argparse.Namespace, config: "GenerateConfig", lines: "list[PromptLine]") -> None:
    """Raises UserError when there is a negative prompt that nothing would read."""
    if config.guidance != 1:
        return
    if arguments.negative is not None:
        raise UserError("--negative has no effect with --guidance 1: leave one of them out.")
    given = [line.prompt for line in lines if line.negative is not None]
    if given:
        raise UserError(
            f"The `negative` of the prompt '{given[0][:60]}' has no effect with --guidance 1: leave one of them out."
        )


def fill_sizes(arguments: argparse.Namespace, model_config: "DiTConfig", name: str) -> Sizes:
    """Asked sizes, completed by the defaults of the model. Raises UserError where a model has none."""
    from wanloom.model.dit import CONFIGS

    known = next((DEFAULTS.get(key) for key, config in CONFIGS.items() if config == model_config), None)
    asked = (arguments.height, arguments.width, arguments.frames)
    if known is None and None in asked:
        raise UserError(
            f"'{name}' is of no known size, so nothing can be assumed: give --height, --width and --frames."
        )
    height, width, frames, shift = known or Sizes(*asked, None)
    if (arguments.height is None) != (arguments.width is None):
        raise UserError("--height and --width belong together: give both or neither.")
    return Sizes(
        height if arguments.height is None else arguments.height,
        width if arguments.width is None else arguments.width,
        frames if arguments.frames is None else arguments.frames,
        shift if arguments.shift is None else arguments.shift,
    )


def check_outputs(plan: Plan, overwrite: bool) -> None:
    """Raises UserError when a file that would be written is there, or the folder cannot be made."""
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder '{plan.out}' cannot be made: {error.strerror}.") from error
    there = [path for job in plan.jobs for path in outputs_of(plan, job) if path.exists()]
    if there and not overwrite:
        raise UserError(
            f"{len(there)} of the files are there already, such as {there[0]}: give another --out, or --overwrite."
        )


def outputs_of(plan: Plan, job: "Job") -> list[Path]:
    suffixes = (".png", ".json") if job.frames == 1 else (".mp4", ".png", ".json")
    return [plan.out / f"{job.name}{suffix}" for suffix in suffixes]


def encode_texts(plan: Plan) -> "tuple[dict[str, Tensor], str]":
    """States of every different prompt, and which encoder made them; the encoder is freed on return."""
    import torch

    from wanloom.codecs.text import TextCodec

    codec = TextCodec.load(plan.pipeline, plan.device, plan.dtype)
    if codec.dim != plan.model_config.text_dim:
        raise UserError(
            f"The text encoder of '{plan.model_name}' gives states of {codec.dim} numbers, the transformer takes "
            f"{plan.model_config.text_dim}: they do not belong together."
        )
    slots = plan.model_config.text_slots
    prompts = list(dict.fromkeys(text for job in plan.jobs for text in (job.prompt, job.negative)))
    for prompt in prompts:
        count = codec.count_tokens(prompt)
        if count > slots:
            print(f"note: of {count} tokens only the first {slots} are used: {prompt[:60]}...", file=sys.stderr)
    states = dict(zip(prompts, codec.encode(prompts, slots), strict=True))
    identity = codec.identity
    del codec
    gc.collect()  # the encoder holds itself in cycles
    if plan.device.type == "cuda":
        torch.cuda.empty_cache()
    return states, identity


def load_model(plan: Plan) -> "tuple[WanDiT, VaeCodec]":
    from wanloom.codecs.vae import VaeCodec
    from wanloom.model.weights import load_dit

    if plan.trained:
        model = plan.trained.load_model(plan.ema, plan.dtype, plan.device, plan.kernel)
    else:
        model = load_dit(plan.pipeline, plan.dtype, plan.device, plan.kernel)
        if not model.head.head.weight.any():
            print(f"note: the transformer of '{plan.model_name}' is untrained, it will give noise", file=sys.stderr)
    vae = VaeCodec.load(plan.pipeline, plan.device)
    if vae.channels != plan.model_config.in_channels:
        raise UserError(
            f"The VAE of '{plan.model_name}' has {vae.channels} channels, the transformer takes "
            f"{plan.model_config.in_channels}: they do not belong together."
        )
    return model.eval().requires_grad_(False), vae


def describe(plan: Plan, text_identity: str, vae_identity: str) -> dict[str, Any]:
    """What all results of this call share, for their json."""
    from wanloom.codecs.identity import folder_identity

    trained = plan.trained
    transformer = trained.identity if trained else folder_identity(plan.pipeline / "transformer")
    packages = ("torch", "diffusers", "transformers", "av")
    return {
        **plan.config.model_dump(),
        "fps": plan.fps,
        "model": plan.model_name,
        "checkpoint": str(trained.path.resolve()) if trained else None,
        "step": trained.step if trained else None,
        "ema": plan.ema,
        "identity": {"transformer": transformer, "text_encoder": text_identity, "vae": vae_identity},
        "precision": plan.precision,
        "kernel": plan.kernel,
        "device": str(plan.device),
        "versions": {
            "wanloom": wanloom.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
    }


def make_all(
    plan: Plan, model: "WanDiT", vae: "VaeCodec", text: "dict[str, Tensor]", facts: dict[str, Any]
) -> tuple[float, float]:
    """Generate and write every job, each as soon as its pack is done; returns seconds of denoising and of the rest."""
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from wanloom.sample.generate import Request, draw_request_noise, generate, latents_shape

    channels = plan.model_config.in_channels
    requests = [
        Request(
            draw_request_noise(latents_shape(channels, job.frames, job.height, job.width), job.seed),
            text[job.prompt],
            text[job.negative],
        )
        for job in plan.jobs
    ]
    console = Console(stderr=True)
    done, writing, began = 0, 0.0, time.monotonic()
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("denoising", total=len(requests) * plan.config.steps)
            for index, latents in generate(model, requests, plan.config, lambda n: progress.advance(task, n)):
                start = time.monotonic()
                write_result(plan, plan.jobs[index], vae.decode(latents), facts)
                done += 1
                writing += time.monotonic() - start
    except KeyboardInterrupt:
        print(f"\n{done} of {len(requests)} are written to {plan.out}.", file=sys.stderr)
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"The memory of {plan.device} is not enough: make it smaller with --height, --width or --frames"
            + (", or use --precision bf16." if plan.precision == "fp32" else ".")
        ) from error
    return time.monotonic() - began - writing, writing


def write_result(plan: Plan, job: "Job", frames: "Tensor", facts: dict[str, Any]) -> None:
    """The files of one job, the json last: where it is, the others are whole."""
    from wanloom.files import write_atomic
    from wanloom.sample.media import write_mp4, write_png, write_sheet

    *media, note = outputs_of(plan, job)
    try:
        if job.frames == 1:
            write_png(media[0], frames[0])
        else:
            write_mp4(media[0], frames, plan.fps)
            write_sheet(media[1], frames)
        own = {key: value for key, value in vars(job).items() if key != "name"}
        content = {**own, **facts, "files": [path.name for path in media], "command": command_of(job, facts)}
        write_atomic(note, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise UserError(f"'{note.with_suffix('')}' cannot be written: {error.strerror or error}.") from error


def command_of(job: "Job", facts: dict[str, Any]) -> str:
    """The command line that makes this one result again."""
    words = ["wanloom", "generate", "--model", facts["model"]]
    if facts["checkpoint"]:
        words += ["--checkpoint", facts["checkpoint"], *(["--ema"] if facts["ema"] else [])]
    words.append(f"--prompt={job.prompt}")
    if facts["guidance"] != 1:
        words.append(f"--negative={job.negative}")
    for key in ("seed", "height", "width", "frames"):
        words += [f"--{key}", str(getattr(job, key))]
    for key in ("fps", "solver", "steps", "shift", "guidance", "precision", "kernel", "device"):
        words += [f"--{key}", str(facts[key])]
    return shlex.join(words)
