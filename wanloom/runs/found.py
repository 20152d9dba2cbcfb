"""Which weights are at a path, and the geometry of a model, as far as it is known without reading them or torch."""

from pathlib import Path
from typing import Any

from wanloom.checkpoint.saved import find_checkpoint, read_recipe, read_state
from wanloom.codecs.settings import read_vae
from wanloom.errors import UserError, cut
from wanloom.formats.pipeline import find_local
from wanloom.geometry import WAN_21, WAN_22, Geometry
from wanloom.variants import find_variant


def is_published(path: Path) -> bool:
    """Whether there are weights as files, and no checkpoint."""
    if path.is_file():
        if (path.parent / "state.json").is_file():
            raise UserError(f"{path} is a piece of a checkpoint: give the folder, {path.parent}.")
        return True
    # a run folder too holds a safetensors file, the states of the empty caption
    if (path / "state.json").is_file() or (path / "checkpoints").is_dir() or not path.is_dir():
        return False
    return (path / "transformer").is_dir() or (path / "transformer_2").is_dir() or any(path.glob("*.safetensors"))


def check_weights(path: Path, ema: bool) -> None:
    """Raises UserError when nothing at `path` can be weights, or for `ema` where there is no average."""
    if not is_published(path):
        find_trained(path, ema)
    elif ema:
        raise UserError(
            f"{path} holds one set of weights and no average beside it: leave out `ema`, or `:ema` in init."
        )


def find_trained(run_or_step: Path, ema: bool) -> tuple[Path, dict[str, Any], str]:
    """The newest checkpoint of a run, or the checkpoint itself: its folder, its state and the name of its model."""
    path = find_checkpoint(run_or_step)
    state = read_state(path)
    recipe = read_recipe(path)
    try:
        model, average = recipe["model"], recipe["ema"]["decay"]
    except (TypeError, KeyError) as error:
        raise UserError(f"{path / 'run.yaml'} does not tell the model of the run: {error}.") from error
    if not isinstance(model, str):
        raise UserError(f"{path / 'run.yaml'} does not tell the model of the run: it is {cut(repr(model))}.")
    if ema and not average:
        raise UserError(
            f"{path} has no averaged weights: the run had no ema.decay. Leave out `ema`, or `:ema` in init."
        )
    return path, state, model


def model_geometry(model: str, channels: int | None = None) -> Geometry | None:
    """How the latents of a model divide a video; None where neither the table nor a VAE on this machine says.

    A transformer without a VAE beside it has the geometry of the known VAE with as many `channels`.
    """
    if known := find_variant(model):
        return known.geometry
    folder = find_local(model, ("vae",))
    if folder:
        return read_vae(folder).geometry
    return next((known for known in (WAN_21, WAN_22) if known.channels == channels), None)
