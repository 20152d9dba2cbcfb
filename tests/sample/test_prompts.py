"""Files of prompts: what ends a line, and which line is wrong."""

import json
from pathlib import Path

import pytest

from wanloom.errors import UserError
from wanloom.sample.prompts import read_prompts

ODD = "a\u2028b\u0085c\x0bd\x0ce\u2029f\x1cg"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_only_a_line_feed_ends_a_prompt(tmp_path: Path, suffix: str, end: str) -> None:
    path = tmp_path / f"prompts.{suffix}"
    lines = [ODD, "second"]
    written = lines if suffix == "txt" else [json.dumps({"prompt": line}, ensure_ascii=False) for line in lines]
    path.write_bytes(("\ufeff" + end.join(["", written[0], "", written[1], ""])).encode())
    assert [line.prompt for line in read_prompts(path)] == lines


def test_the_wrong_line_is_named_by_its_own_number(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n\n{"prompt": c}\n', encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    assert str(caught.value) == f"'{path}', line 3 is not JSON: Expecting value at character 12."


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "prompts.txt").open("wb") as file:
        file.truncate(50 << 30)
    with pytest.raises(UserError, match="is larger than 64 MiB"):
        read_prompts(tmp_path / "prompts.txt")
