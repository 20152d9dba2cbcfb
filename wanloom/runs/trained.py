"""Weights on disk, whoever wrote them: a checkpoint with the recipe that made it, or a transformer as files.

In: the folder of a run or of one of its checkpoints, of a pipeline or a transformer in either layout, or a file. Out:
weights by parameter name, the model's config, and the name of the pipeline whose VAE and text encoder belong to it: the
recipe of a run tells it, and the note that `wanloom convert` writes beside the weights.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wanloom.checkpoint.writer import load_tensors, load_weights
from wanloom.codecs.identity import files_identity, folder_identity
from wanloom.config import build_config, expand_home
from wanloom.dist import pick_device, together
from wanloom.files import read_json
from wanloom.folders import check_finite
from wanloom.formats.pipeline import NOTE
from wanloom.formats.published import find_files
from wanloom.formats.transformer import load_dit, read_config
from wanloom.model.dit import WanDiT, cast_weights
from wanloom.model.settings import DiTConfig
from wanloom.parallel.params import fill, local
from wanloom.runs.found import check_weights, find_trained, is_published
from wanloom.runs.recipe import Run, read_run


@dataclass(frozen=True)
class Trained:
    """What is known of a checkpoint before its weights are read."""

    path: Path
    step: int
    model: str  # the pipeline that the run was trained on
    config: DiTConfig
    identity: str  # of its files: state.json holds the size and checksum of each; the average has another one

    def load_weights(self, ema: bool) -> dict[str, Tensor]:
        """The weights by parameter name, or their average. Raises UserError when there is none, or for damage."""
        weights = load_weights(self.path, ema)[1]
        self._check(weights)
        return weights

    def load_model(
        self,
        ema: bool,
        dtype: torch.dtype,
        device: torch.device,
        kernel: str = "auto",
        apply: Callable[[WanDiT], None] = lambda model: None,
    ) -> WanDiT:
        """The model, its Linears in `dtype`; `apply` may change it, as layouts do, before it gets memory and values.

        Several processes call it together. Raises UserError, the same on all of them, for damage.
        """
        with torch.device("meta"):
            model = WanDiT(self.config, kernel)
        cast_weights(model, dtype)
        apply(model)
        model.to_empty(device=device)
        kind = "ema" if ema else "model"
        load_tensors(self.path, {f"{kind}.{name}": param.detach() for name, param in model.named_parameters()})
        with together():
            self._check({name: local(param) for name, param in model.named_parameters()})
        return model

    def _check(self, weights: dict[str, Tensor]) -> None:
        for name, value in weights.items():
            check_finite(value, f"The checkpoint {self.path}: '{name}'")


@dataclass(frozen=True)
class Published:
    """A transformer as safetensors in either layout, before its weights are read."""

    path: Path
    model: str | None  # the pipeline that its other parts are of, where that is known
    config: DiTConfig
    identity: str  # of its files
    step: int | None = None

    def load_weights(self, ema: bool) -> dict[str, Tensor]:
        """The weights by parameter name, in fp32. Raises UserError for damage."""
        assert not ema, "open_trained refuses it"
        return dict(load_dit(self.path).state_dict())

    def load_model(
        self,
        ema: bool,
        dtype: torch.dtype,
        device: torch.device,
        kernel: str = "auto",
        apply: Callable[[WanDiT], None] = lambda model: None,
    ) -> WanDiT:
        """The model, its Linears in `dtype`; several processes call it together."""
        assert not ema, "open_trained refuses it"
        with together():
            return load_dit(self.path, dtype, device, kernel, apply, fill)


Weights = Trained | Published


def open_trained(path: Path, ema: bool = False) -> Weights:
    """The newest checkpoint of a run, a checkpoint itself, or the weights of a published model at `path`.

    Raises UserError if there is none, or with `ema` if there is no average: before anything slow is done.
    """
    if is_published(path):
        check_weights(path, ema)
        return open_published(path)
    return open_checkpoint(path, ema)


def open_published(path: Path) -> Published:
    """The transformer at `path`. Raises UserError when it is none that can be read."""
    files = find_files(path)
    config = read_config(path)
    # a pipeline has its own parts; the note is beside the weights, or beside their folder
    folder = files[0].parent
    pipeline = next((str(place) for place in (path, path.parent) if (place / "text_encoder").is_dir()), None)
    note = next((file for place in (folder, folder.parent) if (file := place / NOTE).is_file()), None)
    named = read_json(note).get("model") if note else None
    model = pipeline or (named if isinstance(named, str) else None)
    identity = folder_identity(folder) if path.is_dir() else files_identity([*files, *folder.glob("config.json")])
    return Published(path, model, config, identity)


def open_checkpoint(run_or_step: Path, ema: bool) -> Trained:
    """The newest checkpoint of a run, or the checkpoint itself."""
    path, state, model = find_trained(run_or_step, ema)
    digest = hashlib.sha256((path / "state.json").read_bytes()).hexdigest()
    identity = digest[:16] + ("-ema" if ema else "")
    return Trained(path, state["step"], model, build_config(DiTConfig, state["model"]), identity)


@dataclass(frozen=True)
class LoadedRun:
    """What a run has learned, and what it is."""

    model: WanDiT
    recipe: Run
    step: int
    path: Path  # of the checkpoint


def load_run(run_or_step: Path, ema: bool = False, device: str | None = None) -> LoadedRun:
    """The model of the newest checkpoint of a run, or of that checkpoint, in fp32 and without gradients."""
    weights = open_checkpoint(Path(expand_home(str(run_or_step))), ema)
    recipe = read_run(weights.path)
    model = weights.load_model(ema, torch.float32, pick_device(device)).requires_grad_(False)
    return LoadedRun(model, recipe, weights.step, weights.path)
