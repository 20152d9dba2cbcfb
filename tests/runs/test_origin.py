"""Prepared data is compared to the VAE and text encoder of the run's model, wherever it lies."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save

from wanloom.codecs.identity import ENCODERS, encoder_identity
from wanloom.data.places import DONE
from wanloom.data.shards import Dataset
from wanloom.data.tar import END, tar_pair
from wanloom.errors import UserError
from wanloom.runs.origin import check_origins, note_unhashed
from wanloom.runs.recipe import build_run


def notes(model: str | Path, *sources: str | Path) -> list[str]:
    said: list[str] = []
    paths = ", ".join(f"{{path: '{path}'}}" for path in sources)
    check_origins(build_run("tiny", [f"model='{model}'", f"data.sources=[{paths}]"]), said.append)
    return said


def write_origin(folder: str, pipeline: Path, **changes: str | None) -> str:
    settings = {"frames": 17, **{name: encoder_identity(pipeline, name) for name in ENCODERS}, **changes}
    with fsspec.open(f"{folder}/{DONE}", "w") as file:
        file.write(json.dumps({"settings": {k: v for k, v in settings.items() if v is not None}, "input": "x"}))
    return folder


@pytest.fixture(params=["local", "memory"])
def place(request, tmp_path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"


def test_data_of_the_same_model_passes_without_a_word(tiny_pipeline, place):
    assert notes(tiny_pipeline, write_origin(place, tiny_pipeline)) == []


def test_another_vae_is_an_error_in_any_source(tiny_pipeline, place, tmp_path):
    good, bad = write_origin(str(tmp_path), tiny_pipeline), write_origin(f"{place}/b", tiny_pipeline, vae="0" * 16)
    with pytest.raises(UserError, match="/b was prepared with another VAE than that of"):
        notes(tiny_pipeline, good, bad)


def test_another_text_encoder_is_a_note(tiny_pipeline, place):
    (note,) = notes(tiny_pipeline, write_origin(place, tiny_pipeline, **{"text-encoder": "0-1"}))
    assert f"{place} was prepared with other text encoder files than those of" in note


def test_what_cannot_be_compared_is_said(tiny_pipeline, tmp_path):
    (tmp_path / "a").mkdir()
    source = write_origin(str(tmp_path / "a"), tiny_pipeline, vae=None)
    (note,) = notes(tiny_pipeline, source)
    assert "with the VAE of" in note and "there is no prepare.json that says" in note
    assert len(notes(tiny_pipeline, tmp_path)) == 2  # no prepare.json at all
    unknown = notes("nobody-at-all/not-fetched", source)
    assert len(unknown) == 2 and all("is not checked: that is not on this machine" in note for note in unknown)
    shutil.copytree(tiny_pipeline / "vae", tmp_path / "part" / "vae")
    (note,) = notes(tmp_path / "part", write_origin(str(tmp_path), tiny_pipeline))
    assert "with the text encoder of" in note and "is not checked" in note


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"settings": 3}'])
def test_a_damaged_record_is_said(tiny_pipeline, tmp_path, damage):
    (tmp_path / DONE).write_text(damage)
    with pytest.raises(UserError, match=r"prepare\.json is damaged"):
        notes(tiny_pipeline, tmp_path)


def test_samples_whose_content_cannot_be_compared_are_a_note(tmp_path):
    """As folders of others have them: safetensors and json, without a sha256."""
    tensors = {"latents": torch.zeros(16, 1, 4, 4).bfloat16(), "text": torch.zeros(3, 64)}
    ours = tar_pair("ours", tensors, {"caption": "x"}) + END
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.tar").write_bytes(ours)
    said: list[str] = []
    note_unhashed([Dataset.open(tmp_path), "made up"], said.append)
    assert said == []
    with tarfile.open(tmp_path / "train" / "b.tar", "w") as tar:
        for name, data in (("x.safetensors", save(tensors)), ("x.json", b'{"caption": "x"}')):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    (tmp_path / "index.parquet").unlink()
    note_unhashed([Dataset.open(tmp_path)], said.append)
    assert said == [
        f"note: 1 sample of {tmp_path} without a sha256, as in folders that others made: whether the content stays the "
        "same is not checked, only names and lengths are."
    ]
