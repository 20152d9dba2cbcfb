"""`wanloom show` on a recipe, a run and a prepared folder."""

import shutil

import pytest
import yaml

from wanloom.cli import main
from wanloom.cli.show import show_plan
from wanloom.recipes.run import load_run, model_config, use_mock


def test_a_recipe_is_printed_as_a_recipe(tmp_path, capsys):
    assert main(["show", "tiny", "--mock", "17x64x64,1x64x64", "seed=3"]) == 0
    out = capsys.readouterr().out
    (tmp_path / "shown.yaml").write_text(out)
    assert load_run(str(tmp_path / "shown.yaml"), []) == load_run("tiny", ["seed=3", 'data.mock="17x64x64,1x64x64"'])
    assert "# parameters: 1,782,208" in out
    assert "1,024 samples to train on, 16 held out" in out
    assert "# step: 16 samples, " in out and "model TFLOP" in out


def test_the_published_models_are_shown_without_their_weights(capsys):
    assert main(["show", "wan2.1-t2v-14b", "init=random", "--mock", "81x480x832", "batch.samples=4"]) == 0
    out = capsys.readouterr().out
    assert "# parameters: 14,288,491,584" in out
    # 5,035 TFLOP of a step on one such clip, times four
    assert "4.0 packs" in out and "packs: 100.0% full" in out
    flops = float(out.split("% full; step: ")[1].split(" ")[0].replace(",", ""))
    assert abs(flops / (4 * 5035.1) - 1) < 0.01


def test_a_plan_for_several_ranks_says_how_even_they_are(capsys):
    run = load_run("tiny", use_mock([], "17x64x64,1x64x64"), None)
    show_plan(run, model_config(run.model), ranks=4)
    out = capsys.readouterr().out
    balance = float(out.split("# ranks: 4, balance ")[1].split(":")[0])
    assert 1 <= balance < 1.1
    show_plan(run, model_config(run.model))
    assert "balance" not in capsys.readouterr().out


def test_runs_and_folders_are_summarised(tmp_path, prepared, capsys):
    folder, _ = prepared
    assert main(["show", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "12 samples to train on, 3 held out" in out
    assert "4 x 17 frames of 64 x 64 (80 tokens)" in out and "train-000: clip 0" in out
    run_dir = tmp_path / "run"
    words = ["--mock=1x64x64", "batch.samples=2", f"run_dir={run_dir}", "train.steps=2", "log.validate_every=2"]
    assert main(["train", "tiny", *words]) == 0
    capsys.readouterr()
    assert main(["show", str(run_dir)]) == 0
    out = capsys.readouterr().out
    assert (
        "last record: step 2, loss" in out and "held-out loss: " in out and "step_0000002: 4 samples, 64 tokens" in out
    )
    assert yaml.safe_load((run_dir / "run.yaml").read_text())["train"]["steps"] == 2
    assert main(["show", str(run_dir), "seed=1"]) == 2
    assert "settings can only be given for a recipe" in capsys.readouterr().err


def test_what_is_not_there_is_said(tmp_path, capsys):
    assert main(["show", "nothing"]) == 2
    assert "There is no recipe 'nothing'." in capsys.readouterr().err
    assert main(["show", str(tmp_path)]) == 2
    assert "holds no prepared data" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["{", "[]", "{}"])
def test_a_damaged_note_of_a_data_set_is_a_sentence(tmp_path, prepared, capsys, damage):
    folder = tmp_path / "data"
    shutil.copytree(prepared[0], folder)
    (folder / "prepare.json").write_text(damage)
    assert main(["show", str(folder)]) == 2
    assert "prepare.json is damaged" in capsys.readouterr().err
