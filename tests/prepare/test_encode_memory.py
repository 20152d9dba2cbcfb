"""What prepare says when memory is short: before anything is loaded, or when a batch does not fit."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from wanloom import memory
from wanloom.cli import main
from wanloom.errors import UserError
from wanloom.media.framing import FramingConfig
from wanloom.media.video import TimingConfig
from wanloom.prepare.encode import BatchEncoder, FileBlock
from wanloom.prepare.settings import BYTES, PrepareConfig, check_batch, find_helps

pytestmark = pytest.mark.slow


def config(**framing: Any) -> PrepareConfig:
    return PrepareConfig(timing=TimingConfig(frames=81), framing=FramingConfig(**framing), workers=4)


def test_what_cannot_fit_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    free = BYTES * 81 * 480 * 832
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    check_batch(config(height=480, width=832), "cpu")
    check_batch(config(max_area=1 << 30), "cpu")  # a file may be smaller
    with pytest.raises(UserError, match=r"encode 1 x 81 frames of 848x480 pixels, which takes at least .* helps"):
        check_batch(config(height=480, width=848), "cpu")
    (tmp_path / "in").mkdir()
    words = ["prepare", str(tmp_path / "in"), str(tmp_path / "out"), "--model", "tiny"]
    assert main([*words, "--height", "100000", "--width", "100000"]) == 2
    error = capsys.readouterr().err
    assert "not enough to encode 1 x 81 frames of 100000x100000 pixels, which takes at least 11," in error
    assert not (tmp_path / "out").exists()


def test_what_helps_is_sized_from_what_was_asked():
    many = find_helps(config(height=64, width=64), (16, 17, 64, 64))
    assert many == [
        "`batch_size=8` in place of 16, in a new folder",
        "a smaller `height` and `width` than 64 and 64, in a new folder",
        "fewer `frames` than 17, in a new folder",
    ]
    assert find_helps(config(), (1, 1, 64, 32)) == [
        "a smaller `max_area` than 2048, in a new folder",
        "`workers=2` in place of 4",
    ]


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_batch_that_does_not_fit_is_a_sentence(error):
    def fail(pixels):
        raise error

    none: Any = None
    encoders: Any = SimpleNamespace(frames=fail)
    writer = BatchEncoder(none, config(), encoders, {})
    clip: Any = SimpleNamespace(pixels=np.zeros((5, 32, 48, 3), np.uint8))
    writer.clips = [("a", none, clip), ("b", none, clip)]
    with pytest.raises(UserError, match=r"not enough to encode 2 x 5 frames of 48x32 pixels\. .*: `batch_size=1` in"):
        writer.flush(FileBlock(0, []))
