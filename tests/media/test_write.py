"""Written files: what a player reads back, and that a failed write leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from wanloom.demo import shapes
from wanloom.media.write import read_mp4, write_mp4, write_png, write_sheet


def clip(frames: int = 9, height: int = 48, width: int = 80) -> torch.Tensor:
    return torch.from_numpy(shapes.build_clip(3, 5, frames=max(frames, 2), height=height, width=width)[0][:frames])


def test_a_video_plays_with_its_size_rate_and_colours(tmp_path):
    frames, path = clip(), tmp_path / "a.mp4"
    write_mp4(path, frames, 12)
    with av.open(path) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (stream.codec.name, context.pix_fmt, stream.average_rate, stream.frames) == ("h264", "yuv420p", 12, 9)
        assert (context.width, context.height, context.colorspace, context.color_range) == (80, 48, 1, 1)
        assert stream.duration and stream.time_base
        assert stream.duration * stream.time_base == pytest.approx(9 / 12)
    raw = path.read_bytes()
    assert raw.index(b"moov") < raw.index(b"mdat")  # starts to play before all of it is there
    difference = np.abs(read_mp4(path).astype(int) - frames.numpy().astype(int))
    assert np.median(difference) <= 2 and difference.mean() < 5  # only colour edges blur
    assert list(tmp_path.iterdir()) == [path]


def test_plain_colours_come_back(tmp_path):
    for color in ((225, 45, 45), (45, 190, 65), (50, 85, 235), (255, 255, 255), (0, 0, 0)):
        write_mp4(tmp_path / "c.mp4", torch.tensor(color, dtype=torch.uint8).expand(2, 32, 32, 3), 16)
        assert np.abs(read_mp4(tmp_path / "c.mp4")[1, 16, 16].astype(int) - color).max() <= 4


@pytest.mark.parametrize("name", ["12:30.mp4", "http:/a.mp4", "file:a.mp4"])
def test_names_are_never_addresses(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    write_mp4(Path(name), np.full((5, 16, 32, 3), 90, dtype=np.uint8), 16)
    assert read_mp4(Path(name)).shape == (5, 16, 32, 3)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.mp4")] == [name]


def test_the_same_frames_are_the_same_bytes(tmp_path):
    """In other processes too, whatever was in their memory before: x264's mbtree once read what nobody had written."""
    coarse = torch.rand(9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    frames = torch.nn.functional.interpolate(coarse, size=(96, 160), mode="bilinear").mul(255)
    np.save(tmp_path / "frames.npy", frames.permute(0, 2, 3, 1).to(torch.uint8).numpy())
    script = (
        "import sys, numpy, pathlib; from wanloom.media.write import write_mp4;"
        "write_mp4(pathlib.Path(sys.argv[2]), numpy.load(sys.argv[1], allow_pickle=False), 16)"
    )
    for fill in ("0", "1", "90", "165"):
        words = [sys.executable, "-c", script, str(tmp_path / "frames.npy"), str(tmp_path / f"{fill}.mp4")]
        subprocess.run(words, check=True, env={**os.environ, "MALLOC_PERTURB_": fill})
    assert len({path.read_bytes() for path in tmp_path.glob("*.mp4")}) == 1


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"old")
    with pytest.raises(ValueError, match="79x48 pixels"):
        write_mp4(tmp_path / "a.mp4", clip()[:, :, :79], 16)
    with pytest.raises(ValueError, match="not uint8 RGB"):
        write_mp4(tmp_path / "a.mp4", clip().float(), 16)
    with pytest.raises(OSError):
        write_png(tmp_path / "missing" / "a.png", clip()[0])

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wanloom.media.write.av.VideoFrame", SimpleNamespace(from_ndarray=full))
    with pytest.raises(OSError, match="No space"):
        write_mp4(tmp_path / "a.mp4", clip(), 16)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == b"old"


def test_a_picture_is_exact(tmp_path):
    write_png(tmp_path / "a.png", clip()[3])
    with Image.open(tmp_path / "a.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), clip()[3].numpy())


@pytest.mark.parametrize(
    ("frames", "width", "size"),
    [
        (17, 64, (4 * 128 + 12, 2 * 96 + 4)),  # enlarged twice
        (3, 160, (3 * 160 + 8, 48)),  # as it is, one row
        (1, 640, (320, 24)),  # reduced
    ],
)
def test_a_sheet_shows_frames_from_first_to_last(tmp_path, frames, width, size):
    pictures = clip(frames, 48, width)
    write_sheet(tmp_path / "s.png", pictures)
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.size == size
        cells = np.asarray(sheet)
    if width == 64:
        np.testing.assert_array_equal(cells[0:96:2, 0:128:2], pictures[0].numpy())
        np.testing.assert_array_equal(cells[100:196:2, 3 * 132 : 3 * 132 + 128 : 2], pictures[-1].numpy())
