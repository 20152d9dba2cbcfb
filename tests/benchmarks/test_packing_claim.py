"""What padding computes in vain, by FLOPs of real sizes; and that both ways are the same and run."""

from itertools import product

import pytest
import torch

from benchmarks import c07_packing as module
from benchmarks.mixes import MIXES
from wanloom.model.dit import WanDiT
from wanloom.model.flops import train_flops
from wanloom.variants import VARIANTS

pytestmark = pytest.mark.slow

FOURTEEN = VARIANTS["wan2.1-t2v-14b"].shape
RATIOS = {"A": 1.80, "B": 2.64, "D": 1.74, "F": 2.46}


@pytest.mark.parametrize("mix", RATIOS)
def test_padding_takes_that_many_times_the_flops(mix):
    """Counted over all batches that there are."""
    costs = {tokens: train_flops(FOURTEEN, tokens) for tokens in MIXES[mix][1]}
    batches = list(product([costs[tokens] for tokens in MIXES[mix][1]], repeat=module.BATCH))
    padded, packed = module.flops_of_mix(mix)
    assert padded == pytest.approx(module.BATCH * sum(map(max, batches)) / len(batches))
    assert packed == pytest.approx(sum(map(sum, batches)) / len(batches))
    assert padded / packed == pytest.approx(RATIOS[mix], abs=0.005)
    assert padded / packed >= module.FLOPS_TARGETS.get(mix, 1)


@pytest.mark.parametrize("mix", module.BATCHES)
def test_the_timed_batch_has_the_ratio_that_the_14b_has(mix):
    """Of width, tokens and text all divided by one number."""
    whole = module.BATCHES[mix]
    expected = module.padded_flops(FOURTEEN, whole) / module.packed_flops(FOURTEEN, whole, 512)
    scaled, text = [tokens // module.SCALE for tokens in whole], module.NARROW.text_slots
    found = module.padded_flops(module.NARROW, scaled) / module.packed_flops(module.NARROW, scaled, text)
    assert found == pytest.approx(expected, rel=0.02)


def test_the_check_finds_padding_that_is_attended_to(monkeypatch):
    model, *samples = module.build_batch(module.TOY, (3, 8), 1)
    assert isinstance(model, WanDiT) and "within" in module.check(model, *samples)
    monkeypatch.setattr(module, "Masked", lambda lens: model.blocks["0"].cross_attn.attend)
    with pytest.raises(AssertionError):
        module.check(model, *samples)


def test_the_rows_are_those_of_the_claim():
    state = torch.get_rng_state()
    rows = module.measure(toy=True)
    assert [row.unit for row in rows] == ["FLOPs"] * 4 + ["s"] * 4
    assert all("within" in row.checked and row.target and row.target > 1 for row in rows[4:])
    assert torch.equal(state, torch.get_rng_state())
