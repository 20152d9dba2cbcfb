"""Mistakes of `wanloom generate` are one sentence, and what has no effect is noted."""

import json
import subprocess
import sys
from argparse import Namespace

import pytest
from generated import SMALL, expect_mistake, out_at, save_checkpoint

from wanloom.cli import main
from wanloom.cli.generate import note_unknown, note_unused
from wanloom.formats.transformer import load_dit, save_weights
from wanloom.geometry import WAN_21
from wanloom.model.dit import WanDiT
from wanloom.runs.generate import shape_of
from wanloom.sample.prompts import Prompt, fill_in

pytestmark = pytest.mark.slow


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
