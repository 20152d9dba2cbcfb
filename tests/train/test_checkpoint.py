"""Checkpoints: bit-exact, whole or absent, damage named, nothing silently skipped."""

import json
import resource

import pytest
import torch

from wanloom.config import UserError
from wanloom.model.dit import DiTConfig
from wanloom.train import checkpoint as module
from wanloom.train.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    find_checkpoint,
    list_checkpoints,
    load_tensors,
    load_weights,
)

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


def test_what_is_saved_is_the_moment_of_the_call(tmp_path):
    tensors = build_tensors()
    expected = {name: t.clone() for name, t in tensors.items()}
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    checkpointer.save(1, tensors, {"step": 1}, "")
    for tensor in tensors.values():
        tensor.zero_()
    checkpointer.wait()
    checkpointer.close()
    load_tensors(find_checkpoint(tmp_path), tensors)
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


def test_the_newest_are_kept_and_leftovers_of_a_kill_go(tmp_path):
    leftover = tmp_path / "checkpoints" / "step_0000009.partial"
    leftover.mkdir(parents=True)
    (leftover / "half").write_text("x")
    save_steps(tmp_path, [1, 2, 3, 10_000_000], keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_0000003", "step_10000000"]
    assert not list(tmp_path.rglob("*.partial"))


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


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_remove, damage_state])
def test_damage_is_named_and_the_last_whole_one_is_offered(tmp_path, damage):
    save_steps(tmp_path, [1, 2, 3])
    newest = find_checkpoint(tmp_path)
    damage_truncate(tmp_path / "checkpoints" / "step_0000002")
    expected = damage(newest)
    for load in (lambda: load_tensors(newest, build_tensors()), lambda: load_weights(newest, ema=False)):
        with pytest.raises(UserError) as caught:
            load()
        message = str(caught.value)
        assert expected in message and str(newest) in message
        assert f"{tmp_path / 'checkpoints' / 'step_0000001'}, is whole" in message
    damage_flip(tmp_path / "checkpoints" / "step_0000001")
    with pytest.raises(UserError, match="no older whole checkpoint"):
        load_tensors(newest, build_tensors())


def test_the_one_before_is_so_by_its_number(tmp_path):
    save_steps(tmp_path, [9_999_999, 10_000_000, 10_000_001])
    folder = tmp_path / "checkpoints"
    damage_truncate(folder / "step_10000000")
    with pytest.raises(UserError, match=r"step_9999999, is whole"):
        load_tensors(folder / "step_10000000", build_tensors())
    damage_truncate(folder / "step_9999999")
    with pytest.raises(UserError, match="no older whole checkpoint"):
        load_tensors(folder / "step_9999999", build_tensors())


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    save_steps(tmp_path, [1])
    other = build_tensors() | {"model.b": torch.zeros(8), "model.c": torch.zeros(1)}
    with pytest.raises(UserError, match=r"does not fit this model: 2 tensors differ, such as model\.c, model\.b"):
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
        checkpointer.save(2, build_tensors(2), {"step": 2}, "")
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
