"""The settings of noise levels; apart from the code that reads them so that they are checked without torch."""

from typing import Any, Literal

from pydantic import Field

from wanloom.config import Config

PRESETS: dict[str, dict[str, Any]] = {
    "pretrain": {
        "sampler": "logit_normal",
        "logit_mean": 0.0,
        "logit_std": 1.5,
        "mix_uniform_ratio": 0.2,
        "shift": 2.5,
        "weighting": "linear",
    },
    "finetune": {"sampler": "uniform", "mix_uniform_ratio": 0.0, "shift": 3.0, "weighting": "linear"},
}


class FlowConfig(Config):
    """How noise levels are drawn and weighted; the defaults are the `finetune` preset."""

    sampler: Literal["uniform", "logit_normal", "mode", "beta"] = Field(
        default="uniform", description="the distribution of u, from which the noise level follows"
    )
    logit_mean: float = Field(default=0.0, description="of the normal under logit_normal")
    logit_std: float = Field(default=1.0, gt=0, description="of the normal under logit_normal")
    mode_scale: float = Field(  # rising only in this range (SD3, 3.1)
        default=1.29, ge=-1.0, le=1.75, description="of mode: above 0 more levels in the middle, below 0 at the ends"
    )
    beta_alpha: float = Field(default=2.5, ge=0.5, description="of beta, whose density is u^(alpha-1) (1-u)^(beta-1)")
    beta_beta: float = Field(default=1.5, ge=0.5, description="of beta")
    mix_uniform_ratio: float = Field(
        default=0.0, ge=0, le=1, description="this share of the samples draws from uniform instead"
    )
    stratified: bool = Field(
        default=False, description="spread the draws of one step evenly over the distribution: less noise in the loss"
    )
    shift: float = Field(
        default=3.0, gt=0, description="noise level = s*u / (1 + (s-1)*u): a higher shift trains more on high noise"
    )
    shift_tokens: int | None = Field(
        default=None, gt=0, description="tokens of a sample at which shift holds; it grows with their square root"
    )
    weighting: Literal["linear", "none"] = Field(
        default="linear", description="weight of the loss: 1 + shift * noise level, or 1"
    )
