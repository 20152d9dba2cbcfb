"""`wanloom convert`: WanPipeline loads what it writes and gives what `wanloom generate` gives."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from wanloom.cli import main
from wanloom.codecs.text import TextCodec
from wanloom.model.weights import load_dit
from wanloom.sample.generate import GenerateConfig, Request, draw_request_noise, generate, latents_shape
from wanloom.sample.solvers import build_scheduler
from wanloom.train.checkpoint import Checkpointer
from wanloom.train.settings import CheckpointConfig

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
PROMPT, NEGATIVE = "A red circle moves to the left.", "a cat in snow"


@pytest.fixture(scope="module")
def trained(tiny_pipeline, tmp_path_factory) -> Path:
    """A run with checkpoints of steps 10 and 20; weights and averages all differ."""
    run_dir = tmp_path_factory.mktemp("run")
    model = load_dit(tiny_pipeline)
    generator = torch.Generator().manual_seed(8)
    saver = Checkpointer(run_dir, CheckpointConfig())
    for step in (10, 20):
        tensors = {
            prefix + name: value + 0.02 * torch.randn(value.shape, generator=generator)
            for name, value in model.state_dict().items()
            for prefix in ("model.", "ema.")
        }
        state = {"step": step, "model": model.config.model_dump()}
        saver.save(step, tensors, state, json.dumps({"model": str(tiny_pipeline), "ema": {"decay": 0.9}}))
    saver.wait()
    saver.close()
    return run_dir


def checkpoint_tensors(run_dir: Path, step: int, prefix: str) -> dict[str, torch.Tensor]:
    folder = run_dir / "checkpoints" / f"step_{step:07d}"
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= {k.removeprefix(prefix): v for k, v in load_file(file).items() if k.startswith(prefix)}
    return found


def from_pipeline(folder: Path, noise: torch.Tensor, output_type: str) -> torch.Tensor | np.ndarray:
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = build_scheduler("unipc", shift=5.0)
    _, frames, height, width = noise.shape
    return pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        height=8 * height,
        width=8 * width,
        num_frames=4 * frames - 3,
        num_inference_steps=8,
        guidance_scale=4.0,
        latents=noise[None],
        output_type=output_type,
    ).frames[0]


@pytest.mark.parametrize("ema", [False, True])
def test_wan_pipeline_gives_what_generate_gives(trained, tmp_path, ema, capsys):
    out, flag = tmp_path / "converted", ["--ema"] if ema else []
    assert main(["convert", str(trained), str(out), *flag]) == 0
    assert "weights of step 20 in diffusers layout" in capsys.readouterr().out
    # latents, with the checkpoint's tensors put into a model by hand
    model = load_dit(json.loads((out / "wanloom.json").read_text())["model"])
    model.load_state_dict(checkpoint_tensors(trained, 20, "ema." if ema else "model."))
    text, negative = TextCodec.load(out, "cpu").encode([PROMPT, NEGATIVE])
    noise = draw_request_noise(latents_shape(16, 9, 48, 64), 7)
    config = GenerateConfig(steps=8, shift=5.0, guidance=4.0)
    ((_, got),) = generate(model.requires_grad_(False), [Request(noise, text, negative)], config)
    want = from_pipeline(out, noise, "latent")
    assert (got - want).abs().max() < 1e-3 * want.abs().max()
    # pixels, through the command
    still = draw_request_noise(latents_shape(16, 1, 48, 64), 3)
    words = ["--checkpoint", str(trained), *flag, "--prompt", PROMPT, "--negative", NEGATIVE, "--seed", "3"]
    sizes = ["--height", "48", "--width", "64", "--frames", "1", "--steps", "8", "--guidance", "4", "--device", "cpu"]
    assert main(["generate", *words, *sizes, "--out", str(tmp_path / "made")]) == 0
    with Image.open(next((tmp_path / "made").glob("*.png"))) as picture:
        shown = np.asarray(picture).astype(int)
    assert np.abs(shown - (255 * from_pipeline(out, still, "np")[0]).round()).max() <= 1


def test_both_layouts_hold_the_same_numbers_under_their_names(trained, tmp_path):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    step = str(trained / "checkpoints" / "step_0000010")
    assert main(["convert", step, str(tmp_path / "d")]) == 0
    assert main(["convert", step, str(tmp_path / "o"), "--layout", "original"]) == 0
    ours = checkpoint_tensors(trained, 10, "model.")
    diffusers = load_file(tmp_path / "d" / "transformer" / "diffusion_pytorch_model.safetensors")
    original = load_file(tmp_path / "o" / "diffusion_pytorch_model.safetensors")
    theirs = convert_wan_transformer_to_diffusers(dict(original))  # diffusers' own table of names
    assert theirs.keys() == diffusers.keys() and len(ours) == len(diffusers)
    assert all(torch.equal(theirs[name], diffusers[name]) for name in theirs)
    for folder in ("d", "o"):
        back = load_dit(tmp_path / folder).state_dict()
        assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    assert (config["_class_name"], config["model_type"], config["text_len"]) == ("WanModel", "t2v", 512)


def test_the_folders_are_complete_and_say_where_they_come_from(trained, tiny_pipeline, tmp_path):
    assert main(["convert", str(trained), str(tmp_path / "d"), "--ema"]) == 0
    copied = ("vae", "text_encoder", "tokenizer", "scheduler")
    assert {p.name for p in (tmp_path / "d").iterdir()} == {*copied, "transformer", "model_index.json", "wanloom.json"}
    for path in tiny_pipeline.rglob("*"):
        place = tmp_path / "d" / path.relative_to(tiny_pipeline)
        if path.is_file() and "transformer" not in path.parts:
            assert place.read_bytes() == path.read_bytes()
    note = json.loads((tmp_path / "d" / "wanloom.json").read_text())
    assert note["step"] == 20 and note["ema"] and note["checkpoint"].endswith("step_0000020")
    assert main(["convert", str(trained), str(tmp_path / "o"), "--layout", "original"]) == 0
    names = {str(p.relative_to(tmp_path / "o")) for p in (tmp_path / "o").rglob("*") if p.is_file()}
    tokenizer = {f"google/umt5-xxl/{p.name}" for p in (tiny_pipeline / "tokenizer").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors", "wanloom.json", *tokenizer}
    assert not list(tmp_path.glob(".*"))


def test_links_become_files(trained, tiny_pipeline, tmp_path):
    linked = tmp_path / "linked"  # as the hub's cache keeps them
    for path in tiny_pipeline.rglob("*"):
        if path.is_file():
            place = linked / path.relative_to(tiny_pipeline)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)
    assert main(["convert", str(trained), str(tmp_path / "out"), "--model", str(linked)]) == 0
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))


def test_mistakes_are_one_sentence_and_leave_nothing(trained, tiny_pipeline, tmp_path, capsys, monkeypatch):
    def expect(words: list[str], message: str) -> None:
        assert main(["convert", *words]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]

    (tmp_path / "there").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "tokenizer").symlink_to(tiny_pipeline / "tokenizer")
    out = str(tmp_path / "out")
    expect([str(trained), str(tmp_path / "there")], "is there already: give a new folder")
    expect([str(tmp_path / "no"), out], "There is no folder")
    expect([str(tmp_path / "there"), out], "holds no checkpoint")
    expect(
        [str(trained), out, "--model", str(tmp_path / "half")], "has no model_index.json, vae, text_encoder, scheduler"
    )

    def full(source, place):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copytree", full)
    expect([str(trained), out], "cannot be written: No space left on device")
    assert {p.name for p in tmp_path.iterdir()} == {"there", "half"}


def test_what_a_killed_start_left_is_cleared(trained, tmp_path):
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "half.safetensors").write_bytes(b"cut")
    assert main(["convert", str(trained), str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert not (tmp_path / "out" / "half.safetensors").exists()
