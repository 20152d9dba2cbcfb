"""Every setting with what it means, its values and its default, as a page: `wanloom show --explain`.

In: the config classes. Out: Markdown, which docs/settings.md is. The one decision: the words stand beside the setting
in the code, so the page cannot say anything else.
"""

import json
import typing
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from wanloom.config import Config, meant_setting, section_of
from wanloom.errors import UserError

HEAD = """# Settings

Written by `wanloom show --explain`. Each is changed with `key.path=value` on the command line, or in a recipe, see
[train](train.md); `wanloom show RECIPE` prints what a recipe sets. What has no default is said by every recipe. Paths
are relative to the folder where the command runs, and `~` is the home folder.

"""
KINDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}


def explain_settings(cls: type[Config], only: str | None = None) -> str:
    """The page on all settings of a config class, or the table of one section. Raises UserError for another name."""
    if only is not None:
        return explain_one(cls, only)
    plain = {name: field for name, field in cls.model_fields.items() if not is_section(field)}
    parts = [HEAD, table("", plain)]
    for name, field in cls.model_fields.items():
        if is_section(field):
            section = section_of(field.annotation)
            assert section is not None
            parts.append(f"\n## {name}\n{' '.join((section.__doc__ or '').split())}\n\n")
            parts.append(table(f"{name}.", section.model_fields))
            for key, inner in section.model_fields.items():
                if below := section_of(inner.annotation):
                    parts.append(f"\nEach of `{name}.{key}` has:\n\n")
                    parts.append(table("", below.model_fields))
    return "".join(parts)


def explain_one(cls: type[Config], name: str) -> str:
    """The table of one setting such as `optimizer.lr`, or of a section. Raises UserError for another name."""
    fields, (*sections, last) = cls.model_fields, name.split(".")
    for part in sections:
        section = section_of(fields[part].annotation) if part in fields else None
        fields = section.model_fields if section else {}
    if last not in fields:
        raise UserError(f"There is no setting '{name}'.{meant_setting(cls, name)}")
    section = section_of(fields[last].annotation)
    if section:
        return table(f"{name}.", section.model_fields)
    return table("".join(f"{part}." for part in sections), {last: fields[last]})


def is_section(field: FieldInfo) -> bool:
    """Whether a field is a config by itself, not a list of some."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, Config)


def table(prefix: str, fields: dict[str, FieldInfo]) -> str:
    """The rows of one section."""
    rows = ["| setting | values | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        default = "none" if field.is_required() else f"`{plain_value(field.default)}`"
        rows.append(f"| `{prefix}{name}` | {describe_kind(field)} | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def plain_value(value: Any) -> str:
    """A default as it is written in a recipe."""
    if isinstance(value, tuple):
        return f"[{', '.join(plain_value(item) for item in value)}]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe_kind(field: FieldInfo) -> str:
    """The values that a field takes, with its bounds."""
    bounds = []
    for limit in field.metadata:
        for sign, name in ((">", "gt"), (">=", "ge"), ("<", "lt"), ("<=", "le")):
            if (bound := getattr(limit, name, None)) is not None:
                bounds.append(f"{sign} {bound:g}")
    return " ".join([kind_of(field.annotation), ", ".join(bounds)]).strip()


def kind_of(annotation: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind_of(inner[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join("`null`" if kind is NoneType else kind_of(kind) for kind in inner)
    if origin is tuple:
        kinds = [kind for kind in inner if kind is not ...]
        return "list" if section_of(kinds[0]) else f"list of {len(kinds)} x {kind_of(kinds[0])}"
    return KINDS.get(annotation, typing.cast("str", getattr(annotation, "__name__", str(annotation))))
