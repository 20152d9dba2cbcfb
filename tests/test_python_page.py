"""docs/python.md is run, block after block, as a reader would."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import wanloom
from wanloom.errors import UserError

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def test_the_page_runs(tmp_path):
    """In a process of its own, where nothing is imported before `import wanloom`, with warnings as errors."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    command = [sys.executable, "-W", "error", "-W", "ignore:torch.distributed is disabled:UserWarning", "-c"]
    done = subprocess.run([*command, "\n".join(blocks)], cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"6 runs{os.sep}first" in done.stdout and "step_0000006" in done.stdout


def test_the_door_is_quick_and_stays_one():
    """torch waits for the first call, and the rooms train/ and prepare/ do not take the names of functions."""
    code = "import sys, wanloom; assert 'torch' not in sys.modules; import wanloom.train.loop, wanloom.prepare.run; "
    code += "assert callable(wanloom.train) and callable(wanloom.load_run)"
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
