"""E2 runs, and finds latents and pictures equal before it measures."""

import pytest

from benchmarks import e02_generation
from wanloom.codecs.vae import VaeCodec

pytestmark = pytest.mark.slow


def test_it_runs_and_compares_equal_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = e02_generation.measure(toy=True)
    assert row.claim == "E2" and min(row.ours) > 0 and "within" in row.checked
    monkeypatch.setattr(e02_generation, "NEGATIVE", "something else")  # of one side, as both read it when they are made
    real = e02_generation.build_theirs

    def other(*arguments):
        monkeypatch.setattr(e02_generation, "SHIFT", 5.5)
        return real(*arguments)

    monkeypatch.setattr(e02_generation, "build_theirs", other)
    with pytest.raises(AssertionError):
        e02_generation.measure(toy=True)


def test_pictures_two_levels_off_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = VaeCodec.decode
    monkeypatch.setattr(VaeCodec, "decode", lambda self, latents: decode(self, latents) ^ 2)
    with pytest.raises(AssertionError, match=r"^2\.0"):
        e02_generation.measure(toy=True)
