"""The settings of `wanloom prepare`; apart from the code that encodes, so that they are checked without torch."""

import os

from pydantic import Field, model_validator

from wanloom.config import Config
from wanloom.media.framing import FramingConfig
from wanloom.media.limits import LimitsConfig
from wanloom.media.video import TimingConfig
from wanloom.threads import count_cores


def usual_workers() -> int:
    """Half of the cores, shared by the processes of this machine, which `wanloom.dist` counts too but with torch."""
    return min(8, max(1, count_cores() // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class PrepareConfig(Config):
    """The settings of `wanloom prepare`; its --help explains each."""

    timing: TimingConfig = TimingConfig()
    framing: FramingConfig = FramingConfig()
    limits: LimitsConfig = LimitsConfig()
    caption_key: str | None = None
    max_text_length: int = 512
    val_fraction: float = 0.05
    shard_size: int = 512  # MiB
    batch_size: int | None = None  # None: by `default_batch`
    dtype: str = "bf16"
    seed: int = 0
    workers: int = Field(default_factory=usual_workers)
    strict: bool = False
    follow_links: bool = False

    @model_validator(mode="after")
    def _check(self) -> "PrepareConfig":
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"--val-fraction {self.val_fraction:g} is not between 0 and 1")
        for name in ("max_text_length", "shard_size", "batch_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is at least 1")
        if self.dtype not in ("bf16", "fp32"):
            raise ValueError(f"--dtype {self.dtype} is not one of bf16, fp32")
        if "seed" in self.model_fields_set and self.framing.crop != "random" and not self.val_fraction:
            raise ValueError("--seed is of random crops and the validation share, and there is neither: leave it out")
        return self
