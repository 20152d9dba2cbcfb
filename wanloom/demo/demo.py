"""The whole job on small made-up clips: what the demo makes, the commands that it runs, and what it finds.

In: a folder, a seed, the commands of wanloom, and what runs one. Out: report.html in the folder, and what is in it. The
one decision: prepare, train and generate are run as commands that a user can type; whether a generated clip shows what
its prompt says is measured from its pixels.
"""

import json
import os
import platform
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import wanloom
from wanloom.demo import shapes
from wanloom.demo.measure import Seen, measure
from wanloom.demo.page import Command, Comparison, DemoReport, Score, build_page
from wanloom.demo.shapes import Scene
from wanloom.files import write_atomic
from wanloom.media.write import read_mp4, write_mp4
from wanloom.threads import count_cores
from wanloom.train.records import read_metrics

NUM_CLIPS, NUM_PROMPTS, SIZE, FRAMES, FPS = 360, 64, 64, 17, 16
CLIP_SEED, PROMPT_SEED = 1, 1_000_000  # of the demo of seed 0; other seeds as many more, so no two demos share a draw
TARGETS = {"colour": 0.95, "direction of motion": 0.85, "shape": 0.80}
BUSY = 0.25  # load of every core by others; less is what a machine does anyway

Judged = tuple[Scene, str, Path, Seen]  # scene, prompt, generated clip, what is seen in it


class CommandError(Exception):
    """A command of the demo ended with another exit code than 0."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(f"`{text}` ended with exit code {code}")
        self.code = code


def run_demo(
    out: Path, seed: int, report: Path, job: Sequence[list[str]], run_command: Callable[[str, list[str]], int]
) -> DemoReport:
    """Make clips, run the commands of the `job`, measure what they made, write the report; goes on where it stopped.

    `run_command` takes a command as a text and as its words, and returns its exit code. Raises CommandError.
    """
    commands, began = [], time.monotonic()

    def took(text: str) -> None:
        nonlocal began
        commands.append(Command(text, time.monotonic() - began))
        began = time.monotonic()

    clips, prompts = write_clips(out / "clips", seed), write_prompts(out / "prompts.jsonl", seed)
    took(f"(made {NUM_CLIPS} captioned clips in {out / 'clips'})")
    for words in job:
        text = shlex.join(["wanloom", *words])
        if code := run_command(text, words):
            raise CommandError(text, code)
        took(text)
    rows = judge(out / "generated", prompts, seed)
    took("(measured the generated clips)")
    found = build_report(out, rows, commands, clips)
    write_atomic(report, build_page(found).encode())
    return found


def busy() -> str:
    """A sentence when other processes use the cores that the demo computes on; empty where a GPU computes."""
    cores, load = count_cores(), os.getloadavg()[0]
    if torch.cuda.is_available() or load < BUSY * cores:
        return ""
    return f"This machine is busy: {load:.1f} processes wanted its {cores} cores in the last minute."


def write_clips(folder: Path, seed: int) -> dict[Scene, Path]:
    """The training clips as mp4 files with a caption in a text file beside each; a path of a clip for every scene.

    The caption is written last: where it is, the clip of an earlier start is whole.
    """
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


def write_prompts(path: Path, seed: int) -> list[tuple[Scene, str]]:
    """The prompts as JSON lines: all held-out scenes, then seen ones spread evenly; returns (scene, prompt)."""
    spread = [shapes.SEEN[(i * 7) % len(shapes.SEEN)] for i in range(NUM_PROMPTS - len(shapes.HELD_OUT))]
    scenes = [*shapes.HELD_OUT, *spread]
    rows = [(scene, scene.caption(index)) for index, scene in enumerate(scenes)]
    lines = [json.dumps({"prompt": text, "seed": prompt_seed(seed, i)}) for i, (_, text) in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows


def prompt_seed(seed: int, index: int) -> int:
    """The seed of a generated clip: other noise than any other clip of any demo."""
    return PROMPT_SEED + NUM_PROMPTS * seed + index


def judge(folder: Path, prompts: list[tuple[Scene, str]], seed: int) -> list[Judged]:
    """(scene, prompt, clip, what is seen in it) for every prompt, found by the json that generate wrote beside it."""
    made = {}
    for path in folder.glob("*.json"):
        made[json.loads(path.read_text(encoding="utf-8"))["seed"]] = path.with_suffix(".mp4")
    rows = []
    for index, (scene, prompt) in enumerate(prompts):
        clip = made[prompt_seed(seed, index)]
        rows.append((scene, prompt, clip, measure(read_mp4(clip))))
    return rows


def build_report(out: Path, rows: list[Judged], commands: list[Command], clips: dict[Scene, Path]) -> DemoReport:
    """Everything report.html shows."""
    held_out = [row for row in rows if row[0] in shapes.HELD_OUT]
    seen = [row for row in rows if row[0] not in shapes.HELD_OUT]

    def right(part: list[Judged], attribute: int) -> tuple[int, int]:
        return sum(found.agrees(scene)[attribute] for scene, _, _, found in part), len(part)

    order = {"colour": 0, "shape": 1, "direction of motion": 2}
    scores = [
        Score(name, right(rows, order[name]), right(seen, order[name]), right(held_out, order[name]), target)
        for name, target in TARGETS.items()
    ]

    def pairs(part: list[Judged]) -> list[Comparison]:
        return [
            Comparison(prompt, clip, clips.get(scene), _words(found), all(found.agrees(scene)))
            for scene, prompt, clip, found in part
        ]

    return DemoReport(
        title="wanloom demo: from a folder of clips to generated clips",
        machine=machine(),
        commands=commands,
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


def _words(found: Seen) -> str:
    return f"{found.color or 'no colour'}, {found.shape or 'no shape'}, {found.direction or 'no motion'}"


def machine() -> str:
    """What the numbers were measured on."""
    cpu = f"{count_cores()} CPU cores, {platform.machine()}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return f"{device}, Python {platform.python_version()}, torch {torch.__version__}, wanloom {wanloom.__version__}"


def read_curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    """The logged losses by step, plain and smoothed; the held-out loss where it was measured."""
    raw, smooth, held_out, average = [], [], [], None
    for row in read_metrics(path):
        average = row["loss"] if average is None else 0.7 * average + 0.3 * row["loss"]
        raw.append((row["step"], row["loss"]))
        smooth.append((row["step"], average))
        if "val_loss" in row:
            held_out.append((row["step"], row["val_loss"]))
    return {"training loss (unweighted)": raw, "the same, smoothed": smooth, "validation loss": held_out}
