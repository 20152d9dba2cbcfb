"""The table of Wan models: one more of them is one more row.

In: a name. Out: the shape of its transformer, the geometry of its VAE, where it is published, and what it makes when
nothing else is asked for. A model that is not in the table is known by its files alone.
Source: wan/configs of Wan-Video/Wan2.1.
"""

from typing import NamedTuple

from pydantic import Field

from wanloom.config import Config
from wanloom.geometry import WAN_21, Geometry
from wanloom.model.settings import DiTConfig

MAX_SHIFT = 100.0  # beyond it the first levels of UniPC are one number in fp32
MAX_GUIDANCE = 100.0  # far above 20 all is one colour


class Defaults(Config):
    """What one model makes when nothing else is asked for; None where it does not say."""

    height: int | None = Field(default=None, gt=0, le=16_384)
    width: int | None = Field(default=None, gt=0, le=16_384)
    frames: int | None = Field(default=None, gt=0, le=10_000)
    steps: int | None = Field(default=None, gt=0, le=10_000)
    guidance: float | None = Field(default=None, ge=1, le=MAX_GUIDANCE)
    shift: float | None = Field(default=None, gt=0, le=MAX_SHIFT)


class Variant(NamedTuple):
    """A row of the table."""

    shape: DiTConfig
    geometry: Geometry
    hub: str | None  # its name there; tiny is shipped
    defaults: Defaults


VARIANTS = {
    "tiny": Variant(
        DiTConfig(dim=128, ffn_dim=512, num_heads=4, num_layers=6, text_dim=64),
        WAN_21,
        hub=None,
        defaults=Defaults(),  # in its own wanloom.json
    ),
    "wan2.1-t2v-1.3b": Variant(
        DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
        WAN_21,
        hub="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        defaults=Defaults(height=480, width=832, frames=81, shift=5.0),
    ),
    "wan2.1-t2v-14b": Variant(
        DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
        WAN_21,
        hub="Wan-AI/Wan2.1-T2V-14B-Diffusers",
        defaults=Defaults(height=720, width=1280, frames=81, shift=5.0),
    ),
}


def find_variant(model: str) -> Variant | None:
    """The row of a model by its own name or that on the hub."""
    return next((row for name, row in VARIANTS.items() if model in (name, row.hub)), None)
