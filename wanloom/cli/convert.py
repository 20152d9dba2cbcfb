"""`wanloom convert`: a checkpoint of a run as a folder that other programs load."""

import argparse
import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import wanloom
from wanloom.errors import UserError
from wanloom.files import LOCK, lock_folder, remove
from wanloom.formats.pipeline import NOTE, check_name, find_pipeline, full_name
from wanloom.runs.found import check_weights
from wanloom.signals import StopSignal
from wanloom.terminal import say

if TYPE_CHECKING:  # torch is imported only when the command runs
    from wanloom.runs.trained import Weights

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
COPIED = ("model_index.json", "vae", "text_encoder", "tokenizer", "scheduler")
ORIGINAL_TOKENIZER = Path("google") / "umt5-xxl"


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
        check_name(arguments.model, needed_parts(arguments.layout))


def check_new(out: Path) -> None:
    """Raises UserError when something is at `out`."""
    if out.exists() or out.is_symlink():
        raise UserError(f"'{out}' is there already: give a new folder.")


def needed_parts(layout: str) -> tuple[str, ...]:
    """What is taken from the pipeline beside the weights."""
    return COPIED[1:] if layout == "diffusers" else ("tokenizer",)


def run(arguments: argparse.Namespace) -> int:
    """Write the folder; 0, or 128 and the signal that stopped it."""
    from wanloom.runs.trained import open_trained

    out, source = arguments.out, arguments.source
    with StopSignal("nothing") as stop:
        stop.is_patient = False
        try:
            clear_left(out.parent)
            with whole_folder(out) as folder:
                weights = open_trained(source, arguments.ema)
                model = name_parts(source, arguments.model or weights.model)
                pipeline = find_pipeline(model, needed_parts(arguments.layout))
                if arguments.layout == "diffusers":
                    write_diffusers(weights, arguments.ema, pipeline, folder)
                else:
                    write_original(weights, arguments.ema, pipeline, folder)
                write_note(weights, arguments.ema, model, pipeline, folder)
        except (KeyboardInterrupt, UserError) as error:
            if isinstance(error, UserError) and not stop.has_cut:
                raise
            if stop.received in (None, signal.SIGINT):
                raise KeyboardInterrupt from error
            return 128 + stop.received
    average = "averaged " if arguments.ema else ""
    whose = f"of {source}" if weights.step is None else f"of step {weights.step}"
    say(f"{average}weights {whose} in {arguments.layout} layout: {out}")
    return 0


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when the block ends well, and is gone when it does not; one process has it.

    Raises UserError when `out` is there, another process is writing it, or the disk fails.
    """
    check_new(out)
    temporary = out.with_name(f".{out.name}.partial")
    if temporary.is_symlink():  # what it leads to is somebody's
        temporary.unlink()
    lock = lock_folder(temporary, f"Another `wanloom convert` is writing '{out}': wait for it, or give another folder.")
    try:
        for left in temporary.iterdir():  # of a start that was killed: tens of GB for a large model
            if left.name != LOCK:
                remove(left)
        yield temporary
        check_new(out)
        (temporary / LOCK).unlink()
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"'{out}' cannot be written: {error.strerror or error}.") from error
    finally:
        remove(temporary)
        lock.close()


def clear_left(folder: Path) -> None:
    """Remove what a `wanloom convert` that was killed has left here, whatever it was writing; it may be tens of GB."""
    for partial in folder.glob(".*.partial"):
        if partial.is_dir() and not partial.is_symlink() and (partial / LOCK).is_file():
            try:
                lock = lock_folder(partial, "")
            except UserError:
                continue  # of one that is at work
            remove(partial)
            lock.close()


def name_parts(source: Path, model: str | None) -> str:
    """The pipeline whose other parts are copied, as it is found from everywhere. Raises UserError for none."""
    if model is None:
        raise UserError(
            f"'{source}' is a transformer alone: give the pipeline of its other parts too, such as "
            "--model Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
    return full_name(model)


def write_diffusers(weights: "Weights", ema: bool, pipeline: Path, folder: Path) -> None:
    """A folder for WanPipeline.from_pretrained. Raises UserError when a part is missing."""
    from wanloom.formats.transformer import save_weights

    copy_parts(pipeline, {name: folder / name for name in COPIED})
    save_weights(weights.load_weights(ema), weights.config, folder / "transformer", "diffusers")


def write_original(weights: "Weights", ema: bool, pipeline: Path, folder: Path) -> None:
    """The parts of an original folder that are no pickles."""
    from wanloom.formats.transformer import save_weights

    copy_parts(pipeline, {"tokenizer": folder / ORIGINAL_TOKENIZER})
    place = folder / "transformer"
    save_weights(weights.load_weights(ema), weights.config, place, "original")
    for file in place.iterdir():  # in the original they lie in the folder itself
        file.rename(folder / file.name)
    place.rmdir()


def copy_parts(pipeline: Path, places: dict[str, Path]) -> None:
    """Copy files and folders of files; links become what they lead to. Raises UserError naming what is missing."""
    missing = [name for name in places if not (pipeline / name).exists()]
    if missing:
        raise UserError(
            f"'{pipeline}' has no {', '.join(missing)}, so the folder would not be complete: "
            "give a whole pipeline with --model."
        )
    for name, place in places.items():
        part = pipeline / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if part.is_dir():
            place.mkdir()
        for file in sorted(part.iterdir()) if part.is_dir() else [part]:
            if file.is_file():  # no part has folders of its own
                shutil.copyfile(file, place / file.name if part.is_dir() else place)


def write_note(weights: "Weights", ema: bool, model: str, pipeline: Path, folder: Path) -> None:
    """wanloom.json: where the weights come from, and how `wanloom generate` samples them if nothing else is asked."""
    from wanloom.sample.settings import read_defaults

    settings = read_defaults(pipeline, weights.config).model_dump(exclude_none=True)
    note = {
        "checkpoint": str(weights.path.resolve()),
        "step": weights.step,
        "ema": ema,
        "model": model,
        "identity": weights.identity,
        "wanloom": wanloom.__version__,
        "generate": settings,
    }
    (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
