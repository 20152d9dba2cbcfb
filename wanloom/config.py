"""The base of every config: strict, frozen, made from YAML and `key.path=value`, with errors that say what to do.

A config class sits beside the code that reads it; `runs/recipe.py` only composes them.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError
from yaml.error import MarkedYAMLError

from wanloom.errors import UserError, cut, nearest_word

T = TypeVar("T", bound="Config")
MOST_CHARACTERS, MOST_DEPTH, MOST_VALUES = 200_000, 30, 20_000  # of YAML: a mix of a thousand folders is far below
EXPONENT_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+\Z")

NEEDS = {  # by pydantic's type of an error
    "int_type": "it must be a whole number",
    "int_from_float": "it must be a whole number",
    "float_type": "it must be a number",
    "bool_type": "it must be true or false",
    "string_type": "it must be text, in quotes where it looks like a number",
    "finite_number": "it must be a finite number",
    "greater_than": "it must be above {gt}",
    "greater_than_equal": "it must be at least {ge}",
    "less_than": "it must be below {lt}",
    "less_than_equal": "it must be at most {le}",
    "literal_error": "it must be {expected}",
    "too_long": "it must have at most {max_length} values",
    "too_short": "it must have at least {min_length} values",
}


def expand_home(path: str) -> str:
    """`~` at the begin is the home folder, as a shell has it: not every shell sees it in `run_dir=~/runs`."""
    return os.path.expanduser(path)


def as_text(path: Any) -> Any:
    """A path of Python's as a setting has it."""
    return os.fspath(path) if isinstance(path, os.PathLike) else path


UserPath = Annotated[str, BeforeValidator(as_text), AfterValidator(expand_home)]  # of a setting


class Config(BaseModel):
    """Unknown keys and wrong types are errors; values never change after loading."""

    ELSEWHERE: ClassVar[dict[str, str]] = {}  # what settings are called elsewhere: the setting, or a sentence

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, mapping by mapping; neither is changed."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`["optimizer.lr=1e-4", "seed=3"]` to a nested mapping; values are read as YAML scalars or flow collections."""
    given: dict[str, Any] = {}
    for pair in pairs:
        path, separator, text = pair.partition("=")
        if not separator or not path or path.count(".") > MOST_DEPTH:
            raise UserError(f"'{cut(pair)}' is not of the form key.path=value, without spaces around the =.")
        if path in given:
            raise UserError(f"The setting '{path}' is given twice: leave one of them out.")
        try:
            given[path] = load_yaml(text)
        except yaml.YAMLError as error:
            raise UserError(
                f"The value of '{path}' cannot be read: {cut(text)!r} is not valid YAML, {explain_yaml(error)}."
            ) from error
    return nest(given)


def nest(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`{"optimizer.lr": 1e-4, "seed": 3}` as a nested mapping; one that is nested already stays as it is."""
    out: dict[str, Any] = {}
    for path, value in settings.items():
        for key in reversed(path.split(".")):
            value = {key: value}
        out = merge(out, value)
    return out


def load_yaml(text: str) -> Any:
    """YAML as its users expect it: `1e-4` is a number, which YAML 1.1 reads as a string.

    Raises yaml.YAMLError, also for what no recipe needs and would take all memory or never end: a key that is given
    twice, an alias inside of what it names, values that are nested deeply or are millions once aliases are unfolded.
    """
    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(f"it has {len(text):,} characters, more than {MOST_CHARACTERS:,}")
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def explain_yaml(error: yaml.YAMLError) -> str:
    """Where a text is no YAML, and why."""
    if not isinstance(error, MarkedYAMLError) or error.problem is None:
        return " ".join(str(error).split())
    reason = error.problem
    if "'\\t'" in reason:
        reason = "a tab stands before a value, where YAML takes spaces only"
    mark = error.problem_mark or error.context_mark
    return f"line {mark.line + 1}: {reason}" if mark else reason


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML that `load_yaml` reads back: a string that looks like a number is quoted."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """The safe loader with bounds; `sizes` are the values in what an alias names, by node."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise _fault(f"values are nested more than {MOST_DEPTH} deep", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self.sizes:
                raise _fault(f"the alias '*{event.anchor}' stands inside of what it names", event)
        elif node is not None:
            self.sizes[id(node)] = self._size(node)
        return node

    def _size(self, node: yaml.Node) -> int:
        parts = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                    raise _fault(f"the key '{key.value}' is given twice", key)
                seen.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key))
        size = 1 + sum(self.sizes[id(part)] for part in parts)
        if size > MOST_VALUES:
            raise _fault(f"there are more than {MOST_VALUES:,} values", node)
        return size


def _fault(problem: str, place: Any) -> MarkedYAMLError:
    return MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


class _Dumper(yaml.SafeDumper):
    pass


for _kind in (_Loader, _Dumper):  # resolvers see plain scalars only, so "1e3" in quotes stays a string
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT_NUMBER, list("-+0123456789"))


def build_config(cls: type[T], values: dict[str, Any]) -> T:
    """Validate `values`; a UserError lists every mistake by its path, one sentence each."""
    try:
        return cls.model_validate(_tuples(values))
    except ValidationError as error:
        lines = [_explain(cls, item) for item in error.errors()]
        raise UserError(" ".join(lines)) from error


def _tuples(value: Any) -> Any:
    """Lists become tuples all the way down: configs are frozen, and strict mode does not convert."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _explain(cls: type[Config], item: Any) -> str:
    """One sentence on a mistake that pydantic found."""
    kind, given, path = item["type"], item["input"], ".".join(str(part) for part in item["loc"])
    if kind == "extra_forbidden":
        return f"There is no setting '{path}'.{meant_setting(cls, path)}"
    if kind == "missing":
        return f"The setting '{path}' is required."
    if kind == "value_error":
        message = item["msg"].removeprefix("Value error, ").rstrip(".")
        return f"{path}: {message}." if path else f"{message}."
    if kind == "model_type":
        reason = _section_words(section_at(cls, path) or cls, path, given)
    elif kind == "tuple_type":
        reason = f"it must be a list such as [{given if isinstance(given, str) and ',' in given else 'a, b'}]"
    elif kind in ("int_type", "int_from_float") and isinstance(given, float) and given.is_integer():
        reason = f"it must be a whole number, as in {given:.0f}" if given < 1e15 else NEEDS[kind]
    else:
        needs = NEEDS.get(kind)
        reason = needs.format(**item.get("ctx", {})) if needs else item["msg"][0].lower() + item["msg"][1:].rstrip(".")
    return f"The setting '{path}' is {cut(repr(given))}: {reason}."


def _section_words(section: type[Config], path: str, given: Any) -> str:
    """What to write where a section was given one value."""
    if isinstance(given, str) and "path" in section.model_fields:
        return f"write {{path: {given}}} for it" if path[-1].isdigit() else f"write {path}.path={given}"
    first = next(iter(section.model_fields))
    return f"it holds several settings, {', '.join(section.model_fields)}: write {path}.{first}=..."


def meant_setting(cls: type[Config], path: str) -> str:
    """What to tell of a setting that is not there, with a space before it."""
    found = meant(cls, path)
    if found:
        return f" {found}" if " " in found else f" Did you mean '{found}'?"
    parent = path.rpartition(".")[0]
    section = section_at(cls, parent)
    if parent and section:
        return f" '{parent}' has: {', '.join(section.model_fields)}."
    return f" There are: {', '.join(cls.model_fields)}."


def meant(cls: type[Config], path: str) -> str | None:
    """The setting that may have been meant, or what `cls.ELSEWHERE` says of it, or None.

    In this order: another name of it, a slip of the fingers in its section, its last word in another section, a slip
    there.
    """
    known = setting_paths(cls)
    parent, _, leaf = path.rpartition(".")
    first = path.partition(".")[0]
    for word in (path, leaf, "" if first in cls.model_fields else first):
        if hint := cls.ELSEWHERE.get(word.lower().replace("-", "_")):
            return hint
    section = section_at(cls, parent)
    if section and (near := nearest_word(leaf, list(section.model_fields))):
        return f"{parent}.{near}" if parent else near
    leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
    if leaf in leaves or (parent and section):
        return leaves.get(leaf)
    return nearest_word(path, known) or leaves.get(nearest_word(leaf, list(leaves)) or "")


def section_at(cls: type[Config], path: str) -> type[Config] | None:
    """The config class at a path (`data.sources.0`), `cls` itself for an empty one; None where there is none."""
    kind: Any = cls
    for part in path.split(".") if path else ():
        if not part.isdigit():
            field = kind.model_fields.get(part)
            kind = section_of(field.annotation) if field else None
        if kind is None:
            return None
    return kind


def section_of(annotation: Any) -> type[Config] | None:
    """The config class that a field holds, alone, in a tuple or where it may be None."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Config)), None)


def setting_paths(cls: type[Config], prefix: str = "") -> list[str]:
    """Every `key.path` of a config class that takes a value, and those of its sections before them."""
    out = []
    for name, field in cls.model_fields.items():
        out.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            out += setting_paths(field.annotation, f"{prefix}{name}.")
    return out


def leaves_of(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting in nested values by its path; items of a list have a number where they are settings too."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in pairs:
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
            yield from leaves_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
