"""`wanloom convert`: a checkpoint of a run as a folder that other programs load."""

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import wanloom
from wanloom.config import UserError
from wanloom.terminal import say

if TYPE_CHECKING:  # torch is imported only when the command runs
    from wanloom.recipes.trained import Trained

HELP = """Write a trained model as a pipeline folder. OUT must not be there yet; it appears whole, or not at all.

  wanloom convert runs/first converted
  wanloom convert runs/first/checkpoints/step_0001000 converted --layout original --ema

--layout diffusers writes what diffusers' WanPipeline.from_pretrained(OUT) loads: the trained transformer in fp32, and
the other parts (VAE, text encoder, tokenizer, scheduler) copied from the model that the run names.

--layout original writes what a folder of the original repository holds and is no pickle: the transformer under the
original names (diffusion_pytorch_model*.safetensors, config.json) and the tokenizer (google/umt5-xxl). The original's
Wan2.1_VAE.pth and models_t5_umt5-xxl-enc-bf16.pth are pickles, which wanloom neither reads nor writes; training does
not change them: put the published files beside the others.

Both have a wanloom.json that tells the checkpoint. WanPipeline's noise levels differ a little from Wan's own, which
`wanloom generate` uses; pipe.scheduler = wanloom.sample.solvers.build_scheduler("unipc", shift=5.0) makes them equal.
"""
COPIED = ("model_index.json", "vae", "text_encoder", "tokenizer", "scheduler")
ORIGINAL_TOKENIZER = Path("google") / "umt5-xxl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "source",
        type=Path,
        metavar="RUN_OR_STEP",
        help="the folder of a run (its newest checkpoint) or of a checkpoint",
    )
    add("out", type=Path, metavar="OUT", help="the folder to write")
    add("--layout", choices=("diffusers", "original"), default="diffusers", help="default diffusers")
    add("--ema", action="store_true", help="the averaged weights in place of the last ones")
    add("--model", help="folder or hub name of the other parts, where it is not the one that the run names")


def run(arguments: argparse.Namespace) -> int:
    from wanloom.assets import find_pipeline
    from wanloom.recipes.trained import open_trained

    out: Path = arguments.out
    if out.exists():
        raise UserError(f"'{out}' is there already: give a new folder.")
    trained = open_trained(arguments.source, arguments.ema)
    needed = COPIED[1:] if arguments.layout == "diffusers" else ("tokenizer",)
    pipeline = find_pipeline(arguments.model or trained.model, needed)
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # of a start that was killed: tens of GB for a large model
    try:
        temporary.mkdir(parents=True)
        if arguments.layout == "diffusers":
            write_diffusers(trained, arguments.ema, pipeline, temporary)
        else:
            write_original(trained, arguments.ema, pipeline, temporary)
        write_note(trained, arguments.ema, temporary)
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"'{out}' cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    average = "averaged " if arguments.ema else ""
    say(f"{average}weights of step {trained.step} in {arguments.layout} layout: {out}")
    return 0


def write_diffusers(trained: "Trained", ema: bool, pipeline: Path, folder: Path) -> None:
    """A folder for WanPipeline.from_pretrained. Raises UserError when a part is missing."""
    from wanloom.model.weights import save_weights

    copy_parts(pipeline, {name: folder / name for name in COPIED})
    save_weights(trained.load_weights(ema), trained.config, folder / "transformer", "diffusers")


def write_original(trained: "Trained", ema: bool, pipeline: Path, folder: Path) -> None:
    """The parts of an original folder that are no pickles."""
    from wanloom.model.weights import save_weights

    copy_parts(pipeline, {"tokenizer": folder / ORIGINAL_TOKENIZER})
    weights = folder / "transformer"
    save_weights(trained.load_weights(ema), trained.config, weights, "original")
    for file in weights.iterdir():  # in the original they lie in the folder itself
        file.rename(folder / file.name)
    weights.rmdir()


def copy_parts(pipeline: Path, places: dict[str, Path]) -> None:
    """Copy files and folders of a pipeline; links become what they lead to. Raises UserError naming what is missing."""
    missing = [name for name in places if not (pipeline / name).exists()]
    if missing:
        raise UserError(
            f"'{pipeline}' has no {', '.join(missing)}, so the folder would not be complete: "
            "give a whole pipeline with --model."
        )
    for name, place in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        if (pipeline / name).is_dir():
            shutil.copytree(pipeline / name, place)
        else:
            shutil.copyfile(pipeline / name, place)


def write_note(trained: "Trained", ema: bool, folder: Path) -> None:
    """wanloom.json: where the weights come from."""
    note = {
        "checkpoint": str(trained.path.resolve()),
        "step": trained.step,
        "ema": ema,
        "model": trained.model,
        "identity": trained.identity,
        "wanloom": wanloom.__version__,
    }
    (folder / "wanloom.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
