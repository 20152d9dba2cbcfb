"""`wanloom generate`: prompts to videos, with everything that repeats them beside each."""

import argparse
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from wanloom.cli import launch
from wanloom.config import build_config, expand_home
from wanloom.errors import UserError
from wanloom.files import folder_for_one
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
    from wanloom.dist import rank, together
    from wanloom.runs.generate import plan_generation

    generation = plan_generation(prompts, asked)
    note_unused(arguments, prompts, generation.prompts)
    if generation.files.name == "tiny" and not generation.files.checkpoint:
        note_unknown(generation.prompts)
    out = Path(expand_home(arguments.out))
    taken = f"Another `wanloom generate` writes into {out}: wait for it, or give another --out."
    with StopSignal("the files of a video") as stop, ExitStack() as held:
        stop.is_patient = False  # what is done is on the disk, and a video may take an hour
        with together():
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"The folder '{out}' cannot be made: {error.strerror}.") from error
        with together():
            if rank() == 0:
                held.enter_context(folder_for_one(out, taken))
        return make(generation, out, arguments.overwrite, stop)


def make(generation: "Generation", out: Path, overwrite: bool, stop: StopSignal) -> int:
    """What `run` does once it is clear what; returns the exit code."""
    from wanloom.dist import gather, rank, together
    from wanloom.runs.results import find_done

    began, total = time.monotonic(), len(generation.prompts)
    is_first = rank() == 0
    tell: Callable[[str], None] = say if is_first else lambda _: None
    with together():
        done = find_done(out, generation.facts, overwrite) if is_first else []
    done = gather(done)[0]
    config, place = generation.config, generation.place
    tell(
        f"{generation.files.name} on {place.words} in {place.precision}, attention by {place.kernel}: {total} to make "
        f"with {config.steps} steps of {config.solver}, guidance {config.guidance:g}"
        + (f", {len(done)} of them there already" if done else "")
    )
    if len(done) == total:
        tell(f"{out} is complete: this command has made all of it before. --overwrite makes it anew.")
        return 0
    written = [*done]
    try:
        denoising, rest = write_all(generation, out, written, stop, tell)
    except (KeyboardInterrupt, UserError) as error:
        if isinstance(error, UserError) and not stop.has_cut:
            raise
        if is_first:
            more = "; the same command makes the rest." if len(written) < total else "."
            say(f"\n{len(written)} of {total} are written to {out}{more}", sys.stderr)
        if stop.received in (None, signal.SIGINT):
            raise KeyboardInterrupt from error
        return 128 + stop.received
    took = time.monotonic() - began
    tell(f"{total} in {out}: denoising {denoising:.1f} s, decoding and writing {rest:.1f} s, all {took:.1f} s")
    return 0


def write_all(
    generation: "Generation", out: Path, written: list[int], stop: StopSignal, tell: Callable[[str], None]
) -> tuple[float, float]:
    """Write every result that is not `written` yet as soon as it is made. Returns seconds of denoising and the rest."""
    from rich.progress import Progress

    from wanloom.dist import rank, together
    from wanloom.runs.results import write_result

    parts = generation.load(tell)
    began = mark = time.monotonic()  # mark: when the last step was done, or the last result
    writing, done = 0.0, tuple(written)
    console = Terminal(stderr=True)
    with Progress(console=console, transient=True, disable=rank() != 0 or not console.is_terminal) as progress:
        task = progress.add_task("denoising", total=(len(generation.prompts) - len(done)) * generation.config.steps)

        def moved(number: int) -> None:
            nonlocal mark
            mark = time.monotonic()
            progress.advance(task, number)
            if stop.has_cut:  # and a library has swallowed what was raised
                raise KeyboardInterrupt

        for frames, facts in generation.make(parts, done, moved):
            with together():
                if frames is not None:
                    stop.is_patient = True  # all files of a video or none
                    tell(f"  {write_result(out, frames, facts)}")
                    stop.is_patient = False
            written.append(len(written))
            if stop.received:
                raise KeyboardInterrupt
            writing += time.monotonic() - mark
            mark = time.monotonic()
    return time.monotonic() - began - writing, writing


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
