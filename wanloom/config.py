"""The base of every config: strict, frozen, made from YAML and `key.path=value`, with errors that say what to do.

A config class sits beside the code that reads it; `recipes/run.py` only composes them. A user's mistake anywhere in
wanloom is a `UserError`: one sentence that the command line prints without a traceback.
"""

import difflib
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

T = TypeVar("T", bound="Config")
EXPONENT_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+\Z")


class UserError(Exception):
    """A mistake or a limit that the user can do something about; the message says what."""


def sentence_of(error: UserError | OSError) -> str:
    """What to tell the user of an error."""
    if isinstance(error, UserError):
        return str(error)
    name = "" if error.filename is None else f"'{error.filename}' cannot be used: "
    return f"{name}{error.strerror or error}."


class Config(BaseModel):
    """Unknown keys and wrong types are errors; values never change after loading."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", validate_default=True)


def nearest(word: str, known: Sequence[str]) -> str:
    """`" Did you mean 'x'?"` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, mapping by mapping; neither is changed."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`["optimizer.lr=1e-4", "seed=3"]` to a nested mapping; values are read as YAML scalars or flow collections."""
    out: dict[str, Any] = {}
    for pair in pairs:
        path, separator, text = pair.partition("=")
        if not separator or not path:
            raise UserError(f"'{pair}' is not of the form key.path=value.")
        try:
            value: Any = load_yaml(text)
        except yaml.YAMLError as error:
            raise UserError(f"The value of '{path}' cannot be read: {text!r} is not valid YAML.") from error
        for key in reversed(path.split(".")):
            value = {key: value}
        out = merge(out, value)
    return out


def load_yaml(text: str) -> Any:
    """YAML as its users expect it: `1e-4` is a number, which YAML 1.1 reads as a string. Raises yaml.YAMLError."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML that `load_yaml` reads back: a string that looks like a number is quoted."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    pass


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
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _paths(cls)
        # the last word decides what was meant, wherever it was put
        by_leaf = {name.rsplit(".", 1)[-1]: name for name in known}
        hint = nearest(path, known) or nearest(by_leaf.get(path.rsplit(".", 1)[-1], path), known)
        return f"There is no setting '{path}'.{hint}"
    if item["type"] == "missing":
        return f"The setting '{path}' is required."
    message = item["msg"].removeprefix("Value error, ").rstrip(".")
    if item["type"] == "value_error":
        return f"{path}: {message}." if path else f"{message}."
    return f"The setting '{path}' is {item['input']!r}: {message[0].lower() + message[1:]}."


def _paths(cls: type[Config], prefix: str = "") -> list[str]:
    """Every settable `key.path` of a config class."""
    out = []
    for name, field in cls.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Config):
            out += _paths(kind, f"{prefix}{name}.")
        out.append(prefix + name)
    return out
