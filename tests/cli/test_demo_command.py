"""`wanloom demo` in small: every command runs, the page and the verdict are there, foreign folders are left alone."""

import json
from dataclasses import replace

import numpy as np

from wanloom.cli import demo, main
from wanloom.data import shapes
from wanloom.evaluate.shapes import measure
from wanloom.report.page import Score
from wanloom.sample.media import read_mp4, write_mp4


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
    assert len(files) == 62
    said = {scene.caption(i): scene for scene in shapes.SCENES for i in range(len(shapes.TEMPLATES))}
    for path in files:  # what the caption says and what the pixels show, by the files alone
        scene, frames = said[path.with_suffix(".txt").read_text().strip()], read_mp4(path)
        assert scene not in shapes.HELD_OUT and frames.shape == (17, 64, 64, 3)
        assert measure(frames).agrees(scene) == (True, True, True)


def test_scores_are_counted_from_the_pixels_of_the_generated_files(tmp_path, monkeypatch):
    """Clips that are wrong in known ways, in files whose names and order say nothing."""
    monkeypatch.setattr(demo, "NUM_PROMPTS", 24)  # 12 held out, 12 seen
    prompts = demo.write_prompts(tmp_path / "prompts.jsonl")
    wrong = {"color": {0, 1, 2, 12}, "shape": {1, 12, 13}, "direction": {5, 14, 15, 16, 17}}
    others = {
        "color": dict(zip(shapes.COLORS, [*list(shapes.COLORS)[1:], "red"], strict=True)),
        "shape": {"circle": "square", "square": "triangle", "triangle": "circle"},
        "direction": {"left": "right", "right": "up", "up": "down", "down": "left"},
    }
    (tmp_path / "generated").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    for i, (scene, _) in enumerate(prompts):
        changes = {key: others[key][getattr(scene, key)] for key, where in wrong.items() if i in where}
        frames = shapes.render(replace(scene, **changes), np.random.default_rng(i), 9)
        path = tmp_path / "generated" / f"{99 - i}.mp4"
        write_mp4(path, frames, 16)
        path.with_suffix(".json").write_text(json.dumps({"seed": demo.PROMPT_SEED + i}))
    report = demo.build_report(tmp_path, demo.judge(tmp_path / "generated", prompts), [], {})
    found = {s.name: (s.all, s.seen, s.held_out, s.target, s.reached) for s in report.scores}
    assert found == {
        "colour": ((20, 24), (11, 12), (9, 12), 0.95, False),
        "shape": ((21, 24), (10, 12), (11, 12), 0.80, True),
        "direction of motion": ((19, 24), (8, 12), (11, 12), 0.85, False),
    }
    pairs = [*report.held_out, *report.seen]
    assert [pair.prompt for pair in pairs] == [text for _, text in prompts]
    assert {i for i, pair in enumerate(pairs) if not pair.right} == set().union(*wrong.values())


def test_a_score_is_reached_or_not():
    assert Score("colour", (19, 20), (0, 0), (0, 0), 0.95).reached
    assert not Score("colour", (18, 20), (0, 0), (0, 0), 0.95).reached
