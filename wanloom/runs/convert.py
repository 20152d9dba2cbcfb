"""Weights as a folder that other programs load: `convert`.

In: weights, whoever wrote them, and the pipeline of the other parts. Out: a folder for diffusers or in the original
layout, whole or not there. The one decision: a note beside the weights tells where they come from, so that what is
written is read back by everything that reads weights.
"""

import json
import shutil
from pathlib import Path

import wanloom
from wanloom.errors import UserError
from wanloom.files import clear_left, whole_folder
from wanloom.formats.pipeline import NOTE, TAKEN, find_pipeline, full_name
from wanloom.formats.transformer import Layout, save_weights
from wanloom.model.dit import materialise
from wanloom.runs.trained import Weights, open_trained
from wanloom.sample.settings import read_defaults

ORIGINAL_TOKENIZER = Path("google") / "umt5-xxl"
INDEX = "model_index.json"


def convert(
    source: Path, out: Path, *, layout: str = "diffusers", ema: bool = False, model: str | None = None
) -> Weights:
    """Write a new folder; `model` is the pipeline of the other parts, where it is not the one that the weights name.

    Returns what was converted. Raises UserError, and leaves nothing, when something is at `out`, the weights or a part
    of the pipeline cannot be read, or the disk fails.
    """
    clear_left(out.parent)  # tens of GB for a large model
    taken = f"Another `wanloom convert` is writing '{out}': wait for it, or give another folder."
    with whole_folder(out, taken) as folder:
        weights = open_trained(source, ema)
        model = name_parts(source, model or weights.model)
        pipeline = find_pipeline(model, TAKEN[layout])
        if layout == "diffusers":
            copy_parts(pipeline, {name: folder / name for name in (INDEX, *TAKEN[layout])})
            save_model(weights, folder / "transformer", "diffusers")
        else:
            write_original(weights, pipeline, folder)
        write_note(weights, ema, model, pipeline, folder)
    return weights


def name_parts(source: Path, model: str | None) -> str:
    """The pipeline whose other parts are copied, as it is found from everywhere. Raises UserError for none."""
    if model is None:
        raise UserError(
            f"'{source}' is a transformer alone: give the pipeline of its other parts too, such as "
            "`model=Wan-AI/Wan2.1-T2V-1.3B-Diffusers`."
        )
    return full_name(model)


def save_model(weights: Weights, place: Path, layout: Layout) -> None:
    """Write all weights, in fp32."""
    save_weights(weights.load_model(materialise).state_dict(), weights.config, place, layout)


def write_original(weights: Weights, pipeline: Path, folder: Path) -> None:
    """The parts of an original folder that are no pickles."""
    copy_parts(pipeline, {"tokenizer": folder / ORIGINAL_TOKENIZER})
    save_model(weights, folder, "original")


def copy_parts(pipeline: Path, places: dict[str, Path]) -> None:
    """Copy files and folders of files; links become what they lead to. Raises UserError naming what is missing."""
    missing = [name for name in places if not (pipeline / name).exists()]
    if missing:
        raise UserError(
            f"'{pipeline}' has no {', '.join(missing)}, so the folder would not be complete: "
            "give a whole pipeline with `model`."
        )
    for name, place in places.items():
        part = pipeline / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if part.is_dir():
            place.mkdir()
        for file in sorted(part.iterdir()) if part.is_dir() else [part]:
            if file.is_file():  # no part has folders of its own
                shutil.copyfile(file, place / file.name if part.is_dir() else place)


def write_note(weights: Weights, ema: bool, model: str, pipeline: Path, folder: Path) -> None:
    """wanloom.json: where the weights come from, and how `wanloom generate` samples them if nothing else is asked."""
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
