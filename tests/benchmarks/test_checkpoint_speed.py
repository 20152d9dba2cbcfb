"""Whole: both kinds of checkpoint are written, come back equal, and their numbers are of the right things."""

import pytest
import torch

from benchmarks import c14_checkpoint
from wanloom.checkpoint.settings import CheckpointConfig
from wanloom.checkpoint.writer import Checkpointer

pytestmark = pytest.mark.slow


def test_every_row_is_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = c14_checkpoint.measure(toy=True)
    assert [row.claim for row in rows] == ["C14", *["C15"] * 4]
    assert not list(tmp_path.iterdir())
    size = rows[0].facts["bytes"]
    assert size == 3 * 2 * 4 * (8 * (64 * 64 + 64) + 2 * 64 * 256 + 256 + 64)
    held, saved, loaded, filled, _ = rows
    assert max(held.ours) < max(saved.ours)  # standing still is a part of it
    assert all(len(row.ours) == len(row.theirs) >= 7 for row in (held, saved, loaded, filled))


def test_the_full_state_is_1_1_gb_in_proportions_of_the_1_3b_model():
    sizes = c14_checkpoint.shapes(toy=False)
    assert 4 * sum(torch.Size(shape).numel() for shape in sizes.values()) == 1_114_134_528


def test_a_load_takes_no_second_copy(tmp_path, monkeypatch):
    """Of 100 MB hardly anything, as torch.load of a mapped file; one that maps nothing shows that it would be seen."""
    state = {name: torch.randn(1000, 1000) for name in map(str, range(25))}
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    checkpointer.save(1, state, {"step": 1, "model": {}}, "")
    checkpointer.wait()
    checkpointer.close()
    torch.save(c14_checkpoint.Holder(state).state_dict(), tmp_path / "state.pt")
    shapes = {name: (1000, 1000) for name in state}
    monkeypatch.setattr(c14_checkpoint, "shapes", lambda toy: shapes)
    for ours in (True, False):
        assert c14_checkpoint.peak_of_load(tmp_path, ours, toy=False) <= 10_000_000
    monkeypatch.setattr(
        c14_checkpoint, "load_theirs", lambda path, model: model.load_state_dict(torch.load(path, weights_only=True))
    )
    # of 100 MB: on a busy machine the sampler may miss the worst moment
    assert c14_checkpoint.peak_of_load(tmp_path, False, toy=False) > 50_000_000
