"""What `generate` is asked for beside the prompts, and what is wrong with it by the words alone.

In: settings, of which those that are None are left to the model or to the machine. Out: the same, checked, and how to
sample. No torch here, so that a mistake is told at once.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from wanloom.config import Config, build_config, expand_home
from wanloom.devices import check_device_name
from wanloom.errors import UserError, cut
from wanloom.formats.pipeline import check_name
from wanloom.geometry import Geometry
from wanloom.model.settings import KERNELS, check_kernel_name
from wanloom.runs.found import check_weights, find_trained, is_published, model_geometry
from wanloom.sample.prompts import MAX_SEED, Prompt
from wanloom.sample.settings import GenerateConfig, SolverName
from wanloom.variants import VARIANTS, Defaults

WAN = VARIANTS["wan2.1-t2v-1.3b"]
SIDE = f"a multiple of {WAN.geometry.grid} for Wan 2.1"


class Asked(Config):
    """The settings of one call for all of its prompts; sizes, seed and negative are for those that have none."""

    model: str | None = Field(
        default=None,
        description="`tiny`, a diffusers folder or a hub name; default: that of the weights' run, else tiny",
    )
    checkpoint: str | None = Field(
        default=None,
        description="trained weights: a run (its newest), one checkpoint, or a transformer as safetensors in either "
        "layout",
    )
    ema: bool = Field(default=False, description="the averaged weights of the checkpoint")
    height: int | None = Field(
        default=None, description=f"pixels, {SIDE}; default: that of the model, {WAN.defaults.height} for Wan's 1.3B"
    )
    width: int | None = Field(default=None, description=f"pixels, {SIDE}; {WAN.defaults.width} for Wan's 1.3B")
    frames: int | None = Field(
        default=None,
        description=f"{WAN.geometry.frames}n+1; 1 makes an image; {WAN.defaults.frames} for Wan's 1.3B",
    )
    fps: int | None = Field(
        default=None,
        description=f"frames a second of the file; default: that of the model, {WAN.geometry.fps} for Wan 2.1",
    )
    steps: int | None = Field(default=None, description="default: those of the model, or 50")
    solver: SolverName | None = Field(default=None, description="default unipc")
    shift: float | None = Field(
        default=None, description="more of the steps at high noise; default: that of the model, or 5"
    )
    guidance: float | None = Field(
        default=None,
        description="default: that of the model, or 5; 1 leaves the negative prompt out and halves the work",
    )
    negative: str | None = Field(
        default=None, description="what not to show; default: the empty prompt (Wan's own code has a long Chinese one)"
    )
    seed: int = Field(default=0, description="of the first prompt, each next one has one more")
    precision: Literal["fp32", "bf16"] | None = Field(
        default=None, description="of transformer and text encoder; default bf16 on a GPU, else fp32"
    )
    kernel: str = Field(default="auto", description=f"of attention: {', '.join(KERNELS)}")
    device: str | None = Field(
        default=None, description="such as cpu or cuda:1; default: the first GPU where there is one"
    )
    tp: int = Field(default=1, description="split every layer over N of the processes")
    cfg_parallel: Literal[1, 2] | None = Field(
        default=None,
        description="2 computes the two branches of guidance on two groups of processes; default 2 where both can be "
        "had",
    )

    @property
    def weights(self) -> Path | None:
        """Where the trained weights are."""
        return Path(expand_home(self.checkpoint)) if self.checkpoint else None


def check_asked(prompts: Sequence[Prompt], asked: Asked) -> None:
    """Raises UserError for what is wrong by the words alone."""
    if not prompts:
        raise UserError("There is no prompt to make anything of.")
    if asked.ema and not asked.checkpoint:
        raise UserError("`ema` asks for the averaged weights of a run: give the run with `checkpoint`.")
    if asked.fps is not None and asked.fps < 1:
        raise UserError(f"`fps` is {asked.fps}, it must be at least 1.")
    if not 0 <= asked.seed < MAX_SEED:
        raise UserError(f"`seed` is {asked.seed}, it must be at least 0 and below 2^63.")
    if (asked.height is None) != (asked.width is None):
        raise UserError("`height` and `width` belong together: give both or neither.")
    check_places(asked)
    check_negative(prompts, asked, how_to_sample(asked, Defaults()).guidance)
    if (geometry := model_geometry(_name_model(asked))) is None:
        return  # told when the VAE is here
    own = {name: size for name in ("height", "width", "frames") if (size := getattr(asked, name)) is not None}
    check_sizes(geometry, own)
    for prompt in prompts:
        check_sizes(geometry, {name: getattr(prompt, name) for name in prompt.model_fields_set}, prompt.where)


def _name_model(asked: Asked) -> str:
    """The pipeline whose VAE decodes, as far as its name is known before anything is read; else empty."""
    if asked.model or not asked.weights:
        return asked.model or "tiny"
    return "" if is_published(asked.weights) else find_trained(asked.weights, asked.ema)[2]


def check_places(asked: Asked) -> None:
    """Raises UserError for what is to compute, or holds the weights, and cannot as far as its name tells."""
    if asked.tp < 1:
        raise UserError(f"`tp` is {asked.tp}, it must be at least 1.")
    if asked.device is not None:
        check_device_name(asked.device)
    check_kernel_name(asked.kernel)
    if asked.weights:
        check_weights(asked.weights, asked.ema)
    if asked.model and not Path(expand_home(asked.model)).exists():
        check_name(asked.model)


def check_sizes(geometry: Geometry, sizes: Mapping[str, Any], where: str = "") -> None:
    """Raises UserError for a height, width or number of frames that cannot be, with the place that asks for it."""
    try:
        for name in ("height", "width"):
            if name in sizes:
                geometry.check_side(name, sizes[name])
        if "frames" in sizes:
            geometry.check_frames(sizes["frames"])
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from error


def how_to_sample(asked: Asked, of_model: Defaults) -> GenerateConfig:
    """What is neither asked for nor the model's keeps the default of the config."""
    values = {name: getattr(asked, name, None) for name in GenerateConfig.model_fields}
    own = {name: getattr(of_model, name, None) if value is None else value for name, value in values.items()}
    return build_config(GenerateConfig, {name: value for name, value in own.items() if value is not None})


def check_negative(prompts: Sequence[Prompt], asked: Asked, guidance: float) -> None:
    """Raises UserError when there is a negative prompt that nothing would read."""
    if guidance != 1:
        return
    if asked.negative is not None:
        raise UserError("`negative` has no effect with `guidance=1`: leave one of them out.")
    given = [prompt.prompt for prompt in prompts if "negative" in prompt.model_fields_set]
    if given:
        raise UserError(
            f"The 'negative' of the prompt '{cut(given[0])}' has no effect with `guidance=1`: leave one of them out."
        )
