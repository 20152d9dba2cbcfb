"""Prompts from the command line and from files to jobs: what to make, with which seed, under which name.

In: prompts in a list, a text file (one a line) or JSON lines. Out: `Job`s with every value filled in. The one decision:
job number i has seed + i unless its line says otherwise, so adding a prompt at the end changes no other video.
Another seed than i is part of the name.
"""

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, PrivateAttr

from wanloom.config import Config, build_config
from wanloom.errors import UserError
from wanloom.files import json_fault, parse_json

KINDS = (".txt", ".jsonl")
SLUG_LENGTH = 48
MAX_SEED = 1 << 63
MOST_BYTES = 64 << 20  # of a file of prompts


class PromptLine(Config):
    """One line of a JSON lines file; what is left out comes from the command line."""

    prompt: str
    negative: str | None = None
    seed: int | None = Field(default=None, ge=0, lt=MAX_SEED)
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    _where: str = PrivateAttr(default="")

    @property
    def where(self) -> str:
        """The file and line that it stands in, in words; empty for one of the command line."""
        return self._where

    def at(self, where: str) -> "PromptLine":
        """The same, of this place."""
        self._where = where
        return self


@dataclass(frozen=True)
class Job:
    """One video or image to make."""

    name: str  # of its files, without suffix
    prompt: str
    negative: str
    seed: int
    height: int
    width: int
    frames: int


def read_prompts(path: Path) -> list[PromptLine]:
    """Lines of a `.jsonl` file, or of a `.txt` file with one prompt a line; empty lines do not count.

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
        return [PromptLine(prompt=line).at(f"'{path}', line {number}") for number, line in numbered]
    return [_parse_line(f"'{path}', line {number}", line) for number, line in numbered]


def _parse_line(where: str, line: str) -> PromptLine:
    try:
        values = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {json_fault(error)}.") from error
    if not isinstance(values, dict):
        raise UserError(f'{where} is not an object such as {{"prompt": "a cat", "seed": 7}}.')
    try:
        return build_config(PromptLine, values).at(where)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def build_jobs(lines: list[PromptLine], negative: str, seed: int, height: int, width: int, frames: int) -> list[Job]:
    """One job a line, in order; the arguments fill what a line leaves out."""
    digits = max(3, len(str(len(lines) - 1)))

    def pick(own: int | None, default: int) -> int:
        return default if own is None else own

    return [
        Job(
            name=name_of(i, digits, line.prompt, pick(line.seed, seed + i)),
            prompt=line.prompt,
            negative=negative if line.negative is None else line.negative,
            seed=pick(line.seed, seed + i),
            height=pick(line.height, height),
            width=pick(line.width, width),
            frames=pick(line.frames, frames),
        )
        for i, line in enumerate(lines)
    ]


def name_of(index: int, digits: int, prompt: str, seed: int) -> str:
    """The name of a job's files. One seed more is one more name, so that seeds can be tried in one folder."""
    parts = (f"{index:0{digits}d}", slug(prompt), "" if seed == index else f"seed{seed}")
    return "-".join(filter(None, parts))


def slug(prompt: str) -> str:
    """The first words of a prompt as part of a file name, ASCII; empty for a prompt in another script."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode()
    words = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")
    if len(words) > SLUG_LENGTH:
        words = words[:SLUG_LENGTH].rpartition("-")[0] or words[:SLUG_LENGTH]
    return words
