"""`wanloom demo` in small: every command runs, the page and the verdict are there, foreign folders are left alone."""

import json

from wanloom.cli import demo, main
from wanloom.data import shapes
from wanloom.report.page import Score
from wanloom.sample.media import read_mp4


def test_the_whole_job_runs(tmp_path, monkeypatch, capsys):
    """Far too short a training to reach the targets: the demo must say so and end with 1, not with 0."""
    monkeypatch.setattr(demo, "NUM_CLIPS", 24)
    monkeypatch.setattr(demo, "NUM_PROMPTS", 14)
    monkeypatch.setattr(demo, "SAMPLING", "--steps 2 --guidance 3")
    whole_job = demo.job

    def short_job(out):
        prepare, train, generate = whole_job(out)
        return [prepare, [*train, "train.steps=3", "batch.samples=4", "log.every=1"], generate]

    monkeypatch.setattr(demo, "job", short_job)
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert printed.rstrip().splitlines()[-1] == str((out / "report.html").resolve())
    assert "missed" in printed and "held-out" in printed
    page = (out / "report.html").read_text()
    assert page.count("<video") == 14 + 2  # every generated clip; two of the prompts are of scenes with a training clip
    assert "wanloom train tiny" in page and "never seen" in page
    losses = [json.loads(line)["loss"] for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3
    assert main(["demo", "--out", str(out)]) == 1  # again in the same folder: replaced


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "holiday.mp4").write_bytes(b"precious")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "not made by wanloom demo" in capsys.readouterr().err
    assert (tmp_path / "holiday.mp4").read_bytes() == b"precious"


def test_prompts_hold_all_that_is_held_out_and_spread_over_the_rest(tmp_path):
    rows = demo.write_prompts(tmp_path / "prompts.jsonl")
    scenes = [scene for scene, _ in rows]
    assert len(rows) == 64 and scenes[:12] == list(shapes.HELD_OUT)
    assert len(set(scenes)) == 64
    lines = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [text for _, text in rows]
    assert len({line["seed"] for line in lines}) == 64


def test_training_clips_are_real_files_without_held_out_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "NUM_CLIPS", 62)
    paths = demo.write_clips(tmp_path / "clips")
    assert set(paths) == set(shapes.SEEN)
    files = sorted((tmp_path / "clips").glob("*.mp4"))
    assert len(files) == 62 and all(path.with_suffix(".txt").is_file() for path in files)
    assert read_mp4(files[0]).shape == (17, 64, 64, 3)


def test_a_score_is_reached_or_not():
    assert Score("colour", (19, 20), (0, 0), (0, 0), 0.95).reached
    assert not Score("colour", (18, 20), (0, 0), (0, 0), 0.95).reached
