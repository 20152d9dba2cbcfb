"""A trained model on disk: a checkpoint's weights with the recipe that made them.

In: the folder of a run or of one of its checkpoints. Out: weights by parameter name, the model's config, and the name
of the pipeline whose VAE and text encoder belong to it, which the recipe beside the weights tells.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from wanloom.config import UserError, build_config
from wanloom.dist import together
from wanloom.folders import check_finite
from wanloom.model.dit import WanDiT, cast_weights
from wanloom.model.settings import DiTConfig
from wanloom.parallel.params import local
from wanloom.train.checkpoint import load_tensors, load_weights
from wanloom.train.saved import find_checkpoint, read_state


@dataclass(frozen=True)
class Trained:
    """What is known of a checkpoint before its weights are read."""

    path: Path
    step: int
    model: str  # the pipeline that the run was trained on
    config: DiTConfig
    identity: str  # of its files: state.json holds the size and checksum of each

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


def open_trained(run_or_step: Path, ema: bool = False) -> Trained:
    """The newest checkpoint of a run, or the checkpoint itself.

    Raises UserError if there is none, or with `ema` if the run kept no average: before anything slow is done.
    """
    path = find_checkpoint(run_or_step)
    state = read_state(path)
    try:
        recipe = yaml.safe_load((path / "run.yaml").read_text(encoding="utf-8"))
        model, average = recipe["model"], recipe["ema"]["decay"]
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise UserError(f"{path / 'run.yaml'} does not tell the model of the run: {error}.") from error
    if ema and not average:
        raise UserError(f"{path} has no averaged weights: the run was trained without ema.decay. Leave --ema out.")
    digest = hashlib.sha256((path / "state.json").read_bytes()).hexdigest()
    return Trained(path, state["step"], model, build_config(DiTConfig, state["model"]), digest[:16])
