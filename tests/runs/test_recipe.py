"""Recipes: what wins over what, what is shipped, what may change when a run goes on."""

import re
from pathlib import Path

import pytest
import yaml

from wanloom.cli.explain import explain_settings
from wanloom.config import nest, setting_paths
from wanloom.errors import UserError
from wanloom.geometry import WAN_21
from wanloom.model.flops import train_flops
from wanloom.objective.settings import PRESETS
from wanloom.prepare.encode import PrepareConfig
from wanloom.runs.layers import recipe_names
from wanloom.runs.names import NAMES_BEFORE, NAMES_ELSEWHERE
from wanloom.runs.recipe import (
    MIXES,
    Run,
    build_run,
    dump_run,
    model_config,
    settle_steps,
)
from wanloom.runs.resume import MAY_CHANGE, changed_settings, may_change
from wanloom.variants import VARIANTS

STEPS = ["train.steps=3"]


def test_every_shipped_recipe_loads_both_ways():
    assert recipe_names() == ["tiny", "wan2.1-t2v-1.3b", "wan2.1-t2v-1.3b-one-gpu", "wan2.1-t2v-14b"]
    for name in recipe_names():
        assert model_config(build_run(name, []).model) == VARIANTS[name.removesuffix("-one-gpu")].shape
        for init, mode in (("random", "pretrain"), ("pretrained", "finetune")):
            run = build_run(name, [f"init={init}"])
            assert run.init == init
            flow = run.flow.model_dump()
            if name != "tiny":  # which says itself what is best for its few tokens
                assert {key: flow[key] for key in PRESETS[mode]} == PRESETS[mode]
    fine, scratch = (build_run("wan2.1-t2v-14b", [f"init={init}"]) for init in ("pretrained", "random"))
    assert (fine.optimizer.lr, scratch.optimizer.lr) == (5e-6, 5e-5)
    assert (fine.optimizer.betas, scratch.optimizer.betas) == ((0.9, 0.999), (0.9, 0.95))


def test_a_training_mode_asked_for_wins_over_the_recipe_and_words_win_over_both(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "model: tiny\nbatch: {samples: 2, tokens_per_pack: 100}\ntrain: {steps: 5}\noptimizer: {lr: 1e-3}\n"
        "flow: {shift: 7.0, sampler: mode, stratified: true}\n"
        "modes: {finetune: {optimizer: {lr: 2e-4, eps: 1e-9}}}\n"
    )
    plain = build_run(str(recipe), [])
    assert (plain.flow.shift, plain.flow.sampler, plain.optimizer.lr) == (7.0, "mode", 1e-3)
    assert plain.flow.mix_uniform_ratio == 0.2  # of the pretrain preset, where the recipe says nothing
    asked = build_run(str(recipe), [], "pretrain")
    assert (asked.flow.shift, asked.flow.sampler) == (2.5, "logit_normal")
    assert asked.flow.stratified  # the preset says nothing of it
    tuned = build_run(str(recipe), ["flow.shift=9", "optimizer.eps=1e-7"], "finetune")
    assert (tuned.flow.shift, tuned.flow.sampler) == (9, "uniform")
    assert (tuned.optimizer.lr, tuned.optimizer.eps) == (2e-4, 1e-7)


def test_a_dumped_run_is_a_recipe(tmp_path):
    words = ["data.sources=[{path: a, weight: 1}, {path: b, weight: 2.5}]", "optimizer.lr=3e-5", "ema.decay=null"]
    run = build_run("wan2.1-t2v-1.3b", [*words, "init=random", "run_dir='1e3'"])
    (tmp_path / "run.yaml").write_text(dump_run(run))
    assert build_run(str(tmp_path / "run.yaml"), []) == run
    assert run.data.sources[1].weight == 2.5 and run.ema.decay is None and run.run_dir == "1e3"


def test_mock_is_a_setting():
    run = build_run("tiny", ["seed=1"], mock="17x64x64,1x64x64*2")
    assert (run.seed, run.data.mock) == (1, "17x64x64,1x64x64*2")
    with pytest.raises(UserError, match=r"'data\.mock' is given twice"):
        build_run("tiny", ["data.mock=1x64x64"], mock="mix")


def test_settings_and_recipes_may_be_mappings_and_paths(tmp_path):
    settings = {"optimizer.lr": 1e-3, "data": {"path": tmp_path}, "run_dir": tmp_path / "run", "train.steps": 3}
    run = build_run("tiny", settings)
    assert run == build_run("tiny", ["optimizer.lr=1e-3", f"data.path={tmp_path}", f"run_dir={tmp_path}/run", *STEPS])
    assert run == build_run({"based_on": "tiny", **settings})
    (tmp_path / "mine.yaml").write_text("based_on: tiny\ntrain: {steps: 3}\n")
    assert build_run(tmp_path / "mine.yaml").train.steps == 3
    with pytest.raises(UserError, match="The recipe is no whole recipe, it lacks model"):
        build_run({"train.steps": 3})
    with pytest.raises(UserError, match="no training mode 'tune': give one of pretrain, finetune"):
        build_run("tiny", training_mode="tune")


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (["optimizer.lr=1", "seed=7", "flow.shift=4"], ["flow.shift", "optimizer.lr", "seed"]),
        (["train.steps=9", "checkpoint.every=3", "log.every=2", "run_dir=x", "batch.tokens_per_pack=5000"], []),
        (["data.path=elsewhere", "data.prefetch=9", "compute.kernel=flash", "compute.offload_activations=true"], []),
        (
            ["ema.decay=null", "batch.samples=33", "compute.precision=bf16"],
            ["batch.samples", "compute.precision", "ema.decay"],
        ),
    ],
)
def test_what_may_change_when_a_run_goes_on(words, changed):
    old, new = (build_run("tiny", w) for w in ([], words))
    found = changed_settings(old, new)
    assert [name for name in found if not may_change(name)] == changed
    if "seed" in found:
        assert found["seed"] == (0, 7) and found["optimizer.lr"] == (2e-3, 1)


def test_what_may_change_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "train.md").read_text()
    assert all(f"`{name}`" in page for name in MAY_CHANGE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("- 1", "holds no settings"),
        ("model: tiny", "no whole recipe, it lacks batch, train, optimizer: begin it with `based_on: tiny`"),
        ("based_on: tiny\ntrain: {epochs: 2, steps: 3}", "give one of them"),
        ("based_on: 3", "`based_on` in .* is 3: it names a recipe"),
        ("based_on: tinny", "no recipe 'tinny'. Did you mean 'tiny'"),
        ("seed: 1\nseed: 2", "is not valid YAML: line 2: the key 'seed' is given twice"),
        ("train:\n\tsteps: 3", "line 2: a tab stands before a value, where YAML takes spaces only"),
        ("a: &a {b: *a}", "line 1: the alias '\\*a' stands inside"),
        ("1: 2", "holds no settings"),
        ("#" * 1_000_000, "is no recipe: it has 1,000,000 bytes"),
        ("{model: tiny, btach: 1}", "Did you mean 'batch'"),
        ("{model: tiny, modes: 3}", "`modes` in .* is 3: it holds settings for each mode, pretrain and finetune"),
        ("{model: tiny, modes: {finetune: 3}}", "it holds settings for each mode"),
        ("{model: tiny, modes: {finetun: {}}}", "names 'finetun': the training modes are pretrain and finetune"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_said(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        build_run(str(path), [])


def test_a_recipe_that_is_no_text_is_said(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"model: \xff\xfe")
    with pytest.raises(UserError, match="it is not text in UTF-8"):
        build_run(str(tmp_path / "r.yaml"), [])


@pytest.mark.parametrize("betas", ["[0.9, 1.5]", "[-0.1, 0.9]", "[0.9]"])
def test_betas_have_bounds(betas):
    with pytest.raises(UserError, match=r"optimizer\.betas"):
        build_run("tiny", [f"optimizer.betas={betas}"])


def test_an_unknown_recipe_or_model_is_said():
    with pytest.raises(UserError, match=r"no recipe 'wan2\.1-t2v-1b'.* Did you mean 'wan2"):
        build_run("wan2.1-t2v-1b", [])
    with pytest.raises(UserError, match="There is no model 'nothing'"):
        model_config("nothing")
    with pytest.raises(UserError, match="'my models/tiny' is no folder here"):
        model_config("my models/tiny")


def test_names_of_other_trainers_lead_to_settings_that_are_there():
    known = setting_paths(Run)
    settings = [name for name in NAMES_ELSEWHERE.values() if " " not in name]
    assert set(settings) <= set(known) and len(settings) > 20
    leaves = {name.rpartition(".")[2] for name in known}
    assert set(NAMES_ELSEWHERE) & leaves == {"data"}, "a setting of ours needs no other name"


@pytest.mark.parametrize(("old", "new"), NAMES_BEFORE.items())
def test_a_name_of_before_leads_to_the_new_one(old, new, tmp_path):
    """On the command line, in a recipe and to --explain."""
    assert new in setting_paths(Run) and old not in setting_paths(Run)
    told = re.escape(f"There is no setting '{old}'. It is now '{new}'.")
    with pytest.raises(UserError, match=told):
        build_run("tiny", [f"{old}=none"])
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"based_on": "tiny", **nest({old: True})}))
    with pytest.raises(UserError, match=told):
        build_run(tmp_path / "r.yaml")
    with pytest.raises(UserError, match=told):
        explain_settings(Run, old)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lora.rank=16", "There is no setting 'lora'. LoRA is not there yet"),
        ("log.wandb=true", "There is no setting 'log.wandb'. There is no wandb"),
        ("optimizer.name=adam", "There is no setting 'optimizer.name'. 'optimizer' has: lr, betas, eps, weight_decay."),
        ("data=folder", "The setting 'data' is 'folder': write data.path=folder."),
        ("data.sources=[a, b]", "The setting 'data.sources.0' is 'a': write {path: a} for it."),
        ("data.sources=[{path: a, weigth: 1}]", "Did you mean 'data.sources.0.weight'?"),
        ("data.folder=x", "There is no setting 'data.folder'. 'data' has: path, sources, mock, prefetch"),
        ("optimizer.betas=0.9,0.99", "it must be a list such as [0.9,0.99]."),
        ("train.steps=1e3", "it must be a whole number, as in 1000."),
        ("lr=1", "Did you mean 'optimizer.lr'?"),
        ("learning-rate=1", "Did you mean 'optimizer.lr'?"),
        ("compute.offload_activations=1", "it must be true or false."),
        ("run_dir=5", "it must be text, in quotes where it looks like a number."),
        ("trian.steps=4", "There is no setting 'trian'. Did you mean 'train'?"),
    ],
)
def test_a_word_that_is_no_setting_is_told_what_is_near(word, message):
    with pytest.raises(UserError) as caught:
        build_run("tiny", [word])
    text = str(caught.value)
    assert message in text and not any(jargon in text for jargon in ("instance", "dictionary", "tuple", "Config"))


def test_the_home_folder_is_meant_by_a_tilde_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/u")
    words = ["run_dir=~/runs/x", "model=~/wan", "data.sources=[{path: ~/a}, {path: b~c}]"]
    run = build_run("tiny", words)
    assert (run.run_dir, run.model, *(s.path for s in run.data.sources)) == (
        "/home/u/runs/x",
        "/home/u/wan",
        "/home/u/a",
        "b~c",
    )
    assert build_run("tiny", ["data.path=~/d"]).data.path == "/home/u/d"


def test_a_recipe_builds_on_another_and_wins_over_what_it_says_of_the_mode(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("based_on: wan2.1-t2v-1.3b\noptimizer: {lr: 1e-6}\nflow: {shift: 9}")
    (tmp_path / "b.yaml").write_text(
        "based_on: a.yaml\nmodes: {pretrain: {optimizer: {eps: 1e-9}}, finetune: {seed: 4}}"
    )
    below, run = build_run("wan2.1-t2v-1.3b", ["init=random"]), build_run("b.yaml", ["init=random"])
    assert (run.optimizer.lr, run.optimizer.eps, run.seed, run.flow.shift) == (1e-6, 1e-9, 0, 9)
    assert (run.optimizer.betas, run.batch, run.schedule) == (below.optimizer.betas, below.batch, below.schedule)
    assert build_run("b.yaml", []).seed == 4 and build_run("b.yaml", []).init == "pretrained"
    asked = build_run("b.yaml", ["init=random"], "pretrain")
    assert asked.flow.shift == 2.5, "the preset of a mode that is asked for wins"
    (tmp_path / "c.yaml").write_text("based_on: c.yaml")
    with pytest.raises(UserError, match="and so on without end"):
        build_run("c.yaml", [])


def test_a_file_that_is_missing_is_no_recipe_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("")
    (tmp_path / "data").mkdir()
    for name, message in (
        ("mime.yaml", rf"There is no file 'mime.yaml' \(in {tmp_path}\)\. Did you mean 'mine.yaml'\?"),
        ("deep/x.yml", "There is no file 'deep/x.yml'"),
        ("datta", "There is no recipe 'datta'. Did you mean 'data'"),
        ("run", "'run' is a folder, not a recipe: the recipe of that run is run/run.yaml"),
        ("data", "'data' is a folder, not a recipe: give a YAML file or tiny, wan"),
    ):
        with pytest.raises(UserError, match=message):
            build_run(name, [])


def test_epochs_are_steps_once_the_samples_are_counted(tmp_path):
    run = build_run("tiny", ["train.epochs=2.5"])
    settled = settle_steps(run, 100)
    assert (settled.train.steps, settled.train.epochs) == (16, None) and 16 * run.batch.samples >= 250
    assert settle_steps(build_run("tiny", []), 100).train.steps == build_run("tiny", []).train.steps
    tenths = build_run("tiny", ["train.epochs=1.1", "batch.samples=1"])
    assert settle_steps(tenths, 100).train.steps == 110, "exact, where floats are a little above"
    (tmp_path / "r.yaml").write_text("based_on: tiny\ntrain: {epochs: 3}")
    assert build_run(str(tmp_path / "r.yaml"), []).train.epochs == 3
    assert build_run(str(tmp_path / "r.yaml"), ["train.steps=7"]).train.epochs is None, "the later word counts"


def test_a_mix_fits_the_recipe():
    from wanloom.data.mock import MockDataset

    for tokens, shapes in MIXES.items():
        assert max(MockDataset(shapes, 8, WAN_21).rows("train").tokens) == tokens
    assert build_run("tiny", mock="mix").data.mock == MIXES[80]
    assert build_run("wan2.1-t2v-1.3b", mock="mix").data.mock == MIXES[32760]
    assert build_run("wan2.1-t2v-1.3b", ["data.mock=mix", "batch.tokens_per_pack=20000"]).data.mock == MIXES[14040]


def test_twenty_clips_on_one_gpu_are_as_many_steps_and_minutes_as_readme_says():
    text = " ".join((Path(__file__).parents[2] / "README.md").read_text().split())
    run = build_run("wan2.1-t2v-1.3b-one-gpu", ["train.epochs=100"])
    kept = 20 - int(20 * PrepareConfig().val_fraction + 0.5)
    steps = settle_steps(run, kept).train.steps
    tflop = run.batch.samples * train_flops(model_config(run.model), 32760) / 1e12
    assert kept == 19 and f"are {steps} steps of {run.batch.samples} samples, of {round(tflop, -2):,.0f} TFLOP" in text
    seconds = tflop / 400
    assert f"that is {seconds:.0f} s a step and {steps * seconds / 60:.0f} minutes" in text
    assert f"a checkpoint every {run.checkpoint.minutes:.0f} minutes" in text


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize(
    "name", ["train.epochs", "optimizer.lr", "clip_norm", "flow.shift", "flow.logit_mean", "checkpoint.minutes"]
)
def test_numbers_of_a_recipe_are_finite(name, value):
    with pytest.raises(UserError, match=f"The setting '{name}' is .*: it must be "):
        build_run("tiny", [f"{name}={value}"])
