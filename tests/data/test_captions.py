"""Every form of captions, their order, their conflicts and their mistakes."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wanloom.config import UserError
from wanloom.data.captions import Caption, Captions, Problem, read_captions


def read(root: Path, media: list[str], key: str | None = None) -> Captions:
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    return read_captions(root, media, files | set(media), key)


def put(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_sidecars_of_every_form(tmp_path: Path) -> None:
    put(
        tmp_path,
        a_json='{"caption": " a cat "}',
        sub__b_jsonl='{"caption": "a dog"}\n\n',
        c_txt="\ufeffa bird,\nflying\n",
        d_e_txt="two dots",
    )
    got = read(tmp_path, ["a.mp4", "sub/b.mp4", "c.PNG", "d.e.mov"])
    assert got.found == {
        "a.mp4": Caption("a cat", "a.json"),
        "sub/b.mp4": Caption("a dog", "sub/b.jsonl"),
        "c.PNG": Caption("a bird,\nflying", "c.txt"),
        "d.e.mov": Caption("two dots", "d.e.txt"),
    }
    assert got.conflicts == {} and got.missing == []


def test_caption_key(tmp_path: Path) -> None:
    put(tmp_path, a_json='{"caption": "short", "long": "a long one"}', b_json='{"caption": "x"}')
    got = read(tmp_path, ["a.mp4", "b.mp4"], key="long")
    assert got.found["a.mp4"] == Caption("a long one", "a.json")
    assert got.found["b.mp4"] == Problem("b.json has no key 'long', only 'caption'")


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.json", "", "not valid JSON"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", '["caption"]', "no key 'caption'"),
        ("a.json", '{"caption": 3}', "is no text"),
        ("a.json", '{"caption": "  "}', "is empty"),
        ("a.txt", " \n", "is empty"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"caption": "x"}\n{"caption": "y"}', "2 different captions"),
    ],
)
def test_a_bad_sidecar_is_a_problem_of_its_file_alone(tmp_path: Path, name: str, text: str, reason: str) -> None:
    (tmp_path / name).write_text(text)
    (tmp_path / "b.txt").write_text("fine")
    got = read(tmp_path, ["a.mp4", "b.mp4", "c.mp4"])
    problem = got.found["a.mp4"]
    assert isinstance(problem, Problem) and name in problem.reason and reason in problem.reason
    assert got.found["b.mp4"] == Caption("fine", "b.txt")
    assert got.found["c.mp4"] == Problem("no caption found")


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("h\xe9".encode("latin-1"))
    assert read(tmp_path, ["a.mp4"]).found["a.mp4"] == Problem("a.txt is not UTF-8 text")


def write_table(root: Path, kind: str, columns: dict[str, list]) -> None:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if kind == "parquet":
        pq.write_table(pa.table(columns), root / "metadata.parquet")
    elif kind == "jsonl":
        (root / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    else:
        lines = [",".join(columns), *(",".join(f'"{value or ""}"' for value in row.values()) for row in rows)]
        (root / "metadata.csv").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(("file", "caption"), [("file_name", "caption"), ("video", "prompt"), ("path", "text")])
def test_tables(tmp_path: Path, kind: str, file: str, caption: str) -> None:
    names = ["a.mp4", "./sub/b.mp4", "sub\\c.mp4", "gone.mp4", "empty.mp4", str(tmp_path / "d.mp4")]
    captions = ["one, with a comma", "two", "three", "x", None, "four"]
    write_table(tmp_path, kind, {file: names, "other": list("uvwxyz"), caption: captions})
    got = read(tmp_path, ["a.mp4", "sub/b.mp4", "sub/c.mp4", "empty.mp4", "d.mp4", "e.mp4"])
    table = f"metadata.{kind}"
    assert got.found["a.mp4"] == Caption("one, with a comma", table)
    assert got.found["sub/b.mp4"] == Caption("two", table)
    assert got.found["sub/c.mp4"] == Caption("three", table)
    assert got.found["d.mp4"] == Caption("four", table)
    assert got.found["empty.mp4"] == Problem("it is empty")
    assert got.found["e.mp4"] == Problem("no caption found")
    assert got.missing == ["gone.mp4"]


def test_the_first_source_wins_and_disagreement_is_listed(tmp_path: Path) -> None:
    put(tmp_path, a_json='{"caption": "from json"}', a_txt="from txt", b_txt="same  words", c_json="{", c_txt="good")
    write_table(tmp_path, "csv", {"file": ["a.mp4", "b.mp4"], "text": ["from table", "same words"]})
    got = read(tmp_path, ["a.mp4", "b.mp4", "c.mp4"])
    assert got.found["a.mp4"] == Caption("from json", "a.json")
    assert got.conflicts["a.mp4"] == "a.json is used, a.txt, metadata.csv says something else"
    assert "b.mp4" not in got.conflicts
    assert got.found["c.mp4"] == Caption("good", "c.txt")
    assert "c.json is not valid JSON" in got.conflicts["c.mp4"]


def test_tables_that_cannot_be_understood(tmp_path: Path) -> None:
    table = tmp_path / "metadata.csv"
    for text, message in (
        ("file,caption,text\na.mp4,x,y", r"several caption columns \(caption, text\): say which with --caption-key"),
        ("file,path,caption\na.mp4,b,x", "several file columns"),
        ("name,caption\na.mp4,x", "no file column"),
        ("file,words\na.mp4,x", "no caption column"),
        ("file,caption\na.mp4,with, commas", "row 2 has more fields"),
    ):
        table.write_text(text)
        with pytest.raises(UserError, match=message):
            read(tmp_path, ["a.mp4"])
    table.write_text("file,caption,text\na.mp4,x,y")
    assert read(tmp_path, ["a.mp4"], key="text").found["a.mp4"] == Caption("y", "metadata.csv")
    with pytest.raises(UserError, match="no column 'words'"):
        read(tmp_path, ["a.mp4"], key="words")
    (tmp_path / "metadata.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"metadata.csv and metadata.parquet: keep one"):
        read(tmp_path, ["a.mp4"])
    table.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path, ["a.mp4"])


def test_hostile_captions_are_problems_of_their_file(tmp_path: Path) -> None:
    """Half a surrogate pair cannot be stored, deep nesting ends the parser, a pipe is never read to its end."""
    put(tmp_path, a_json='{"caption": "x \\ud800 y"}', b_json="[" * 200_000, d_txt="fine")
    os.mkfifo(tmp_path / "c.txt")
    files = {"a.json", "b.json", "c.txt", "d.txt"}
    got = read_captions(tmp_path, ["a.mp4", "b.mp4", "c.mp4", "d.mp4"], files)
    reasons = [str(got.found[name]) for name in ("a.mp4", "b.mp4", "c.mp4")]
    for reason, words in zip(reasons, ("half of a surrogate pair", "nested too deeply", "is a pipe"), strict=True):
        assert words in reason
    assert got.found["d.mp4"] == Caption("fine", "d.txt")
    table = tmp_path / "metadata.jsonl"
    for text, words in (('{"file": "a.mp4", "caption": "\\ud800"}', "surrogate"), ("[" * 200_000, "nested")):
        table.write_text(text)
        with pytest.raises(UserError, match=words):
            read_captions(tmp_path, ["a.mp4"], {table.name})
    table.unlink()
    os.mkfifo(table)
    with pytest.raises(UserError, match="is a pipe or a device"):
        read_captions(tmp_path, ["a.mp4"], {table.name})
