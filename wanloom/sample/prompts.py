"""Prompts from the command line, from files and from Python: what to make, with which seed, under which name.

In: prompts in a list, a text file (one a line) or JSON lines. Out: `Prompt`s, later with every value filled in. The one
decision: prompt number i has seed + i unless it says otherwise, so adding one at the end changes no other video.
Another seed than i is part of the name.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr

from wanloom.config import Config, build_config
from wanloom.errors import UserError
from wanloom.files import json_fault, parse_json

KINDS = (".txt", ".jsonl")
SLUG_LENGTH = 48
MAX_SEED = 1 << 63
MOST_BYTES = 64 << 20  # of a file of prompts


class Prompt(Config):
    """One video or image to make. What is not given, as `model_fields_set` tells, `fill_in` takes from elsewhere."""

    prompt: str
    negative: str = ""
    seed: int = Field(default=0, ge=0, lt=MAX_SEED)
    height: int = 0
    width: int = 0
    frames: int = 0
    _where: str = PrivateAttr(default="")
    _name: str = PrivateAttr(default="")

    @property
    def where(self) -> str:
        """The file and line that it stands in, in words; empty for one that is in no file."""
        return self._where

    @property
    def name(self) -> str:
        """Of its files, without suffix; empty until it is filled in."""
        return self._name

    def at(self, where: str) -> "Prompt":
        """The same, of this place."""
        self._where = where
        return self


def read_prompts(path: Path) -> list[Prompt]:
    """Those of a `.jsonl` file, or of a `.txt` file with one prompt a line; empty lines do not count.

    Raises UserError for a file that is neither, cannot be read or holds no prompt, and names the line that is wrong.
    """
    kind = path.suffix.lower()  # some systems write .TXT
    if kind not in KINDS and not path.is_dir():
        raise UserError(
            f"'{path}' is no file of prompts by its name: a .txt has one prompt a line, a .jsonl one JSON object a "
            'line, such as {"prompt": "a cat", "seed": 7}.'
        )
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise UserError(f"'{path}' is larger than {MOST_BYTES >> 20} MiB: it is no file of prompts.")
        lines = data.decode("utf-8-sig").split("\n")  # other separators, such as U+2028, are part of a prompt
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"they are no UTF-8 (byte {error.start})"
        raise UserError(f"The prompts in '{path}' cannot be read: {reason}.") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"'{path}' holds no prompt.")
    if kind != ".jsonl":
        return [Prompt(prompt=line).at(f"'{path}', line {number}") for number, line in numbered]
    return [_parse_line(f"'{path}', line {number}", line) for number, line in numbered]


def _parse_line(where: str, line: str) -> Prompt:
    try:
        values = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {json_fault(error)}.") from error
    if not isinstance(values, dict):
        raise UserError(f'{where} is not an object such as {{"prompt": "a cat", "seed": 7}}.')
    left_out = {name for name in Prompt.model_fields if name != "prompt" and values.get(name, "") is None}
    try:
        return build_config(Prompt, {name: value for name, value in values.items() if name not in left_out}).at(where)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def fill_in(prompts: Sequence[Prompt], seed: int, values: Mapping[str, Any]) -> list[Prompt]:
    """The prompts, in order, with their names and what they leave out: seed + i, and what `values` has by field."""
    digits = max(3, len(str(len(prompts) - 1)))
    out = []
    for i, prompt in enumerate(prompts):
        missing = {"seed": seed + i, **values}
        own = {name: value for name, value in missing.items() if name not in prompt.model_fields_set}
        out.append(filled := prompt.model_copy(update=own))
        filled._name = name_of(i, digits, filled.prompt, filled.seed)
    return out


def name_of(index: int, digits: int, prompt: str, seed: int) -> str:
    """The name of a prompt's files. One seed more is one more name, so that seeds can be tried in one folder."""
    parts = (f"{index:0{digits}d}", slug(prompt), "" if seed == index else f"seed{seed}")
    return "-".join(filter(None, parts))


def slug(prompt: str) -> str:
    """The first words of a prompt as part of a file name, ASCII; empty for a prompt in another script."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode()
    words = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")
    if len(words) > SLUG_LENGTH:
        words = words[:SLUG_LENGTH].rpartition("-")[0] or words[:SLUG_LENGTH]
    return words
