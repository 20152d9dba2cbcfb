"""What the config.json of a pipeline's part may say; apart from the codecs so that it is read without torch.

In: the folder of a part. Out: its checked config, and of a VAE the geometry. The one decision: a number is bounded
before a module of that size is made, and a VAE that is neither that of Wan 2.1 nor that of Wan 2.2 is refused: what it
makes of a size would be a guess.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import ConfigDict, Field, model_validator

from wanloom.config import Config, build_config
from wanloom.errors import MOST_REASON, UserError, cut
from wanloom.files import read_json
from wanloom.geometry import WAN_21, WAN_22, Geometry

C = TypeVar("C", bound="PartConfig")
Channel = Annotated[int, Field(gt=0, le=1024)]
Statistic = Annotated[float, Field(ge=-1000, le=1000)]


class PartConfig(Config):
    """What is read of a part's config.json; what a library writes beside it is left out."""

    model_config = ConfigDict(extra="ignore")


def read_part(schema: type[C], folder: Path, what: str, *kinds: str, name: str = "config.json") -> C:
    """The checked config of `folder`, of one of `kinds`, the first of them where it says none.

    Raises UserError when it is missing, of another kind or out of bounds.
    """
    file = folder / name
    if not file.is_file():
        raise UserError(f"There is no {what} in '{folder.parent}': {file} is missing.")
    values = read_json(file)
    if "quantization_config" in values:
        raise UserError(f"The {what} in {folder} is quantised, which is not read: give it in bf16, fp16 or fp32.")
    named = values.get("_class_name") or values.get("architectures") or values.get("tokenizer_class") or kinds[0]
    named = named[0] if isinstance(named, list) and named else named
    if named not in kinds:
        raise UserError(f"{file} describes a {cut(str(named), 60)!r}, but the {what} of Wan is a {kinds[0]}.")
    try:
        return build_config(schema, {key: value for key, value in values.items() if value is not None})
    except UserError as error:
        reason = cut(str(error), MOST_REASON)
        raise UserError(f"{file} does not describe the {what} of a Wan model. {reason}") from error


class VaeConfig(PartConfig):
    """An AutoencoderKLWan; the defaults are the library's, which are those of Wan 2.1."""

    base_dim: Channel = 96
    decoder_base_dim: Channel | None = None
    z_dim: int = Field(16, gt=0, le=256)
    dim_mult: tuple[int, int, int, int] = (1, 2, 4, 4)
    num_res_blocks: int = Field(2, gt=0, le=16)
    attn_scales: tuple[Statistic, ...] = Field((), max_length=8)
    temperal_downsample: tuple[bool, bool, bool] = (False, True, True)
    dropout: float = Field(0.0, ge=0, lt=1)
    latents_mean: tuple[Statistic, ...]
    latents_std: tuple[Statistic, ...]
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    @property
    def geometry(self) -> Geometry:
        """What `_agrees` holds the fields to."""
        return replace(WAN_22 if self.is_residual else WAN_21, channels=self.z_dim)

    @model_validator(mode="after")
    def _agrees(self) -> "VaeConfig":
        if not all(0 < factor <= 16 for factor in self.dim_mult):
            raise ValueError(f"dim_mult is {list(self.dim_mult)}, factors of 1 to 16 are expected")
        if sum(self.temperal_downsample) != 2:
            raise ValueError(f"temperal_downsample is {list(self.temperal_downsample)}, two of them halve the frames")
        for name, values in (("latents_mean", self.latents_mean), ("latents_std", self.latents_std)):
            if len(values) != self.z_dim:  # one number would be taken for all channels
                raise ValueError(f"{name} has {len(values)} numbers for {self.z_dim} channels of latents")
        if min(self.latents_std) <= 0:
            raise ValueError("latents_std has a number that is not above 0")
        patch = 2 if self.is_residual else None  # pixels that are folded into channels before the first layer
        colours, geometry = 3 * (patch or 1) ** 2, self.geometry
        wanted = (patch, colours, colours, geometry.frames, geometry.pixels)
        names = ("patch_size", "in_channels", "out_channels", "scale_factor_temporal", "scale_factor_spatial")
        found = tuple(getattr(self, name) for name in names)
        if found != wanted:
            differs = [
                f"{name} is {was}, not {must}"
                for name, was, must in zip(names, found, wanted, strict=True)
                if was != must
            ]
            raise ValueError(
                f"it is no VAE of the geometry {WAN_21} (Wan 2.1) or {WAN_22} (Wan 2.2): with is_residual "
                f"{self.is_residual}, {', '.join(differs)}"
            )
        return self


def read_vae(pipeline: Path) -> VaeConfig:
    """The config of a pipeline's VAE. Raises UserError when it is missing, of another kind or out of bounds."""
    return read_part(VaeConfig, pipeline / "vae", "VAE", "AutoencoderKLWan")
