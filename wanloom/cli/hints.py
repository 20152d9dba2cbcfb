"""The command that comes next, as it can be pasted into a shell.

In: what a command has made. Out: the words of the next one, quoted. The one decision: a hint is complete. It has the
recipe that fits the model and every setting without which it would end in an error; a test runs each as it is printed.
"""

import json
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from wanloom.config import expand_home, load_yaml
from wanloom.errors import UserError
from wanloom.geometry import Geometry

if TYPE_CHECKING:
    from wanloom.data.shards import Row
    from wanloom.model.settings import DiTConfig

RUNS = Path("runs")  # where a hint puts the folder of a run
MOST_PROMPT = 200  # characters of a caption that is shown as a prompt


def setting(key: str, value: str | int) -> str:
    """`key=value` that is read back as the same value: a path such as `1e3` or `a: b` is text only in quotes."""
    try:
        is_plain = load_yaml(str(value)) == value
    except yaml.YAMLError:
        is_plain = False
    return f"{key}={value if is_plain else json.dumps(value, ensure_ascii=False)}"  # JSON is YAML


def as_word(path: Path) -> str:
    """A path as a word that is no option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def train_command(data: Path, model: str) -> str | None:
    """How to train `model` on a prepared folder; None where nothing that is shipped fits."""
    from wanloom.data.shards import Dataset
    from wanloom.runs.recipe import build_run

    dataset = Dataset.open(data)
    train, val = dataset.rows("train"), dataset.rows("val")
    if not len(train):
        return None
    found = find_recipe(model, dataset.read(train[0]).tensors["text"].shape[1])
    if found is None:
        return None
    recipe, words = found
    words = [*words, setting("data.path", as_word(data)), setting("run_dir", as_word(free_run_dir(data)))]
    longest = max(int(rows.tokens.max()) for rows in (train, val) if len(rows))
    if longest > build_run(recipe, words).batch.tokens_per_pack:
        words.append(setting("batch.tokens_per_pack", longest))
    return shlex.join(["wanloom", "train", recipe, *words])


def free_run_dir(data: Path) -> Path:
    """A folder for a run that is not there yet."""
    name = data.resolve().name
    numbered = (RUNS / (f"{name}-{number}" if number else name) for number in range(10_000))
    return next(path for path in numbered if not path.exists())


def find_recipe(model: str, text_dim: int) -> tuple[str, list[str]] | None:
    """The shipped recipe for a model, of several the one with the smallest step, and the words that it takes besides.

    For a model that no recipe names it is that of the nearest size with such a text encoder. None for a folder without
    a transformer.
    """
    from wanloom.formats.pipeline import find_local
    from wanloom.formats.transformer import read_config
    from wanloom.runs.layers import recipe_names
    from wanloom.runs.recipe import build_run, model_config

    runs = {name: build_run(name, []) for name in recipe_names()}
    if same := [name for name, run in runs.items() if run.model == model]:
        return min(same, key=lambda name: (runs[name].batch.samples, name)), []
    transformer = find_local(model, ("transformer",))
    if transformer is None and Path(expand_home(model)).exists():
        return None
    try:
        size = math.log(num_weights(read_config(transformer))) if transformer else 0.0
    except UserError:
        return None
    configs = {name: model_config(run.model) for name, run in runs.items()}
    fitting = [name for name, config in configs.items() if config.text_dim == text_dim]
    if not fitting:
        return None

    def rank(name: str) -> tuple[float, int, str]:
        return abs(math.log(num_weights(configs[name])) - size), runs[name].batch.samples, name

    return min(fitting, key=rank), [setting("model", model), "init=pretrained"]


def num_weights(config: "DiTConfig") -> int:
    """About how many weights a model has."""
    return config.num_layers * config.dim * (8 * config.dim + 2 * config.ffn_dim)


def generate_command(run_dir: Path, sample: "Row", geometry: Geometry | None, averaged: bool) -> str:
    """How to make what a run was trained on: the caption and the size of a sample of it."""
    prompt = " ".join(sample.caption.split())
    if not 0 < len(prompt) <= MOST_PROMPT or prompt.startswith("-"):
        prompt = "a cat that runs"
    shape = geometry.video_shape(sample.frames, sample.height, sample.width) if geometry else ()
    sizes = zip(("--frames", "--height", "--width"), shape, strict=bool(shape))
    words = [word for name, size in sizes for word in (name, str(size))]
    of_run = ["--checkpoint", as_word(run_dir), *(["--ema"] if averaged else [])]
    return shlex.join(["wanloom", "generate", *of_run, *words, "--prompt", prompt])
