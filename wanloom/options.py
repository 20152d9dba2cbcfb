"""A config class as options of a command: one for each setting, with its description as help and its default.

The settings of sections stand beside those of the class itself, under the title of their section. Below the command
line a text names a setting in backticks, as `frames` or `frames=17`; only where it is printed is that an option.
"""

import argparse
import re
from collections.abc import Collection, Iterator, Mapping
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic.fields import FieldInfo

from wanloom.config import Config, T, build_config, section_of
from wanloom.errors import UserError, nearest

SETTING = re.compile(r"`(\w+)(?:=([^`]*))?`")
METAVARS = {int: "N", float: "X", str: "NAME"}


class Option(NamedTuple):
    name: str  # of the setting
    title: str  # of the options that it stands among
    field: FieldInfo


def find_options(cls: type[Config], title: str = "") -> Iterator[Option]:
    """The settings of a config class and of its sections, in their order."""
    for name, field in cls.model_fields.items():
        if section := section_of(field.annotation):
            yield from find_options(section, field.title or title)
        else:
            yield Option(name, field.title or title, field)


def add_options(parser: argparse.ArgumentParser, cls: type[Config]) -> None:
    """An option for each setting; what is not given is None."""
    options = list(find_options(cls))
    titles = dict.fromkeys(option.title for option in options)
    groups = {title: parser.add_argument_group(title) if title else parser for title in titles}
    for name, title, field in options:
        text = name_options(field.description or "", [option.name for option in options])
        if field.default is not False and field.default is not None and field.default_factory is None:
            text += f" ({field.default:g})" if isinstance(field.default, float) else f" ({field.default})"
        groups[title].add_argument(_flag(name), help=text.replace("%", "%%"), **_keywords(field))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _keywords(field: FieldInfo) -> dict[str, Any]:
    """How argparse reads a value; without `None`, which is left out instead."""
    kind: Any = field.annotation
    if NoneType in get_args(kind):
        (kind,) = {*get_args(kind)} - {NoneType}
    if kind is bool:
        return {"action": "store_true", "default": None}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind), "type": type(get_args(kind)[0])}
    return {"type": kind, "metavar": METAVARS[kind]}


def read_options(arguments: argparse.Namespace, cls: type[Config]) -> dict[str, Any]:
    """What was given of the settings of `cls`, by their names."""
    given = {option.name: getattr(arguments, option.name) for option in find_options(cls)}
    return {name: value for name, value in given.items() if value is not None}


def build_flat(cls: type[T], values: Mapping[str, Any]) -> T:
    """The config of settings without their sections. Raises UserError, also for a name that is none of them."""
    known = [option.name for option in find_options(cls)]
    if unknown := next((name for name in values if name not in known), None):
        raise UserError(f"There is no setting '{unknown}'.{nearest(unknown, known)} There are: {', '.join(known)}.")
    given = {name: value for name, value in values.items() if name in cls.model_fields}
    for name, field in cls.model_fields.items():
        if section := section_of(field.annotation):
            of_section = {option.name for option in find_options(section)}
            given[name] = build_flat(section, {key: value for key, value in values.items() if key in of_section})
    return build_config(cls, given)


def name_options(text: str, names: Collection[str]) -> str:
    """`text` with the options for those settings in backticks that are in `names`."""

    def name(found: re.Match[str]) -> str:
        if found[1] not in names:
            return found[0]
        return _flag(found[1]) if found[2] is None else f"{_flag(found[1])} {found[2]}"

    return SETTING.sub(name, text)
