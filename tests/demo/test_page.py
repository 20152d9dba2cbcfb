"""The page shows what it is given, escapes what comes from outside, and draws curves where the numbers are."""

import re
from pathlib import Path

import pytest

from wanloom.demo.page import Command, Comparison, DemoReport, Score, build_page, draw_curves


def build_report(clip: Path, prompt: str = "A red circle.") -> DemoReport:
    return DemoReport(
        title="A run",
        machine="2 CPU cores",
        commands=[Command("wanloom train tiny", 12.34), Command("wanloom generate", 7.66)],
        curves={"loss": [(1, 2.0), (10, 1.0)], "never logged": []},
        scores=[Score("colour", (62, 64), (50, 52), (12, 12), 0.95), Score("shape", (10, 64), (9, 52), (1, 12), 0.8)],
        seen=[Comparison(prompt, clip, clip, "red, circle, left", True)],
        held_out=[Comparison("held out", clip, None, "no colour, no shape, no motion", False)],
        settings={"run": "runs/<x>"},
    )


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"not read by the page")
    return path


def test_everything_is_on_the_page(clip):
    page = build_page(build_report(clip))
    for text in ("97% (62 of 64)", "96% (50 of 52)", "16% (10 of 64)", "12.3", "20.0", "2 CPU cores", "no motion"):
        assert text in page, text
    assert page.count("data:video/mp4;base64,bm90IHJlYWQ") == 3
    assert "never seen" in page
    assert re.search(r'class="number good">97%', page) and re.search(r'class="number bad">16%', page)


def test_nothing_from_outside_becomes_markup(clip):
    page = build_page(build_report(clip, "<script>alert(1)</script>"))
    assert "<script" not in page and "&lt;script&gt;" in page and "runs/&lt;x&gt;" in page
    assert "<b>" not in draw_curves({"<b>": [(1, 1)]})


def test_a_missing_clip_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        build_page(build_report(tmp_path / "gone.mp4"))


def test_curves_lie_where_the_numbers_are():
    picture = draw_curves({"a": [(0, 0.0), (50, 2.0), (100, 4.0)]})
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', picture)[1].split()]
    assert points[0] == (60.0, 264.0) and points[2] == (836.0, 10.0)
    assert points[1] == pytest.approx(((60 + 836) / 2, (264 + 10) / 2))
    assert "4.00" in picture and ">100<" in picture
    assert "No losses" in draw_curves({"a": []})
