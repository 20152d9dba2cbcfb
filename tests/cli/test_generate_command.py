"""`wanloom generate` as a user types it: what is written, that it repeats, and what each mistake says."""

import json
import os
import shlex
import signal
import subprocess
import sys
import weakref
from argparse import Namespace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from wanloom.checkpoint.settings import CheckpointConfig
from wanloom.checkpoint.writer import Checkpointer
from wanloom.cli import main
from wanloom.cli.generate import note_unknown, note_unused
from wanloom.codecs.text import TextCodec
from wanloom.codecs.vae import VaeCodec
from wanloom.errors import UserError
from wanloom.files import folder_for_one
from wanloom.formats.transformer import load_dit, save_weights
from wanloom.geometry import WAN_21
from wanloom.media.write import read_mp4
from wanloom.model.dit import WanDiT
from wanloom.runs.generate import shape_of
from wanloom.runs.results import write_result
from wanloom.runs.trained import open_trained
from wanloom.sample import generate as sampling
from wanloom.sample.generate import Request, generate
from wanloom.sample.prompts import Prompt, fill_in
from wanloom.sample.settings import GenerateConfig
from wanloom.variants import VARIANTS

pytestmark = pytest.mark.slow

SMALL = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tiny_pipeline, tmp_path_factory) -> Path:
    """A run folder with one checkpoint of a model that is not the pipeline's, and another one as its average."""
    run_dir = tmp_path_factory.mktemp("run")
    save_checkpoint(run_dir, tiny_pipeline, ema=True)
    return run_dir


def save_checkpoint(run_dir: Path, pipeline: Path, ema: bool, change=lambda name, value: value) -> None:
    model = load_dit(pipeline)
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        for prefix in ("model.", "ema.") if ema else ("model.",):
            moved = value + 0.02 * torch.randn(value.shape, generator=generator)
            tensors[prefix + name] = change(prefix + name, moved)
    saver = Checkpointer(run_dir, CheckpointConfig())
    state = {"step": 30, "model": model.config.model_dump()}
    recipe = {"model": str(pipeline), "ema": {"decay": 0.9 if ema else None}}
    saver.save(30, tensors, state, json.dumps(recipe))  # JSON is YAML
    saver.wait()
    saver.close()


def read_picture(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def expect_mistake(capsys, words: list[str], message: str) -> None:
    assert main(["generate", *words]) == 2
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1].startswith("wanloom: ") and message in printed.splitlines()[-1], printed


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


def out_at(folder: Path) -> list[str]:
    return ["--out", str(folder / "out")]


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


def test_what_is_done_stays_when_stopped(tiny_pipeline, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sampling, "plan_packs", lambda requests, config: [[0], [1]])
    real, calls = VaeCodec.decode, []

    def decode(self, latents):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, latents)

    monkeypatch.setattr(VaeCodec, "decode", decode)
    words = ["--model", str(tiny_pipeline), "--prompt", "x", "--prompt", "y", *SMALL, *out_at(tmp_path)]
    assert main(["generate", *words]) == 130
    assert f"1 of 2 are written to {tmp_path / 'out'}; the same command makes the rest." in capsys.readouterr().err
    assert names(tmp_path / "out") == ["000-x.json", "000-x.mp4", "000-x.png"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_that_a_library_makes_an_error_of_is_a_stop(tiny_pipeline, tmp_path, capsys, monkeypatch, number, code):
    """safetensors, interrupted while it reads, calls a whole file broken."""

    def load(folder, device):
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt as error:
            raise UserError(f"{folder} is not a whole safetensors file: fetch it again.") from error

    monkeypatch.setattr(VaeCodec, "load", load)
    words = ["--model", str(tiny_pipeline), "--prompt", "x", *SMALL, *out_at(tmp_path)]
    assert main(["generate", *words]) == code
    said = capsys.readouterr().err
    assert "0 of 1 are written" in said and "fetch it again" not in said


def test_a_stop_that_a_library_swallows_is_seen_at_the_next_step(tiny_pipeline, tmp_path, capsys, monkeypatch):
    real = sampling.guided_velocity

    def velocity(*arguments):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            made.append(1)
        return real(*arguments)

    made = []
    monkeypatch.setattr(sampling, "guided_velocity", velocity)
    words = ["--model", str(tiny_pipeline), "--prompt", "x", *SMALL, *out_at(tmp_path)]
    assert main(["generate", *words]) == 143 and len(made) == 1
    assert names(tmp_path / "out") == []


PAIR = ["--prompt", "x", "--prompt", "y"]


def test_a_stopped_call_goes_on_where_it_was(tiny_pipeline, tmp_path, capsys, monkeypatch):
    """Also in the middle of a pack, whose videos share calls of the model: the bytes are those of one call."""
    words = ["generate", "--model", str(tiny_pipeline), *PAIR, *SMALL, "--frames", "1", "--out"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    real, made = write_result, []

    def write(out, frames, facts):
        made.append(facts["name"])
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGTERM)  # the files of this one are finished first
        if len(made) == 3:
            raise KeyboardInterrupt
        return real(out, frames, facts)

    monkeypatch.setattr("wanloom.runs.generate.write_result", write)
    out, third = str(tmp_path / "out"), ["--prompt", "z"]
    assert main([*words, out, *third]) == 143
    said = capsys.readouterr()
    assert f"\n2 of 3 are written to {out}; the same command makes the rest.\n" in said.err
    assert names(tmp_path / "out") == [f"{stem}.{end}" for stem in ("000-x", "001-y") for end in ("json", "png")]
    assert main([*words, out, *third]) == 130, "stopped once more"
    assert main([*words, out, *third]) == 0
    assert "3 to make with 2 steps of unipc, guidance 5, 2 of them there already\n" in capsys.readouterr().out
    assert made == ["000-x", "001-y", "002-z", "002-z"]
    assert main([*words, out, *third]) == 0 and made[4:] == []
    assert "is complete: this command has made all of it before" in capsys.readouterr().out
    assert main([*words, str(tmp_path / "three"), *third]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "three")


def test_another_seed_is_another_name_and_other_settings_are_not(tiny_pipeline, tmp_path, capsys):
    words = ["--model", str(tiny_pipeline), "--prompt", "x", *SMALL, "--frames", "1", *out_at(tmp_path)]
    assert main(["generate", *words]) == 0 and main(["generate", *words, "--seed", "7"]) == 0
    assert names(tmp_path / "out") == [f"000-x{seed}.{end}" for seed in ("-seed7", "") for end in ("json", "png")]
    expect_mistake(capsys, [*words, "--guidance", "3"], "2 of the files are there already, made otherwise, such as")


@pytest.mark.parametrize("fails", ["write_mp4", "write_sheet", "json"])
def test_no_video_stays_without_its_json(tiny_pipeline, tmp_path, capsys, monkeypatch, fails):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if fails == "json":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        monkeypatch.setattr(f"wanloom.runs.results.{fails}", full)
    words = ["--model", str(tiny_pipeline), "--prompt", "x", *SMALL, *out_at(tmp_path)]
    expect_mistake(capsys, words, "000-x' cannot be written: No space left on device.")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_reader_never_sees_a_video_without_its_json(tiny_pipeline, tmp_path, monkeypatch):
    """Also of a call that replaces an older one: its video and the new json are never there together."""
    words = ["generate", "--model", str(tiny_pipeline), "--prompt", "x", *SMALL, "--out", str(tmp_path)]
    assert main(words) == 0
    old, seen, replace = contents(tmp_path), [], Path.replace

    def watched(self, target):
        out = replace(self, target)
        seen.append({name: data for name, data in contents(tmp_path).items() if not name.startswith(".")})
        return out

    monkeypatch.setattr(Path, "replace", watched)
    assert main([*words, "--overwrite", "--guidance", "2"]) == 0
    new = contents(tmp_path)
    assert new["000-x.mp4"] != old["000-x.mp4"] and len(seen) >= 3
    for state in seen:
        if state.get("000-x.mp4") == old["000-x.mp4"]:
            assert state["000-x.json"] == old["000-x.json"]
        if state.get("000-x.mp4") == new["000-x.mp4"]:
            assert state["000-x.json"] == new["000-x.json"]


def test_two_calls_do_not_write_into_one_folder(tiny_pipeline, tmp_path, capsys):
    words = ["--model", str(tiny_pipeline), "--prompt", "x", *SMALL, *out_at(tmp_path)]
    with folder_for_one(tmp_path / "out", ""):
        expect_mistake(capsys, words, "Another `wanloom generate` writes into")
    assert names(tmp_path / "out") == []


def test_a_full_disk_is_one_sentence(tiny_pipeline, tmp_path, capsys, monkeypatch):
    def full(path, frames):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wanloom.runs.results.write_sheet", full)
    words = ["--model", str(tiny_pipeline), "--prompt", "x", *SMALL, *out_at(tmp_path)]
    expect_mistake(capsys, words, "000-x' cannot be written: No space left on device.")


def test_weights_of_a_run_that_are_not_finite_are_named(tiny_pipeline, tmp_path, capsys):
    def spoil(name, value):
        return value.index_fill(0, torch.tensor([0]), float("nan")) if name == "ema.head.head.bias" else value

    save_checkpoint(tmp_path / "run", tiny_pipeline, ema=True, change=spoil)
    words = ["--checkpoint", str(tmp_path / "run"), "--prompt", "x", *SMALL, *out_at(tmp_path)]
    expect_mistake(capsys, [*words, "--ema"], "step_0000030: 'head.head.bias' holds NaN or infinity")
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "c"), "--ema"]) == 2
    assert "'head.head.bias' holds NaN" in capsys.readouterr().err and not (tmp_path / "c").exists()
    assert main(["generate", *words]) == 0, "the others are whole"


def test_latents_that_are_not_finite_are_never_written(tiny_pipeline, tmp_path, capsys, monkeypatch):
    """They would be a black video."""
    monkeypatch.setattr(sampling, "unpatchify", lambda part, grid: torch.full((16, 2, 4, 6), float("inf")))
    words = ["--model", str(tiny_pipeline), "--prompt", "x", *SMALL, *out_at(tmp_path)]
    expect_mistake(capsys, words, "'000-x' cannot be decoded: The tensor of latents holds NaN or infinity")
    assert not list(tmp_path.rglob("*.*"))


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


def test_options_that_no_prompt_is_left_for_are_noted(capsys):
    prompts = [Prompt(prompt="x", seed=seed, frames=1) for seed in (1, 2)]
    given = Namespace(seed=3, height=32, width=32, frames=5, negative=None, fps=24, prompts="a.jsonl")
    note_unused(given, prompts, prompts)
    assert capsys.readouterr().err.splitlines() == [
        "note: --seed has no effect: every prompt in a.jsonl has its own.",
        "note: --frames has no effect: every prompt in a.jsonl has its own.",
        "note: --fps 24 has no effect on images.",
    ]
    other = Prompt(prompt="y")
    note_unused(given, [*prompts, other], [*prompts, *fill_in([other], 0, {"frames": 5})])
    assert capsys.readouterr().err == ""


def test_an_empty_prompt_is_noted(capsys):
    prompts = [Prompt(prompt=text, height=32, width=32, frames=5) for text in (" ", "x")]
    assert [shape_of(prompt, WAN_21) for prompt in fill_in(prompts, 0, {})] == [(16, 2, 4, 4)] * 2
    assert capsys.readouterr().err == "note: the prompt of '000' is empty, so it shows anything.\n"


@pytest.mark.parametrize(("given", "found"), [("checkpoints", "step_0000030"), (".", "step_0000030")])
def test_a_run_is_found_by_the_folder_of_its_checkpoints_too(trained, given, found):
    assert open_trained(trained / given).path.name == found
    (piece,) = (trained / "checkpoints" / found).glob("*model*.safetensors")
    with pytest.raises(UserError, match=f"is a piece of a checkpoint: give the folder, .*{found}"):
        open_trained(piece)


def test_a_long_prompt_is_cut_and_said_so(tiny_pipeline, tmp_path, capsys):
    words = ["--model", str(tiny_pipeline), "--prompt", "red " * 600, *SMALL, *out_at(tmp_path)]
    assert main(["generate", *words]) == 0
    assert "of 601 tokens only the first 512 are used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--height", "60"], "The height is 60, it must be a multiple of 16: try 48 or 64."),
        (["--width", "8"], "The width is 8, it must be a multiple of 16: try 16."),
        (["--frames", "16"], "The number of frames is 16, it must be 4n+1: try 13 or 17."),
        (["--steps", "0"], "The setting 'steps' is 0: it must be at least 1."),
        (["--shift", "-1"], "The setting 'shift' is -1.0: it must be above 0."),
        (["--guidance", "1e30"], "The setting 'guidance' is 1e+30: it must be at most 100."),
        (["--guidance", "0.5"], "The setting 'guidance' is 0.5: it must be at least 1."),
        (["--fps", "0"], "--fps is 0"),
        (["--ema"], "give the run with --checkpoint"),
        (
            ["--kernel", "flsh"],
            "There is no attention kernel 'flsh'; known are auto, cudnn, flash, efficient. Did you mean 'flash'?",
        ),
        (["--kernel", "cudnn"], "The attention kernel 'cudnn' needs a CUDA device and bf16, not cpu and float32"),
        (["--guidance", "1", "--negative", "x"], "--negative has no effect with --guidance 1"),
        (["--model", "tinny"], "There is no model 'tinny'"),
        (["--checkpoint", "nowhere"], "There is no folder nowhere"),
        (["--device", "tpu9"], "There is no device 'tpu9': give cpu, cuda, or one GPU such as cuda:1."),
        (["--out", __file__], "cannot be written"),
        (["--out", ""], "--out is empty"),
        (["--seed", "-5"], "--seed is -5, it must be at least 0 and below 2^63."),
        (["--seed", str(1 << 63)], "below 2^63"),
        (["--device", "gpu"], "There is no device 'gpu': give cpu, cuda, or one GPU such as cuda:1."),
        (
            ["--height", "16000", "--width", "16000", "--frames", "801"],
            "is not enough to make 801 frames of 16000x16000, which takes at least",
        ),
    ],
)
def test_mistakes_are_one_sentence(tiny_pipeline, tmp_path, capsys, words, message):
    model = ["--model", str(tiny_pipeline)]
    expect_mistake(capsys, [*model, "--prompt", "x", *SMALL, *out_at(tmp_path), *words], message)
    assert not list(tmp_path.rglob("*.mp4"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n  \n", "holds no prompt"),
        ("a.jsonl", '{"prompt": "x"}\n{"promt": "y"}', "There is no setting 'promt'. Did you mean 'prompt'?"),
        ("a.jsonl", '{"prompt": "x", "seed": 1.5}', "line 1: The setting 'seed' is 1.5"),
        ("a.jsonl", '{"prompt": "x", "seed": -1}', "line 1: The setting 'seed' is -1"),
        ("a.JSONL", '{"prompt": "x", "height": 33, "width": 32}', "a.JSONL', line 1: The height is 33"),
        ("a.TXT", " \n", "holds no prompt"),
        ("a.json", '[{"prompt": "x"}]', "a.json' is no file of prompts by its name: a .txt has one prompt a line"),
        ("a.csv", "x", "a.csv' is no file of prompts"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": "\\ud83d"}', "line 2 is not JSON"),
        ("a.jsonl", '\n["x"]', "line 2 is not an object"),
        ("a.jsonl", "{x", "line 1 is not JSON"),
        ("a.jsonl", '{"prompt": "x", "frames": 4}', "The number of frames is 4, it must be 4n+1: try 1 or 5."),
    ],
)
def test_mistakes_in_prompt_files_name_the_line(tiny_pipeline, tmp_path, capsys, name, text, message):
    (tmp_path / name).write_text(text)
    words = ["--model", str(tiny_pipeline), "--prompts", str(tmp_path / name), *SMALL, *out_at(tmp_path)]
    expect_mistake(capsys, words, message)
    expect_mistake(capsys, [*words[:2], "--prompts", str(tmp_path / "none.txt"), *SMALL], "read: No such file")


def test_mistakes_in_the_words_are_told_before_torch_is_imported(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "height": 33, "width": 32}')
    cases = [["--prompts", str(tmp_path / name)] for name in ("none.txt", "a.json", "a.jsonl")]
    for words in (
        ["--steps", "0"],
        ["--height", "33", "--width", "32"],
        ["--ema"],
        ["--checkpoint", "no"],
        ["--out", ""],
    ):
        cases.append(["--prompt", "x", *words])
    code = f"import sys; from wanloom.cli import main; codes = [main(['generate', *words]) for words in {cases}]; "
    code += "sys.exit('torch' in sys.modules or codes != [2] * len(codes))"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_negative_prompt_that_nothing_reads_is_an_error_in_a_file_too(tiny_pipeline, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y", "negative": "z"}')
    words = ["--model", str(tiny_pipeline), "--prompts", str(tmp_path / "a.jsonl"), *SMALL, *out_at(tmp_path)]
    expect_mistake(
        capsys, [*words, "--guidance", "1"], "The 'negative' of the prompt 'y' has no effect with --guidance 1"
    )


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


def test_a_model_of_no_known_size_asks_for_one(tiny_pipeline, tmp_path, capsys):
    words = ["--model", str(tiny_pipeline), "--prompt", "x", "--frames", "5", *out_at(tmp_path)]
    expect_mistake(capsys, words, "give --height, --width and --frames")


def test_a_run_without_an_average_says_so_before_anything_is_encoded(tiny_pipeline, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("wanloom.runs.generate.encode_texts", lambda *_: pytest.fail("encoded first"))
    save_checkpoint(tmp_path / "run", tiny_pipeline, ema=False)
    words = ["--checkpoint", str(tmp_path / "run"), "--ema", "--prompt", "x", *SMALL, *out_at(tmp_path)]
    expect_mistake(capsys, words, "has no averaged weights")


def test_parts_that_do_not_belong_together_are_noticed(tiny_pipeline, tmp_path, capsys):
    config = load_dit(tiny_pipeline).config.model_copy(update={"text_dim": 32})
    for part in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / part).symlink_to(tiny_pipeline / part)
    save_weights(WanDiT(config).state_dict(), config, tmp_path / "transformer")
    words = ["--model", str(tmp_path), "--prompt", "x", *SMALL, *out_at(tmp_path)]
    expect_mistake(capsys, words, "gives states of 64 numbers, the transformer takes 32")


def test_a_model_of_another_geometry_makes_the_size_that_is_asked_for(wan22_pipeline, tmp_path, capsys):
    """It once made 64x128 of 32x64, at 16 frames a second."""
    words = ["--model", str(wan22_pipeline), "--prompt", "x", "--steps", "1", "--device", "cpu", *out_at(tmp_path)]
    assert main(["generate", *words, "--height", "32", "--width", "64", "--frames", "5"]) == 0
    with av.open(next((tmp_path / "out").glob("*.mp4"))) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.width, stream.height, stream.average_rate) == (5, 64, 32, 24)
    expect_mistake(capsys, [*words, *SMALL], "The width is 48, it must be a multiple of 32: try 32 or 64.")


def test_a_vae_of_no_or_another_geometry_is_noticed_before_anything_is_loaded(
    tiny_pipeline, wan22_pipeline, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("wanloom.runs.generate.encode_texts", lambda *_: pytest.fail("encoded first"))
    for part in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / part).symlink_to(tiny_pipeline / part)
    (tmp_path / "transformer").symlink_to(wan22_pipeline / "transformer")
    words = ["--model", str(tmp_path), "--prompt", "x", *SMALL, *out_at(tmp_path)]
    expect_mistake(capsys, words, "has 16 channels, the transformer takes 48: they do not belong together")
    config = json.loads((wan22_pipeline / "vae" / "config.json").read_text()) | {"scale_factor_spatial": 8}
    (tmp_path / "vae").unlink()
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    expect_mistake(capsys, words, "scale_factor_spatial is 8, not 16")


def test_prompts_are_needed(capsys):
    expect_mistake(capsys, [], "One of the arguments --prompt --prompts is required.")


def test_what_the_shipped_model_does_not_know_is_said(capsys):
    """Its clips of other sentences look as if something were broken."""

    def say_of(*prompts: str) -> str:
        note_unknown([Prompt(prompt=prompt) for prompt in prompts])
        return capsys.readouterr().err

    known = "A red circle moves to the left across a dark background."
    assert say_of(known) == ""
    assert say_of("a dog") == (
        f"note: tiny was trained on small shapes in the six sentences of the demo alone, such as '{known}': with this "
        "prompt it may miss motion, colour and shape.\n"
    )
    assert "with 2 of these prompts" in say_of(known, "a dog", "A red circle moves up.")
