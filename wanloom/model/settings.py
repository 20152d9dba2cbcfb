"""The shape of a model and the names of its kernels; apart from the model so that they are checked without torch."""

from typing import Literal, get_args

from pydantic import Field, model_validator

from wanloom.config import Config
from wanloom.errors import UserError, nearest

Kernel = Literal["auto", "cudnn", "flash", "efficient"]
KERNELS = get_args(Kernel)


def check_kernel_name(name: str) -> None:
    """Raises UserError for a name that no kernel has."""
    if name not in KERNELS:
        raise UserError(
            f"There is no attention kernel '{name}'; known are {', '.join(KERNELS)}.{nearest(name, KERNELS)}"
        )


class DiTConfig(Config):
    """The shape of a WanDiT; the defaults are what all published Wan 2.1 models share.

    The bounds are far from any model, so that a broken config is a sentence before memory is asked for.
    """

    dim: int = Field(gt=0, le=65_536)
    ffn_dim: int = Field(gt=0, le=262_144)
    num_heads: int = Field(gt=0, le=1024)
    num_layers: int = Field(gt=0, le=256)
    in_channels: int = Field(default=16, gt=0, le=4096)
    out_channels: int = Field(default=16, gt=0, le=4096)
    text_dim: int = Field(default=4096, gt=0, le=65_536)
    freq_dim: int = Field(default=256, gt=0, le=65_536)
    text_slots: int = Field(default=512, gt=0, le=65_536)
    eps: float = Field(default=1e-6, gt=0, lt=1)

    @model_validator(mode="after")
    def _divides(self) -> "DiTConfig":
        if self.dim % self.num_heads or self.dim // self.num_heads % 2:
            raise ValueError(f"dim {self.dim} does not split into {self.num_heads} heads of an even width")
        return self
