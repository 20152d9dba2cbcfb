"""The one table of captions at the top of a folder: metadata.csv, metadata.jsonl or metadata.parquet.

In: the folder. Out: what the table says of each file. The one decision: a table is read row by row, and only the two
columns that matter, so neither its size nor what it unfolds to decides how much memory is taken. A line that cannot be
read is an error with its number and not a drop, because what follows it may belong to other files. A name is looked for
as it is written, then by its composed form (NFC), because macOS and old archives write an accent as a character of its
own; a name that differs in any other way is never taken, only named.
"""

import csv
import io
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Generic, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from wanloom.errors import UserError
from wanloom.files import is_special, json_fault, parse_json

TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_COLUMNS = ("file_name", "file", "path", "video")
CAPTION_COLUMNS = ("caption", "text", "prompt")
MOST_BYTES = 1 << 20  # of one line
MOST_ROWS = 10_000_000
BATCH_ROWS = 4096  # of a parquet table, at a time
MOST_GROUP_BYTES = 1 << 30  # of the two columns in a row group of a parquet table, unpacked


T = TypeVar("T")


def compose(name: str) -> str:
    """The composed form (NFC) of a name: the same for every way to write its characters."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def loose(name: str) -> str:
    """What is left of a name without its folders, its ending, case and outer blanks."""
    return compose(PurePosixPath(name).stem).casefold().strip()


class Names:
    """A set of names that is searched by written names."""

    def __init__(self, names: Iterable[str]) -> None:
        self._exact = set(names)
        self._composed: dict[str, str] = {}
        for name in sorted(self._exact):
            self._composed.setdefault(compose(name), name)

    def find(self, written: str) -> str | None:
        """The name that `written` means, if there is one."""
        return written if written in self._exact else self._composed.get(compose(written))


class Table(NamedTuple, Generic[T]):
    """What was found."""

    name: str  # empty when there is no table
    answers: dict[str, list[T]]  # what it says of each media file
    missing: list[str]  # entries that are no media file of the folder, sorted


def read_table(
    root: Path, files: set[str], media: Names, key: str | None, check: Callable[[Any, str, str], T]
) -> Table[T]:
    """The table of `root`, every caption through `check` (value, name of the table, where in it).

    Raises UserError when the table cannot be read or its columns are ambiguous.
    """
    names = [name for name in TABLES if name in files]
    if not names:
        return Table("", {}, [])
    if len(names) > 1:
        raise UserError(f"'{root}' has {' and '.join(names)}: keep one of them.")
    path = root / names[0]
    where = "row" if path.suffix == ".parquet" else "line"
    answers: dict[str, list[T]] = {}
    missing: set[str] = set()

    try:
        for number, file, caption in _read_rows(path, partial(choose_columns, path, key), media):
            if number > MOST_ROWS:
                raise ValueError(f"it has more than {MOST_ROWS:,} rows: split the input into several folders")
            name = media.find(_relative(root, file)) or media.find(_relative(root, file.strip()))
            if name is None:
                missing.add(_relative(root, file))
            else:
                answers.setdefault(name, []).append(check(caption, path.name, f"{path.name}, {where} {number}"))
    except OSError as error:
        raise UserError(f"The table '{path}' cannot be read: {error.strerror or error}.") from error
    except (ValueError, pa.ArrowException) as error:
        raise UserError(f"The table '{path}' cannot be read: {error}.") from error
    return Table(path.name, answers, sorted(missing))


Choose = Callable[[list[str]], tuple[str, str]]
Row = tuple[int, Any, Any]  # number, file, caption


def _read_rows(path: Path, choose: Choose, media: Names) -> Iterator[Row]:
    """The rows that name a file. Raises ValueError for one that has a caption and no file."""
    if is_special(path):
        raise ValueError("it is a pipe or a device, not a file")
    if path.suffix == ".parquet":
        rows = _read_parquet(path, choose)
    elif path.suffix == ".jsonl":
        rows = _read_json_lines(path, choose)
    else:
        rows = _read_csv(path, choose, media)
    for number, file, caption in rows:
        if isinstance(file, str) and file.strip():
            yield number, file, caption
        elif isinstance(caption, str) and caption.strip():
            raise ValueError(f"line {number} has a caption and names no file")


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines; only a line feed ends one. Raises ValueError for a line that is no text, or endless."""
    with path.open("rb") as file:
        for number, data in enumerate(iter(partial(file.readline, MOST_BYTES + 1), b""), 1):
            if len(data) > MOST_BYTES:
                raise ValueError(f"line {number} is longer than {MOST_BYTES >> 20} MiB")
            try:
                yield number, data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number} is not UTF-8 text") from error


def _read_json_lines(path: Path, choose: Choose) -> Iterator[Row]:
    columns: set[str] = set()
    for _, row in _read_objects(path):
        columns |= row.keys()
    file_column, caption_column = choose(sorted(columns))
    for number, row in _read_objects(path):
        yield number, row.get(file_column), row.get(caption_column)


def _read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _read_lines(path):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not valid JSON: {json_fault(error)}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no JSON object")
        yield number, row


def _read_csv(path: Path, choose: Choose, media: Names) -> Iterator[Row]:
    csv.field_size_limit(MOST_BYTES)
    rows = _split_csv(path)
    columns = [name.strip() for name in next(rows, (1, []))[1]]
    name, count = Counter(columns).most_common(1)[0] if columns else ("", 0)
    if count > 1 and name:
        raise ValueError(f"it has {count} columns '{name}'")
    file_column, caption_column = (columns.index(name) for name in choose(columns))
    for number, row in rows:
        if len(row) > len(columns):
            raise ValueError(
                f"line {number} has more fields than there are columns (a caption with commas needs quotes)"
            )
        for field in row:
            swallowed = field.split("\n")[1:]
            if any(media.find(line.partition(",")[0].strip('" \r')) for line in swallowed):
                raise ValueError(f"a quote in line {number} is not closed: it takes the rows after it as its text")
        row += [""] * (len(columns) - len(row))
        yield number, row[file_column], row[caption_column]


def _split_csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Fields of every row that has some, and the line in which it begins."""
    # lines end as the csv module has it, so also with the carriage return of old spreadsheets
    pieces = (piece for _, line in _read_lines(path) for piece in io.StringIO(line, newline=""))
    reader = csv.reader(pieces, strict=True)
    begin = 1
    try:
        for row in reader:
            if any(field.strip() for field in row):
                yield begin, row
            begin = reader.line_num + 1
    except csv.Error as error:
        reason = "a quote is never closed" if "unexpected end" in str(error) else str(error)
        raise ValueError(f"the row that begins in line {begin} is not valid CSV: {reason}") from error


def _read_parquet(path: Path, choose: Choose) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
    columns = choose(schema.names)
    for name in columns:
        kind = schema.field(name).type
        if not any(check(kind) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)):
            raise ValueError(f"its column '{name}' holds {kind}, not text")
    if metadata.num_rows > MOST_ROWS:
        raise ValueError(f"it has {metadata.num_rows:,} rows, at most {MOST_ROWS:,} are read")
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        chunks = (group.column(j) for j in range(group.num_columns))
        size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in columns)
        if size > MOST_GROUP_BYTES:
            raise ValueError(f"its row group {i} unpacks to {size >> 20} MiB: write it with smaller row groups")
    number = 0
    # as dictionaries: a caption that a small file repeats a million times is in memory once
    with pq.ParquetFile(path, read_dictionary=list(columns)) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=list(columns)):
            values = [_unpack(batch.column(name)) for name in columns]
            for entry, caption in zip(*values, strict=True):
                number += 1
                yield number, entry, caption


def _unpack(column: pa.Array) -> list[Any]:
    if not isinstance(column, pa.DictionaryArray):
        return column.to_pylist()
    texts = column.dictionary.to_pylist()
    return [None if i is None else texts[i] for i in column.indices.to_pylist()]


def choose_columns(path: Path, key: str | None, columns: list[str]) -> tuple[str, str]:
    """Which columns hold the file and the caption."""
    file = _choose(path, columns, FILE_COLUMNS, None, "file", "rename or remove the others")
    return file, _choose(path, columns, CAPTION_COLUMNS, key, "caption", "say which with `caption_key`")


def _choose(path: Path, columns: list[str], known: tuple[str, ...], wanted: str | None, what: str, advice: str) -> str:
    if wanted is not None:
        if wanted not in columns:
            raise UserError(f"The table '{path}' has no column '{wanted}', only {', '.join(columns)}.")
        return wanted
    matches = [name for name in known if name in columns]
    if len(matches) > 1:
        raise UserError(f"The table '{path}' has several {what} columns ({', '.join(matches)}): {advice}.")
    if not matches and len(columns) == 1 and any(mark in columns[0] for mark in ";\t|"):
        raise UserError(f"The columns of the table '{path}' must be separated by commas, it begins: {columns[0]!r}.")
    if not matches and not columns:
        raise UserError(f"The table '{path}' is empty: it needs the columns '{FILE_COLUMNS[0]}' and 'caption'.")
    if not matches:
        raise UserError(f"The table '{path}' has no {what} column: call one of {', '.join(columns)} '{known[0]}'.")
    return matches[0]


def _relative(root: Path, file: str) -> str:
    """A table's entry as a path relative to `root`, with '/'."""
    path = PurePosixPath(file.replace("\\", "/"))
    if path.is_absolute() and path.is_relative_to(root.absolute().as_posix()):
        path = path.relative_to(root.absolute().as_posix())
    return str(path)
