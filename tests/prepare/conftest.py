"""A folder of every kind of file and what an undisturbed run makes of it, made once; not to be written to."""

import shutil
from pathlib import Path

import pytest
from small_folders import ALL, contents, put_image, put_video, run, small_shards

from wanloom.prepare import run as prepare_module


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 files (many blocks) of several shapes, with drops of every kind among them."""
    root = tmp_path_factory.mktemp("mixed")
    for i in range(6):
        put_video(root, f"videos/v{i}.mp4", f"video number {i}", first=i, count=8 + 7 * (i % 3))
    for i in range(58):
        put_image(root, f"images/i{i:02d}.png", f"image number {i} " + "word " * (i % 5), level=4 * i)
    put_video(root, "videos/short.mp4", "too short", count=3)
    (root / "videos/text.mp4").write_text("no video")
    (root / "videos/text.txt").write_text("a caption")
    put_video(root, "videos/mute.mp4", None, first=11)
    shutil.copy(root / "videos/v3.mp4", root / "videos/v3copy.mp4")
    (root / "videos/v3copy.txt").write_text("the same again")
    put_image(root, "images/last.png", "the last", level=250)
    (root / "notes.md").write_text("no media")
    (root / ".hidden.mp4").write_bytes(b"x")
    return root


@pytest.fixture(scope="session")
def expected(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The folder that an undisturbed run makes; small shards, so that there are several."""
    out = tmp_path_factory.mktemp("expected") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "ShardWriter", small_shards)
        run(mixed, out, **ALL)
    return contents(out)
