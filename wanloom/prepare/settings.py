"""The settings of `wanloom prepare`; apart from the code that encodes, so that they are checked without torch.

Of the memory that a batch takes only what is certain is refused beforehand: its pixels as they were decoded and as the
VAE takes them. What the VAE makes of them inside is many times that; it is left to the allocator, whose error tells.
"""

import os
from typing import Literal

from pydantic import Field, model_validator

from wanloom.config import Config
from wanloom.errors import UserError
from wanloom.geometry import Geometry
from wanloom.media.framing import FramingConfig
from wanloom.media.limits import LimitsConfig
from wanloom.media.video import TimingConfig
from wanloom.memory import check_memory
from wanloom.threads import count_cores

MOST_CLIPS, MOST_PIXELS = 16, 4_000_000  # of a batch; one clip of 81 frames of 832x480 has 32 million pixels
BYTES = 3 + 3 * 4  # of a pixel: uint8 and fp32
Shape = tuple[int, int, int, int]


def usual_workers() -> int:
    """Half of the cores, shared by the processes of this machine, which `wanloom.dist` counts too but with torch."""
    return min(8, max(1, count_cores() // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class PrepareConfig(Config):
    """What is made of a folder of media."""

    framing: FramingConfig = Field(default=FramingConfig(), title="size")
    timing: TimingConfig = Field(default=TimingConfig(), title="time")
    follow_links: bool = Field(
        default=False,
        title="input",
        description="also take what is in folders outside of INPUT that links in it lead to",
    )
    caption_key: str | None = Field(
        default=None,
        title="captions",
        description="key or column that holds the caption (caption; of a table also text or prompt)",
    )
    max_text_length: int = Field(
        default=512,
        title="captions",
        description="longest caption in tokens; longer ones are cut and listed in the report",
    )
    val_fraction: float = Field(
        default=0.05,
        title="result",
        description="share of the files, rounded to whole ones, that is kept for validation, chosen by a hash of their "
        "path; all clips of a file are on one side",
    )
    shard_size: int = Field(default=512, title="result", description="MiB of one tar file")
    dtype: Literal["bf16", "fp32"] = Field(
        default="bf16", title="result", description="of the stored latents and text states"
    )
    seed: int = Field(default=0, title="result", description="of the random crops and the validation share")
    strict: bool = Field(default=False, title="result", description="a file that would be dropped is an error")
    limits: LimitsConfig = Field(default=LimitsConfig(), title="limits of one file, beyond which it is dropped")
    workers: int = Field(
        title="speed",
        default_factory=usual_workers,
        description="files decoded at once by each process; each holds about two clips in memory (half the cores, "
        "shared by the processes of a machine, at most 8)",
    )
    batch_size: int | None = Field(  # None: by `clips_of_batch`
        default=None,
        title="speed",
        description="clips of equal size encoded together; changes latents by rounding, so it is fixed for a folder "
        "(as many as have 4 million pixels together, at most 16)",
    )

    def clips_of_batch(self, pixels: int) -> int:
        """Clips of so many pixels, over all frames, to encode together: many small ones, one large one."""
        return self.batch_size or max(1, min(MOST_CLIPS, MOST_PIXELS // pixels))

    @model_validator(mode="after")
    def _check(self) -> "PrepareConfig":
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"`val_fraction={self.val_fraction:g}` is not between 0 and 1")
        for name in ("max_text_length", "shard_size", "batch_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is at least 1")
        if "seed" in self.model_fields_set and self.framing.crop != "random" and not self.val_fraction:
            raise ValueError("`seed` is of random crops and the validation share, and there is neither: leave it out")
        return self


def fit_config(config: PrepareConfig, geometry: Geometry) -> PrepareConfig:
    """The settings for a model of this geometry: where none was asked for, the frame rate is its own.

    Raises UserError for sizes that its latents cannot have.
    """
    framing, timing = config.framing, config.timing
    if framing.height is not None and framing.width is not None:
        geometry.check_side("height", framing.height)
        geometry.check_side("width", framing.width)
    if framing.max_area is not None and framing.max_area < geometry.grid**2:
        raise UserError(
            f"`max_area={framing.max_area}` is less than one token of {geometry.grid}x{geometry.grid} pixels."
        )
    if timing.mode == "video":
        geometry.check_frames(timing.frames)
    if "fps" not in timing.model_fields_set:
        timing = timing.model_copy(update={"fps": float(geometry.fps)})
    return config.model_copy(update={"timing": timing})


def check_batch(config: PrepareConfig, device: str) -> None:
    """Raises UserError when a batch of the one size that all clips get cannot fit."""
    height, width = config.framing.height, config.framing.width
    if height is None or width is None or config.framing.keep_aspect:
        return  # no file is known yet
    frames = config.timing.frames if config.timing.mode == "video" else 1
    shape = config.clips_of_batch(frames * height * width), frames, height, width
    needed = BYTES * shape[0] * frames * height * width
    check_memory(needed, device, describe_batch(shape), find_helps(config, shape))


def describe_batch(shape: Shape) -> str:
    """What is done, to go after "not enough to"."""
    count, frames, height, width = shape
    return f"encode {count} x {frames} frames of {width}x{height} pixels"


def find_helps(config: PrepareConfig, shape: Shape) -> list[str]:
    """The settings that make it less, the best first."""
    count, frames, height, width = shape
    helps = [f"`batch_size={count // 2}` in place of {count}"] if count > 1 else []
    if config.framing.height is None:
        helps.append(f"a smaller `max_area` than {height * width}")
    else:
        helps.append(f"a smaller `height` and `width` than {height} and {width}")
    if frames > 1:
        helps.append(f"fewer `frames` than {frames}")
    helps = [f"{words}, in a new folder" for words in helps]
    if config.workers > 1:
        helps.append(f"`workers={config.workers // 2}` in place of {config.workers}")
    return helps[:3]
