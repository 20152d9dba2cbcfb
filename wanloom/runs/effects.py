"""Settings that were asked for and change nothing beside the others.

In: a run, and what was said of it. Out: one sentence for each such setting. The one decision: on the command line it is
a mistake; in a recipe of one's own, which serves runs of several kinds, it is worth a note; what shipped recipes,
presets and defaults hold is nobody's wish. What depends on the data or the device is told when these are known,
and a run that is cut short by `train.steps` may keep the rest of its words.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from wanloom.config import leaves_of, section_at
from wanloom.errors import UserError
from wanloom.objective.settings import PRESETS
from wanloom.runs.layers import Recipe, name_of, read_layers, recipe_names

if TYPE_CHECKING:
    from wanloom.runs.recipe import Run


class Rule(NamedTuple):
    """Where some settings change nothing: `reason` is empty where they do, else what they stand beside."""

    names: tuple[str, ...]
    reason: Callable[["Run"], str]


def _of_sampler(sampler: str) -> Callable[["Run"], str]:
    return lambda run: "" if run.flow.sampler == sampler else f"with flow.sampler={run.flow.sampler}"


def _share(run: "Run") -> float:
    source = run.data.sources[0]
    return source.repeats or source.weight or 1  # 1 says what is so anyway


SAMPLERS = {
    "logit_normal": ("flow.logit_mean", "flow.logit_std"),
    "mode": ("flow.mode_scale",),
    "beta": ("flow.beta_alpha", "flow.beta_beta"),
}
DRAWS = ("flow.sampler", *(name for names in SAMPLERS.values() for name in names))
RULES = (
    *(Rule(names, _of_sampler(sampler)) for sampler, names in SAMPLERS.items()),
    Rule(DRAWS, lambda run: "with flow.mix_uniform_ratio=1" if run.flow.mix_uniform_ratio == 1 else ""),
    Rule(("flow.mix_uniform_ratio",), lambda run: "with flow.sampler=uniform" if run.flow.sampler == "uniform" else ""),
    Rule(("flow.stratified",), lambda run: "with batch.samples=1" if run.batch.samples == 1 else ""),
    Rule(
        ("schedule.min_lr_ratio",),
        lambda run: "with schedule.kind=constant" if run.schedule.kind == "constant" else "",
    ),
    Rule(("schedule.kind",), lambda run: "with schedule.min_lr_ratio=1" if run.schedule.min_lr_ratio == 1 else ""),
    Rule(
        ("parallel.context", "parallel.cp_ulysses"),
        lambda run: "without parallel.cp above 1" if run.parallel.cp == 1 else "",
    ),
    Rule(
        ("data.sources.0.repeats", "data.sources.0.weight"),
        lambda run: "with a single source" if len(run.data.sources) == 1 and _share(run) != 1 else "",
    ),
)


def check_words(run: "Run", words: dict[str, Any]) -> None:
    """Raises UserError when `words` of the command line have no effect on the run."""
    for sentence in _idle(run, {name for name, _ in leaves_of(words)}):
        raise UserError(f"{sentence}: leave it out, or change the other.")


def find_notes(run: "Run", recipe: Recipe) -> list[str]:
    """Sentences on what a recipe of one's own says, and those below it, without effect on the run."""
    if str(recipe) in recipe_names():
        return []
    said = dict[str, Any]()
    for layer in read_layers(recipe):
        for values in (layer.values, *layer.modes.values()):
            said |= dict(leaves_of(values))
    # a recipe that `wanloom show` wrote holds the presets too
    preset = [pair for values in PRESETS.values() for pair in leaves_of({"flow": values})]
    names = {name for name, value in said.items() if (name, value) not in preset and _value(run, name) == value}
    return [f"{sentence} ({name_of(recipe)} says it)." for sentence in _idle(run, names)]


def _idle(run: "Run", names: set[str]) -> list[str]:
    """A sentence for each of these settings that changes nothing; not for one that says what is so by default."""
    found = dict[str, str]()
    for rule in RULES:
        for name in names.intersection(rule.names):
            value = _value(run, name)
            if value != _default(run, name) and (reason := rule.reason(run)):
                found.setdefault(name, f"{name}={_word(value)} has no effect {reason}")
    return [found[name] for name in sorted(found)]


def _value(run: "Run", name: str) -> Any:
    value: Any = run
    for part in name.split("."):
        value = value[int(part)] if part.isdigit() else getattr(value, part)
    return value


def _default(run: "Run", name: str) -> Any:
    parent, _, leaf = name.rpartition(".")
    section = section_at(type(run), parent)
    return section.model_fields[leaf].default if section else None


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
