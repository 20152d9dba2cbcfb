"""The settings of data and batches; apart from the code that reads them so that they are checked without torch."""

from pydantic import Field

from wanloom.config import Config, UserPath
from wanloom.errors import UserError

NO_DATA = (
    "Say once where the training data is: data.path=FOLDER for a prepared folder, data.sources for several, or "
    "`mock` for made-up data."
)


class SourceConfig(Config):
    """A prepared folder and how often it is seen: by `repeats` of its samples or by its `weight` in the mix."""

    path: UserPath = Field(description="a folder that `wanloom prepare` made, or one of WebDataset shards of latents")
    repeats: int | None = Field(
        default=None, gt=0, description="passes over this source while a source with 1 is passed once"
    )
    weight: float | None = Field(
        default=None, gt=0, description="share of the samples, relative to the weights of the other sources"
    )


class DataConfig(Config):
    """Where the samples come from: one folder (`path`), a mix (`sources`) or nowhere (`mock`)."""

    path: UserPath | None = Field(default=None, description="the prepared folder; in place of it sources or mock")
    sources: tuple[SourceConfig, ...] = Field(
        default=(), description="several folders, each as {path: FOLDER, repeats: N} or {path: FOLDER, weight: X}"
    )
    mock: str | None = Field(
        default=None,
        description="made-up samples, frames x height x width such as 81x480x832,1x480x832*4, or mix for clips and "
        "images that fit the recipe",
    )
    prefetch: int = Field(default=2, ge=1, le=1000, description="steps that are read ahead")

    def resolved(self) -> tuple[SourceConfig, ...]:
        """The sources, whichever way they were given. Raises UserError unless there is exactly one way."""
        if sum(bool(way) for way in (self.path, self.sources, self.mock)) != 1:
            raise UserError(NO_DATA)
        return self.sources or (SourceConfig(path=self.path or f"mock {self.mock}"),)


class BatchConfig(Config):
    """What makes a step; results do not depend on `tokens_per_pack`, speed and memory do."""

    samples: int = Field(gt=0, description="samples of an optimizer step, over all GPUs")
    tokens_per_pack: int = Field(
        gt=0,
        description="video tokens of one forward pass, at most; a clip of 81 frames of 832x480 has 32,760. Less takes "
        "less memory and gives the same losses within rounding, but every sample must fit",
    )
