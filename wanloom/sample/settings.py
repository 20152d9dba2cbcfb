"""How latents are sampled, of which sizes, and what a model makes when nothing else is asked for.

In: options, and the folder of a pipeline. Out: `GenerateConfig` and shapes, checked, and `Defaults`, in which None is
left to GenerateConfig or must be asked for. The one decision: defaults belong to the model, so they lie beside it, in
`wanloom.json` under `generate`; published models have no such file and are known by their shape. No torch here, so that
a mistake is told at once.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from wanloom.config import Config, build_config
from wanloom.errors import UserError, cut
from wanloom.formats.pipeline import NOTE
from wanloom.model.settings import CONFIGS, DiTConfig

SPATIAL_STEP = 16  # pixels of one token, rows and columns: 8 in the VAE times 2 in the patch
TEMPORAL_STEP = 4  # frames of one latent frame, after the first
PIXELS_PER_LATENT = 8
MAX_SHIFT = 100.0  # beyond it the first levels of UniPC are one number in fp32
MAX_GUIDANCE = 100.0  # far above 20 all is one colour
SolverName = Literal["unipc", "dpm++", "euler"]


class GenerateConfig(Config):
    """How latents are sampled."""

    solver: SolverName = "unipc"
    steps: int = Field(default=50, ge=1)
    shift: float = Field(default=5.0, gt=0, le=MAX_SHIFT)
    guidance: float = Field(default=5.0, ge=1, le=MAX_GUIDANCE)  # 1 leaves the negative prompt out


def check_side(name: str, value: int) -> None:
    """Raises UserError with the nearest legal values for a height or width that is no multiple of a token's."""
    if value < SPATIAL_STEP or value % SPATIAL_STEP:
        legal = _around(value, SPATIAL_STEP, 0)
        raise UserError(f"The {name} is {value}, it must be a multiple of {SPATIAL_STEP}: {legal}.")


def check_frames(frames: int) -> None:
    """Raises UserError with the nearest legal values for a number of frames that is not 4n+1."""
    if frames < 1 or frames % TEMPORAL_STEP != 1:
        legal = _around(frames, TEMPORAL_STEP, 1)
        raise UserError(f"The number of frames is {frames}, it must be 4n+1: {legal}.")


def latents_shape(channels: int, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Shape of the latents of a video in pixels. Raises UserError with the nearest legal values."""
    check_side("height", height)
    check_side("width", width)
    check_frames(frames)
    latent_frames = (frames - 1) // TEMPORAL_STEP + 1
    return channels, latent_frames, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT


def video_shape(latent_frames: int, rows: int, columns: int) -> tuple[int, int, int]:
    """Frames, height and width in pixels of latents of this size."""
    return TEMPORAL_STEP * (latent_frames - 1) + 1, PIXELS_PER_LATENT * rows, PIXELS_PER_LATENT * columns


def _around(value: int, step: int, rest: int) -> str:
    """The legal values `step * n + rest` next to `value`, in words."""
    below = (value - rest) // step * step + rest
    smallest = rest or step
    return f"try {smallest}" if below < smallest else f"try {below} or {below + step}"


class Defaults(Config):
    """What one model makes when nothing else is asked for; None where it does not say."""

    height: int | None = Field(default=None, gt=0, le=16_384)
    width: int | None = Field(default=None, gt=0, le=16_384)
    frames: int | None = Field(default=None, gt=0, le=10_000)
    steps: int | None = Field(default=None, gt=0, le=10_000)
    guidance: float | None = Field(default=None, ge=1, le=MAX_GUIDANCE)
    shift: float | None = Field(default=None, gt=0, le=MAX_SHIFT)


# by the name of the config in model/settings.py, as Wan's own code has them
DEFAULTS = {
    "wan2.1-t2v-1.3b": Defaults(height=480, width=832, frames=81, shift=5.0),
    "wan2.1-t2v-14b": Defaults(height=720, width=1280, frames=81, shift=5.0),
}


def read_defaults(pipeline: Path, config: DiTConfig) -> Defaults:
    """The defaults of the model in `pipeline` with a transformer of this config. Raises UserError for a broken file."""
    from wanloom.folders import MOST_REASON, read_json  # which reads tensors too, with torch

    file = pipeline / NOTE
    values = read_json(file).get("generate") if file.is_file() else None
    if values is None:
        return next(
            (DEFAULTS[name] for name, known in CONFIGS.items() if known == config and name in DEFAULTS), Defaults()
        )
    if not isinstance(values, dict):
        raise UserError(f"`generate` in {file} holds no settings.")
    try:
        return build_config(Defaults, values)
    except UserError as error:
        raise UserError(f"`generate` in {file}: {cut(str(error), MOST_REASON)}") from error
