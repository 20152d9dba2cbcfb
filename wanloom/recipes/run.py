"""The whole of a run as one config: composition only; every part is defined beside the code that reads it.

In: a recipe's name or a YAML file, `key.path=value` words, a training mode. Out: a `Run`. The one decision: values
are laid over one another key by key in a fixed order, later ones win: the mode's preset of `flow`, the recipe, its
values for the mode, the words of the command line. The preset of a mode that is asked for by name wins over the recipe.
"""

from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from wanloom.assets import find_pipeline
from wanloom.config import (
    Config,
    UserError,
    UserPath,
    build_config,
    dump_yaml,
    load_yaml,
    merge,
    nearest,
    parse_overrides,
)
from wanloom.data.settings import BatchConfig, DataConfig
from wanloom.model.settings import CONFIGS, DiTConfig
from wanloom.objective.settings import PRESETS, FlowConfig
from wanloom.parallel.settings import Compile, ParallelConfig, Recompute
from wanloom.train.settings import CheckpointConfig, EmaConfig, LogConfig, OptimizerConfig, ScheduleConfig, TrainConfig

RECIPES = files("wanloom.recipes")
PUBLISHED = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan2.1-t2v-1.3b",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan2.1-t2v-14b",
}
# What a resumed run may change: it alters neither the samples nor the steps that are done. `train.steps` moves the end
# of a linear or cosine schedule; a kernel, a pack or a layout changes the rounding; data is known by its fingerprint.
MAY_CHANGE = (
    "run_dir",
    "train.steps",
    "train.kernel",
    "batch.tokens_per_pack",
    "checkpoint.*",
    "log.*",
    "data.*",
    "parallel.*",
    "recompute",
    "offload",
    "compile",
)
# what other trainers call it: our setting, or what to say
NAMES_ELSEWHERE = {
    "data": "data.path",
    "dataset": "data.path",
    "data_dir": "data.path",
    "dataset_path": "data.path",
    "num_workers": "data.prefetch",
    "workers": "data.prefetch",
    "output": "run_dir",
    "output_dir": "run_dir",
    "out": "run_dir",
    "learning_rate": "optimizer.lr",
    "adam_epsilon": "optimizer.eps",
    "batch_size": "batch.samples",
    "global_batch_size": "batch.samples",
    "train_batch_size": "batch.samples",
    "gradient_accumulation_steps": "A step is batch.samples samples, in as many packs of batch.tokens_per_pack as that "
    "takes.",
    "max_steps": "train.steps",
    "max_train_steps": "train.steps",
    "num_steps": "train.steps",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "dtype": "train.precision",
    "mixed_precision": "train.precision",
    "attention": "train.kernel",
    "gradient_checkpointing": "recompute",
    "activation_checkpointing": "recompute",
    "lr_scheduler": "schedule.kind",
    "scheduler": "schedule.kind",
    "warmup": "schedule.warmup_steps",
    "lr_warmup_steps": "schedule.warmup_steps",
    "max_grad_norm": "clip_norm",
    "grad_clip": "clip_norm",
    "ema_decay": "ema.decay",
    "use_ema": "ema.decay",
    "save_every": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "checkpointing_steps": "checkpoint.every",
    "validation_steps": "log.validate_every",
    "eval_steps": "log.validate_every",
    "resume": "The same command goes on from the newest checkpoint of its run_dir.",
    "resume_from_checkpoint": "The same command goes on from the newest checkpoint of its run_dir.",
    "device": "wanloom takes the GPU where there is one; CUDA_VISIBLE_DEVICES chooses it, and an empty one hides it.",
    "gpus": "Several GPUs of a machine are used with --nproc N.",
    "num_gpus": "Several GPUs of a machine are used with --nproc N.",
    "lora": "LoRA is not there yet: all weights are trained.",
    "lora_rank": "LoRA is not there yet: all weights are trained.",
    "wandb": "There is no wandb: run_dir holds metrics.jsonl and files for TensorBoard.",
    "report_to": "There is no choice of trackers: run_dir holds metrics.jsonl and files for TensorBoard.",
    "width": "Sizes are those that `wanloom prepare` gave the data.",
    "height": "Sizes are those that `wanloom prepare` gave the data.",
    "resolution": "Sizes are those that `wanloom prepare` gave the data.",
    "frames": "Sizes are those that `wanloom prepare` gave the data.",
    "num_frames": "Sizes are those that `wanloom prepare` gave the data.",
    "fps": "The frame rate is that which `wanloom prepare` gave the data.",
}


class Run(Config):
    """Everything that decides a run."""

    ELSEWHERE = NAMES_ELSEWHERE
    model: UserPath = Field(
        description="tiny, a folder in diffusers layout, or a name on the Hugging Face hub such as "
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    )
    init: Literal["random", "pretrained"] = Field(
        default="random", description="start from random weights or from those of the model"
    )
    run_dir: UserPath | None = Field(
        default=None, description="where checkpoints and metrics go; `wanloom train` needs it"
    )
    seed: int = Field(default=0, ge=0, description="of the order of the data, noise, noise levels and random weights")
    data: DataConfig = Field(default=DataConfig(), description="where the samples come from")
    batch: BatchConfig = Field(description="what makes a step")
    train: TrainConfig = Field(description="how long and in which precision")
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
    recompute: Recompute = Field(
        default="none",
        description="what the backward pass computes again to save memory: cheap (norms, rotation, GELU, "
        "cross-attention), attention (all but self-attention) or full (all but the input of a block)",
    )
    offload: bool = Field(
        default=False, description="what is kept for the backward pass waits in host memory; of a GPU only"
    )
    compile: Compile = Field(
        default="none", description="block: every block through torch.compile; minutes at the start, then faster"
    )


def recipe_names() -> list[str]:
    """The shipped recipes."""
    return sorted(entry.name.removesuffix(".yaml") for entry in RECIPES.iterdir() if entry.name.endswith(".yaml"))


def load_run(recipe: str, overrides: list[str], training_mode: str | None = None) -> Run:
    """A run from a shipped recipe or a YAML file. Raises UserError for what cannot be read or is not a setting.

    Without `training_mode` it is `pretrain` for `init=random` and `finetune` for `init=pretrained`.
    """
    values = read_recipe(recipe)
    by_mode = read_modes(recipe, values.pop("modes", {}))
    words = parse_overrides(overrides)
    init = words.get("init", values.get("init", "random"))
    mode = training_mode or ("finetune" if init == "pretrained" else "pretrain")
    preset = {"flow": PRESETS[mode]}
    values = merge(values, preset) if training_mode else merge(preset, values)
    return build_config(Run, merge(merge(values, by_mode.get(mode, {})), words))


def use_mock(overrides: list[str], shapes: str | None) -> list[str]:
    """The words of the command line with those of `--mock`."""
    return [*overrides, f'data.mock="{shapes}"'] if shapes else list(overrides)


def read_recipe(recipe: str) -> dict[str, Any]:
    """The values of a shipped recipe or of a YAML file."""
    names = recipe_names()
    path = Path(recipe)
    if recipe in names:
        text = (RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8")
    elif path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{recipe} is no YAML file: it is not text in UTF-8.") from error
    else:
        raise UserError(
            f"There is no recipe '{recipe}'.{nearest(recipe, names)} Give a YAML file or one of: {', '.join(names)}."
        )
    try:
        values = load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{recipe} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{recipe} holds no settings: a recipe is a YAML mapping.")
    return values


def read_modes(recipe: str, modes: Any) -> dict[str, dict[str, Any]]:
    """What a recipe says of each training mode. Raises UserError when it is not settings by the name of a mode."""
    if not isinstance(modes, dict) or not all(isinstance(values, dict) for values in modes.values()):
        raise UserError(f"`modes` in {recipe} is {modes!r}: it holds settings for each mode, {' and '.join(PRESETS)}.")
    unknown = [str(name) for name in modes if name not in PRESETS]
    if unknown:
        raise UserError(f"`modes` in {recipe} names '{unknown[0]}': the training modes are {' and '.join(PRESETS)}.")
    return modes


def model_config(model: str) -> DiTConfig:
    """The shape of a model by name, without its weights where it is a known one."""
    known = PUBLISHED.get(model, model)
    if known in CONFIGS:
        return CONFIGS[known]
    from wanloom.model.weights import read_config  # takes torch

    return read_config(find_pipeline(model, ("transformer",)))


def dump_run(run: Run) -> str:
    """The run as YAML that `load_run` reads back."""
    return dump_yaml(run.model_dump(mode="json"))


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The settings that differ between two dumped runs and may not change when a run is resumed."""
    before, after = _flatten(old), _flatten(new)
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    return [key for key in changed if not any(fnmatch(key, may) for may in MAY_CHANGE)]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, value in values.items():
        out |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out
