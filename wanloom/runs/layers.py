"""The values of a recipe, layer by layer: what it builds on first, then what it says itself.

In: the name of a shipped recipe, a YAML file, or a mapping. Out: for each layer its values, and what it says for a
training mode. The one decision: `based_on` in a file names the recipe that gives all that the file does not say.
Relative paths, there and in every setting, are relative to the folder where the command runs, wherever the file is.
"""

import os
from collections.abc import Mapping
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from wanloom.config import MOST_CHARACTERS, expand_home, explain_yaml, load_yaml, nest
from wanloom.errors import UserError, cut, nearest
from wanloom.objective.settings import PRESETS

RECIPES = files("wanloom") / "recipes"
MOST_LAYERS = 10
MOST_NAMES = 1000  # of a folder, among which a near one is looked for


Recipe = str | Path | Mapping[str, Any]


class Layer(NamedTuple):
    """What one file says."""

    values: dict[str, Any]
    modes: dict[str, dict[str, Any]]


def recipe_names() -> list[str]:
    """The shipped recipes."""
    return sorted(entry.name.removesuffix(".yaml") for entry in RECIPES.iterdir() if entry.name.endswith(".yaml"))


def name_of(recipe: Recipe) -> str:
    """How a message calls it."""
    return "The recipe" if isinstance(recipe, Mapping) else str(recipe)


def read_layers(recipe: Recipe) -> list[Layer]:
    """The layers of a recipe, the lowest first. Raises UserError for what cannot be read."""
    layers: list[Layer] = []
    name: Any = recipe
    while name is not None:
        values = read_values(name)
        below = values.pop("based_on", None)
        layers.insert(0, Layer(values, read_modes(name_of(name), values.pop("modes", {}))))
        if below is not None and not isinstance(below, str):
            raise UserError(f"`based_on` in {name_of(name)} is {cut(repr(below))}: it names a recipe, such as tiny.")
        if len(layers) > MOST_LAYERS:
            raise UserError(
                f"{name_of(recipe)} is based on {name_of(name)}, and so on without end: a recipe has few below it."
            )
        name = below
    return layers


def read_values(recipe: Recipe) -> dict[str, Any]:
    """The values of a shipped recipe, of a YAML file or of a mapping."""
    if isinstance(recipe, Mapping):
        return nest(recipe)
    recipe = str(recipe)
    path = Path(expand_home(recipe))
    if recipe in recipe_names():
        text = (RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8")
    elif path.is_file():
        if path.stat().st_size > 4 * MOST_CHARACTERS:
            raise UserError(f"{recipe} is no recipe: it has {path.stat().st_size:,} bytes.")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{recipe} is no YAML file: it is not text in UTF-8.") from error
    else:
        raise UserError(_explain_missing(recipe, path))
    try:
        values = load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{recipe} is not valid YAML: {explain_yaml(error)}.") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{recipe} holds no settings: a recipe is a YAML mapping.")
    return values


def _explain_missing(recipe: str, path: Path) -> str:
    names = recipe_names()
    if path.is_dir():
        run = path / "run.yaml"
        hint = f"the recipe of that run is {run}" if run.is_file() else f"give a YAML file or {', '.join(names)}"
        return f"'{recipe}' is a folder, not a recipe: {hint}."
    folder = path.parent
    if folder.is_dir():
        beside = [entry.name for entry in islice(os.scandir(folder), MOST_NAMES)]
        names = [*names, *(str(folder / name) for name in sorted(beside))]
    hint = nearest(recipe, names)
    if path.suffix in (".yaml", ".yml") or "/" in recipe:
        return f"There is no file '{recipe}' (in {Path.cwd()}).{hint}"
    shipped = ", ".join(recipe_names())
    return f"There is no recipe '{recipe}'.{hint} Give a YAML file or one of: {shipped}."


def read_modes(recipe: str, modes: Any) -> dict[str, dict[str, Any]]:
    """What a recipe says of each training mode. Raises UserError when it is not settings by the name of a mode."""
    if not isinstance(modes, dict) or not all(isinstance(values, dict) for values in modes.values()):
        given = cut(repr(modes))
        raise UserError(f"`modes` in {recipe} is {given}: it holds settings for each mode, {' and '.join(PRESETS)}.")
    unknown = [str(name) for name in modes if name not in PRESETS]
    if unknown:
        raise UserError(f"`modes` in {recipe} names '{unknown[0]}': the training modes are {' and '.join(PRESETS)}.")
    return modes
