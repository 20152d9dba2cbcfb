"""The benchmark of decoding at sizes for tests: its own checks of equality run, and can fail."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import c10_decode
from benchmarks.dfm_way import count_frames, load_frames, load_video, spread

pytestmark = pytest.mark.slow


def test_the_rows_say_what_was_compared() -> None:
    rows = c10_decode.measure(toy=True)
    assert [(row.claim, row.target) for row in rows] == [("C10", 4.0), ("C11", 8.0)]
    assert all(min(*row.ours, *row.theirs) > 0 and row.checked for row in rows)


def test_other_moments_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c10_decode, "FPS", 20)
    with pytest.raises(AssertionError):
        c10_decode.measure(toy=True)


def test_the_peer_seeks_what_it_reads(tmp_path: Path) -> None:
    path = c10_decode.write_clip(tmp_path / "a.mp4", (256, 144), 12, 1.0)
    assert count_frames(path) == 12 and spread(12, 3) == [0, 5, 11]
    every = load_video(path, (128, 80), 12)
    assert every.shape == (1, 3, 12, 80, 128) and 0 <= every.min() < 0.2 and 0.8 < every.max() <= 1
    levels = (every[0].permute(1, 2, 3, 0) * 255).round().byte().numpy()
    assert np.array_equal(np.stack(load_frames(path, (128, 80), [0, 5, 11])), levels[[0, 5, 11]])
