"""docs/python.md is run, block after block, as a reader would."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import wanloom
from wanloom.demo.shapes import build_clip
from wanloom.errors import UserError
from wanloom.media.write import write_mp4

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def test_the_page_runs(tmp_path):
    """In a process of its own, where nothing is imported before `import wanloom`, with warnings as errors."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    (tmp_path / "clips").mkdir()
    for name in ("0", "1"):
        frames, _, caption = build_clip(0, int(name), frames=17, height=64, width=64)
        write_mp4(tmp_path / "clips" / f"{name}.mp4", torch.from_numpy(frames), fps=16)
        (tmp_path / "clips" / f"{name}.txt").write_text(caption)
    (tmp_path / "clips" / "none.mp4").write_text("no video")
    command = [sys.executable, "-W", "error", "-W", "ignore:torch.distributed is disabled:UserWarning", "-c"]
    done = subprocess.run([*command, "\n".join(blocks)], cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'total': 2," in done.stdout and "none.mp4 no caption found" in done.stdout
    assert f"6 runs{os.sep}first" in done.stdout and "step_0000006" in done.stdout


def test_the_door_is_quick_and_stays_one():
    """torch waits for the first call, and the rooms train/ and prepare/ do not take the names of functions."""
    code = "import sys, wanloom; assert 'torch' not in sys.modules; import wanloom.train.loop, wanloom.prepare.run; "
    code += "assert all(callable(f) for f in (wanloom.prepare, wanloom.train, wanloom.load_run, wanloom.generate))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("tinny", {}, "There is no recipe 'tinny'. Did you mean 'tiny'?"),
        ("tiny", {}, "run_dir=FOLDER"),
        ("tiny", {"run_dir": "x", "data.path": "nowhere"}, "There is no folder 'nowhere'"),
        ("tiny", {"run_dir": "x", "optimzer.lr": 1}, "Did you mean 'optimizer'?"),
        ({"run_dir": "x"}, {}, "The recipe is no whole recipe, it lacks model"),
    ],
)
def test_mistakes_are_those_of_the_command(tmp_path, monkeypatch, recipe, settings, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        wanloom.train(recipe, settings)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        wanloom.load_run(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 80}, "The number of frames is 80, it must be 4n+1: try 77 or 81."),
        ({"frame": 17}, "There is no setting 'frame'. Did you mean 'frames'? There are: height, width, "),
        ({"height": 64}, "`height` and `width` belong together"),
        ({"model": "nowhere"}, "There is no model 'nowhere'"),
        ({}, "holds no videos or images"),
    ],
)
def test_mistakes_of_prepare_name_settings(tmp_path, settings, message):
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match=re.escape(message)):
        wanloom.prepare(tmp_path / "in", tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
