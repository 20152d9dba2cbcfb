"""What the demo makes and how it counts: clips, prompts and scores, without its training."""

import json
from dataclasses import replace

import numpy as np
import pytest

from wanloom.cli import demo as command
from wanloom.demo import demo, shapes
from wanloom.demo.measure import measure
from wanloom.demo.page import Score
from wanloom.media.write import read_mp4, write_mp4


def test_no_two_seeds_share_a_draw(tmp_path):
    clips, noise, training = set(), set(), set()
    for seed in range(3):
        demo.write_prompts(tmp_path / "prompts.jsonl", seed)
        noise |= {json.loads(line)["seed"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()}
        training.add(next(word for word in command.job(tmp_path, seed)[1] if word.startswith("seed=")))
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


def test_prompts_hold_all_that_is_held_out_and_spread_over_the_rest(tmp_path):
    rows = demo.write_prompts(tmp_path / "prompts.jsonl", 0)
    scenes = [scene for scene, _ in rows]
    assert len(rows) == 64 and scenes[:12] == list(shapes.HELD_OUT)
    assert len(set(scenes)) == 64
    lines = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [text for _, text in rows]
    assert len({line["seed"] for line in lines}) == 64


@pytest.mark.slow
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
