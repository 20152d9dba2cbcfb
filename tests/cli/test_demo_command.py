"""`wanloom demo` in small: every command runs, the page and the verdict are there, foreign folders are left alone."""

import json
from dataclasses import replace

import numpy as np
import pytest

from wanloom.cli import demo, main
from wanloom.demo import shapes
from wanloom.demo.measure import measure
from wanloom.demo.page import Score
from wanloom.media.write import read_mp4, write_mp4

pytestmark = pytest.mark.slow


@pytest.fixture
def short(monkeypatch):
    """A demo of seconds."""
    monkeypatch.setattr(demo, "NUM_CLIPS", 24)
    monkeypatch.setattr(demo, "NUM_PROMPTS", 14)
    monkeypatch.setattr(demo, "SAMPLING", "--steps 2 --guidance 3")
    whole_job = demo.job

    def short_job(out, seed):
        prepare, train, generate = whole_job(out, seed)
        return [prepare, [*train, "train.steps=3", "batch.samples=4", "log.every=1"], generate]

    monkeypatch.setattr(demo, "job", short_job)


def test_the_whole_job_runs_goes_on_and_is_kept(tmp_path, short, monkeypatch, capsys):
    """Far too short a training to reach the targets: the demo must say so and end with 1, not with 0."""
    out = tmp_path / "demo"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(demo, "judge", stop)
        assert main(["demo", "--out", str(out)]) == 130
    capsys.readouterr()
    made = {path: path.stat().st_mtime_ns for part in ("clips", "run/checkpoints") for path in (out / part).rglob("*")}
    assert len(made) > 48
    assert main(["demo", "--out", str(out), "--seed", "3"]) == 2
    assert "unfinished demo of another seed" in capsys.readouterr().err

    assert main(["demo", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "Going on with the demo in" in printed and "is complete at step 3" in printed
    assert made == {path: path.stat().st_mtime_ns for path in made}
    assert printed.rstrip().splitlines()[-1] == str((out / "report.html").resolve())
    assert "missed" in printed and "held-out" in printed
    page = (out / "report.html").read_text()
    assert page.count("<video") == 14 + 2  # every generated clip; two of the prompts are of scenes with a training clip
    assert "wanloom train tiny" in page and "never seen" in page
    losses = [json.loads(line)["loss"] for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3

    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main(["demo", "--out", str(out)]) == 2
    assert "holds a finished demo" in capsys.readouterr().err
    assert files == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert not demo.open_folder(out, 1, replace=True)
    assert [path.name for path in out.iterdir()] == ["README.txt"]
    assert demo.open_folder(out, 1, replace=False)


def test_a_command_that_fails_is_said_with_the_way_to_go_on(tmp_path, short, monkeypatch, capsys):
    monkeypatch.setattr(demo, "job", lambda out, seed: [["show", str(out / "nothing")]])
    assert main(["demo", "--out", str(tmp_path / "de mo")]) == 2
    printed = capsys.readouterr().out
    assert (
        "ended with exit code 2" in printed and f"`wanloom demo --out '{tmp_path / 'de mo'}' --seed 0` goes" in printed
    )


def test_no_two_seeds_share_a_draw(tmp_path):
    clips, noise, training = set(), set(), set()
    for seed in range(3):
        demo.write_prompts(tmp_path / "prompts.jsonl", seed)
        noise |= {json.loads(line)["seed"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()}
        training.add(next(word for word in demo.job(tmp_path, seed)[1] if word.startswith("seed=")))
        frames, _, _ = shapes.build_clip(demo.CLIP_SEED + seed, 0)
        clips.add(frames.tobytes())
    assert len(noise) == 3 * 64 and training == {"seed=0", "seed=1", "seed=2"} and len(clips) == 3


@pytest.mark.parametrize(
    ("load", "cores", "says"), [(1.2, 2, True), (0.3, 2, False), (3.0, 16, False), (9.0, 16, True)]
)
def test_a_busy_machine_is_said(monkeypatch, load, cores, says):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    assert demo.busy() == (
        f"This machine is busy: {load} processes wanted its {cores} cores in the last minute." * says
    )


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "holiday.mp4").write_bytes(b"precious")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "not made by wanloom demo" in capsys.readouterr().err
    assert (tmp_path / "holiday.mp4").read_bytes() == b"precious"


def test_prompts_hold_all_that_is_held_out_and_spread_over_the_rest(tmp_path):
    rows = demo.write_prompts(tmp_path / "prompts.jsonl", 0)
    scenes = [scene for scene, _ in rows]
    assert len(rows) == 64 and scenes[:12] == list(shapes.HELD_OUT)
    assert len(set(scenes)) == 64
    lines = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [text for _, text in rows]
    assert len({line["seed"] for line in lines}) == 64


def test_training_clips_are_real_files_without_held_out_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "NUM_CLIPS", 62)
    paths = demo.write_clips(tmp_path / "clips", 0)
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
    prompts = demo.write_prompts(tmp_path / "prompts.jsonl", 0)
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
        path.with_suffix(".json").write_text(json.dumps({"seed": demo.prompt_seed(0, i)}))
    report = demo.build_report(tmp_path, demo.judge(tmp_path / "generated", prompts, 0), [], {})
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
