"""`wanloom generate` that is stopped, or has no disk or no finite numbers: what is done stays, and is whole."""

import os
import signal
from pathlib import Path

import pytest
import torch
from generated import SMALL, contents, expect_mistake, names, out_at, save_checkpoint

from wanloom.cli import main
from wanloom.codecs.vae import VaeCodec
from wanloom.errors import UserError
from wanloom.files import folder_for_one
from wanloom.runs.results import write_result
from wanloom.sample import generate as sampling

pytestmark = pytest.mark.slow


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
