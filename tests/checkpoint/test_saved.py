"""Checkpoints on the disk: which are whole, what damages one, and what is odd in one is a sentence."""

import json
import re
import shutil
import threading

import pytest
from saved_weights import load_weights
from small_checkpoints import build_tensors, save_steps

from wanloom.checkpoint import saved
from wanloom.checkpoint import writer as module
from wanloom.checkpoint.saved import find_checkpoint, find_damage, read_state, seal
from wanloom.checkpoint.writer import load_tensors
from wanloom.errors import UserError
from wanloom.runs.trained import open_checkpoint


def damage_truncate(folder):
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    return f"{file.name} has 100 bytes instead of"


def damage_flip(folder):
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 16
    file.write_bytes(data)
    return f"the content of {file.name} has changed"


def damage_remove(folder):
    file = next(folder.glob("*.safetensors"))
    file.unlink()
    return f"{file.name} is missing"


def damage_state(folder):
    (folder / "state.json").write_text('{"step": 3, ')
    return "state.json cannot be read"


def damage_add(folder):
    (folder / "more.safetensors").write_bytes(b"x")
    return "more.safetensors does not belong to it"


def damage_number(folder):
    """One digit of what a run goes on with."""
    path = folder / "state.json"
    path.write_text(path.read_text().replace('"num_layers": 1', '"num_layers": 3'))
    return "state.json cannot be read (its content has changed)"


def damage_recipe(folder):
    (folder / "run.yaml").write_text("seed: 7\n")
    return "the content of run.yaml has changed"


def damage_recipe_away(folder):
    (folder / "run.yaml").unlink()
    return "run.yaml is missing"


def damage_step(folder):
    """The state of another checkpoint of the run."""
    shutil.copy(folder.with_name("step_0000001") / "state.json", folder)
    return "state.json is of step 1, and the folder has another name"


def damage_copy(folder):
    """Another checkpoint under this name, all of it."""
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step_0000001"), folder)
    return "state.json is of step 1, and the folder has another name"


DAMAGES = [damage_add, damage_truncate, damage_flip, damage_remove, damage_state]
DAMAGES += [damage_number, damage_recipe, damage_recipe_away, damage_step, damage_copy]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_last_whole_one_is_offered(tmp_path, damage):
    save_steps(tmp_path, [1, 2, 3])
    newest = find_checkpoint(tmp_path)
    damage_truncate(tmp_path / "checkpoints" / "step_0000002")
    expected = damage(newest)
    for read in (lambda: load_tensors(newest, build_tensors()), lambda: load_weights(newest, ema=False)):
        with pytest.raises(UserError) as caught:
            read()
        message = str(caught.value)
        assert expected in message and str(newest) in message
        assert f"{tmp_path / 'checkpoints' / 'step_0000001'}, is whole" in message
    damage_flip(tmp_path / "checkpoints" / "step_0000001")
    with pytest.raises(UserError, match="no older whole checkpoint"):
        load_tensors(newest, build_tensors())


def test_files_are_read_beside_each_other_and_the_first_damaged_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FILE_BYTES", 100)
    save_steps(tmp_path, [1])
    folder = find_checkpoint(tmp_path)
    files, both, checksum = sorted(folder.glob("*.safetensors")), threading.Barrier(2), saved._checksum

    def meet(path) -> int:
        if path.name != "run.yaml":
            both.wait(timeout=20)
        return checksum(path)

    monkeypatch.setattr(saved, "_checksum", meet)
    assert len(files) == 6 and find_damage(folder) is None
    monkeypatch.setattr(saved, "_checksum", checksum)
    files[4].unlink()
    for place in (3, 1):
        data = bytearray(files[place].read_bytes())
        data[-1] ^= 1
        files[place].write_bytes(data)
        assert find_damage(folder) == f"the content of {files[place].name} has changed"
    assert find_damage(folder, 4, 6) == f"{files[4].name} is missing" and find_damage(folder, 0, 2) is not None
    assert find_damage(folder, 2, 6) is None


def test_a_copy_under_a_name_of_its_own_is_whole(tmp_path):
    save_steps(tmp_path, [3])
    shutil.copytree(find_checkpoint(tmp_path), tmp_path / "best")
    assert find_checkpoint(tmp_path / "best") == tmp_path / "best" and find_damage(tmp_path / "best") is None
    load_tensors(tmp_path / "best", build_tensors())


ODD_RECIPES = {
    b"seed: 3": "of the run: 'model'",  # not in it
    b"[1, 2]": "it holds no settings",
    b"model: 3\nema: {decay: null}": "of the run: it is 3",
    b"model: tiny\nema: 3": "does not tell the model",
    b"[" * 50_000: "nested more than",
    b"model: \xff": "can't decode byte 0xff",
    b"a: 1\na: 2": "the key 'a' is given twice",
}


@pytest.mark.parametrize("data", ODD_RECIPES, ids=range(len(ODD_RECIPES)))
def test_an_odd_recipe_beside_weights_is_a_sentence(tmp_path, data):
    save_steps(tmp_path, [3])
    folder = find_checkpoint(tmp_path)
    (folder / "run.yaml").write_bytes(data)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(seal(state, data)))
    with pytest.raises(UserError, match=f"run.yaml.*{re.escape(ODD_RECIPES[data])}") as caught:
        open_checkpoint(folder, ema=False)
    assert len(str(caught.value)) < 400


ODD_STATES = {
    "[1, 2]": "it is not an object",
    '{"step": 3, "model": {}}': "files: Field required",
    '{"step": "3", "model": {}, "files": {}}': "step: Input should be a valid integer",
    '{"step": 3, "model": {}, "files": {}, "tokens": null}': "tokens: Input",
    '{"step": -3, "model": {}, "files": {}}': "step: Input should be greater than or equal to 0",
    '{"step": 3, "model": {}, "files": {}, "samples": 9999999999999999999999}': "samples: Input should be less than",
    '{"step": 3, "model": {}, "files": {}, "data": null}': "data: Input should be a valid string",
    '{"step": 3, "model": {}, "files": {"../a.safetensors": {"bytes": 1, "crc32": 1}}}': "files.../a.safetensors",
    '{"step": 3, "model": {}, "files": {"a.safetensors": {"bytes": 1}}}': "files.a.safetensors.crc32: Field required",
    "[" * 100_000: "nested too deeply",
    "\x00": "state.json cannot be read",
}


@pytest.mark.parametrize("text", ODD_STATES, ids=range(len(ODD_STATES)))
def test_an_odd_state_is_a_sentence(tmp_path, text):
    save_steps(tmp_path, [3])
    folder = find_checkpoint(tmp_path)
    (folder / "state.json").write_text(text)
    for read in (lambda: load_tensors(folder, build_tensors()), lambda: read_state(folder)):
        with pytest.raises(UserError, match=r"is damaged: state\.json cannot be read \(") as caught:
            read()
        assert ODD_STATES[text] in str(caught.value)


def test_the_one_before_is_so_by_its_number(tmp_path):
    save_steps(tmp_path, [9_999_999, 10_000_000, 10_000_001])
    folder = tmp_path / "checkpoints"
    damage_truncate(folder / "step_10000000")
    with pytest.raises(UserError, match=r"step_9999999, is whole"):
        load_tensors(folder / "step_10000000", build_tensors())
    damage_truncate(folder / "step_9999999")
    with pytest.raises(UserError, match="no older whole checkpoint"):
        load_tensors(folder / "step_9999999", build_tensors())


def test_a_folder_without_a_checkpoint_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(UserError, match="There is no folder"):
        find_checkpoint(tmp_path / "nothing")
