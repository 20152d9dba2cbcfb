"""Checkpoints: bit-exact, whole or absent, damage named, nothing silently skipped."""

import json
import resource
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_weights import load_weights
from small_checkpoints import CONFIG, build_tensors, save_steps
from torch.distributed.checkpoint import HuggingFaceStorageReader, load

from wanloom.checkpoint import writer as module
from wanloom.checkpoint.pieces import CHUNK
from wanloom.checkpoint.saved import find_checkpoint, find_damage, list_checkpoints
from wanloom.checkpoint.settings import CheckpointConfig
from wanloom.checkpoint.writer import Checkpointer, load_tensors
from wanloom.errors import UserError
from wanloom.threads import one_thread


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
