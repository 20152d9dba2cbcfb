"""The whole of a run as one config: composition only; every part is defined beside the code that reads it.

In: a recipe, settings that replace its own, a training mode. Out: a `Run`. The one decision: values are laid over one
another key by key in a fixed order, later ones win: the mode's preset of `flow`, the recipe, its values for the mode,
the settings of the command line. The preset of a mode that is asked for by name wins over the recipe.
A recipe that is based on another one comes with its values for the mode after all of the other.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from wanloom.checkpoint.saved import read_recipe
from wanloom.checkpoint.settings import CheckpointConfig
from wanloom.config import Config, UserPath, build_config, dump_yaml, merge, nest, parse_overrides
from wanloom.data.settings import BatchConfig, DataConfig
from wanloom.errors import UserError
from wanloom.formats.pipeline import find_pipeline
from wanloom.model.settings import DiTConfig
from wanloom.objective.settings import PRESETS, FlowConfig
from wanloom.parallel.settings import ComputeConfig, ParallelConfig
from wanloom.runs.effects import check_words
from wanloom.runs.layers import Recipe, name_of, read_layers
from wanloom.runs.names import NAMES_BEFORE, NAMES_ELSEWHERE
from wanloom.train.settings import EmaConfig, LogConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from wanloom.variants import find_variant

MODES = tuple(PRESETS)
MIX = "mix"
MIXES = {  # made-up shapes, by the tokens of the clip
    32760: "81x480x832,1x480x832*4",
    14040: "33x480x832,1x480x832*4",
    5070: "49x240x416,1x240x416*4",
    80: "17x64x64,1x64x64*4",
}


class Run(Config):
    """Everything that decides a run."""

    ELSEWHERE: ClassVar = NAMES_ELSEWHERE | {old: f"It is now '{new}'." for old, new in NAMES_BEFORE.items()}
    model: UserPath = Field(
        description="tiny, a folder in diffusers layout, or a name on the Hugging Face hub such as "
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    )
    init: UserPath = Field(
        default="random",
        description="where the weights come from: random, pretrained (those of model), or a run or checkpoint, such as "
        "runs/first for its weights and runs/first:ema for the averaged ones",
    )
    run_dir: UserPath | None = Field(
        default=None, description="where checkpoints and metrics go; `wanloom train` needs it"
    )
    seed: int = Field(default=0, ge=0, description="of the order of the data, noise, noise levels and random weights")
    data: DataConfig = Field(default=DataConfig(), description="where the samples come from")
    batch: BatchConfig = Field(description="what makes a step")
    train: TrainConfig = Field(description="how long")
    optimizer: OptimizerConfig = Field(description="AdamW")
    schedule: ScheduleConfig = Field(default=ScheduleConfig(), description="the learning rate over the run")
    flow: FlowConfig = Field(default=FlowConfig(), description="how noise levels are drawn and weighted")
    caption_dropout: float = Field(
        default=0.1, ge=0, lt=1, description="share of draws that see the empty caption, which guidance needs"
    )
    clip_norm: float | None = Field(default=1.0, gt=0, description="of the gradient over all parameters; null: never")
    ema: EmaConfig = Field(default=EmaConfig(), description="the averaged weights")
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(), description="when to save and how many to keep")
    log: LogConfig = Field(default=LogConfig(), description="how often the run tells something")
    parallel: ParallelConfig = Field(default=ParallelConfig(), description="how several processes share the work")
    compute: ComputeConfig = Field(default=ComputeConfig(), description="in which precision, and speed for memory")


def build_run(
    recipe: Recipe,
    settings: Sequence[str] | Mapping[str, Any] = (),
    training_mode: str | None = None,
    mock: str | None = None,
) -> Run:
    """A run from a shipped recipe, a YAML file or a mapping. Raises UserError for what cannot be read or is no setting.

    `settings` replace those of the recipe: `key.path=value` words, or a mapping of key.path to value. `mock` is that of
    the data. Without `training_mode` it is `pretrain` for `init=random`, else `finetune`.
    """
    layers = read_layers(recipe)
    words = nest(settings) if isinstance(settings, Mapping) else parse_overrides(settings)
    if mock:
        words = use_mock(words, mock)
    if training_mode is not None and training_mode not in PRESETS:
        raise UserError(f"There is no training mode '{training_mode}': give one of {', '.join(PRESETS)}.")
    inits = [values["init"] for values in (words, *(layer.values for layer in reversed(layers))) if "init" in values]
    mode = training_mode or ("pretrain" if inits[:1] in ([], ["random"]) else "finetune")
    values: dict[str, Any] = {"flow": PRESETS[mode]}
    for layer in layers:
        values = lay(lay(values, layer.values), layer.modes.get(mode, {}))
    if training_mode:  # its preset wins over what the layers say for every mode
        values = lay(values, {"flow": PRESETS[mode]})
        for layer in layers:
            values = lay(values, {"flow": layer.modes.get(mode, {}).get("flow", {})})
    values = choose_mix(lay(values, words))
    train = values.get("train")
    if isinstance(train, dict) and train.get("epochs") is not None:
        train.setdefault("steps", 1)  # they follow when the samples are counted
    check_whole(values, recipe)
    run = build_config(Run, values)
    check_words(run, words)
    return run


def lay(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `values`; steps that are said later replace epochs that were said before, and the other way."""
    train = over.get("train")
    if not isinstance(train, dict) or not isinstance(values.get("train"), dict):
        return merge(values, over)
    if "epochs" in train and "steps" in train and train["epochs"] is not None:
        raise UserError("train.steps and train.epochs are two ways to say how long: give one of them.")
    if "steps" in train:
        over = merge({"train": {"epochs": None}}, over)
    return merge(values, over)


def split_init(init: str) -> tuple[Path, bool]:
    """The folder of a run or checkpoint that `init` names, and whether its averaged weights are meant."""
    return Path(init.removesuffix(":ema")), init.endswith(":ema")


def settle_steps(run: Run, num_samples: int) -> Run:
    """The run with as many steps as its epochs are, over `num_samples` of all sources; they are said once."""
    if run.train.epochs is None:
        return run
    steps = math.ceil(Fraction(str(run.train.epochs)) * num_samples / run.batch.samples)
    train = run.train.model_copy(update={"steps": max(steps, 1), "epochs": None})
    return run.model_copy(update={"train": train})


def use_mock(words: dict[str, Any], shapes: str) -> dict[str, Any]:
    """The settings with made-up data."""
    if isinstance(words.get("data"), dict) and "mock" in words["data"]:
        raise UserError("The setting 'data.mock' is given twice: leave one of them out.")
    return merge(words, {"data": {"mock": shapes}})


def check_whole(values: dict[str, Any], recipe: Recipe) -> None:
    """Raises UserError for a recipe that does not say all that a run needs."""
    needed = [name for name, field in Run.model_fields.items() if field.is_required() and name not in values]
    if needed and set(values) <= set(Run.model_fields):
        raise UserError(
            f"{name_of(recipe)} is no whole recipe, it lacks {', '.join(needed)}: begin it with `based_on: tiny` (or "
            "another recipe), which gives all that it does not say, or make it of one: wanloom show tiny > my.yaml"
        )


def choose_mix(values: dict[str, Any]) -> dict[str, Any]:
    """The made-up shapes that `data.mock=mix` stands for: the largest clip of MIXES that fits in a pack, and images."""
    data, batch = values.get("data"), values.get("batch")
    if not isinstance(data, dict) or data.get("mock") != MIX:
        return values
    room = batch.get("tokens_per_pack") if isinstance(batch, dict) else None
    fitting = [shapes for tokens, shapes in MIXES.items() if isinstance(room, int) and tokens <= room]
    return merge(values, {"data": {"mock": fitting[0] if fitting else list(MIXES.values())[-1]}})


def model_config(model: str) -> DiTConfig:
    """The shape of a model by name, without its weights where it is a known one."""
    if known := find_variant(model):
        return known.shape
    from wanloom.formats.transformer import read_config  # takes torch

    return read_config(find_pipeline(model, ("transformer",)))


def read_run(checkpoint: Path) -> Run:
    """The run that wrote a checkpoint; settings that are newer have their defaults. Raises UserError for other ones."""
    values = read_recipe(checkpoint)
    try:
        return build_config(Run, values)
    except UserError as error:
        raise UserError(
            f"{checkpoint}/run.yaml cannot be read: {error} Where another version of wanloom wrote it, go on with that "
            f"one, or start a new run from its weights: init={checkpoint} run_dir=ANOTHER."
        ) from error


def dump_run(run: Run) -> str:
    """The run as YAML that `build_run` reads back."""
    return dump_yaml(run.model_dump(mode="json"))
