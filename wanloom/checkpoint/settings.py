"""When checkpoints are saved; apart from the code that reads it so that it is checked without torch."""

from pydantic import Field

from wanloom.config import Config


class CheckpointConfig(Config):
    """When to save and how many to keep; the last step is always saved."""

    every: int = Field(default=500, gt=0, description="steps from one checkpoint to the next")
    minutes: float | None = Field(
        default=None, gt=0, description="save too when so many minutes have gone by since the last checkpoint"
    )
    keep: int = Field(default=2, ge=1, description="newest checkpoints that are kept")
