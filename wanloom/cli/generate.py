"""`wanloom generate`: prompts to videos, with everything that repeats them beside each."""

import argparse
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from wanloom.cli import launch
from wanloom.config import build_config, expand_home
from wanloom.errors import UserError
from wanloom.options import add_options, read_options
from wanloom.runs.asked import Asked, check_asked
from wanloom.sample.prompts import Prompt, read_prompts
from wanloom.signals import StopSignal
from wanloom.terminal import Terminal, note, say

if TYPE_CHECKING:  # torch is imported only when the command runs
    from wanloom.runs.generate import Generation

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
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    prompts.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help=".txt with one prompt a line, or .jsonl with `prompt` and, where wanted, `negative`, `seed`, "
        "`height`, `width`, `frames`",
    )
    parser.add_argument("--out", default="generated", metavar="FOLDER", help="default: generated")
    parser.add_argument("--overwrite", action="store_true", help="replace files of the same name, and make all anew")
    add_options(parser, Asked)
    launch.add_arguments(parser, restarts=False)


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for what is wrong by the words alone."""
    check_asked(*read(arguments))


def read(arguments: argparse.Namespace) -> tuple[list[Prompt], Asked]:
    """What is asked for."""
    if not arguments.out.strip():
        raise UserError("--out is empty: give the folder for the videos, or leave it out for `generated`.")
    texts = arguments.prompt
    prompts = [Prompt(prompt=text) for text in texts] if texts else read_prompts(arguments.prompts)
    return prompts, build_config(Asked, read_options(arguments, Asked))


def run(arguments: argparse.Namespace) -> int:
    """Make everything; rank 0 encodes, decodes, writes and prints, all share the denoising."""
    prompts, asked = read(arguments)
    from wanloom.runs.generate import hold_results, plan_generation

    generation = plan_generation(prompts, asked)
    note_unused(arguments, prompts, generation.prompts)
    if generation.files.name == "tiny" and not generation.files.checkpoint:
        note_unknown(generation.prompts)
    out = Path(expand_home(arguments.out))
    with StopSignal("the files of a video") as stop:
        stop.is_patient = False  # what is done is on the disk, and a video may take an hour
        with hold_results(out, generation.facts, arguments.overwrite) as done:
            return make(generation, out, done, stop)


def make(generation: "Generation", out: Path, done: list[int], stop: StopSignal) -> int:
    """What `run` does once it is clear what; returns the exit code."""
    from rich.progress import Progress

    from wanloom.dist import rank

    began, total = time.monotonic(), len(generation.prompts)
    tell: Callable[[str], None] = say if rank() == 0 else lambda _: None
    config, place = generation.config, generation.place
    where = place.layout.describe_on(place.device)
    tell(
        f"{generation.files.name} on {where} in {place.precision}, attention by {place.kernel}: {total} to make "
        f"with {config.steps} steps of {config.solver}, guidance {config.guidance:g}"
        + (f", {len(done)} of them there already" if done else "")
    )
    if len(done) == total:
        tell(f"{out} is complete: this command has made all of it before. --overwrite makes it anew.")
        return 0
    written, rest = len(done), 0.0
    try:
        parts = generation.load(tell)
        loaded = time.monotonic()
        console = Terminal(stderr=True)
        with Progress(console=console, transient=True, disable=rank() > 0 or not console.is_terminal) as bar:
            task = bar.add_task("denoising", total=(total - len(done)) * config.steps)
            for path, seconds in generation.write(parts, out, done, stop, partial(bar.advance, task)):
                written, rest = written + 1, rest + seconds
                tell(f"  {path}")
    except (KeyboardInterrupt, UserError) as error:
        if isinstance(error, UserError) and not stop.has_cut:
            raise
        if rank() == 0:
            more = "; the same command makes the rest." if written < total else "."
            say(f"\n{written} of {total} are written to {out}{more}", sys.stderr)
        if stop.received in (None, signal.SIGINT):
            raise KeyboardInterrupt from error
        return 128 + stop.received
    took, all_of_it = time.monotonic() - loaded, time.monotonic() - began
    tell(f"{total} in {out}: denoising {took - rest:.1f} s, decoding and writing {rest:.1f} s, all {all_of_it:.1f} s")
    return 0


def note_unused(arguments: argparse.Namespace, prompts: list[Prompt], complete: list[Prompt]) -> None:
    """Say which options no prompt is left for; a file of prompts may be meant to be complete."""
    for name in ("seed", "height", "width", "frames", "negative"):
        if getattr(arguments, name) and all(name in prompt.model_fields_set for prompt in prompts):
            note(f"--{name} has no effect: every prompt in {arguments.prompts} has its own.")
    if arguments.fps is not None and all(prompt.frames == 1 for prompt in complete):
        note(f"--fps {arguments.fps} has no effect on images.")


def note_unknown(prompts: list[Prompt]) -> None:
    """A line on prompts that the shipped transformer was not trained on: their clips look broken, and are not."""
    from wanloom.demo.shapes import SCENES, TEMPLATES

    known = [scene.caption(template) for scene in SCENES for template in range(len(TEMPLATES))]
    strange = [prompt for prompt in prompts if prompt.prompt not in known]
    if strange:
        which = "this prompt" if len(strange) == len(prompts) == 1 else f"{len(strange)} of these prompts"
        note(
            f"tiny was trained on small shapes in the six sentences of the demo alone, such as '{known[0]}': with "
            f"{which} it may miss motion, colour and shape."
        )
