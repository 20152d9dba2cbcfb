"""What is said of a run before its first step."""

import pytest

from wanloom.runs.recipe import build_run
from wanloom.runs.train import tell_outlook, times


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0.016, "0.016 times"),
        (0.96, "0.96 times"),
        (1, "once"),
        (1.4, "1.4 times"),
        (2.5, "2.5 times"),
        (9.96, "10 times"),
        (1234.5, "1,234 times"),
    ],
)
def test_how_often_is_said_as_it_is(number, words):
    assert times(number) == words


def test_one_step_passes():
    run, said = build_run("tiny", ["run_dir=x", "data.path=x", "train.steps=1", "batch.samples=4"]), []
    tell_outlook(run, [4], [1.0], 0, [], said.append)
    assert said == ["1 step passes over each sample once; the first checkpoint comes after the last step."]


@pytest.mark.parametrize(
    ("done", "words"),
    [
        (0, "first checkpoint comes after step 4."),
        (3, "next checkpoint comes after step 4."),
        (4, "next checkpoint comes after step 8."),
        (9, "next checkpoint comes after the last step."),
    ],
)
def test_the_checkpoint_that_comes_is_said(done, words):
    run, said = build_run("tiny", ["run_dir=x", "data.path=x", "train.steps=12", "checkpoint.every=4"]), []
    tell_outlook(run, [4], [1.0], done, [], said.append)
    assert said[0].endswith(words)


def test_the_long_wait_of_compilation_is_said_beforehand():
    run, said = build_run("tiny", ["run_dir=x", "data.path=x", "compute.compile=block"]), []
    tell_outlook(run, [4], [1.0], 0, [], said.append)
    assert said[1].startswith("compute.compile=block: the first step takes minutes")
