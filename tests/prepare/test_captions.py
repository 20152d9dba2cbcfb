"""Every form of captions, their order, their conflicts and their mistakes."""

import json
import os
import tracemalloc
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wanloom.errors import UserError
from wanloom.prepare import tables
from wanloom.prepare.captions import Caption, Captions, Problem, read_captions
from wanloom.prepare.tables import TABLES


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
        ("a.json", "", "a.json is empty"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", '["caption"]', "no key 'caption'"),
        ("a.json", '{"caption": 3}', "is no text"),
        ("a.json", '{"caption": "  "}', "a.json: the caption is empty"),
        ("a.txt", " \n", "is empty"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"caption": "x"}\n\n{"caption": x}', "a.jsonl, line 3 is not valid JSON: Expecting value at"),
        ("a.json", '{"caption": NaN}', "the caption is empty"),
        ("a.json", '{"caption": "NaN"}', "stands for a missing one"),
        ("a.txt", "None\n", "stands for a missing one"),
        ("a.txt", "word " * 4001, "has 20,004 characters, at most 20,000 are taken"),
        ("a.txt", " " * (1 << 20) + "x", "a.txt is larger than 1 MiB"),
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
    where = {"csv": "line 6", "jsonl": "line 5", "parquet": "row 5"}[kind]
    assert got.found["empty.mp4"] == Problem(f"{table}, {where}: the caption is empty")
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
        ("file,caption,text\na.mp4,x,y", r"several caption columns \(caption, text\): say which with `caption_key`"),
        ("file,path,caption\na.mp4,b,x", "several file columns"),
        ("name,caption\na.mp4,x", "no file column"),
        ("file,words\na.mp4,x", "no caption column"),
        ("file,caption\na.mp4,with, commas", "line 2 has more fields"),
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


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three\x0bfour\x0cfive\u2029six"
    (tmp_path / "a.jsonl").write_text(json.dumps({"caption": text}, ensure_ascii=False) + "\r\n", newline="")
    assert read(tmp_path, ["a.mp4"]).found["a.mp4"] == Caption(text, "a.jsonl")
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "b.txt").write_text(text + "\n")
    for name, line in (
        ("metadata.jsonl", json.dumps({"file": "a.mp4", "caption": text}, ensure_ascii=False)),
        ("metadata.csv", f"file,caption\r\na.mp4,{text}"),
    ):
        (tmp_path / name).write_text(line + "\r\n", encoding="utf-8", newline="")
        got = read(tmp_path, ["a.mp4", "b.mp4"])
        assert got.found == {"a.mp4": Caption(text, name), "b.mp4": Caption(text, "b.txt")}
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "jsonl",
            '{"file": "a.mp4", "caption": "x"}\n\n{"file": oops}\n',
            "line 3 is not valid JSON: Expecting value at",
        ),
        ("jsonl", '{"file": "a.mp4", "caption": "x"}\n[]\n', "line 2 is no JSON object"),
        ("jsonl", '{"file": "a.mp4", "caption": "\\ud800"}\n', "line 1 is not valid JSON: it holds half"),
        ("jsonl", '{"file": "a.mp4", "caption": "x"}\n{"caption": "y"}\n', "line 2 has a caption and names no file"),
        ("csv", 'file,caption\na.mp4,"two\nlines"\nb.mp4,x,y\n', "line 4 has more fields"),
        ("csv", "file,caption\na.mp4,x\n,y\n", "line 3 has a caption and names no file"),
        ("csv", 'file,caption\na.mp4,x\nb.mp4,"open\nc.mp4,y\n', "begins in line 3 is not valid CSV: a quote is never"),
        ("csv", 'file,caption\na.mp4,"open\nb.mp4,"x" y\n', "begins in line 2 is not valid CSV"),
        ("csv", 'file,caption\na.mp4,"open\nb.mp4,"\n', "a quote in line 2 is not closed"),
        ("csv", "file,caption,caption\na.mp4,x,y\n", "has 2 columns 'caption'"),
        ("csv", "file;caption\na.mp4;x\n", "separated by commas, it begins: 'file;caption'"),
        ("csv", "\n", "is empty: it needs the columns"),
        ("csv", "file,caption\na.mp4,x\nb.mp4," + "y" * (1 << 20) + "\n", "line 3 is longer than 1 MiB"),
    ],
)
def test_a_bad_line_of_a_table_is_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / f"metadata.{name}").write_text(text)
    with pytest.raises(UserError) as caught:
        read(tmp_path, ["a.mp4", "b.mp4", "c.mp4"])
    assert words in str(caught.value) and f"The table '{tmp_path}/metadata.{name}'" in str(caught.value).replace(
        f"columns of the table '{tmp_path}", f"The table '{tmp_path}"
    )


def test_text_in_another_encoding_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_bytes(b"file,caption\na.mp4,x\nb.mp4,caf\xe9\n")
    with pytest.raises(UserError, match="line 3 is not UTF-8 text"):
        read(tmp_path, ["a.mp4"])


def test_old_line_ends_of_csv(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_bytes(b'file, caption\ra.mp4,x\r"b.mp4","two\rlines"\r')
    got = read(tmp_path, ["a.mp4", "b.mp4"])
    assert got.found["a.mp4"] == Caption("x", "metadata.csv")
    assert got.found["b.mp4"] == Caption("two\rlines", "metadata.csv")


@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_accents_meet_in_either_form(tmp_path: Path, written: str) -> None:
    other = "NFD" if written == "NFC" else "NFC"
    file, text = (unicodedata.normalize(form, "\u00e9t\u00e9") for form in (written, other))
    (tmp_path / f"{text}.txt").write_text("summer")
    assert read(tmp_path, [f"{file}.mp4"]).found[f"{file}.mp4"] == Caption("summer", f"{text}.txt")
    (tmp_path / f"{text}.txt").unlink()
    write_table(tmp_path, "csv", {"file": [f"{text}.mp4"], "caption": ["summer"]})
    got = read(tmp_path, [f"{file}.mp4"])
    assert got.found[f"{file}.mp4"] == Caption("summer", "metadata.csv") and not got.missing


def test_files_whose_names_differ_only_in_form_keep_their_own(tmp_path: Path) -> None:
    names = {form: unicodedata.normalize(form, "\u00e9.mp4") for form in ("NFC", "NFD")}
    for form, name in names.items():
        (tmp_path / name).with_suffix(".txt").write_text(form)
    got = read(tmp_path, list(names.values()))
    assert {form: got.found[name].text for form, name in names.items()} == {"NFC": "NFC", "NFD": "NFD"}


def test_other_endings_and_whole_names(tmp_path: Path) -> None:
    for name, text in (("a.TXT", "A"), ("b.caption", "B"), ("c.png.txt", "C"), ("d.mp4.Json", '{"caption": "D"}')):
        (tmp_path / name).write_text(text)
    got = read(tmp_path, ["a.mp4", "b.mp4", "c.png", "d.mp4"])
    assert {name: caption.text for name, caption in got.found.items()} == {
        "a.mp4": "A",
        "b.mp4": "B",
        "c.png": "C",
        "d.mp4": "D",
    }
    (tmp_path / "c.txt").write_text("less precise")
    assert read(tmp_path, ["c.png"]).found["c.png"] == Caption("C", "c.png.txt")
    assert read(tmp_path, ["c.png"]).conflicts["c.png"] == "c.png.txt is used, c.txt says something else"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("A.txt", "A.txt is not read, call it v/a.txt"),
        ("v/a.srt", "v/a.srt is not read, call it v/a.txt"),
        ("captions/a.json", "captions/a.json is not read, call it v/a.json"),
        ("captions/a.mp4.txt", "captions/a.mp4.txt is not read, call it v/a.txt"),
        ("v/metadata.csv", "v/metadata.csv is not read, a table lies at the top of the input"),
        ("captions.csv", "captions.csv is not read, a table is called metadata.csv, metadata.jsonl"),
    ],
)
def test_a_near_miss_is_named(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / text).parent.mkdir(exist_ok=True)
    (tmp_path / text).write_text("x")
    found = read(tmp_path, ["v/a.mp4"]).found["v/a.mp4"]
    assert isinstance(found, Problem) and found.reason.startswith(f"no caption found: {reason}")


def test_a_table_that_nearly_names_a_file(tmp_path: Path) -> None:
    write_table(tmp_path, "csv", {"file": ["a.mp4", "B", "c.mp4"], "caption": ["x", "y", "z"]})
    got = read(tmp_path, ["v/a.mp4", "b.mp4", "c.mp4"])
    assert got.found["v/a.mp4"] == Problem("no caption found: metadata.csv has 'a.mp4', it must say 'v/a.mp4'")
    assert got.found["b.mp4"] == Problem("no caption found: metadata.csv has 'B', it must say 'b.mp4'")
    assert got.missing == ["B", "a.mp4"]


def test_a_thumbnail_does_not_take_the_caption_of_its_clip(tmp_path: Path) -> None:
    put(tmp_path, a_txt="a film", b_txt="a film", b_jpg_txt="a still", c_txt="two films", d_txt="two pictures")
    got = read(tmp_path, ["a.jpg", "a.mp4", "b.jpg", "b.mp4", "c.avi", "c.mp4", "d.jpg", "d.png"])
    assert got.found["a.mp4"] == Caption("a film", "a.txt")
    assert got.found["a.jpg"] == Problem("a.txt is the caption of a.mp4: give this one its own, a.jpg.txt")
    assert got.found["b.jpg"] == Caption("a still", "b.jpg.txt") and not got.conflicts
    assert got.shared == {
        "c.avi": "c.txt is also the caption of c.mp4",
        "c.mp4": "c.txt is also the caption of c.avi",
        "d.jpg": "d.txt is also the caption of d.png",
        "d.png": "d.txt is also the caption of d.jpg",
    }
    assert read(tmp_path, ["a.jpg"]).found["a.jpg"] == Caption("a film", "a.txt"), "alone it is no thumbnail"


@pytest.mark.parametrize("caption", [float("nan"), None])
def test_a_missing_value_of_a_table_is_no_caption(tmp_path: Path, caption: float | None) -> None:
    rows = [{"file": "a.mp4", "caption": caption}, {"file": "b.mp4", "caption": 7}, {"file": "c.mp4", "caption": "nan"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    got = read(tmp_path, ["a.mp4", "b.mp4", "c.mp4"])
    reasons = [
        "the caption is empty",
        "the caption is no text",
        "the caption is only 'nan', which stands for a missing one",
    ]
    assert [got.found[name].reason for name in ("a.mp4", "b.mp4", "c.mp4")] == [
        f"metadata.jsonl, line {number}: {reason}" for number, reason in enumerate(reasons, 1)
    ]
    (tmp_path / "metadata.jsonl").unlink()
    pq.write_table(pa.table({"file": ["a.mp4"], "caption": pa.array([caption], pa.float64())}), tmp_path / TABLES[2])
    with pytest.raises(UserError, match="column 'caption' holds double, not text"):
        read(tmp_path, ["a.mp4"])


def test_a_small_parquet_that_unfolds_to_gigabytes(tmp_path: Path) -> None:
    """One caption of 1 MB in 1,000 rows is a file of a few kB, and would be 1 GB as text."""
    rows = 1000
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * 1_000_000]))
    table = pa.table({"file": [f"{i}.mp4" for i in range(rows)], "caption": column})
    path = tmp_path / "metadata.parquet"
    pq.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 10_000
    media = [f"{i}.mp4" for i in range(rows)]
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    got = read(tmp_path, media)
    peak = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before
    tracemalloc.stop()
    assert peak < 50e6
    assert all("has 1,000,000 characters" in str(got.found[name]) for name in media)


def test_a_parquet_that_unpacks_to_more_than_is_sane_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metadata.parquet"
    table = pa.table({"file": ["a.mp4", "b.mp4"], "caption": ["x" * 2_000_000, "y"]})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    monkeypatch.setattr(tables, "MOST_GROUP_BYTES", 1 << 20)
    with pytest.raises(UserError, match="row group 0 unpacks to 1 MiB: write it with smaller row groups"):
        read(tmp_path, ["a.mp4"])
    monkeypatch.setattr(tables, "MOST_ROWS", 1)
    with pytest.raises(UserError, match="has 2 rows, at most 1 are read"):
        read(tmp_path, ["a.mp4"])
    path.unlink()
    write_table(tmp_path, "csv", {"file": ["a.mp4", "b.mp4"], "caption": ["x", "y"]})
    with pytest.raises(UserError, match="more than 1 rows"):
        read(tmp_path, ["a.mp4"])


def test_a_sidecar_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(50 << 30)
    assert read(tmp_path, ["a.mp4"]).found["a.mp4"] == Problem("a.txt is larger than 1 MiB: it is no caption")
