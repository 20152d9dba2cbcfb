"""What a model makes when nothing else is asked for: sizes, steps, guidance.

In: the folder of a pipeline. Out: `Settings`, in which None is left to GenerateConfig or must be asked for. The one
decision: they belong to the model, so they lie beside it, in `wanloom.json` under `generate`; published models have no
such file and are known by their shape.
"""

from pathlib import Path

from pydantic import Field

from wanloom.config import Config, UserError, build_config
from wanloom.folders import brief, read_json
from wanloom.model.settings import CONFIGS, DiTConfig

FILE = "wanloom.json"


class Settings(Config):
    """Defaults of one model."""

    height: int | None = Field(default=None, gt=0, le=16_384)
    width: int | None = Field(default=None, gt=0, le=16_384)
    frames: int | None = Field(default=None, gt=0, le=10_000)
    steps: int | None = Field(default=None, gt=0, le=10_000)
    guidance: float | None = Field(default=None, ge=1, le=100)
    shift: float | None = Field(default=None, gt=0, le=100)


# by the name of the config in model/dit.py, as Wan's own code has them
PUBLISHED = {
    "wan2.1-t2v-1.3b": Settings(height=480, width=832, frames=81, shift=5.0),
    "wan2.1-t2v-14b": Settings(height=720, width=1280, frames=81, shift=5.0),
}


def read_settings(pipeline: Path, config: DiTConfig) -> Settings:
    """The defaults of the model in `pipeline` with a transformer of this config. Raises UserError for a broken file."""
    file = pipeline / FILE
    values = read_json(file).get("generate") if file.is_file() else None
    if values is None:
        return next(
            (PUBLISHED[name] for name, known in CONFIGS.items() if known == config and name in PUBLISHED), Settings()
        )
    if not isinstance(values, dict):
        raise UserError(f"`generate` in {file} holds no settings.")
    try:
        return build_config(Settings, values)
    except UserError as error:
        raise UserError(f"`generate` in {file}: {brief(error)}") from error
