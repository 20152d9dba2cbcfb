"""Prepare end to end with quick encoders: what comes out, what is reported, and kills at every point of the way."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_encoders import build_encoders, encode_frames, encode_text
from media_files import numbered, write_numbers, write_video
from PIL import Image
from rich.console import Console
from small_folders import ALL, contents, put_image, put_video, run, small_shards

from wanloom.cli.prepare_report import print_report
from wanloom.data.shards import Dataset
from wanloom.errors import UserError
from wanloom.prepare import run as prepare_module
from wanloom.prepare.encode import sample_key
from wanloom.prepare.settings import PrepareConfig

pytestmark = pytest.mark.slow


def test_files_whose_names_end_alike_have_keys_of_their_own():
    """Two of a million and a half paths, of which 40 bits of a hash agree: noise is drawn for a key."""
    one, other = (f"{number:08d}/{'a' * 48}.mp4" for number in (725_202, 1_555_197))
    assert sample_key(one, 0)[:40] == sample_key(other, 0)[:40]
    assert len({sample_key(one, 0), sample_key(other, 0), sample_key(one, 1)}) == 3


def test_samples_hold_what_the_files_show(tmp_path: Path) -> None:
    source = tmp_path / "in"
    put_video(source, "sub/a clip.mp4", "a gray video", first=3, count=12)
    put_image(source, "b.png", "a picture", level=90)
    done = run(source, tmp_path / "out", timing={"clips": "all"}, val_fraction=0.0)
    dataset = Dataset.open(tmp_path / "out")
    rows = dataset.rows("train")
    assert [row.caption for row in rows] == ["a picture", "a gray video", "a gray video"]
    assert rows.texts["key"].to_pylist() == [sample_key("b.png", 0), *(sample_key("sub/a clip.mp4", n) for n in (0, 1))]
    for number in (0, 1):
        pixels = np.stack([np.full((32, 48, 3), 8 * (3 + 5 * number + k)) for k in range(5)]).astype(np.uint8)
        sample = dataset.read(rows[1 + number])
        close = encode_frames(torch.from_numpy(pixels)[None])[0]
        assert (sample.tensors["latents"].float() - close).abs().max() < 0.03  # the codec is lossy by a level or two
        assert torch.equal(sample.tensors["text"], encode_text("a gray video", 512).bfloat16())
    assert dataset.read(rows[0]).tensors["latents"].shape == (16, 1, 4, 6)
    assert dataset.read(rows[0]).tensors["latents"].dtype == torch.bfloat16
    record = json.loads(read_member(tmp_path / "out", rows[2].key))
    assert record["source"] == "sub/a clip.mp4"
    assert (record["start_s"], record["end_s"], record["fps"], record["frames"]) == (0.3125, 0.5625, 16.0, 5)
    assert record["source_size"] == [64, 48] and record["size"] == [48, 32]
    assert record["crop"] == [0, 2, 48, 32] and record["resized"] == [48, 36]
    assert record["caption_source"] == "sub/a clip.txt" and record["vae"] == "fake"
    assert len(record["source_sha256"]) == len(record["sha256"]) == 64
    assert not done.was_complete and done.report["samples"] == {"total": 3, "train": 3, "val": 0}
    assert not (tmp_path / "out/.work").exists()


def read_member(out: Path, key: str) -> bytes:
    import tarfile

    for shard in out.glob("*/*.tar"):
        with tarfile.open(shard) as archive:
            if f"{key}.json" in archive.getnames():
                return archive.extractfile(f"{key}.json").read()
    raise KeyError(key)


def test_every_file_is_a_sample_or_in_the_report(expected: dict[str, bytes], mixed: Path) -> None:
    report = json.loads(expected["report.json"])
    assert report["files"] == {"found": 70 - 1, "videos": 10, "images": 59}
    assert {d["file"]: d["kind"] for d in report["dropped"]} == {
        "videos/mute.mp4": "captionless",
        "videos/short.mp4": "too short",
        "videos/text.mp4": "broken",
        "videos/v3copy.mp4": "duplicate",
    }
    reasons = {d["file"]: d["reason"] for d in report["dropped"]}
    assert reasons["videos/short.mp4"] == (
        "has 3 frames at 16 fps, 5 are asked for; `mode=frames` takes single pictures of it"
    )
    assert reasons["videos/v3copy.mp4"] == "the same file as videos/v3.mp4, with another caption"
    assert report["ignored"] == [".hidden.mp4", "notes.md"]
    assert report["samples"]["total"] == 59 + sum((8 + 7 * (i % 3)) // 5 for i in range(6))
    assert report["sizes"] == {"1 frame of 48x32": 59, "5 frames of 48x32": report["samples"]["total"] - 59}
    assert sum(name.startswith("train/") and name.endswith(".tar") for name in expected) > 2


def test_split_keeps_a_file_on_one_side(expected: dict[str, bytes], tmp_path: Path) -> None:
    for name, data in expected.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    table = [row._asdict() for split in ("train", "val") for row in Dataset.open(tmp_path).rows(split)]
    sides: dict[str, set[str]] = {}
    for row in table:
        sides.setdefault(row["source"], set()).add(row["split"])
    assert all(len(side) == 1 for side in sides.values())
    # a fifth of the files that were not dropped before decoding (65 samples' files, two that break later)
    assert sum(side == {"val"} for side in sides.values()) in range(11, 15)


def test_the_printed_report_names_the_files(expected: dict[str, bytes]) -> None:
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - lives as long as the test
    print_report(json.loads(expected["report.json"]), console)
    console.file.close()
    text = console.export_text()
    for words in ("files in", "samples out", "dropped, broken", "videos/text.mp4", "5 are asked for", "notes.md"):
        assert words in text


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_no_byte(
    mixed: Path, expected: dict[str, bytes], tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "ShardWriter", small_shards)
    run(mixed, tmp_path / "out", workers=workers, **ALL)
    assert contents(tmp_path / "out") == expected


def test_a_finished_folder_is_left_alone(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(mixed, out)
    before = contents(out)
    log = tmp_path / "log"
    again = run(mixed, out, build_encoders(log))
    assert again.was_complete and again.report == json.loads(json.dumps(first.report))
    assert contents(out) == before and not log.exists()


def test_pipes_and_devices_are_dropped_unread(tmp_path: Path) -> None:
    put_image(tmp_path / "in", "a.png", "one", level=9)
    os.mkfifo(tmp_path / "in" / "pipe.mp4")
    (tmp_path / "in" / "endless.mp4").symlink_to("/dev/zero")
    dropped = run(tmp_path / "in", tmp_path / "out").report["dropped"]
    assert [(drop["file"], drop["kind"]) for drop in dropped] == [("endless.mp4", "broken"), ("pipe.mp4", "broken")]
    assert all("is a pipe or a device" in drop["reason"] for drop in dropped)


def test_strict_names_the_files(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"before any is decoded, 2 files would be dropped:\n  videos/mute.mp4: capt"):
        run(mixed, tmp_path / "out", strict=True)
    source = tmp_path / "in"
    put_video(source, "short.mp4", "too short", count=3)
    with pytest.raises(UserError, match=r"`strict`: short.mp4 would be dropped: too short, has"):
        run(source, tmp_path / "out2", strict=True)


def test_truncated_captions_are_listed(tmp_path: Path) -> None:
    put_image(tmp_path / "in", "a.png", "one two three four five six", 10)
    put_image(tmp_path / "in", "b.png", "one two", 20)
    done = run(tmp_path / "in", tmp_path / "out", max_text_length=4)
    assert done.report["captions_truncated"] == {"a.png": "7 tokens, 4 kept"}
    assert Dataset.open(tmp_path / "out").rows("train").columns["text_len"].tolist() == [4, 3]


def test_modes(tmp_path: Path) -> None:
    source = tmp_path / "in"
    put_video(source, "v.mp4", "a video", count=12)
    put_image(source, "i.png", "an image", 10)
    images = run(source, tmp_path / "images", timing={"mode": "image"}).report
    assert images["samples"]["total"] == 1 and images["dropped_by_kind"] == {"not taken": 1}
    frames = run(source, tmp_path / "frames", timing={"mode": "frames", "frames_per_video": 3}).report
    assert frames["samples"]["total"] == 4 and frames["sizes"] == {"1 frame of 48x32": 4}


def test_random_crops_and_mixed_sizes(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for i, size in enumerate(((96, 32), (48, 48), (33, 70))):
        put_image(source, f"{i}.png", "x", 10 * i, size)
    area = {"height": None, "width": None, "max_area": 1600}
    run(source, tmp_path / "a", framing=area)
    rows = Dataset.open(tmp_path / "a").rows("train")
    assert [(row.height, row.width) for row in rows] == [(2, 8), (4, 4), (6, 4)]
    run(source, tmp_path / "b", framing={"crop": "random"}, seed=1)
    run(source, tmp_path / "c", framing={"crop": "random"}, seed=2)
    assert contents(tmp_path / "b/train") != contents(tmp_path / "c/train")


def test_links_hidden_files_and_strange_names(tmp_path: Path) -> None:
    source = tmp_path / "in"
    put_image(source, "a b/\u00e9t\u00e9 (1).png", "summer", 10)
    put_image(source, "a b/\u00e9t\u00e9-1.png", "winter", 20)
    (source / "again").symlink_to(source / "a b")
    (source / "loop").symlink_to(source)
    (source / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (source / "gone.txt").write_text("x")
    odd = os.fsencode(source) + b"/bad\xff.png"
    with open(odd, "wb") as file:
        file.write(b"x")
    done = run(source, tmp_path / "out")
    assert done.report["samples"]["total"] == 2
    assert {d["file"]: d["kind"] for d in done.report["dropped"]} == {"bad\\udcff.png": "broken", "gone.png": "broken"}
    keys = Dataset.open(tmp_path / "out").rows("train").texts["key"].to_pylist()
    assert len(set(keys)) == 2 and all(key.isascii() and "." not in key and "/" not in key for key in keys)


def test_a_shard_is_never_larger_than_asked_unless_one_sample_is(expected: dict[str, bytes]) -> None:
    sizes = [len(data) - 1024 for name, data in expected.items() if name.endswith(".tar")]
    assert max(sizes) <= 40_000


def test_a_file_that_breaks_late_keeps_its_clips_and_says_so(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.h264").write_bytes(
        write_numbers(tmp_path / "l.h264", 12).read_bytes()
        + write_video(tmp_path / "s.h264", [numbered(3, 32, 32)] * 9).read_bytes()
    )
    (source / "a.txt").write_text("changes in the middle")
    done = run(source, tmp_path / "out", timing={"clips": "all"})
    (drop,) = done.report["dropped"]
    assert drop["kind"] == "broken" and drop["samples"] == done.report["samples"]["total"] > 0


def test_small_clips_are_encoded_together_and_large_ones_alone(tmp_path: Path) -> None:
    assert PrepareConfig().clips_of_batch(81 * 480 * 832) == 1
    assert PrepareConfig().clips_of_batch(480 * 832) == 10
    sizes = []
    encoders = build_encoders()

    def encode(frames: torch.Tensor) -> torch.Tensor:
        sizes.append(len(frames))
        return encoders.frames(frames)

    for i in range(20):
        put_image(tmp_path / "in", f"{i:02d}.png", "x", 10 * i)
    run(tmp_path / "in", tmp_path / "out", encoders._replace(frames=encode))
    assert sizes == [16, 4]


def test_a_thumbnail_is_dropped_beside_its_clip_and_taken_for_an_image(tmp_path: Path) -> None:
    source = tmp_path / "in"
    put_video(source, "clip.mp4", "a film")
    Image.new("RGB", (48, 32), (9, 9, 9)).save(source / "clip.jpg")
    for name in ("a.png", "a.jpg"):
        put_image(source, name, "shared", 50 if name == "a.png" else 90)
    (source / "clip.srt").write_text("1")
    report = run(source, tmp_path / "video").report
    assert [(drop["file"], drop["kind"]) for drop in report["dropped"]] == [("clip.jpg", "captionless")]
    assert report["captions_shared"] == {
        "a.jpg": "a.txt is also the caption of a.png",
        "a.png": "a.txt is also the caption of a.jpg",
    }
    assert report["ignored"] == ["clip.srt"]
    report = run(source, tmp_path / "image", timing={"mode": "image"}).report
    assert {drop["file"]: drop["kind"] for drop in report["dropped"]} == {"clip.mp4": "not taken"}
    assert report["samples"]["total"] == 3 and report["ignored"] == ["clip.srt"]
