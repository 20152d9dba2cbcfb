"""Every form in which people keep captions beside their media, read into one caption per file.

In: a folder and the media files in it. Out: a `Caption` (text and where it was found) or a `Problem` for each. Of the
sources, the first that has a caption wins: the sidecars `<name>.json`, `.jsonl`, `.txt`, `.caption` of a file's whole
name, those of its name without its ending, then the table at the top. The one decision: what is not understood is
never silently ignored. A second source that says something else is listed, a sidecar that cannot be read is a problem
of that file alone, and what looks like a caption and is none is named.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from wanloom.files import is_special, json_fault, parse_json
from wanloom.prepare.tables import TABLES, Names, Table, compose, loose, read_table
from wanloom.suffixes import kind_of

SIDECARS = (".json", ".jsonl", ".txt", ".caption")
# endings of texts that are no captions here, and are named when they have the name of a file without one
OTHER_TEXTS = (".text", ".md", ".srt", ".vtt", ".tags", ".cap", ".yaml", ".yml", ".xml", ".csv", ".tsv")
OTHER_TABLES = (".csv", ".jsonl", ".json", ".parquet", ".tsv", ".xlsx")
MOST_BYTES = 1 << 20  # of a sidecar
MOST_CHARACTERS = 20_000  # of a caption: text encoders take about 2,500
NOTHING = {"nan", "none", "null", "<na>"}  # what programs write for a missing value


class Caption(NamedTuple):
    text: str  # stripped, not empty
    source: str  # file it was read from, relative to the folder


class Problem(NamedTuple):
    reason: str  # a sentence for the report


Answer = Caption | Problem


class Captions(NamedTuple):
    """What was found."""

    found: dict[str, Answer]  # by media file
    conflicts: dict[str, str]  # media files whose sources disagree, and how
    shared: dict[str, str]  # media files whose caption is also another's, and whose
    missing: list[str]  # files that the table lists and the folder does not have


class Sidecars:
    """The sidecars among the files of a folder, by the file that they belong to."""

    def __init__(self, files: Iterable[str]) -> None:
        self._by_stem: dict[tuple[str, str], list[str]] = defaultdict(list)
        for name in sorted(files):
            stem, dot, suffix = name.rpartition(".")
            if (ending := dot + suffix.lower()) in SIDECARS:
                self._by_stem[compose(stem), ending].append(name)

    def own(self, media: str) -> list[str]:
        """Those of the whole name, such as clip.mp4.txt: they belong to no other file."""
        return self._find(media)

    def common(self, media: str) -> list[str]:
        """Those of the name without its ending, such as clip.txt."""
        return self._find(media.rpartition(".")[0])

    def _find(self, stem: str) -> list[str]:
        out = []
        for ending in SIDECARS:
            names = self._by_stem.get((compose(stem), ending), [])
            out += [name for name in names if name.rpartition(".")[0] == stem] or names
        return out


def read_captions(root: Path, media: list[str], files: set[str], key: str | None = None) -> Captions:
    """Captions of the `media` files; `files` are all files under `root`, both as relative paths with '/'.

    `key` is the json key or column; by default "caption", and in tables also "text" or "prompt". Raises UserError for a
    table that cannot be read or whose columns are ambiguous.
    """
    table = read_table(root, files, Names(media), key, check_caption)
    sidecars = Sidecars(files)
    near = NearMisses(files, sidecars, media, table)
    groups: dict[str, list[str]] = defaultdict(list)  # media files of one name
    for name in media:
        groups[compose(name.rpartition(".")[0])].append(name)
    found: dict[str, Answer] = {}
    conflicts: dict[str, str] = {}
    shared: dict[str, str] = {}
    for name in media:
        others = [other for other in groups[compose(name.rpartition(".")[0])] if other != name]
        films = [other for other in others if kind_of(other) == "video"]
        answers = [read_sidecar(root, source, key) for source in sidecars.own(name)]
        common = sidecars.common(name)
        if kind_of(name) == "image" and films:  # a thumbnail does not show what the caption says
            answers += [
                Problem(f"{source} is the caption of {films[0]}: give this one its own, {name}.txt")
                for source in common
                if not any(isinstance(answer, Caption) for answer in answers)
            ]
        else:
            answers += [read_sidecar(root, source, key) for source in common]
        answers += table.answers.get(name, [])
        found[name], conflict = choose_answer(answers)
        if conflict:
            conflicts[name] = conflict
        if not answers:
            found[name] = Problem(f"no caption found{near.explain(name)}")
        source = getattr(found[name], "source", "")
        sharing = [other for other in others if kind_of(other) == "video" or kind_of(name) == "image"]
        if source in common and sharing:
            shared[name] = f"{source} is also the caption of {sharing[0]}"
    return Captions(found, conflicts, shared, table.missing)


def choose_answer(answers: list[Answer]) -> tuple[Answer, str]:
    """The first caption, and what the other sources say against it; without one, every problem."""
    captions = [answer for answer in answers if isinstance(answer, Caption)]
    problems = [answer.reason for answer in answers if isinstance(answer, Problem)]
    if not captions:
        return Problem("; ".join(problems)), ""
    first = captions[0]
    others = [caption.source for caption in captions if caption.text.split() != first.text.split()]
    if others:
        return first, f"{first.source} is used, {', '.join(others)} says something else"
    return first, f"{first.source} is used; {'; '.join(problems)}" if problems else ""


def check_caption(value: Any, source: str, where: str) -> Answer:
    """A caption, unless it is empty, no text, too long or what stands for none; `where` it is goes into the reason."""
    if value is None or value != value:  # a missing value of a table is the number NaN
        return Problem(f"{where}: the caption is empty")
    if not isinstance(value, str):
        return Problem(f"{where}: the caption is no text")
    text = value.strip()
    if not text:
        return Problem(f"{where}: the caption is empty")
    if len(text) > MOST_CHARACTERS:
        return Problem(f"{where}: the caption has {len(text):,} characters, at most {MOST_CHARACTERS:,} are taken")
    if text.lower() in NOTHING:
        return Problem(f"{where}: the caption is only '{text}', which stands for a missing one")
    return Caption(text, source)


def read_sidecar(root: Path, name: str, key: str | None) -> Answer:
    """The caption in one sidecar file."""
    if is_special(root / name):
        return Problem(f"{name} is a pipe or a device, not a file")
    try:
        with (root / name).open("rb") as file:
            data = file.read(MOST_BYTES + 1)  # never all of it: it may have gigabytes
        if len(data) > MOST_BYTES:
            return Problem(f"{name} is larger than {MOST_BYTES >> 20} MiB: it is no caption")
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Problem(f"{name} is not UTF-8 text")
    except OSError as error:
        return Problem(f"{name} cannot be read: {error.strerror}")
    if not text.strip():
        return Problem(f"{name} is empty")
    ending = name.rpartition(".")[2].lower()
    if ending == "json":
        return _read_object(text, name, name, key or "caption")
    if ending != "jsonl":
        return check_caption(text, name, name)
    # other separators of lines, such as U+2028, are part of a text in JSON
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    answers = [_read_object(line, name, f"{name}, line {number}", key or "caption") for number, line in lines]
    problems = [answer for answer in answers if isinstance(answer, Problem)]
    if problems:
        return problems[0]
    if len(set(answers)) > 1:
        return Problem(f"{name} has {len(set(answers))} different captions, one is needed")
    return answers[0]


def _read_object(text: str, name: str, where: str, key: str) -> Answer:
    try:
        value = parse_json(text)
    except ValueError as error:
        return Problem(f"{where} is not valid JSON: {error if name == where else json_fault(error)}")
    if not isinstance(value, dict) or key not in value:
        keys = f", only {', '.join(map(repr, value))}" if isinstance(value, dict) and value else ""
        return Problem(f"{where} has no key '{key}'{keys}")
    return check_caption(value[key], name, where)


class NearMisses:
    """What looks like the caption of a file that has none: the reason is a name, far more often than a lost text."""

    def __init__(self, files: set[str], sidecars: Sidecars, media: list[str], table: Table[Answer]) -> None:
        used = {name for file in media for name in sidecars.own(file) + sidecars.common(file)}
        self.table = table.name
        self.tables = sorted(name for name in files if PurePosixPath(name).name.lower() in TABLES)
        texts = (name for name in sorted(files - used) if PurePosixPath(name).suffix.lower() in SIDECARS + OTHER_TEXTS)
        self.texts = self._by_name(name for name in texts if name not in self.tables)
        self.entries = self._by_name(table.missing)
        self.other_tables = [
            name
            for name in sorted(files - used)
            if "/" not in name and PurePosixPath(name).suffix.lower() in OTHER_TABLES and name not in TABLES
        ]

    @staticmethod
    def _by_name(names: Iterable[str]) -> dict[str, str]:
        out: dict[str, str] = {}
        for name in names:
            out.setdefault(loose(name), name)
            if kind_of(PurePosixPath(name).stem):  # clip.mp4.txt
                out.setdefault(loose(PurePosixPath(name).stem), name)
        return out

    def explain(self, name: str) -> str:
        """`": why"`, or an empty string."""
        stem, near = name.rpartition(".")[0], loose(name)
        if text := self.texts.get(near):
            suffix = PurePosixPath(text).suffix.lower()
            return f": {text} is not read, call it {stem}{suffix if suffix in SIDECARS else '.txt'}"
        if entry := self.entries.get(near):
            return f": {self.table} has '{entry}', it must say '{name}'"
        above = {str(folder) for folder in PurePosixPath(name).parents}
        if tables := [table for table in self.tables if str(PurePosixPath(table).parent) in above - {"."}]:
            return f": {tables[0]} is not read, a table lies at the top of the input"
        if self.other_tables and not self.table:
            other = self.other_tables[0]
            return f": {other} is not read, a table is called {', '.join(TABLES)}"
        return ""
