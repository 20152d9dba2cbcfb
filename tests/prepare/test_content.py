"""What is encoded is what was hashed, whatever happens to the files; folders outside are entered only when asked."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_encoders import IDENTITY, build_encoders
from media_files import write_numbers
from PIL import Image

from wanloom.data.places import WORK
from wanloom.errors import UserError
from wanloom.geometry import WAN_21
from wanloom.media.decoding import MediaError
from wanloom.media.framing import Crop, FramingConfig
from wanloom.media.video import TimingConfig, read_clips
from wanloom.prepare import content as content_module
from wanloom.prepare.content import Content, hash_file, read_stamp
from wanloom.prepare.listing import list_files, read_entries
from wanloom.prepare.run import PLAN, PrepareJob, encode_folder
from wanloom.prepare.settings import PrepareConfig
from wanloom.prepare.shard_writer import ShardWriter


def picture(path: Path, level: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (48, 32), (level, 0, 0)).save(path)
    path.with_suffix(".txt").write_text(path.stem)
    return path


def run(source: Path, out: Path, between: Callable[[], None] = lambda: None, **values):
    """Prepare; `between` comes after hashing and before decoding."""

    def load():
        between()
        return build_encoders()

    values = {"timing": TimingConfig(frames=5), **values}
    config = PrepareConfig(framing=FramingConfig(height=32, width=48), val_fraction=0, **values)
    return encode_folder(PrepareJob(source, out, config, WAN_21, IDENTITY, load)).report


def count_hashes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an entry for each hash that is made while decoding; files count as having lain there for long."""
    hashed: list[int] = []

    def count(descriptor: int) -> str:
        hashed.append(descriptor)
        return hash_file(descriptor)

    monkeypatch.setattr(content_module, "SETTLED_NS", 0)
    monkeypatch.setattr(content_module, "hash_file", count)
    return hashed


def replaced(path: Path, other: Path) -> None:
    """Another file of the same size under the name, with the old times."""
    status = path.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert other.stat().st_size == status.st_size
    other.rename(path)


def overwritten(path: Path, other: Path) -> None:
    """The same, in place."""
    status = path.stat()
    path.write_bytes(other.read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [replaced, overwritten, lambda path, other: path.write_bytes(b"now no image")])
@pytest.mark.parametrize("settled", [True, False])
def test_a_file_that_changes_after_hashing_is_dropped(
    tmp_path: Path, change: Callable[[Path, Path], None], settled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if settled:
        monkeypatch.setattr(content_module, "SETTLED_NS", 0)  # as if the files had lain there for long
    (tmp_path / "other").mkdir()
    files = [picture(tmp_path / f"in/{i}.png", 10 * i) for i in range(4)]
    other = picture(tmp_path / "other/x.png", 99)
    report = run(tmp_path / "in", tmp_path / "out", lambda: change(files[2], other))
    assert report["samples"]["total"] == 3
    (drop,) = report["dropped"]
    assert (drop["file"], drop["kind"]) == ("2.png", "changed") and "others than those" in drop["reason"]


def test_other_times_alone_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = count_hashes(monkeypatch)
    path = write_numbers(tmp_path / "in/a.mp4", 20)
    path.with_suffix(".txt").write_text("a")
    timing = TimingConfig(frames=5, clips="all")
    report = run(tmp_path / "in", tmp_path / "out", lambda: os.utime(path, (5, 5)), timing=timing)
    assert report["samples"]["total"] == 4
    assert len(hashed) == 1  # once for all clips


def test_a_video_that_changes_while_it_is_read_keeps_the_clips_before(tmp_path: Path) -> None:
    path = write_numbers(tmp_path / "a.mp4", 30)
    with path.open("rb") as file:
        content = Content(read_stamp(os.fstat(file.fileno())), hash_file(file.fileno()))
    clips = read_clips(
        path,
        "video",
        TimingConfig(frames=5, clips="all"),
        lambda w, h, n: Crop((64, 48), (0, 0), (64, 48)),
        content.check,
    )
    assert next(clips).number == 0
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(MediaError, match="others than those that were hashed"):
        next(clips)


def test_unchanged_files_are_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = count_hashes(monkeypatch)
    for i in range(3):
        picture(tmp_path / f"in/{i}.png", 10 * i)
    assert run(tmp_path / "in", tmp_path / "out")["samples"]["total"] == 3
    assert hashed == []


def test_the_saved_plan_knows_where_the_files_are_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks read it, and would hash every file again."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(content_module, "SETTLED_NS", 0)
    monkeypatch.setattr(ShardWriter, "finish", stop)
    path = picture(tmp_path / "in/a.png", 10)
    saved, stamps = tmp_path / "out" / WORK / PLAN, []
    for seconds in (5, 9):
        os.utime(path, (seconds, seconds))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "in", tmp_path / "out")
        stamps.append(read_entries(saved.read_bytes())[0].mtime_ns)
    assert stamps == [5_000_000_000, 9_000_000_000]


def test_links_that_lead_outside_are_followed_when_asked(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere/deep/b.png", 20)
    picture(tmp_path / "files/c.png", 30)
    picture(tmp_path / "in/sub/a.png", 10)
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/inner").symlink_to(tmp_path / "in/sub")
    for name in ("c.png", "c.txt"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "files" / name)  # a link to a file is a file
    report = run(tmp_path / "in", tmp_path / "out")
    assert report["samples"]["total"] == 2 and report["ignored"] == []
    assert report["links_not_followed"] == ["link"]
    report = run(tmp_path / "in", tmp_path / "out2", follow_links=True)
    assert report["samples"]["total"] == 3 and report["links_not_followed"] == []
    (tmp_path / "way").symlink_to(tmp_path / "in")  # the input itself may be one
    assert run(tmp_path / "way", tmp_path / "out3")["samples"]["total"] == 2
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"no videos or images.* `follow_links` takes what 'link' leads to"):
        run(tmp_path / "bare", tmp_path / "out4")
    assert list_files(tmp_path / "in", tmp_path / "out")[2] == ["link"]
    assert "follow-links" not in json.loads((tmp_path / "out/prepare.json").read_text())["settings"]
