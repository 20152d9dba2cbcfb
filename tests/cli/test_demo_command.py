"""`wanloom demo` in small: every command runs, the page and the verdict are there, foreign folders are left alone."""

import json

import pytest

from wanloom.cli import demo as command
from wanloom.cli import main
from wanloom.demo import demo

pytestmark = pytest.mark.slow


@pytest.fixture
def short(monkeypatch):
    """A demo of seconds."""
    monkeypatch.setattr(demo, "NUM_CLIPS", 24)
    monkeypatch.setattr(demo, "NUM_PROMPTS", 14)
    monkeypatch.setattr(command, "SAMPLING", "--steps 2 --guidance 3")
    whole_job = command.job

    def short_job(out, seed):
        prepare, train, generate = whole_job(out, seed)
        return [prepare, [*train, "train.steps=3", "batch.samples=4", "log.every=1"], generate]

    monkeypatch.setattr(command, "job", short_job)


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
    assert not command.open_folder(out, 1, replace=True)
    assert [path.name for path in out.iterdir()] == ["README.txt"]
    assert command.open_folder(out, 1, replace=False)


def test_a_command_that_fails_is_said_with_the_way_to_go_on(tmp_path, short, monkeypatch, capsys):
    monkeypatch.setattr(command, "job", lambda out, seed: [["show", str(out / "nothing")]])
    assert main(["demo", "--out", str(tmp_path / "de mo")]) == 2
    printed = capsys.readouterr().out
    assert (
        "ended with exit code 2" in printed and f"`wanloom demo --out '{tmp_path / 'de mo'}' --seed 0` goes" in printed
    )


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "holiday.mp4").write_bytes(b"precious")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "not made by wanloom demo" in capsys.readouterr().err
    assert (tmp_path / "holiday.mp4").read_bytes() == b"precious"
