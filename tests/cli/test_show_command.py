"""`wanloom show` on a recipe, a run and a prepared folder."""

import base64
import io
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from wanloom.cli import main
from wanloom.codecs.vae import VaeCodec
from wanloom.data.shards import Dataset
from wanloom.formats.pipeline import TINY
from wanloom.geometry import WAN_21
from wanloom.media.write import write_png
from wanloom.report.data import size_of
from wanloom.runs.recipe import build_run

pytestmark = pytest.mark.slow


def test_a_recipe_is_printed_as_a_recipe(tmp_path, capsys):
    assert main(["show", "tiny", "--mock", "17x64x64,1x64x64", "seed=3"]) == 0
    out = capsys.readouterr().out
    (tmp_path / "shown.yaml").write_text(out)
    assert build_run(str(tmp_path / "shown.yaml"), []) == build_run("tiny", ["seed=3", 'data.mock="17x64x64,1x64x64"'])
    assert "# parameters: 1,782,208" in out
    assert "1,024 samples to train on, 16 held out" in out
    assert "# step: 16 samples, " in out and "model TFLOP" in out


def test_epochs_are_shown_as_the_steps_that_they_are(capsys):
    assert main(["show", "tiny", "--mock", "1x64x64", "train.epochs=0.05"]) == 0
    out = capsys.readouterr().out
    assert "1,024 samples to train on" in out and "# run: 4 steps, 64 samples" in out


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
    assert f"train-002: clip 2\n  and 9 samples more: `wanloom show {folder} --page` draws them\n" in out
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


@pytest.mark.parametrize("damage", ["{", "[]", '{"settings": []}'])
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
    (folder / "index.parquet").unlink()
    train = [sys.executable, "-m", "wanloom", "train", "tiny", f"data.path={folder}", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(train, capture_output=True, text=True)
    assert " ".join(done.stdout.split()).count("has no index: reading the headers of 2 shards") == 1


def test_the_page_s_file_is_an_option(capsys, prepared):
    assert main(["show", str(prepared[0]), "--page", "my.html"]) == 2
    assert "'my.html' is one word too many: --out FILE says where the page goes." in capsys.readouterr().err


def test_the_page_of_a_folder_shows_its_latents_decoded(tmp_path, capsys, monkeypatch):
    """Made with tiny, which is found by itself; every picture is what its VAE makes of the stored latents."""
    clips, data, file = tmp_path / "clips", tmp_path / "da<ta", tmp_path / "page.html"
    clips.mkdir()
    for i in range(5):
        write_png(clips / f"{i}.png", np.full((64, 64, 3), 40 * i, dtype=np.uint8))
        (clips / f"{i}.txt").write_text(f"shade {i} <b>")
    assert main(["prepare", str(clips), str(data), "--model", "tiny", "--mode", "image", "--val-fraction", "0.2"]) == 0
    monkeypatch.setattr("wanloom.report.data.NUM_SAMPLES", 3)
    capsys.readouterr()
    assert main(["show", str(data), "--page", "--out", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["decoded 3 of 3", str(file)]
    page, index = file.read_text(), Dataset.open(data).rows("train")
    assert len(index) == 4 and "the VAE of tiny, which they were made with" in page and "da&lt;ta" in page
    pictures = [base64.b64decode(text) for text in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert len(pictures) == 3 and "<b>" not in page
    vae = VaeCodec.load(TINY, "cpu")
    for picture, number in zip(pictures, (0, 1, 2), strict=True):  # 0, 4/3, 8/3 rounded down
        row = index[number]
        assert row.caption.replace("<b>", "&lt;b&gt;") in page and f"<code>{row.key}</code>, 64x64<" in page
        want = vae.decode(Dataset.open(data).read(row).tensors["latents"])[0].numpy()
        shown = np.asarray(Image.open(io.BytesIO(picture)))
        np.testing.assert_array_equal(shown[::2, ::2], want)  # enlarged by whole pixels
    assert main(["show", str(data), "--page", "--out", str(file)]) == 0  # its own page is replaced
    file.write_text("a diary")
    assert main(["show", str(data), "--page", "--out", str(file)]) == 2
    assert "is there and is no such page" in capsys.readouterr().err and file.read_text() == "a diary"


def test_a_long_clip_is_shown_by_its_first_frames():
    assert size_of(WAN_21, 9, 60, 104) == "832x480, 33 frames, the first 17 shown"
    assert size_of(WAN_21, 5, 60, 104) == "832x480, 17 frames" and size_of(WAN_21, 1, 60, 104) == "832x480"


def test_a_page_is_decoded_by_the_vae_of_the_data_only(tmp_path, prepared, tiny_pipeline, capsys):
    """A folder of others does not say which VAE made it; one that says is not shown by another."""
    folder = tmp_path / "data"
    shutil.copytree(prepared[0], folder)
    file = ["--page", "--out", str(tmp_path / "page.html")]
    (folder / "prepare.json").write_text('{"settings": {"vae": "of somebody"}}')
    for words, message in (
        ([str(folder), *file], "--model names the model that it was prepared for"),
        ([str(folder), *file, "--model", str(tiny_pipeline)], "prepared with another VAE than that of"),
        ([str(folder), "--model", "tiny"], "give --page too"),
        (["tiny", "--page"], "--page is for a prepared folder"),
    ):
        assert main(["show", *words]) == 2
        assert message in capsys.readouterr().err
    (folder / "prepare.json").unlink()
    assert main(["show", str(folder), *file]) == 2
    assert "cannot be told here" in capsys.readouterr().err
    assert main(["show", str(folder), *file, "--model", "tiny"]) == 0
    assert "Whether these latents were made with this VAE is not known" in (tmp_path / "page.html").read_text()
    assert (tmp_path / "page.html").read_text().count("17 frames") == 4
