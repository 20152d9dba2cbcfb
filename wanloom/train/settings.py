"""The settings of training; apart from the code that reads them so that they are checked without torch."""

from typing import Annotated, Literal

from pydantic import Field

from wanloom.config import Config

Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Config):
    """How long a run is."""

    steps: int = Field(gt=0, description="optimizer steps of the whole run")
    epochs: float | None = Field(
        default=None,
        gt=0,
        description="passes over all samples, in place of steps, which follow from it when the run starts",
    )


class OptimizerConfig(Config):
    """AdamW; the moments are fp32."""

    lr: float = Field(gt=0, description="learning rate, at its highest")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="of AdamW")
    eps: float = Field(default=1e-8, gt=0, description="of AdamW")
    weight_decay: float = Field(default=0.01, ge=0, description="of matrices only: no biases, norms, modulation tables")


class ScheduleConfig(Config):
    """The learning rate over the run, relative to `optimizer.lr`."""

    kind: Literal["constant", "linear", "cosine"] = Field(default="constant", description="after the warm-up")
    warmup_steps: int = Field(default=0, ge=0, description="steps over which the learning rate rises to optimizer.lr")
    min_lr_ratio: float = Field(
        default=0.0, ge=0, le=1, description="share of optimizer.lr at which linear and cosine end, at the last step"
    )


class EmaConfig(Config):
    """No average is kept unless `decay` is set."""

    decay: float | None = Field(
        default=None, gt=0, lt=1, description="of the averaged weights, such as 0.999; without it there are none"
    )


class LogConfig(Config):
    """How often the run tells something; in steps."""

    every: int = Field(default=1, gt=0, description="steps of a record, which is the mean over them")
    validate_every: int = Field(
        default=0, ge=0, description="steps from one loss on the held-out samples to the next; 0: never"
    )
