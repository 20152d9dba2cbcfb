"""The benchmark of preparing at sizes for tests: its checks of equality run, and can fail."""

import pytest
import torch

from benchmarks import e03_prepare

pytestmark = pytest.mark.slow


def test_both_encode_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        e03_prepare, "take_turns", lambda functions: {name: [f() or 1.0] for name, f in functions.items()}
    )
    rows = e03_prepare.measure(toy=True)
    assert [row.claim for row in rows] == ["E3", "E3"]
    monkeypatch.setattr(e03_prepare, "thin", lambda video: e03_prepare.thin_bytes(torch.zeros(1, 5, 32, 48, 3)))
    with pytest.raises(AssertionError):
        e03_prepare.measure(toy=True)
