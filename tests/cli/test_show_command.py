"""`wanloom show` on a recipe, a run and a prepared folder."""

import shutil
import subprocess
import sys

import pytest
import yaml

from wanloom.cli import main
from wanloom.recipes.run import load_run


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


def test_a_layout_is_shown_with_what_a_rank_holds(capsys):
    words = ["wan2.1-t2v-14b", "init=random", "--mock=81x480x832,1x480x832*4", "batch.samples=80"]
    axes = ["parallel.cp=8", "parallel.tp=2", "parallel.dp_replicate=2", "ema.decay=0.99"]
    assert main(["show", *words, "--world=64", *axes]) == 0
    out = capsys.readouterr().out
    assert "# layout of 64: dp_replicate 2 x dp_shard 2 x cp_ring 2 x cp_ulysses 4 x tp 2; data ranks: 4" in out
    assert "rank 0 with 0, 2, 4, 6, inside a machine of 8" in out and "rank 0 with 0, 32, across machines of 8" in out
    held = int(out.split("a rank holds at most ")[1].split(" ")[0].replace(",", ""))
    assert 14_288_491_584 / 32 < held < 14_288_491_584 / 32 * 1.03, "over dp_shard, cp and tp; norms are not split"
    assert f"parameters {held * 4 / 2**30:.2f}" in out and f"moments {held * 8 / 2**30:.2f}" in out
    assert "2,048 tokens of a pack of 32,760" in out
    packs = float(out.split("# data rank: ")[1].split(" ")[0])
    assert packs == pytest.approx(float(out.split(" packs\n")[0].split(" ")[-1]) / 4, rel=0.02)
    balance, padding = (float(out.split(word)[1].split(" ")[0].split("%")[0]) for word in ("balance ", "padding "))
    assert 1 <= balance < 1.1 and 0 < padding < 0.5
    assert main(["show", *words, "--world=64", *axes, "--per-node=4"]) == 0
    assert "rank 0 with 0, 2, 4, 6, across machines of 4" in capsys.readouterr().out


def test_a_layout_that_cannot_be_is_a_sentence(capsys):
    assert main(["show", "wan2.1-t2v-1.3b", "--world=8", "parallel.cp=8", "parallel.context=ulysses"]) == 2
    out, error = capsys.readouterr()
    assert not out and "Ulysses over 8 ranks does not divide the 12 heads" in error
    assert main(["show", "tiny", "--world=0"]) == 2
    assert capsys.readouterr().err == "wanloom: --world is 0: it counts from 1.\n"


def test_runs_and_folders_are_summarised(tmp_path, prepared, capsys):
    folder, _ = prepared
    assert main(["show", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"'{folder}' has 12 samples to train on, 3 held out, 448 tokens" in out
    assert "4 x 17 frames of 64x64 (80 tokens)" in out and "4 x 1 frame of 64x64 (16 tokens)" in out
    assert "4 x 5 frames of 64x32 (16 tokens)" in out and "sizes are width x height" in out
    assert "train-002: clip 2\n  and 9 samples more" in out
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
    assert "There is no recipe, file or folder 'nothing'. The recipes are tiny, " in capsys.readouterr().err
    (tmp_path / "data").mkdir()
    for wrong, near in ((str(tmp_path / "datta"), str(tmp_path / "data")), ("tinny", "tiny")):
        assert main(["show", wrong]) == 2
        assert f"'{wrong}'. Did you mean '{near}'?" in capsys.readouterr().err
    assert main(["show", str(tmp_path)]) == 2
    assert "holds no prepared data" in capsys.readouterr().err
    (tmp_path / "my clips").mkdir()
    (tmp_path / "my clips/a.mp4").write_bytes(b"x")
    assert main(["show", str(tmp_path / "my clips")]) == 2
    assert f"make data of them with `wanloom prepare '{tmp_path}/my clips' OUT`." in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["{", "[]", "{}"])
def test_a_damaged_note_of_a_data_set_is_a_sentence(tmp_path, prepared, capsys, damage):
    folder = tmp_path / "data"
    shutil.copytree(prepared[0], folder)
    (folder / "prepare.json").write_text(damage)
    assert main(["show", str(folder)]) == 2
    assert "prepare.json is damaged" in capsys.readouterr().err


def test_a_missing_index_is_a_note(tmp_path, prepared):
    folder = tmp_path / "data"
    shutil.copytree(prepared[0], folder)
    (folder / "index.parquet").unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "wanloom", "show", str(folder)], capture_output=True, text=True, check=True
    )
    assert "has no index: reading the headers of 2 shards" in " ".join(done.stderr.split())
    assert "12 samples" in done.stdout and "reading" not in done.stdout
