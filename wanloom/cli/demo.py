"""`wanloom demo`: the whole job on small made-up clips, through the same commands that a user types.

Ends non-zero when a target is missed. Stopped anywhere, the same command goes on to the report; a finished demo is
replaced only with `--replace`.
"""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from wanloom.cli import main
from wanloom.errors import UserError
from wanloom.files import remove, write_atomic
from wanloom.terminal import Terminal, say

if TYPE_CHECKING:
    from wanloom.demo.page import DemoReport

HELP = (
    "Make small clips, prepare them, train on them from random weights, generate from prompts, and write report.html."
)
SAMPLING = "--steps 20 --guidance 2"
MARKER, MARKER_FILE, REPORT = "this folder was made by wanloom demo", "README.txt", "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to write (demo)")
    parser.add_argument("--seed", type=int, default=0, help="of clips, training and generation (0)")
    parser.add_argument("--replace", action="store_true", help="delete the earlier demo in the folder and start anew")


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for a seed or a folder that cannot be taken."""
    if arguments.seed < 0:
        raise UserError(f"--seed is {arguments.seed}: it counts from 0.")
    find_earlier(arguments.out, arguments.seed, arguments.replace)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; 0 when every target is reached, 1 when not."""
    from wanloom.demo.demo import CommandError, busy, run_demo

    check(arguments)
    console = Terminal()
    out, seed = arguments.out, arguments.seed
    if open_folder(out, seed, arguments.replace):
        console.print(f"Going on with the demo in {out}.", soft_wrap=True)
    if load := busy():
        console.print(f"{load} It takes minutes on two idle cores and longer here.", soft_wrap=True)

    def run_command(text: str, words: list[str]) -> int:
        console.print(f"\n$ {text}", style="bold", soft_wrap=True)
        return main(words)  # in this process: the same code as from the shell, without loading the libraries again

    try:
        report = run_demo(out, seed, out / REPORT, job(out, seed), run_command)
    except CommandError as error:
        again = shlex.join(["wanloom", "demo", "--out", str(out), "--seed", str(seed)])
        console.print(f"The demo stopped: {error}.", soft_wrap=True)
        console.print(f"`{again}` goes on from there, with --replace from the start.", soft_wrap=True)
        return error.code
    print_scores(console, report)
    say(str((out / REPORT).resolve()))
    return 0 if all(score.reached for score in report.scores) else 1


def job(out: Path, seed: int) -> list[list[str]]:
    """The commands of the demo, as a user would type them: bf16 where the machine computes in it, else it is slow."""
    import torch

    from wanloom.demo.demo import FRAMES, SIZE
    from wanloom.torch_private import has_bf16_instructions

    quick = torch.cuda.is_available() or has_bf16_instructions()
    speed = "compute.precision=bf16" if quick else "compute.precision=fp32 train.steps=2600"
    size = f"--height {SIZE} --width {SIZE} --frames {FRAMES}"
    lines = (
        f"prepare {{0}}/clips {{0}}/data --model tiny {size}",
        f"train tiny data.path={{0}}/data run_dir={{0}}/run seed={seed} {speed} log.validate_every=400",
        f"generate --checkpoint {{0}}/run --ema --prompts {{0}}/prompts.jsonl --out {{0}}/generated --overwrite {size} "
        f"{SAMPLING}",
    )
    return [shlex.split(line.format(shlex.quote(str(out)))) for line in lines]


def find_earlier(out: Path, seed: int, replace: bool) -> bool:
    """Whether a demo was begun in the folder.

    Raises UserError when the folder holds anything else, a finished demo or one of another seed, and shall keep it.
    """
    marker = out / MARKER_FILE
    earlier = out.exists() and any(out.iterdir())
    if earlier:
        written = marker.read_text(encoding="utf-8", errors="replace") if marker.is_file() else ""
        if MARKER not in written:
            raise UserError(f"'{out}' is not empty and was not made by wanloom demo: give another folder with --out.")
        if not replace and (out / REPORT).exists():
            raise UserError(
                f"'{out}' holds a finished demo, see {out / REPORT}: --replace deletes it and starts anew, --out takes "
                "another folder."
            )
        if not replace and written != mark(seed):
            raise UserError(
                f"'{out}' holds an unfinished demo of another seed or version: --replace deletes it and starts anew, "
                "--out takes another folder."
            )
    return earlier


def mark(seed: int) -> str:
    """What is written into the folder of a demo, to be known by."""
    return f"{MARKER}, with --seed {seed}.\n"


def open_folder(out: Path, seed: int, replace: bool) -> bool:
    """Make the folder ready; whether there is an unfinished demo in it to go on with. Raises as `find_earlier` does."""
    earlier, marker = find_earlier(out, seed, replace), out / MARKER_FILE
    if earlier and replace:
        for entry in out.iterdir():  # the marker stays: killed in the middle, the folder is still known as a demo's
            if entry != marker:
                remove(entry)
    write_atomic(marker, mark(seed).encode())
    return earlier and not replace


def print_scores(console: Terminal, report: "DemoReport") -> None:
    """The table of results, and the time it took, in the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="generated clips that show what the prompt says, measured from pixels")
    for column in ("attribute", "all", "seen combinations", "held-out combinations", "target", ""):
        table.add_column(column, justify="left" if column in ("attribute", "") else "right")
    for score in report.scores:
        cells = [f"{100 * n / of:.0f}% ({n}/{of})" for n, of in (score.all, score.seen, score.held_out)]
        verdict = "reached" if score.reached else Text("missed", style="bold red")
        table.add_row(score.name, *cells, f"{100 * score.target:.0f}%", verdict)
    console.print(table)
    console.print(f"The demo took {sum(command.seconds for command in report.commands):.0f} s.")
