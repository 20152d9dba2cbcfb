"""`wanloom convert`: WanPipeline loads what it writes and gives what `wanloom generate` gives."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from wanloom.checkpoint.settings import CheckpointConfig
from wanloom.checkpoint.writer import Checkpointer
from wanloom.cli import main
from wanloom.codecs.text import TextCodec
from wanloom.errors import UserError
from wanloom.files import whole_folder
from wanloom.formats.transformer import load_dit
from wanloom.geometry import WAN_21
from wanloom.sample.generate import Request, draw_request_noise, generate
from wanloom.sample.settings import GenerateConfig
from wanloom.sample.solvers import build_scheduler

pytestmark = pytest.mark.slow

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
    shape = WAN_21.latents_shape(9, 48, 64)
    config = GenerateConfig(steps=8, shift=5.0, guidance=4.0)
    ((_, got),) = generate(model.requires_grad_(False), [Request(shape, 7, text, negative)], config)
    want = from_pipeline(out, draw_request_noise(shape, 7), "latent")
    assert (got - want).abs().max() < 1e-3 * want.abs().max()
    # pixels, through the command
    still = draw_request_noise(WAN_21.latents_shape(1, 48, 64), 3)
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
        [str(trained), out, "--model", str(tmp_path / "half")],
        "half' has no vae, text_encoder, scheduler: give a whole",
    )

    def full(source, place):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    expect([str(trained), out], f"wanloom: '{out}' cannot be written: No space left on device.")
    assert {p.name for p in tmp_path.iterdir()} == {"there", "half"}


def make(words: list[str], out: Path) -> bytes:
    """The picture of a call of `wanloom generate`."""
    small = ["--height", "32", "--width", "32", "--frames", "1", "--steps", "2", "--device", "cpu", "--prompt", "x"]
    assert main(["generate", *words, *small, "--out", str(out)]) == 0
    return (out / "000-x.png").read_bytes()


def test_what_is_written_is_read_back_in_either_layout(trained, tiny_pipeline, tmp_path, capsys):
    """By generate as a model or as weights, and by convert again: the same pictures and the same numbers."""
    for layout in ("diffusers", "original"):
        assert main(["convert", str(trained), str(tmp_path / layout), "--layout", layout, "--ema"]) == 0
    want = make(["--checkpoint", str(trained), "--ema"], tmp_path / "1")
    file = tmp_path / "original" / "diffusion_pytorch_model.safetensors"
    assert make(["--model", str(tmp_path / "diffusers")], tmp_path / "2") == want
    assert make(["--model", str(tmp_path / "original")], tmp_path / "3") == want
    assert make(["--checkpoint", str(tmp_path / "original")], tmp_path / "4") == want
    assert make(["--checkpoint", str(file), "--model", str(tiny_pipeline)], tmp_path / "5") == want
    note = json.loads((tmp_path / "3" / "000-x.json").read_text())
    assert note["checkpoint"] == str(tmp_path / "original") and note["model"] == str(tiny_pipeline)
    assert main(["convert", str(tmp_path / "original"), str(tmp_path / "again")]) == 0
    first, again = (tmp_path / name / "transformer" for name in ("diffusers", "again"))
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}
    (tmp_path / "original" / "wanloom.json").unlink()
    capsys.readouterr()
    for words in (["generate", "--prompt", "x", "--model"], ["convert"]):
        out = [str(tmp_path / "no")] if words == ["convert"] else []
        assert main([*words, str(tmp_path / "original"), *out]) == 2
        assert "is a transformer alone: give the pipeline" in capsys.readouterr().err
    assert main(["convert", str(file), str(tmp_path / "no"), "--ema"]) == 2
    assert "one set of weights and no average" in capsys.readouterr().err


def test_the_average_has_an_identity_of_its_own(trained, tmp_path):
    found = set()
    for number, words in enumerate([["--ema"], []]):
        make(["--checkpoint", str(trained), *words], tmp_path / str(number))
        found.add(json.loads((tmp_path / str(number) / "000-x.json").read_text())["identity"]["transformer"])
    assert len(found) == 2


def test_files_are_readable_by_whom_the_user_lets(trained, tmp_path):
    before = os.umask(0o027)
    try:
        assert main(["convert", str(trained), str(tmp_path / "d")]) == 0
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "d").rglob("*") if path.is_file()}
    assert modes == {0o640}


def test_settings_go_with_the_model(trained, tiny_pipeline, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for part in tiny_pipeline.iterdir():
        (model / part.name).symlink_to(part)
    (model / "wanloom.json").write_text('{"generate": {"height": 32, "width": 48, "frames": 1, "steps": 3}}')
    assert main(["convert", str(trained), str(tmp_path / "out"), "--model", str(model)]) == 0
    assert main(["generate", "--model", str(tmp_path / "out"), "--prompt", "x", "--out", str(tmp_path / "made")]) == 0
    note = json.loads((tmp_path / "made" / "000-x.json").read_text())
    assert [note[key] for key in ("height", "width", "frames", "steps", "guidance")] == [32, 48, 1, 3, 5.0]


def test_two_do_not_write_one_folder(trained, tmp_path, capsys):
    with whole_folder(tmp_path / "out", "") as folder:
        (folder / "mine").touch()
        assert main(["convert", str(trained), str(tmp_path / "out")]) == 2
        assert "Another `wanloom convert` is writing" in capsys.readouterr().err
        assert (folder / "mine").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_sigterm_leaves_nothing(trained, tmp_path, monkeypatch):
    def stopped(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", stopped)
    assert main(["convert", str(trained), str(tmp_path / "out")]) == 143
    assert list(tmp_path.iterdir()) == []


def test_a_stop_that_a_library_makes_an_error_of_is_a_stop(trained, tmp_path, capsys, monkeypatch):
    """safetensors, interrupted while it reads, calls a whole file broken."""

    def stopped(*_, **__):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise UserError("The file is damaged: fetch it again.") from error

    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", stopped)
    assert main(["convert", str(trained), str(tmp_path / "out")]) == 143
    assert "damaged" not in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_link_in_the_way_is_replaced_and_what_it_leads_to_stays(trained, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "film.mp4").touch()
    (tmp_path / ".out.partial").symlink_to(tmp_path / "mine")
    assert main(["convert", str(trained), str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]
    assert (tmp_path / "mine" / "film.mp4").exists()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert main(["convert", str(trained), str(tmp_path / "link")]) == 2
    assert "is there already" in capsys.readouterr().err


def test_what_was_killed_while_it_wrote_another_folder_is_cleared_too(trained, tmp_path):
    for name in (".other.partial", ".foreign.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half.safetensors").write_bytes(b"cut")
    (tmp_path / ".other.partial" / ".lock").touch()
    with whole_folder(tmp_path / "third", ""):
        assert main(["convert", str(trained), str(tmp_path / "out")]) == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == [".foreign.partial", ".third.partial", "out"]


def test_what_a_killed_start_left_is_cleared(trained, tmp_path):
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "half.safetensors").write_bytes(b"cut")
    assert main(["convert", str(trained), str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert not (tmp_path / "out" / "half.safetensors").exists()
