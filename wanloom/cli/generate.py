"""`wanloom generate`: prompts to videos, with everything that repeats them beside each."""

import argparse
import gc
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from wanloom.cli import launch
from wanloom.cli.generate_files import describe, find_done, write_result
from wanloom.cli.generate_plan import FPS, Plan, build_plan, check_alike, check_words, helps_of
from wanloom.errors import UserError, cut
from wanloom.files import folder_for_one
from wanloom.memory import enough_memory
from wanloom.signals import StopSignal
from wanloom.terminal import Terminal, note, plural, say

if TYPE_CHECKING:  # torch is imported only when the command runs
    from torch import Tensor

    from wanloom.codecs.vae import VaeCodec
    from wanloom.model.dit import WanDiT
    from wanloom.parallel.mesh import Mesh

HELP = """Make videos, or images with --frames 1, from prompts.

  wanloom generate --checkpoint runs/first --prompt "A red circle moves to the left."
  wanloom generate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts prompts.txt --out videos

Each prompt gives NNN-words.mp4 (H.264), a contact sheet NNN-words.png and NNN-words.json with everything that is needed
to make it again; an image gives the .png and the .json. Small videos share calls of the model: the same call gives the
same bytes again, a video made alone equals the one made in company within rounding. With --nproc several processes make
each video together: the same one within rounding. What a call that was stopped has made is kept, and the same command
makes the rest.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="`tiny`, a diffusers folder or a hub name; default: that of the weights' run, else tiny")
    add(
        "--checkpoint",
        type=Path,
        metavar="WEIGHTS",
        help="trained weights: a run (its newest), one checkpoint, or a transformer as safetensors in either layout",
    )
    add("--ema", action="store_true", help="the averaged weights of the checkpoint")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    prompts.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help=".txt with one prompt a line, or .jsonl with `prompt` and, where wanted, `negative`, `seed`, "
        "`height`, `width`, `frames`",
    )
    add("--height", type=int, help="pixels, a multiple of 16; default: that of the model, 480 for Wan's 1.3B")
    add("--width", type=int, help="pixels, a multiple of 16; 832 for Wan's 1.3B")
    add("--frames", type=int, help="4n+1; 1 makes an image; 81 for Wan's 1.3B")
    add("--fps", type=int, default=FPS, help=f"frames a second of the file, default {FPS}")
    # without a default here: what is not given is left to GenerateConfig, or to the model
    add("--steps", type=int, help="default: those of the model, or 50")
    add("--solver", choices=("unipc", "dpm++", "euler"), help="default unipc")
    add("--shift", type=float, help="more of the steps at high noise; default: that of the model, or 5")
    add(
        "--guidance",
        type=float,
        help="default: that of the model, or 5; 1 leaves the negative prompt out and halves the work",
    )
    add("--negative", help="what not to show; default: the empty prompt (Wan's own code has a long Chinese one)")
    add("--seed", type=int, default=0, help="of the first prompt, each next one has one more; default 0")
    add(
        "--precision",
        choices=("fp32", "bf16"),
        help="of transformer and text encoder; default bf16 on a GPU, else fp32",
    )
    add("--kernel", default="auto", help="of attention: cudnn, flash, efficient or auto, the default")
    add("--device", help="such as cpu or cuda:1; default: the first GPU where there is one")
    add("--out", default="generated", help="folder, default: generated")
    add("--overwrite", action="store_true", help="replace files of the same name, and make all anew")
    add("--tp", type=int, default=1, metavar="N", help="split every layer over N of the processes; default 1")
    add(
        "--cfg-parallel",
        type=int,
        choices=(1, 2),
        help="2 computes the two branches of guidance on two groups of processes; default 2 where both can be had",
    )
    launch.add_arguments(parser, restarts=False)


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for what is wrong by the words alone."""
    check_words(arguments)


def run(arguments: argparse.Namespace) -> int:
    """Make everything; rank 0 encodes, decodes, writes and prints, all share the denoising."""
    lines = check_words(arguments)
    from wanloom.dist import rank, together

    with together():
        plan = build_plan(arguments, lines)
        try:
            plan.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"The folder '{plan.out}' cannot be made: {error.strerror}.") from error
    check_alike(plan)
    taken = f"Another `wanloom generate` writes into {plan.out}: wait for it, or give another --out."
    with StopSignal("the files of a video") as stop, ExitStack() as held:
        stop.is_patient = False  # what is done is on the disk, and a video may take an hour
        with together():
            if rank() == 0:
                held.enter_context(folder_for_one(plan.out, taken))
        return make(plan, arguments.overwrite, stop)


def make(plan: Plan, overwrite: bool, stop: StopSignal) -> int:
    """What `run` does once it is clear what; returns the exit code."""
    began = time.monotonic()
    from wanloom.dist import gather, rank, together
    from wanloom.parallel.mesh import Mesh

    is_first = rank() == 0
    tell = say if is_first else lambda _: None
    facts, done = dict[str, Any](), list[int]()
    with together():
        if is_first:
            facts = describe(plan)
            done = find_done(plan, overwrite, facts)
    done = gather(done)[0]
    ways = f"{plan.config.steps} steps of {plan.config.solver}, guidance {plan.config.guidance:g}"
    there = f", {len(done)} of them there already" if done else ""
    tell(
        f"{plan.model_name} on {plan.where} in {plan.precision}, attention by {plan.kernel}: "
        f"{len(plan.jobs)} to make with {ways}{there}"
    )
    if len(done) == len(plan.jobs):
        tell(f"{plan.out} is complete: this command has made all of it before. --overwrite makes it anew.")
        return 0
    written = list(done)
    try:
        with enough_memory("load the model", ["--precision bf16"] if plan.precision == "fp32" else helps_of(plan)):
            with together():
                text = encode_texts(plan) if is_first else []
            text = hand_out(plan, text)
            took = time.monotonic() - began
            both = "" if plan.config.guidance == 1 else ", negative ones included"
            tell(f"text: {plural(len(text), 'prompt')} encoded{both}, {took:.1f} s with loading")
            mesh = Mesh(plan.layout, plan.device)
            model = load_model(plan, mesh)
            with together():
                vae = load_vae(plan) if is_first else None
        tell(f"model: loaded, {time.monotonic() - began - took:.1f} s")
        denoise, decode = make_all(plan, mesh, model, Writer(plan, vae, facts, stop, tell), text, written)
    except (KeyboardInterrupt, UserError) as error:
        if isinstance(error, UserError) and not stop.has_cut:
            raise
        if is_first:
            more = "; the same command makes the rest." if len(written) < len(plan.jobs) else "."
            say(f"\n{len(written)} of {len(plan.jobs)} are written to {plan.out}{more}", sys.stderr)
        if stop.received in (None, signal.SIGINT):
            raise KeyboardInterrupt from error
        return 128 + stop.received
    tell(
        f"{len(plan.jobs)} in {plan.out}: denoising {denoise:.1f} s, decoding and writing {decode:.1f} s, "
        f"all {time.monotonic() - began:.1f} s"
    )
    return 0


def encode_texts(plan: Plan) -> "list[Tensor]":
    """States of every one of the prompts; the encoder is freed on return."""
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
            note(f"of {count} tokens only the first {slots} are used: {cut(prompt)}")
    states = codec.encode(plan.prompts, slots)
    del codec
    gc.collect()  # the encoder holds itself in cycles
    if plan.device.type == "cuda":
        torch.cuda.empty_cache()
    return states


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
    from wanloom.dist import rank
    from wanloom.parallel import params
    from wanloom.parallel.apply import apply_layout

    def apply(model: "WanDiT") -> None:
        apply_layout(model, mesh, bf16=False)  # the weights themselves are bf16 where that is the precision

    model = plan.weights.load_model(plan.ema, plan.dtype, plan.device, plan.kernel, apply)
    if rank() == 0 and not params.local(model.head.head.weight).any():
        note(f"the transformer of '{plan.model_name}' is untrained, it will give noise")
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


class Writer(NamedTuple):
    """What turns latents into files, where the VAE is: on the first process."""

    plan: Plan
    vae: "VaeCodec | None"
    facts: dict[str, Any]
    stop: StopSignal
    tell: Callable[[str], None]

    def write(self, index: int, latents: "Tensor") -> None:
        """Decode and write one job. Raises UserError for what would be a black video, and for a full disk."""
        if self.vae is None:
            return
        job = self.plan.jobs[index]
        try:
            with enough_memory(f"decode {job.frames} frames of {job.width}x{job.height}", helps_of(self.plan)):
                frames = self.vae.decode(latents)
        except UserError as error:
            raise UserError(f"'{job.name}' cannot be decoded: {error}") from error
        self.stop.is_patient = True  # all files of a video or none
        path = write_result(self.plan, job, frames, self.facts)
        self.tell(f"  {path}")
        self.stop.is_patient = False


def make_all(
    plan: Plan, mesh: "Mesh", model: "WanDiT", writer: Writer, text: "dict[str, Tensor]", written: list[int]
) -> tuple[float, float]:
    """Generate every job that is not `written` yet, and write each as soon as its pack is done.

    Returns seconds of denoising and of the rest.
    """
    writing, began = 0.0, time.monotonic()
    from rich.progress import Progress

    from wanloom.dist import together
    from wanloom.sample.generate import Request, generate
    from wanloom.sample.settings import latents_shape

    channels = plan.model_config.in_channels
    requests = [
        Request(
            latents_shape(channels, job.frames, job.height, job.width),
            job.seed,
            text[job.prompt],
            text.get(job.negative, text[job.prompt]),  # not read without guidance
        )
        for job in plan.jobs
    ]
    console = Terminal(stderr=True)
    quiet = writer.vae is None or not console.is_terminal
    doing = f"make {len(plan.jobs)} of {plan.jobs[0].width}x{plan.jobs[0].height}"
    with Progress(console=console, transient=True, disable=quiet) as progress:
        task = progress.add_task("denoising", total=(len(requests) - len(written)) * plan.config.steps)

        def moved(number: int) -> None:
            progress.advance(task, number)
            if writer.stop.has_cut:  # and a library has swallowed what was raised
                raise KeyboardInterrupt

        made = generate(model, requests, plan.config, moved, mesh, tuple(written))
        with enough_memory(doing, helps_of(plan)):
            for index, latents in made:
                start = time.monotonic()
                with together():
                    writer.write(index, latents)
                written.append(index)
                if writer.stop.received:
                    raise KeyboardInterrupt
                writing += time.monotonic() - start
    return time.monotonic() - began - writing, writing
