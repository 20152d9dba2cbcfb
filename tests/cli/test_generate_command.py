"""`wanloom generate` as a user types it: what is written, that it repeats, and whose weights it is made with."""

import json
import shlex
import weakref
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from generated import SMALL, contents, expect_mistake, names, out_at, save_checkpoint
from PIL import Image

from wanloom.cli import main
from wanloom.codecs.text import TextCodec
from wanloom.codecs.vae import VaeCodec
from wanloom.errors import UserError
from wanloom.formats.transformer import load_dit, save_weights
from wanloom.geometry import WAN_21
from wanloom.media.write import read_mp4
from wanloom.runs.trained import open_trained
from wanloom.sample.generate import Request, generate
from wanloom.sample.settings import GenerateConfig
from wanloom.variants import VARIANTS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tiny_pipeline, tmp_path_factory) -> Path:
    """A run folder with one checkpoint of a model that is not the pipeline's, and another one as its average."""
    run_dir = tmp_path_factory.mktemp("run")
    save_checkpoint(run_dir, tiny_pipeline, ema=True)
    return run_dir


def read_picture(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_prompts_become_videos_sheets_and_notes(tiny_pipeline, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--prompt", "A red circle!", "--prompt", "\u4e00\u53ea\u732b", "--negative", "snow", "--seed", "40"]
    code = main(["generate", "--model", str(tiny_pipeline), *words, *SMALL, "--fps", "8", "--out", str(out)])
    printed = capsys.readouterr().out
    assert f"{tiny_pipeline} on cpu in fp32, attention by flash: 2 to make with 2 steps of unipc" in printed
    assert code == 0 and "text: 3 prompts" in printed and "denoising" in printed and "decoding" in printed
    stems = ("000-a-red-circle-seed40", "001-seed41")
    assert names(out) == [f"{stem}.{end}" for stem in stems for end in ("json", "mp4", "png")]
    assert all(f"  {out / stem}.mp4\n" in printed for stem in stems)
    facts = json.loads((out / "001-seed41.json").read_text(encoding="utf-8"))
    assert facts["prompt"] == "\u4e00\u53ea\u732b" and facts["negative"] == "snow" and facts["seed"] == 41
    assert (facts["height"], facts["width"], facts["frames"], facts["fps"]) == (32, 48, 5, 8)
    assert (facts["solver"], facts["steps"], facts["shift"], facts["guidance"]) == ("unipc", 2, 5.0, 5.0)
    assert (
        facts["model"] == str(tiny_pipeline) and facts["checkpoint"] is None and facts["files"][0] == "001-seed41.mp4"
    )
    assert facts["versions"]["torch"] == torch.__version__ and len(facts["identity"]["vae"]) == 16
    with av.open(out / "001-seed41.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.width, stream.height, stream.average_rate) == (5, 48, 32, 8)


def test_the_video_is_that_of_the_library(tiny_pipeline, tmp_path):
    """The command adds nothing of its own: its picture is that of the parts called by hand."""
    words = ["--prompt", "a blue square", "--seed", "9", "--height", "48", "--width", "32", "--frames", "1"]
    code = main(
        ["generate", "--model", str(tiny_pipeline), *words, "--steps", "3", "--device", "cpu", *out_at(tmp_path)]
    )
    assert code == 0 and names(tmp_path / "out") == [f"000-a-blue-square-seed9.{end}" for end in ("json", "png")]
    text, negative = TextCodec.load(tiny_pipeline, "cpu").encode(["a blue square", ""])
    request = Request(WAN_21.latents_shape(1, 48, 32), 9, text, negative)
    model = load_dit(tiny_pipeline).requires_grad_(False)
    ((_, latents),) = generate(model, [request], GenerateConfig(steps=3))
    want = VaeCodec.load(tiny_pipeline, "cpu").decode(latents)[0].numpy()
    np.testing.assert_array_equal(read_picture(tmp_path / "out" / "000-a-blue-square-seed9.png"), want)


def test_the_command_in_the_note_makes_the_same_bytes(trained, tmp_path):
    words = ["--checkpoint", str(trained), "--ema", '--prompt=-- it\'s "odd" --', *SMALL, "--solver", "dpm++"]
    assert main(["generate", *words, "--out", str(tmp_path / "a"), "--seed", "3"]) == 0
    note = json.loads(next((tmp_path / "a").glob("*.json")).read_text())
    assert note["step"] == 30 and note["ema"] and note["checkpoint"].endswith("step_0000030")
    again = shlex.split(note["command"])
    assert again[0] == "wanloom" and main([*again[1:], "--out", str(tmp_path / "b")]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and len(contents(tmp_path / "a")) == 3


def test_many_prompts_repeat_and_equal_each_alone(trained, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "a red circle", "seed": 5},
        {"prompt": "a cat in snow", "negative": "dark", "height": 64, "width": 32, "frames": 9},
        {"prompt": "a red circle", "frames": 1},
    ]
    prompts.write_text("\ufeff" + "\n\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    words = ["generate", "--checkpoint", str(trained), "--prompts", str(prompts), *SMALL]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    assert main([*words, "--out", str(tmp_path / "b")]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    notes = [json.loads(path.read_text()) for path in sorted((tmp_path / "a").glob("*.json"))]
    assert [note["seed"] for note in notes] == [5, 1, 2] and [note["negative"] for note in notes] == ["", "dark", ""]
    for number, note in enumerate(notes):
        out = tmp_path / f"alone{number}"
        assert main([*shlex.split(note["command"])[1:], "--out", str(out)]) == 0
        together, alone = tmp_path / "a" / note["files"][0], next(out.glob(f"*{Path(note['files'][0]).suffix}"))
        read = read_picture if note["frames"] == 1 else read_mp4
        difference = np.abs(read(together).astype(int) - read(alone))
        assert difference.mean() < 0.5  # 36 and more with another seed; rounding moves blocks in the encoder


def test_weights_are_those_of_the_checkpoint_or_its_average(tiny_pipeline, trained, tmp_path):
    sources = {
        "pipeline": ["--model", str(tiny_pipeline)],
        "weights": ["--checkpoint", str(trained)],
        "average": ["--checkpoint", str(trained / "checkpoints" / "step_0000030"), "--ema"],
    }
    pictures = {}
    for name, words in sources.items():
        code = main(["generate", *words, "--prompt", "x", *SMALL, "--frames", "1", "--out", str(tmp_path / name)])
        assert code == 0
        pictures[name] = read_picture(tmp_path / name / "000-x.png").astype(int)
    for one, other in (("pipeline", "weights"), ("weights", "average"), ("pipeline", "average")):
        assert np.abs(pictures[one] - pictures[other]).mean() > 0.5


def test_bf16_is_close_and_is_not_fp32(tiny_pipeline, tmp_path):
    pictures = []
    for precision in ("fp32", "bf16"):
        words = ["--model", str(tiny_pipeline), "--prompt", "x", *SMALL, "--frames", "1", "--precision", precision]
        assert main(["generate", *words, "--out", str(tmp_path / precision)]) == 0
        pictures.append(read_picture(tmp_path / precision / "000-x.png").astype(int))
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 3


def test_each_text_is_encoded_once_and_the_encoder_is_gone_before_the_model(tiny_pipeline, tmp_path, monkeypatch):
    encoders, encoded, alive = [], [], []
    load, encode, load_weights = TextCodec.load, TextCodec.encode, load_dit

    def watched_load(*words):
        codec = load(*words)
        encoders.append(weakref.ref(codec.encoder))
        return codec

    def watched_encode(self, texts, *words):
        encoded.extend(texts)
        return encode(self, texts, *words)

    def watched_model(*words):
        alive.extend(ref() for ref in encoders)
        return load_weights(*words)

    monkeypatch.setattr(TextCodec, "load", watched_load)
    monkeypatch.setattr(TextCodec, "encode", watched_encode)
    monkeypatch.setattr("wanloom.runs.trained.load_dit", watched_model)
    words = ["--prompt", "x", "--prompt", "y", "--prompt", "x", *SMALL, "--frames", "1", *out_at(tmp_path)]
    assert main(["generate", "--model", str(tiny_pipeline), *words]) == 0
    assert sorted(encoded) == ["", "x", "y"] and alive == [None]


def test_existing_files_are_kept_unless_told_otherwise(tiny_pipeline, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "000-x.png").write_bytes(b"mine")
    words = ["--model", str(tiny_pipeline), "--prompt", "x", *SMALL, "--out", str(out)]
    expect_mistake(capsys, words, "1 of the files are there already, made otherwise, such as")
    assert names(out) == ["000-x.png"] and (out / "000-x.png").read_bytes() == b"mine"
    assert main(["generate", *words, "--overwrite"]) == 0
    assert len(names(out)) == 3 and (out / "000-x.png").read_bytes() != b"mine"


def test_another_seed_is_another_name_and_other_settings_are_not(tiny_pipeline, tmp_path, capsys):
    words = ["--model", str(tiny_pipeline), "--prompt", "x", *SMALL, "--frames", "1", *out_at(tmp_path)]
    assert main(["generate", *words]) == 0 and main(["generate", *words, "--seed", "7"]) == 0
    assert names(tmp_path / "out") == [f"000-x{seed}.{end}" for seed in ("-seed7", "") for end in ("json", "png")]
    expect_mistake(capsys, [*words, "--guidance", "3"], "2 of the files are there already, made otherwise, such as")


def test_an_untrained_model_is_said_to_be_one(tiny_pipeline, tmp_path, capsys):
    folder = tmp_path / "new"
    folder.mkdir()
    for part in ("vae", "text_encoder", "tokenizer"):
        (folder / part).symlink_to(tiny_pipeline / part)
    model = load_dit(tiny_pipeline)
    torch.nn.init.zeros_(model.head.head.weight)
    save_weights(model.state_dict(), model.config, folder / "transformer")
    words = ["--model", str(folder), "--prompt", "x", *SMALL, *out_at(tmp_path)]
    assert main(["generate", *words]) == 0
    assert "is untrained, it will give noise" in capsys.readouterr().err


def test_without_guidance_the_negative_prompt_is_not_encoded(tiny_pipeline, tmp_path, capsys):
    words = ["--model", str(tiny_pipeline), "--prompt", "x", *SMALL, "--frames", "1", *out_at(tmp_path)]
    assert main(["generate", *words, "--guidance", "1"]) == 0
    assert "text: 1 prompt encoded, " in capsys.readouterr().out


@pytest.mark.parametrize(("given", "found"), [("checkpoints", "step_0000030"), (".", "step_0000030")])
def test_a_run_is_found_by_the_folder_of_its_checkpoints_too(trained, given, found):
    assert open_trained(trained / given).path.name == found
    (piece,) = (trained / "checkpoints" / found).glob("*model*.safetensors")
    with pytest.raises(UserError, match=f"is a piece of a checkpoint: give the folder, .*{found}"):
        open_trained(piece)


def test_the_defaults_in_the_help_are_those_of_the_config(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    config = GenerateConfig()
    assert f"--steps N default: those of the model, or {config.steps}" in printed
    assert f"--guidance X default: that of the model, or {config.guidance:g};" in printed
    assert f"default: that of the model, or {config.shift:g}" in printed and f"default {config.solver}" in printed
    wan = VARIANTS["wan2.1-t2v-1.3b"].defaults
    for value in (wan.height, wan.width, wan.frames):
        assert f"{value} for Wan's 1.3B" in printed


def test_a_model_of_another_geometry_makes_the_size_that_is_asked_for(wan22_pipeline, tmp_path, capsys):
    """It once made 64x128 of 32x64, at 16 frames a second."""
    words = ["--model", str(wan22_pipeline), "--prompt", "x", "--steps", "1", "--device", "cpu", *out_at(tmp_path)]
    assert main(["generate", *words, "--height", "32", "--width", "64", "--frames", "5"]) == 0
    with av.open(next((tmp_path / "out").glob("*.mp4"))) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.width, stream.height, stream.average_rate) == (5, 64, 32, 24)
    expect_mistake(capsys, [*words, *SMALL], "The width is 48, it must be a multiple of 32: try 32 or 64.")
