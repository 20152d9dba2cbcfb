"""The settings of layouts and memory; apart from the code that reads them so that they are checked without torch."""

from typing import Literal

from pydantic import Field

from wanloom.config import Config

Recompute = Literal["none", "cheap", "attention", "full"]
Compile = Literal["none", "block"]


class ParallelConfig(Config):
    """How many processes each axis has; the product is the number of processes. One of the two dp may be -1."""

    dp_replicate: int = Field(default=1, ge=-1, description="copies of the model; -1: what the others leave")
    dp_shard: int = Field(
        default=-1, ge=-1, description="parts of parameters, gradients and moments (FSDP2); -1: what the others leave"
    )
    cp: int = Field(default=1, ge=1, description="parts of a packed sequence (context parallel)")
    tp: int = Field(default=1, ge=1, description="parts of every layer (tensor and sequence parallel)")
    pp: int = Field(default=1, ge=1, description="stages of the model (pipeline parallel)")
    context: Literal["auto", "ulysses", "ring"] = Field(
        default="auto", description="how cp attends; auto: Ulysses as far as the heads divide"
    )
    cp_ulysses: int | None = Field(
        default=None, ge=1, description="how much of cp is Ulysses, under context=auto; the rest is the ring"
    )
