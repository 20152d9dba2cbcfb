"""`wanloom convert`: a checkpoint of a run as a folder that other programs load."""

import argparse
import signal
from pathlib import Path

from wanloom.errors import UserError
from wanloom.files import check_new
from wanloom.formats.pipeline import TAKEN, check_name
from wanloom.runs.found import check_weights
from wanloom.signals import StopSignal
from wanloom.terminal import say

HELP = """Write a model as a folder that others load. OUT must not be there yet; it appears whole, or not at all.

  wanloom convert runs/first converted
  wanloom convert runs/first/checkpoints/step_0001000 converted --layout original --ema
  wanloom convert wan.safetensors converted --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers

WEIGHTS are a run, one of its checkpoints, or what else wanloom reads: a pipeline, a transformer as a folder or as a
safetensors file, in either layout.

--layout diffusers writes what diffusers' WanPipeline.from_pretrained(OUT) loads: the transformer in fp32, and the other
parts (VAE, text encoder, tokenizer, scheduler) copied from the model that the weights belong to.

--layout original writes what a folder of the original repository holds and is no pickle: the transformer under the
original names (diffusion_pytorch_model*.safetensors, config.json) and the tokenizer (google/umt5-xxl). The original's
Wan2.1_VAE.pth and models_t5_umt5-xxl-enc-bf16.pth are pickles, which wanloom neither reads nor writes; training does
not change them: put the published files beside the others.

Both have a wanloom.json that tells where the weights come from, so that `wanloom generate` and `wanloom convert` read
either. WanPipeline's noise levels differ a little from Wan's own, which `wanloom generate` uses; pipe.scheduler =
wanloom.sample.solvers.build_scheduler("unipc", shift=5.0) makes them equal.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("source", type=Path, metavar="WEIGHTS", help="a run (its newest checkpoint), a checkpoint, a model or a file")
    add("out", type=Path, metavar="OUT", help="the folder to write")
    add("--layout", choices=("diffusers", "original"), default="diffusers", help="default diffusers")
    add("--ema", action="store_true", help="the averaged weights in place of the last ones")
    add("--model", help="folder or hub name of the other parts, where it is not the one that the weights name")


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError when OUT is there, or WEIGHTS or --model cannot be what they shall be."""
    check_new(arguments.out)
    check_weights(arguments.source, arguments.ema)
    if arguments.model:
        check_name(arguments.model, TAKEN[arguments.layout])


def run(arguments: argparse.Namespace) -> int:
    """Write the folder; 0, or 128 and the signal that stopped it."""
    from wanloom.runs.convert import convert

    out, source, layout, ema = arguments.out, arguments.source, arguments.layout, arguments.ema
    with StopSignal("nothing") as stop:
        stop.is_patient = False
        try:
            weights = convert(source, out, layout=layout, ema=ema, model=arguments.model)
        except (KeyboardInterrupt, UserError) as error:
            if isinstance(error, UserError) and not stop.has_cut:
                raise
            if stop.received in (None, signal.SIGINT):
                raise KeyboardInterrupt from error
            return 128 + stop.received
    average = "averaged " if ema else ""
    whose = f"of {source}" if weights.step is None else f"of step {weights.step}"
    say(f"{average}weights {whose} in {layout} layout: {out}")
    return 0
