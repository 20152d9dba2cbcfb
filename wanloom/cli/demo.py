"""`wanloom demo`: the whole job on small made-up clips, through the same commands that a user types.

It makes captioned mp4 files of moving shapes, then runs prepare, train and generate, measures from the pixels whether
the generated clips show what their prompts say, and writes report.html. Ends non-zero when a target is missed. Stopped
anywhere, the same command goes on to the report; a finished demo is replaced only with `--replace`.
"""

import argparse
import json
import os
import platform
import shlex
import time
from pathlib import Path
from typing import Any

import wanloom
from wanloom.cli import main
from wanloom.errors import UserError
from wanloom.files import remove, write_atomic
from wanloom.terminal import Terminal, say
from wanloom.threads import count_cores

HELP = (
    "Make small clips, prepare them, train on them from random weights, generate from prompts, and write report.html."
)
NUM_CLIPS, NUM_PROMPTS, SIZE, FRAMES, FPS = 360, 64, 64, 17, 16
SAMPLING = "--steps 20 --guidance 2"
CLIP_SEED, PROMPT_SEED = 1, 1_000_000  # --seed 0; of other seeds as many more, so that no two demos share a draw
TARGETS = {"colour": 0.95, "direction of motion": 0.85, "shape": 0.80}
MARKER, MARKER_FILE, REPORT = "this folder was made by wanloom demo", "README.txt", "report.html"
BUSY = 0.25  # load of every core by others; less is what a machine does anyway


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
    from wanloom.demo.page import build_page

    check(arguments)
    console = Terminal()
    out, seed = arguments.out, arguments.seed
    if open_folder(out, seed, arguments.replace):
        console.print(f"Going on with the demo in {out}.", soft_wrap=True)
    if load := busy():
        console.print(f"{load} It takes minutes on two idle cores and longer here.", soft_wrap=True)
    commands, began = [], time.monotonic()
    clips = write_clips(out / "clips", seed)
    commands.append((f"(made {NUM_CLIPS} captioned clips in {out / 'clips'})", time.monotonic() - began))
    prompts = write_prompts(out / "prompts.jsonl", seed)
    for words in job(out, seed):
        text = shlex.join(["wanloom", *words])
        console.print(f"\n$ {text}", style="bold", soft_wrap=True)
        began = time.monotonic()
        code = main(words)  # in this process: the same code as from the shell, without loading the libraries again
        if code:
            again = shlex.join(["wanloom", "demo", "--out", str(out), "--seed", str(seed)])
            console.print(f"The demo stopped: `{text}` ended with exit code {code}.", soft_wrap=True)
            console.print(f"`{again}` goes on from there, with --replace from the start.", soft_wrap=True)
            return code
        commands.append((text, time.monotonic() - began))
    began = time.monotonic()
    rows = judge(out / "generated", prompts, seed)
    commands.append(("(measured the generated clips)", time.monotonic() - began))
    report = build_report(out, rows, commands, clips)
    write_atomic(out / REPORT, build_page(report).encode())
    print_scores(console, report, commands)
    say(str((out / REPORT).resolve()))
    return 0 if all(score.reached for score in report.scores) else 1


def job(out: Path, seed: int) -> list[list[str]]:
    """The commands of the demo, as a user would type them: bf16 where the machine computes in it, else it is slow."""
    import torch

    from wanloom.torch_private import has_bf16_instructions

    quick = torch.cuda.is_available() or has_bf16_instructions()
    speed = "train.precision=bf16" if quick else "train.precision=fp32 train.steps=2600"
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


def busy() -> str:
    """A sentence when other processes use the cores that the demo computes on; empty where a GPU computes."""
    import torch

    cores, load = count_cores(), os.getloadavg()[0]
    if torch.cuda.is_available() or load < BUSY * cores:
        return ""
    return f"This machine is busy: {load:.1f} processes wanted its {cores} cores in the last minute."


def write_clips(folder: Path, seed: int) -> dict[Any, Path]:
    """The training clips as mp4 files with a caption in a text file beside each; a path of a clip for every scene.

    The caption is written last: where it is, the clip of an earlier start is whole.
    """
    from wanloom.demo import shapes
    from wanloom.media.write import write_mp4

    folder.mkdir(exist_ok=True)
    paths = {}
    for index in range(NUM_CLIPS):
        path = folder / f"clip-{index:04d}.mp4"
        paths[shapes.SEEN[index % len(shapes.SEEN)]] = path
        if not path.with_suffix(".txt").exists():
            frames, _, caption = shapes.build_clip(CLIP_SEED + seed, index, shapes.SEEN, FRAMES, SIZE, SIZE)
            write_mp4(path, frames, FPS)
            write_atomic(path.with_suffix(".txt"), (caption + "\n").encode())
    return paths


def write_prompts(path: Path, seed: int) -> list[tuple[Any, str]]:
    """The prompts as JSON lines: all held-out scenes, then seen ones spread evenly; returns (scene, prompt)."""
    from wanloom.demo import shapes

    spread = [shapes.SEEN[(i * 7) % len(shapes.SEEN)] for i in range(NUM_PROMPTS - len(shapes.HELD_OUT))]
    scenes = [*shapes.HELD_OUT, *spread]
    rows = [(scene, scene.caption(index)) for index, scene in enumerate(scenes)]
    lines = [json.dumps({"prompt": text, "seed": prompt_seed(seed, i)}) for i, (_, text) in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows


def prompt_seed(seed: int, index: int) -> int:
    """The seed of a generated clip: other noise than any other clip of any demo."""
    return PROMPT_SEED + NUM_PROMPTS * seed + index


def judge(folder: Path, prompts: list[tuple[Any, str]], seed: int) -> list[tuple[Any, str, Path, Any]]:
    """(scene, prompt, clip, what is seen in it) for every prompt, found by the json that generate wrote beside it."""
    from wanloom.demo.measure import measure
    from wanloom.media.write import read_mp4

    made = {}
    for path in folder.glob("*.json"):
        made[json.loads(path.read_text(encoding="utf-8"))["seed"]] = path.with_suffix(".mp4")
    rows = []
    for index, (scene, prompt) in enumerate(prompts):
        clip = made[prompt_seed(seed, index)]
        rows.append((scene, prompt, clip, measure(read_mp4(clip))))
    return rows


def build_report(out: Path, rows: list[Any], commands: list[tuple[str, float]], clips: dict[Any, Path]) -> Any:
    """Everything report.html shows."""
    from wanloom.demo import shapes
    from wanloom.demo.page import Command, Comparison, DemoReport, Score

    held_out = [row for row in rows if row[0] in shapes.HELD_OUT]
    seen = [row for row in rows if row[0] not in shapes.HELD_OUT]

    def right(part: list[Any], attribute: int) -> tuple[int, int]:
        return sum(found.agrees(scene)[attribute] for scene, _, _, found in part), len(part)

    order = {"colour": 0, "shape": 1, "direction of motion": 2}
    scores = [
        Score(name, right(rows, order[name]), right(seen, order[name]), right(held_out, order[name]), target)
        for name, target in TARGETS.items()
    ]

    def pairs(part: list[Any]) -> list[Comparison]:
        return [
            Comparison(prompt, clip, clips.get(scene), _words(found), all(found.agrees(scene)))
            for scene, prompt, clip, found in part
        ]

    return DemoReport(
        title="wanloom demo: from a folder of clips to generated clips",
        machine=machine(),
        commands=[Command(*command) for command in commands],
        curves=read_curves(out / "run" / "metrics.jsonl"),
        scores=scores,
        seen=pairs(seen),
        held_out=pairs(held_out),
        settings={
            "training clips": f"{NUM_CLIPS} of {len(shapes.SEEN)} combinations, {FRAMES} frames of {SIZE}x{SIZE}",
            "generated clips": f"{len(rows)}, of them {len(held_out)} of {len(shapes.HELD_OUT)} held-out combinations",
            "run": str(out / "run"),
        },
    )


def _words(found: Any) -> str:
    return f"{found.color or 'no colour'}, {found.shape or 'no shape'}, {found.direction or 'no motion'}"


def machine() -> str:
    """What the numbers were measured on."""
    import torch

    cpu = f"{count_cores()} CPU cores, {platform.machine()}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return f"{device}, Python {platform.python_version()}, torch {torch.__version__}, wanloom {wanloom.__version__}"


def read_curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    """The logged losses by step, plain and smoothed; the held-out loss where it was measured."""
    from wanloom.train.records import read_metrics

    raw, smooth, held_out, average = [], [], [], None
    for row in read_metrics(path):
        average = row["loss"] if average is None else 0.7 * average + 0.3 * row["loss"]
        raw.append((row["step"], row["loss"]))
        smooth.append((row["step"], average))
        if "val_loss" in row:
            held_out.append((row["step"], row["val_loss"]))
    return {"training loss (unweighted)": raw, "the same, smoothed": smooth, "validation loss": held_out}


def print_scores(console: Terminal, report: Any, commands: list[tuple[str, float]]) -> None:
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
    console.print(f"The demo took {sum(seconds for _, seconds in commands):.0f} s.")
