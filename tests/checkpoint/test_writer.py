"""Checkpoints: bit-exact, whole or absent, damage named, nothing silently skipped."""

import json
import re
import resource
import shutil
import threading
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, load

from wanloom.checkpoint import saved
from wanloom.checkpoint import writer as module
from wanloom.checkpoint.pieces import CHUNK
from wanloom.checkpoint.saved import find_checkpoint, find_damage, list_checkpoints, read_state, seal
from wanloom.checkpoint.settings import CheckpointConfig
from wanloom.checkpoint.writer import Checkpointer, load_tensors, load_weights
from wanloom.errors import UserError
from wanloom.model.settings import DiTConfig
from wanloom.runs.trained import open_checkpoint
from wanloom.threads import one_thread

CONFIG = DiTConfig(dim=8, ffn_dim=8, num_heads=1, num_layers=1)


def build_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    names = [f"{kind}.{name}" for kind in ("model", "ema", "optimizer.exp_avg") for name in ("a.weight", "b")]
    return {name: torch.randn(9, 5, generator=g) if "a" in name else torch.randn(7, generator=g) for name in names}


def save_steps(run, steps, keep=5, tensors=None) -> None:
    checkpointer = Checkpointer(run, CheckpointConfig(every=1, keep=keep))
    for step in steps:
        state = {"step": step, "model": CONFIG.model_dump()}
        checkpointer.save(step, tensors or build_tensors(step), state, f"seed: {step}\n")
    checkpointer.wait()
    checkpointer.close()


@pytest.mark.parametrize("file_bytes", [2**30, 200])
def test_tensors_come_back_bit_for_bit(tmp_path, monkeypatch, file_bytes):
    monkeypatch.setattr(module, "FILE_BYTES", file_bytes)
    save_steps(tmp_path, [3])
    folder = find_checkpoint(tmp_path)
    assert folder == tmp_path / "checkpoints" / "step_0000003" == find_checkpoint(folder)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (file_bytes == 200)
    assert (folder / "run.yaml").read_text() == "seed: 3\n"
    saved, loaded = build_tensors(3), {name: torch.zeros_like(t) for name, t in build_tensors(3).items()}
    load_tensors(folder, loaded)
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    config, weights = load_weights(folder, ema=False)
    assert config == CONFIG and weights.keys() == {"a.weight", "b"}
    assert torch.equal(weights["b"], saved["model.b"])
    assert torch.equal(load_weights(folder, ema=True)[1]["a.weight"], saved["ema.a.weight"])


def test_a_file_is_what_torch_and_safetensors_take(tmp_path):
    """Also of several types, a scalar, nothing, and more than one chunk."""
    tensors = build_tensors() | {
        "model.half": torch.randn(5).bfloat16(),
        "model.double": torch.randn(3, 2).double(),
        "model.scalar": torch.randn(()),
        "model.none": torch.randn(0, 3),
        "model.large": torch.randn(CHUNK // 4 + 3),
        "model.turned": torch.randn(4, 3).T,
    }
    save_steps(tmp_path, [1], tensors=tensors)
    folder = find_checkpoint(tmp_path)
    files = list(folder.glob("*.safetensors"))
    plain = load_file(files[0])
    assert len(files) == 1 and all(torch.equal(plain[name], tensors[name]) for name in tensors | plain)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load(loaded, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    load_tensors(folder, loaded := {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_what_is_saved_is_the_moment_of_the_call(tmp_path):
    tensors = build_tensors()
    expected = {name: t.clone() for name, t in tensors.items()}
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    checkpointer.save(1, tensors, {"step": 1, "model": {}}, "")
    for tensor in tensors.values():
        tensor.zero_()
    checkpointer.wait()
    checkpointer.close()
    load_tensors(find_checkpoint(tmp_path), tensors)
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


def test_threads_are_as_many_as_before(tmp_path):
    """Saving and loading copy by one thread, also when they fail."""
    tensors = build_tensors()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        save_steps(tmp_path, [1], tensors=tensors)
        assert torch.get_num_threads() == 2
        load_tensors(find_checkpoint(tmp_path), tensors)
        assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_newest_are_kept_and_leftovers_of_a_kill_go(tmp_path):
    leftover = tmp_path / "checkpoints" / "step_0000009.partial"
    leftover.mkdir(parents=True)
    (leftover / "half").write_text("x")
    save_steps(tmp_path, [1, 2, 3, 10_000_000], keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_0000003", "step_10000000"]
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_what_ends_the_reading_is_what_is_raised(tmp_path, monkeypatch, error):
    """torch makes an error of its own of all of it, which nothing here would catch."""
    tensors = {"model.a": torch.randn(3)}
    saver = Checkpointer(tmp_path, CheckpointConfig())
    saver.save(1, tensors, {"step": 1}, "")
    saver.wait()
    saver.close()

    def read(*_):
        raise error

    monkeypatch.setattr("wanloom.checkpoint.pieces.StoredPieces.read_data", read)
    with pytest.raises(type(error)):
        load_tensors(tmp_path / "checkpoints" / "step_0000001", tensors)


def test_links_among_the_checkpoints_are_links(tmp_path):
    """As made by hand, to have a checkpoint on another disk; what they lead to is left alone."""
    save_steps(tmp_path, [1, 2])
    folder, away = tmp_path / "checkpoints", tmp_path / "away"
    (folder / "step_0000001").rename(away)
    (folder / "step_0000001").symlink_to(away)
    (folder / "old.partial").symlink_to(away)
    (folder / "file.partial").write_text("x")
    load_tensors(folder / "step_0000001", build_tensors())
    save_steps(tmp_path, [3], keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step_0000002", "step_0000003"]
    assert find_damage(away) is None


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


def damage_state(folder):
    (folder / "state.json").write_text('{"step": 3, ')
    return "state.json cannot be read"


def damage_add(folder):
    (folder / "more.safetensors").write_bytes(b"x")
    return "more.safetensors does not belong to it"


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


def rewrite(folder, header):
    """Put another file in the place of the only one, and its sums in state.json, as its own program would."""
    file = next(folder.glob("*.safetensors"))
    save_file({"model.b": torch.zeros(7)}, file, metadata=header)
    state = json.loads((folder / "state.json").read_text())
    state.pop("crc32", None)
    state["files"] = {file.name: {"bytes": file.stat().st_size, "crc32": zlib.crc32(file.read_bytes())}}
    (folder / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    "sharding",
    [
        "{",
        "[]",
        '{"model.c": {}}',
        '{"model.b": 3}',
        '{"model.b": {"saved_offsets": "x"}}',
        '{"model.b": {"saved_offsets": [1]}}',
        '{"model.b": {"saved_offsets": [-1]}}',
        '{"model.b": {"saved_offsets": [0, 0]}}',
        '{"model.b": {"saved_offsets": [0.5]}}',
        '{"model.b": {"saved_offsets": [1000000000000000000000000]}}',
    ],
)
def test_an_odd_header_is_a_sentence(tmp_path, sharding):
    save_steps(tmp_path, [3])
    folder = find_checkpoint(tmp_path)
    rewrite(folder, {"DCP_SHARDING_INFO": sharding})
    for read in (lambda: load_tensors(folder, {"model.b": torch.ones(7)}), lambda: load_weights(folder, ema=False)):
        with pytest.raises(UserError, match="headers of its files cannot be read"):
            read()
    rewrite(folder, {"DCP_SHARDING_INFO": '{"model.b": {"saved_offsets": [0]}}'})
    load_tensors(folder, tensors := {"model.b": torch.ones(7)})
    assert tensors["model.b"].eq(0).all()


def test_the_one_before_is_so_by_its_number(tmp_path):
    save_steps(tmp_path, [9_999_999, 10_000_000, 10_000_001])
    folder = tmp_path / "checkpoints"
    damage_truncate(folder / "step_10000000")
    with pytest.raises(UserError, match=r"step_9999999, is whole"):
        load_tensors(folder / "step_10000000", build_tensors())
    damage_truncate(folder / "step_9999999")
    with pytest.raises(UserError, match="no older whole checkpoint"):
        load_tensors(folder / "step_9999999", build_tensors())


def test_values_are_rounded_to_the_dtype_that_is_asked_for(tmp_path):
    save_steps(tmp_path, [1])
    exact, rounded = build_tensors(7), {name: tensor.bfloat16() for name, tensor in build_tensors(7).items()}
    for tensors in (exact, rounded):
        load_tensors(find_checkpoint(tmp_path), tensors)
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)
    with pytest.raises(UserError, match="does not fit"):
        load_tensors(find_checkpoint(tmp_path), {"model.b": torch.zeros(7, dtype=torch.int64)})


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    save_steps(tmp_path, [1])
    other = build_tensors() | {"model.b": torch.zeros(8), "model.c": torch.zeros(1)}
    with pytest.raises(UserError, match=r"does not fit this model: 2 tensors differ, such as model\.b, model\.c"):
        load_tensors(find_checkpoint(tmp_path), other)
    save_steps(tmp_path, [2], tensors={name: t for name, t in build_tensors().items() if "ema" not in name})
    with pytest.raises(UserError, match="no averaged weights"):
        load_weights(find_checkpoint(tmp_path), ema=True)


def test_a_folder_without_a_checkpoint_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(UserError, match="There is no folder"):
        find_checkpoint(tmp_path / "nothing")


def test_a_disk_that_takes_no_more_leaves_the_last_checkpoint(tmp_path):
    """The system refuses the write itself: the same way as a full disk, at the same place."""
    save_steps(tmp_path, [1])
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(every=1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        checkpointer.save(2, build_tensors(2), {"step": 2, "model": {}}, "")
        with pytest.raises(UserError) as caught:
            checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        checkpointer.close()
    message = str(caught.value)
    assert "checkpoint of step 2 could not be written: File too large. The last whole checkpoint is" in message
    assert "step_0000001" in message and "Make room" in message
    assert not list(tmp_path.rglob("*.partial"))
    load_tensors(find_checkpoint(tmp_path), loaded := build_tensors(7))
    assert torch.equal(loaded["model.b"], build_tensors(1)["model.b"])


def test_state_lists_the_files(tmp_path):
    save_steps(tmp_path, [4])
    state = json.loads((find_checkpoint(tmp_path) / "state.json").read_text())
    assert state["step"] == 4 and len(state["files"]) == 1
