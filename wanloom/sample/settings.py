"""How latents are sampled, and what a model makes when nothing else is asked for.

In: options, and the folder of a pipeline. Out: `GenerateConfig`, checked, and `Defaults`, in which None is left to
GenerateConfig or must be asked for. The one decision: defaults belong to the model, so they lie beside it, in
`wanloom.json` under `generate`; published models have no such file and are known by their shape. No torch here, so that
a mistake is told at once.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from wanloom.config import Config, build_config
from wanloom.errors import MOST_REASON, UserError, cut
from wanloom.files import read_json
from wanloom.formats.pipeline import NOTE
from wanloom.model.settings import DiTConfig
from wanloom.variants import MAX_GUIDANCE, MAX_SHIFT, VARIANTS, Defaults

SolverName = Literal["unipc", "dpm++", "euler"]


class GenerateConfig(Config):
    """How latents are sampled."""

    solver: SolverName = "unipc"
    steps: int = Field(default=50, ge=1)
    shift: float = Field(default=5.0, gt=0, le=MAX_SHIFT)
    guidance: float = Field(default=5.0, ge=1, le=MAX_GUIDANCE)  # 1 leaves the negative prompt out


def read_defaults(pipeline: Path, config: DiTConfig) -> Defaults:
    """The defaults of the model in `pipeline` with a transformer of this config. Raises UserError for a broken file."""
    file = pipeline / NOTE
    values = read_json(file).get("generate") if file.is_file() else None
    if values is None:
        return next((row.defaults for row in VARIANTS.values() if row.shape == config), Defaults())
    if not isinstance(values, dict):
        raise UserError(f"`generate` in {file} holds no settings.")
    try:
        return build_config(Defaults, values)
    except UserError as error:
        raise UserError(f"`generate` in {file}: {cut(str(error), MOST_REASON)}") from error
