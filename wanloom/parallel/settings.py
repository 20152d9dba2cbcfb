"""How work is laid out and computed; apart from the code that reads it so that it is checked without torch."""

from typing import Literal

from pydantic import Field

from wanloom.config import Config
from wanloom.model.settings import Kernel

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


class ComputeConfig(Config):
    """How the model computes; all but `precision` may change when a run goes on, as it alters no more than rounding."""

    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="of the arithmetic; bf16 is torch.autocast, for GPUs from Ampere on and CPUs with bf16 "
        "instructions. Weights, gradients and moments are fp32 in both",
    )
    kernel: Kernel = Field(default="auto", description="of attention; the first line of a run says what auto became")
    recompute: Recompute = Field(
        default="none",
        description="what the backward pass computes again to save memory: cheap (norms, rotation, GELU, "
        "cross-attention), attention (all but self-attention) or full (all but the input of a block)",
    )
    offload_activations: bool = Field(
        default=False, description="what is kept for the backward pass waits in host memory; of a GPU only"
    )
    compile: Compile = Field(
        default="none", description="block: every block through torch.compile; minutes at the start, then faster"
    )

    @property
    def bf16(self) -> bool:
        return self.precision == "bf16"
