"""`wanloom generate`: prompts to videos, with everything that repeats them beside each."""

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanloom.cli import launch
from wanloom.cli.generate_files import check_outputs, describe, write_result
from wanloom.cli.generate_plan import DEFAULTS, Plan, build_plan, check_alike
from wanloom.config import UserError
from wanloom.terminal import Terminal, say

if TYPE_CHECKING:  # torch is imported only when the command runs
    from torch import Tensor

    from wanloom.codecs.vae import VaeCodec
    from wanloom.model.dit import WanDiT
    from wanloom.parallel.mesh import Mesh
    from wanloom.sample.prompts import Job

HELP = """Make videos, or images with --frames 1, from prompts.

  wanloom generate --checkpoint runs/first --prompt "A red circle moves to the left."
  wanloom generate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts prompts.txt --out videos

Each prompt gives NNN-words.mp4 (H.264), a contact sheet NNN-words.png and NNN-words.json with everything that is needed
to make it again; an image gives the .png and the .json. Small videos share calls of the model: the same call gives the
same bytes again, a video made alone equals the one made in company within rounding. With --nproc several processes make
each video together: the same one within rounding.
"""


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
    add("--tp", type=int, default=1, metavar="N", help="split every layer over N of the processes; default 1")
    add(
        "--cfg-parallel",
        type=int,
        choices=(1, 2),
        help="2 computes the two branches of guidance on two groups of processes; default 2 where both can be had",
    )
    launch.add_arguments(parser, restarts=False)


def run(arguments: argparse.Namespace) -> int:
    """Make everything; rank 0 encodes, decodes, writes and prints, all share the denoising."""
    began = time.monotonic()
    from wanloom.dist import rank, together
    from wanloom.parallel.mesh import Mesh

    is_first = rank() == 0
    with together():
        plan = build_plan(arguments)
        if is_first:
            check_outputs(plan, arguments.overwrite)
    check_alike(plan)
    say = partial(print) if is_first else lambda _: None
    say(
        f"{plan.model_name} on {plan.where} in {plan.precision}, attention by {plan.kernel}: "
        f"{len(plan.jobs)} to make with {plan.config.steps} steps of {plan.config.solver}"
    )
    with together():
        text, text_identity = encode_texts(plan) if is_first else ([], "")
    text = hand_out(plan, text)
    took = time.monotonic() - began
    say(f"text: {len(text)} prompts encoded, negative ones included, {took:.1f} s with loading")
    mesh = Mesh(plan.layout, plan.device)
    model = load_model(plan, mesh)
    with together():
        vae = load_vae(plan) if is_first else None
        facts = describe(plan, text_identity, vae.identity) if vae else {}
    say(f"model: loaded, {time.monotonic() - began - took:.1f} s")
    denoise, decode = make_all(plan, mesh, model, vae, text, facts)
    say(
        f"{len(plan.jobs)} in {plan.out}: denoising {denoise:.1f} s, decoding and writing {decode:.1f} s, "
        f"all {time.monotonic() - began:.1f} s"
    )
    return 0


def encode_texts(plan: Plan) -> "tuple[list[Tensor], str]":
    """States of every one of the prompts, and which encoder made them; the encoder is freed on return."""
    import torch

    from wanloom.codecs.text import TextCodec

    codec = TextCodec.load(plan.pipeline, plan.device, plan.dtype)
    if codec.dim != plan.model_config.text_dim:
        raise UserError(
            f"The text encoder of '{plan.model_name}' gives states of {codec.dim} numbers, the transformer takes "
            f"{plan.model_config.text_dim}: they do not belong together."
        )
    slots = plan.model_config.text_slots
    for prompt in plan.prompts:
        count = codec.count_tokens(prompt)
        if count > slots:
            say(f"note: of {count} tokens only the first {slots} are used: {prompt[:60]}...", file=sys.stderr)
    states = codec.encode(plan.prompts, slots)
    identity = codec.identity
    del codec
    gc.collect()  # the encoder holds itself in cycles
    if plan.device.type == "cuda":
        torch.cuda.empty_cache()
    return states, identity


def hand_out(plan: Plan, states: "list[Tensor]") -> "dict[str, Tensor]":
    """The states of rank 0 by prompt, on every rank: the encoder may be several times as large as the transformer."""
    import torch

    from wanloom.dist import gather, rank

    if plan.layout.world > 1:
        lens = gather([len(x) for x in states])[0]
        empty = torch.empty(sum(lens), plan.model_config.text_dim, dtype=plan.dtype)
        flat = torch.cat(states).to(plan.dtype) if rank() == 0 else empty
        torch.distributed.broadcast(flat.view(torch.uint8), 0)  # bytes: not every gloo knows bf16
        states = list(flat.split(lens))
    return dict(zip(plan.prompts, states, strict=True))


def load_model(plan: Plan, mesh: "Mesh") -> "WanDiT":
    """The part of the transformer that is this process's: `--tp` splits it, and FSDP what that leaves."""
    from wanloom.dist import rank, together
    from wanloom.model.weights import load_dit
    from wanloom.parallel import params
    from wanloom.parallel.apply import apply_layout

    def apply(model: "WanDiT") -> None:
        apply_layout(model, mesh, bf16=False)  # the weights themselves are bf16 where that is the precision

    if plan.trained:
        model = plan.trained.load_model(plan.ema, plan.dtype, plan.device, plan.kernel, apply)
    else:
        with together():
            model = load_dit(plan.pipeline, plan.dtype, plan.device, plan.kernel, apply, params.fill)
        if rank() == 0 and not params.local(model.head.head.weight).any():
            say(f"note: the transformer of '{plan.model_name}' is untrained, it will give noise", file=sys.stderr)
    return model.eval().requires_grad_(False)


def load_vae(plan: Plan) -> "VaeCodec":
    from wanloom.codecs.vae import VaeCodec

    vae = VaeCodec.load(plan.pipeline, plan.device)
    if vae.channels != plan.model_config.in_channels:
        raise UserError(
            f"The VAE of '{plan.model_name}' has {vae.channels} channels, the transformer takes "
            f"{plan.model_config.in_channels}: they do not belong together."
        )
    return vae


def make_all(
    plan: Plan, mesh: "Mesh", model: "WanDiT", vae: "VaeCodec | None", text: "dict[str, Tensor]", facts: dict[str, Any]
) -> tuple[float, float]:
    """Generate every job and, where the VAE is, write each as soon as its pack is done.

    Returns seconds of denoising and of the rest.
    """
    done, writing, began = 0, 0.0, time.monotonic()
    try:
        from rich.progress import Progress

        from wanloom.dist import together
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
        console = Terminal(stderr=True)
        quiet = vae is None or not console.is_terminal
        with Progress(console=console, transient=True, disable=quiet) as progress, enough_memory(plan):
            task = progress.add_task("denoising", total=len(requests) * plan.config.steps)
            for index, latents in generate(model, requests, plan.config, lambda n: progress.advance(task, n), mesh):
                start = time.monotonic()
                with together(), enough_memory(plan):
                    if vae is not None:
                        write_result(plan, plan.jobs[index], decode_one(plan.jobs[index], vae, latents), facts)
                done += 1
                writing += time.monotonic() - start
    except KeyboardInterrupt:
        if vae is not None:
            say(f"\n{done} of {len(plan.jobs)} are written to {plan.out}.", file=sys.stderr)
        raise
    return time.monotonic() - began - writing, writing


def decode_one(job: "Job", vae: "VaeCodec", latents: "Tensor") -> "Tensor":
    """Frames. Raises UserError for what would be a black video."""
    try:
        return vae.decode(latents)
    except UserError as error:
        raise UserError(
            f"'{job.name}' cannot be decoded: {error} A lower --guidance or more --steps may help."
        ) from error


@contextmanager
def enough_memory(plan: Plan) -> Iterator[None]:
    """Raises UserError with what helps when there is not."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"The memory of {plan.device} is not enough: make it smaller with --height, --width or --frames"
            + (", or use --precision bf16." if plan.precision == "fp32" else ".")
        ) from error
