"""Every form in which people keep captions beside their media, read into one caption per file.

In: a folder and the media files in it. Out: a `Caption` (text and where it was found) or a `Problem` for each. Of the
sources, the first that has a caption wins: `<stem>.json`, `<stem>.jsonl`, `<stem>.txt`, then one table `metadata.csv`,
`.jsonl` or `.parquet` at the top. The one decision: a second source that says something else is never silently ignored,
it is listed; a sidecar that cannot be read is a problem of that file alone.
"""

import csv
import io
import stat
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from wanloom.config import UserError
from wanloom.files import parse_json

SIDECARS = (".json", ".jsonl", ".txt")
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_COLUMNS = ("file_name", "file", "path", "video")
CAPTION_COLUMNS = ("caption", "text", "prompt")


class Caption(NamedTuple):
    text: str  # stripped, not empty
    source: str  # file it was read from, relative to the folder


class Problem(NamedTuple):
    reason: str  # a sentence for the report


class Captions(NamedTuple):
    """What was found."""

    found: dict[str, Caption | Problem]  # by media file
    conflicts: dict[str, str]  # media files whose sources disagree, and how
    missing: list[str]  # files that the table lists and the folder does not have


def read_captions(root: Path, media: list[str], files: set[str], key: str | None = None) -> Captions:
    """Captions of the `media` files; `files` are all files under `root`, both as relative paths with '/'.

    `key` is the json key or column; by default "caption", and in tables also "text" or "prompt". Raises UserError for a
    table that cannot be read or whose columns are ambiguous.
    """
    table, table_name = read_table(root, files, key)
    found: dict[str, Caption | Problem] = {}
    conflicts: dict[str, str] = {}
    for name in media:
        stem = str(PurePosixPath(name).with_suffix(""))
        answers: list[Caption | Problem] = [
            read_sidecar(root, stem + suffix, key) for suffix in SIDECARS if stem + suffix in files
        ]
        answers += [Caption(text, table_name) if text else Problem("it is empty") for text in table.get(name, [])]
        captions = [answer for answer in answers if isinstance(answer, Caption)]
        problems = [answer.reason for answer in answers if isinstance(answer, Problem)]
        if captions:
            found[name] = captions[0]
            others = [c.source for c in captions if " ".join(c.text.split()) != " ".join(captions[0].text.split())]
            if others:
                conflicts[name] = f"{captions[0].source} is used, {', '.join(others)} says something else"
            elif problems:
                conflicts[name] = f"{captions[0].source} is used; {'; '.join(problems)}"
        else:
            found[name] = Problem("; ".join(problems) or "no caption found")
    return Captions(found, conflicts, sorted(set(table) - set(media)))


def read_sidecar(root: Path, name: str, key: str | None) -> Caption | Problem:
    """The caption in one sidecar file."""
    if is_special(root / name):
        return Problem(f"{name} is a pipe or a device, not a file")
    try:
        text = (root / name).read_text(encoding="utf-8-sig")
        if name.endswith(".json"):
            value: Any = _from_object(parse_json(text), name, key or "caption")
        elif name.endswith(".jsonl"):
            values = [
                _from_object(parse_json(line), name, key or "caption") for line in text.splitlines() if line.strip()
            ]
            if len(set(values)) > 1:
                return Problem(f"{name} has {len(set(values))} different captions, one is needed")
            value = values[0] if values else ""
        else:
            value = text
    except UnicodeDecodeError:
        return Problem(f"{name} is not UTF-8 text")
    except OSError as error:
        return Problem(f"{name} cannot be read: {error.strerror}")
    except ValueError as error:  # json's errors are ValueErrors too
        return Problem(str(error) if str(error).startswith(name) else f"{name} is not valid JSON: {error}")
    return Caption(value.strip(), name) if value.strip() else Problem(f"{name} is empty")


def is_special(path: Path) -> bool:
    """Whether this, or what a link leads to, is a pipe or a device: reading it may never end."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:  # reading it will say why
        return False


def _from_object(value: Any, name: str, key: str) -> str:
    if not isinstance(value, dict) or key not in value:
        keys = f", only {', '.join(map(repr, value))}" if isinstance(value, dict) and value else ""
        raise ValueError(f"{name} has no key '{key}'{keys}")
    if not isinstance(value[key], str):
        raise ValueError(f"{name}: '{key}' is no text")
    return value[key]


def read_table(root: Path, files: set[str], key: str | None) -> tuple[dict[str, list[str]], str]:
    """Captions by file of the one table in `root` (none: an empty dict), and the name of the table."""
    names = [name for name in TABLES if name in files]
    if not names:
        return {}, ""
    if len(names) > 1:
        raise UserError(f"'{root}' has {' and '.join(names)}: keep one of them.")
    name = names[0]
    try:
        columns, rows = _read_rows(root / name)
    except (OSError, ValueError, csv.Error, pa.ArrowInvalid) as error:
        raise UserError(f"{root / name} cannot be read: {error}") from error
    file_column = _choose(columns, FILE_COLUMNS, None, name, "file", "rename or remove the others")
    caption_column = _choose(columns, CAPTION_COLUMNS, key, name, "caption", "say which with --caption-key")
    out: dict[str, list[str]] = {}
    for row in rows:
        file, caption = row.get(file_column), row.get(caption_column)
        if file:
            out.setdefault(_relative(root, str(file)), []).append(str(caption).strip() if caption else "")
    return out, name


def _read_rows(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    if is_special(path):
        raise ValueError("it is a pipe or a device, not a file")
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        return table.column_names, table.to_pylist()
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".jsonl":
        rows = [parse_json(line) for line in text.splitlines() if line.strip()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line is no JSON object")
        return sorted({column for row in rows for column in row}), rows
    csv.field_size_limit(1 << 24)
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows = list(reader)
    for number, row in enumerate(rows, start=2):
        if None in row:
            raise ValueError(
                f"row {number} has more fields than there are columns (a caption with commas needs quotes)"
            )
    return list(reader.fieldnames or []), rows


def _choose(columns: list[str], known: tuple[str, ...], wanted: str | None, table: str, what: str, advice: str) -> str:
    if wanted is not None:
        if wanted not in columns:
            raise UserError(f"{table} has no column '{wanted}', only {', '.join(columns)}.")
        return wanted
    matches = [name for name in known if name in columns]
    if not matches:
        raise UserError(f"{table} has no {what} column: call one of {', '.join(columns)} '{known[0]}'.")
    if len(matches) > 1:
        raise UserError(f"{table} has several {what} columns ({', '.join(matches)}): {advice}.")
    return matches[0]


def _relative(root: Path, file: str) -> str:
    """A table's entry as a path relative to `root`, with '/'."""
    path = PurePosixPath(file.replace("\\", "/"))
    if path.is_absolute() and path.is_relative_to(root.absolute().as_posix()):
        path = path.relative_to(root.absolute().as_posix())
    return str(path)
