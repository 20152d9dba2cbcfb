"""Weights on disk, whoever wrote them: a checkpoint with the recipe that made it, or a transformer as files.

In: the folder of a run or of one of its checkpoints, of a pipeline or a transformer in either layout, or a file. Out:
weights by parameter name, the model's config, and the name of the pipeline whose VAE and text encoder belong to it: the
recipe of a run tells it, and the note that `wanloom convert` writes beside the weights.
"""

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from wanloom.checkpoint.writer import load_tensors
from wanloom.codecs.identity import files_identity, folder_identity
from wanloom.config import build_config, expand_home
from wanloom.dist import pick_device, together
from wanloom.errors import UserError
from wanloom.files import read_json
from wanloom.folders import check_finite
from wanloom.formats.pipeline import NOTE, find_pipeline
from wanloom.formats.published import find_files
from wanloom.formats.transformer import load_dit, read_config
from wanloom.keys import SCHEME
from wanloom.model.dit import WanDiT, materialise
from wanloom.model.init import init_weights
from wanloom.model.settings import DiTConfig
from wanloom.parallel.params import fill, local
from wanloom.runs.found import check_weights, find_trained, is_published
from wanloom.runs.recipe import Run, read_run, split_init

Make = Callable[[DiTConfig], WanDiT]  # `materialise`, with all that is not of the weights


@dataclass(frozen=True)
class Random:
    """New weights."""

    config: DiTConfig
    seed: int
    identity = f"random:{SCHEME}"

    def load_model(self, make: Make) -> WanDiT:
        """The model."""
        model = make(self.config)
        init_weights(model, self.seed, fill)
        return model


@dataclass(frozen=True)
class Published:
    """A transformer as safetensors in either layout, before its weights are read."""

    path: Path
    model: str | None  # the pipeline that its other parts are of, where that is known
    config: DiTConfig
    step: int | None = None

    @cached_property
    def identity(self) -> str:
        """Of its files."""
        folder = find_files(self.path)[0].parent
        if self.path.is_dir():
            return folder_identity(folder)
        return files_identity([*find_files(self.path), *folder.glob("config.json")])

    def load_model(self, make: Make) -> WanDiT:
        """The model; several processes call it together. Raises UserError, the same on all of them, for damage."""
        with together():
            return load_dit(self.path, make, fill)


@dataclass(frozen=True)
class Trained:
    """What is known of a checkpoint before its weights are read."""

    path: Path
    step: int
    model: str  # the pipeline that the run was trained on
    config: DiTConfig
    identity: str  # of its files: state.json holds the size and checksum of each; the average has another one
    ema: bool  # whether the average is meant
    names: Collection[str] | None = None  # of the parameters that it holds, by default all
    base: "Init | None" = None  # which has the others

    def load_model(self, make: Make) -> WanDiT:
        """The model; several processes call it together. Raises UserError, the same on all of them, for damage."""
        model = self.base.load_model(make) if self.base else make(self.config)
        named, kind = dict(model.named_parameters()), "ema" if self.ema else "model"
        own = named if self.names is None else {name: named[name] for name in self.names if name in named}
        load_tensors(self.path, {f"{kind}.{name}": param.detach() for name, param in own.items()})
        with together():
            for name, param in own.items():
                check_finite(local(param), f"The checkpoint {self.path}: '{name}'")
        return model


Weights = Trained | Published
Init = Weights | Random


def open_init(run: Run, config: DiTConfig) -> Init:
    """The weights that a run begins with. Raises UserError for none that can be read, or of another shape."""
    if run.init == "random":
        return Random(config, run.seed)
    if run.init == "pretrained":
        return open_published(find_pipeline(run.model, ("transformer",)))
    weights = open_trained(*split_init(run.init))
    if weights.config != config:
        raise UserError(f"{weights.path} has weights of another shape than those of {run.model}.")
    return weights


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
    return Published(path, model, config)


def open_checkpoint(run_or_step: Path, ema: bool) -> Trained:
    """The newest checkpoint of a run, or the checkpoint itself."""
    path, state, model = find_trained(run_or_step, ema)
    config = build_config(DiTConfig, state["model"])
    digest = hashlib.sha256((path / "state.json").read_bytes()).hexdigest()
    identity, names = digest[:16] + ("-ema" if ema else ""), state.get("trained")
    base = None if names is None else open_base(path, config, state["base"])
    return Trained(path, state["step"], model, config, identity, ema, names, base)


def open_base(path: Path, config: DiTConfig, identity: str) -> Init:
    """What a run of which some parameters were trained began with. Raises UserError when it is no longer there."""
    run = read_run(path)
    try:
        base = open_init(run, config)
        if base.identity != identity:
            raise UserError("They are other ones now.")
    except UserError as error:
        raise UserError(
            f"{path} holds only the parameters that were trained, the others are those that the run began with: "
            f"init={run.init} of the model {run.model}. {error}"
        ) from error
    return base


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
    model = weights.load_model(partial(materialise, device=pick_device(device))).requires_grad_(False)
    return LoadedRun(model, recipe, weights.step, weights.path)
