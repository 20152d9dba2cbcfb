"""Settings without effect: an error where the command line says them, a note where one's own recipe does."""

from types import SimpleNamespace

import pytest

from wanloom.cli import main
from wanloom.errors import UserError
from wanloom.runs.effects import RULES, find_notes
from wanloom.runs.layers import recipe_names
from wanloom.runs.recipe import build_run, dump_run

# words that have no effect, and the word beside them that gives them one
IDLE = [
    ("flow.logit_mean=1", "with flow.sampler=uniform", ["flow.sampler=logit_normal"]),
    ("flow.logit_std=0.5", "with flow.sampler=uniform", ["flow.sampler=logit_normal"]),
    ("flow.mode_scale=1", "with flow.sampler=uniform", ["flow.sampler=mode"]),
    ("flow.beta_alpha=2", "with flow.sampler=uniform", ["flow.sampler=beta"]),
    ("flow.beta_beta=2", "with flow.sampler=uniform", ["flow.sampler=beta"]),
    ("flow.mix_uniform_ratio=0.5", "with flow.sampler=uniform", ["flow.sampler=mode"]),
    ("flow.sampler=mode", "with flow.mix_uniform_ratio=1", ["flow.mix_uniform_ratio=0"], "flow.mix_uniform_ratio=1"),
    ("flow.stratified=true", "with batch.samples=1", ["batch.samples=2"], "batch.samples=1"),
    ("schedule.min_lr_ratio=0.1", "with schedule.kind=constant", ["schedule.kind=linear"], "schedule.kind=constant"),
    ("schedule.kind=linear", "with schedule.min_lr_ratio=1", ["schedule.min_lr_ratio=0"], "schedule.min_lr_ratio=1"),
    ("parallel.context=ring", "without parallel.cp above 1", ["parallel.cp=2"]),
    ("parallel.cp_ulysses=1", "without parallel.cp above 1", ["parallel.cp=2"]),
    ("data.sources=[{path: a, repeats: 2}]", "with a single source", []),
    ("data.sources=[{path: a, weight: 2}]", "with a single source", []),
]


@pytest.mark.parametrize(("word", "reason", "use", "beside"), [(*case, None)[:4] for case in IDLE])
def test_a_word_without_effect_is_an_error(word, reason, use, beside):
    name, _, value = word.partition("=")
    with pytest.raises(UserError) as error:
        build_run("tiny", [word, *([beside] if beside else [])])
    sentence = str(error.value)
    assert name in sentence and f"has no effect {reason}: leave it out" in sentence and "\n" not in sentence
    assert value in sentence or name == "data.sources"
    if use:
        build_run("tiny", [word, *use])


def test_every_rule_is_tried_above():
    tried = {word.partition("=")[0] for word, *_ in IDLE} | {"data.sources.0.repeats", "data.sources.0.weight"}
    assert {name for rule in RULES for name in rule.names} <= tried


def test_what_a_word_says_by_default_is_no_mistake():
    build_run("tiny", ["flow.mode_scale=1.29", "parallel.context=auto", "flow.mix_uniform_ratio=0"])
    build_run("tiny", ["data.sources=[{path: a, repeats: 2}, {path: b}]"])
    build_run("tiny", ["data.sources=[{path: a, repeats: 1, weight: 1}]"])  # what is so by default is no wish
    build_run("tiny", ["train.steps=2", "log.validate_every=100"])  # a trial of a longer run


def test_shipped_recipes_and_presets_are_nobodys_wish(tmp_path):
    for name in recipe_names():
        for mode in (None, "pretrain", "finetune"):
            run = build_run(name, ["schedule.kind=constant", "train.steps=1"], mode)
            assert find_notes(run, name) == []
            (tmp_path / "dumped.yaml").write_text(dump_run(build_run(name, [], mode)))
            dumped = str(tmp_path / "dumped.yaml")
            assert find_notes(build_run(dumped, []), dumped) == []


def test_a_recipe_of_ones_own_gives_notes(tmp_path):
    below, recipe = tmp_path / "below.yaml", str(tmp_path / "mine.yaml")
    below.write_text("based_on: tiny\nflow: {mode_scale: 1.0, beta_alpha: 3.0}\nschedule: {min_lr_ratio: 0.3}\n")
    text = f"based_on: {below}\nflow: {{sampler: beta}}\nmodes: {{finetune: {{flow: {{logit_mean: 1.0}}}}}}\n"
    (tmp_path / "mine.yaml").write_text(text)
    mode = f"flow.mode_scale=1 has no effect with flow.sampler=beta ({recipe} says it)."
    assert find_notes(build_run(recipe, []), recipe) == [mode]
    kind = f"schedule.min_lr_ratio=0.3 has no effect with schedule.kind=constant ({recipe} says it)."
    assert find_notes(build_run(recipe, ["schedule.kind=constant"]), recipe) == [mode, kind]
    assert find_notes(build_run(recipe, ["flow.sampler=mode"]), recipe) == [
        f"flow.beta_alpha=3 has no effect with flow.sampler=mode ({recipe} says it)."
    ]


@pytest.mark.parametrize("words", [["show"], ["train", "--mock"]])
def test_the_commands_say_the_notes(tmp_path, monkeypatch, capsys, words):
    (tmp_path / "mine.yaml").write_text("based_on: tiny\nflow: {mode_scale: 1.0}\n")
    monkeypatch.setattr("wanloom.runs.train.train", lambda run: SimpleNamespace(stopped=None, taken=0))
    monkeypatch.chdir(tmp_path)
    assert main([words[0], "mine.yaml", *words[1:], "run_dir=x"]) == 0
    note = "note: flow.mode_scale=1 has no effect with flow.sampler=uniform (mine.yaml says it)."
    assert capsys.readouterr().err.splitlines().count(note) == 1
