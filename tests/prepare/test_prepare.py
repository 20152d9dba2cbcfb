"""Prepare end to end with quick encoders: what comes out, what is reported, and kills at every point of the way."""

import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_encoders import IDENTITY, build_encoders, encode_frames, encode_text
from media_files import numbered, write_numbers, write_video
from PIL import Image
from rich.console import Console

from wanloom.cli.prepare_report import print_report
from wanloom.data.shards import Dataset
from wanloom.errors import UserError
from wanloom.files import write_atomic
from wanloom.geometry import WAN_21
from wanloom.media.framing import FramingConfig
from wanloom.media.video import TimingConfig
from wanloom.prepare import run as prepare_module
from wanloom.prepare.encode import sample_key
from wanloom.prepare.journal import Journal
from wanloom.prepare.listing import read_entries
from wanloom.prepare.run import Prepared, PrepareJob, encode_folder
from wanloom.prepare.settings import PrepareConfig
from wanloom.prepare.shard_writer import ShardWriter

pytestmark = pytest.mark.slow

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["wanloom.prepare.run", "pytest"])


def config(**values) -> PrepareConfig:
    timing = values.pop("timing", {})
    timing = timing if "mode" in timing else {"frames": 5, **timing}
    framing = {"height": 32, "width": 48, **values.pop("framing", {})}
    return PrepareConfig(timing=TimingConfig(**timing), framing=FramingConfig(**framing), **values)


def put_video(root: Path, name: str, caption: str | None, first: int = 0, count: int = 8) -> None:
    write_video(root / name, [numbered((first + i) % 31) for i in range(count)])
    if caption is not None:
        (root / name).with_suffix(".txt").write_text(caption)


def put_image(root: Path, name: str, caption: str, level: int, size: tuple[int, int] = (48, 32)) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level // 2, 255 - level)).save(root / name)
    (root / name).with_suffix(".txt").write_text(caption)


def run(source: Path, out: Path, encoders=None, identity=IDENTITY, **values) -> Prepared:
    return encode_folder(
        PrepareJob(source, out, config(**values), WAN_21, identity, lambda: encoders or build_encoders())
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
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


ALL = {"timing": {"clips": "all"}, "batch_size": 3, "val_fraction": 0.2}


@pytest.fixture(scope="module")
def expected(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The folder that an undisturbed run makes; small shards, so that there are several."""
    out = tmp_path_factory.mktemp("expected") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "ShardWriter", small_shards)
        run(mixed, out, **ALL)
    return contents(out)


def small_shards(out: Path, shard_bytes: int) -> ShardWriter:
    return ShardWriter(out, 40_000)


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


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("before", [True, False])
def test_death_at_every_change_of_the_disk(
    mixed: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """Die before or after each rename, deletion and log line, start again, die at the next, until it is finished."""
    monkeypatch.setattr(prepare_module, "ShardWriter", small_shards)
    left = [0]

    def dying(real: Callable) -> Callable:
        def call(*args, **keywords):
            left[0] -= 1
            if left[0] == 0 and before:
                raise Killed
            result = real(*args, **keywords)
            if left[0] == 0:
                raise Killed
            return result

        return call

    for owner, name in ((Path, "replace"), (Path, "unlink"), (shutil, "rmtree"), (Journal, "_write")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    log, out, deaths = tmp_path / "log", tmp_path / "out", 0
    for start in range(100):
        left[0] = 1 + start % (4 + start // 3)  # further and further
        try:
            run(mixed, out, build_encoders(log), **ALL)
            break
        except Killed:
            deaths += 1
    left[0] = 0
    assert deaths > 15, deaths
    assert contents(out) == expected
    counts = Counter(log.read_text().split())
    samples = json.loads(expected["report.json"])["samples"]["total"]
    assert len(counts) == samples
    assert sum(counts.values()) <= samples + 3 * deaths  # only the batch under way is ever encoded again


def child(source: Path, out: Path, log: Path, started: Path) -> None:
    started.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "ShardWriter", small_shards)
        encode_folder(
            PrepareJob(
                source, out, config(**ALL, workers=2), WAN_21, IDENTITY, lambda: build_encoders(log, seconds=0.05)
            )
        )


def test_sigkill_at_random_moments(mixed: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    draws, log, out, kills = random.Random(7), tmp_path / "log", tmp_path / "out", 0
    while True:
        started = tmp_path / f"started{kills}"
        process = PROCESSES.Process(target=child, args=(mixed, out, log, started))
        process.start()
        while not started.exists():
            time.sleep(0.01)
        process.join(timeout=draws.uniform(0, 0.8) if kills < 8 else 60)
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    assert process.exitcode == 0
    assert kills >= 3
    assert contents(out) == expected
    counts = Counter(log.read_text().split())
    samples = json.loads(expected["report.json"])["samples"]["total"]
    assert len(counts) == samples
    assert sum(counts.values()) <= samples + 3 * kills


def die_at_write(source: Path, out: Path, moment: int) -> None:
    """End the process, without any clearing up, when the file number `moment` has its name."""
    real, calls = Path.replace, []

    def replace(path: Path, target: Path) -> None:
        real(path, target)
        calls.append(target)
        if len(calls) == moment:
            os._exit(7)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        run(source, out)


@pytest.mark.parametrize("moment", [1, 2])
def test_a_kill_while_beginning_costs_nothing_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Killed between the first files, stopped later by Ctrl-C: what was encoded in between is kept."""
    source, out, log = tmp_path / "in", tmp_path / "out", tmp_path / "log"
    for i in range(3):
        put_image(source, f"{i}.png", f"caption {i}", 10 * i)
    process = PROCESSES.Process(target=die_at_write, args=(source, out, moment))
    process.start()
    process.join()
    assert process.exitcode == 7

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            run(source, out, build_encoders(log))
    with pytest.raises(UserError, match="dtype was bf16, now fp32"):
        run(source, out, dtype="fp32")
    assert run(source, out, build_encoders(log)).report["samples"]["total"] == 3
    assert len(log.read_text().split()) == 3


def test_a_finished_folder_is_left_alone(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(mixed, out)
    before = contents(out)
    log = tmp_path / "log"
    again = run(mixed, out, build_encoders(log))
    assert again.was_complete and again.report == json.loads(json.dumps(first.report))
    assert contents(out) == before and not log.exists()


def test_a_finished_folder_with_a_lost_or_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    put_image(tmp_path / "in", "a.png", "one", level=9)
    run(tmp_path / "in", tmp_path / "out")
    for name in ("report.json", "prepare.json"):
        whole = (tmp_path / "out" / name).read_bytes()
        for damage in (b"{", b"[]", b"{}", b"\xff"):
            (tmp_path / "out" / name).write_bytes(damage)
            with pytest.raises(UserError, match=rf"{name}' cannot be read .*restore it, or prepare into a new folder"):
                run(tmp_path / "in", tmp_path / "out")
        (tmp_path / "out" / name).write_bytes(whole)
    (tmp_path / "out" / "report.json").unlink()
    with pytest.raises(UserError, match=r"report.json' cannot be read .*No such file"):
        run(tmp_path / "in", tmp_path / "out")


def test_pipes_and_devices_are_dropped_unread(tmp_path: Path) -> None:
    put_image(tmp_path / "in", "a.png", "one", level=9)
    os.mkfifo(tmp_path / "in" / "pipe.mp4")
    (tmp_path / "in" / "endless.mp4").symlink_to("/dev/zero")
    dropped = run(tmp_path / "in", tmp_path / "out").report["dropped"]
    assert [(drop["file"], drop["kind"]) for drop in dropped] == [("endless.mp4", "broken"), ("pipe.mp4", "broken")]
    assert all("is a pipe or a device" in drop["reason"] for drop in dropped)


def test_changed_options_and_models_ask_for_a_new_folder(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    put_image(source, "a.png", "a", 10)
    run(source, out, workers=1)
    run(source, out, workers=2)  # changes no byte
    for values, message in (
        ({"timing": {"fps": 24.0}}, "fps was 16.0, now 24.0"),
        ({"framing": {"crop": "random"}, "seed": 3}, "crop was center, now random; seed was 0, now 3"),
        ({"dtype": "fp32"}, "dtype was bf16, now fp32"),
    ):
        with pytest.raises(UserError, match=message):
            run(source, out, **values)
    with pytest.raises(UserError, match="vae was fake, now other"):
        run(source, out, identity={**IDENTITY, "vae": "other"})


def test_a_changed_input_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    for i in range(3):
        put_image(source, f"{i}.png", f"caption {i}", 10 * i)

    def stop(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", stop)
        with pytest.raises(Killed):
            run(source, out)
    put_image(source, "3.png", "new", 99)
    with pytest.raises(UserError, match=r"input changed since .* \(1 new, such as 3.png\)"):
        run(source, out)
    (source / "3.png").unlink()
    (source / "1.txt").write_text("another caption")
    with pytest.raises(UserError, match=r"\(1 changed, such as 1.png\)"):
        run(source, out)
    (source / "1.txt").write_text("caption 1")
    moved = shutil.copytree(source, tmp_path / "moved")  # the same files with other times and another place
    run(moved, out)
    (moved / "2.png").unlink()
    with pytest.raises(UserError, match="input changed"):
        run(moved, out)


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


def test_folders_in_each_others_way(tmp_path: Path) -> None:
    source = tmp_path / "in"
    put_image(source, "a.png", "a", 10)
    with pytest.raises(UserError, match="There is no folder"):
        run(tmp_path / "nowhere", tmp_path / "out")
    for out in (source, tmp_path):
        with pytest.raises(UserError, match="would hold the input"):
            run(source, out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.doc").write_text("mine")
    with pytest.raises(UserError, match=r"not empty and was not made by prepare \(it holds 'thesis.doc'\)"):
        run(source, tmp_path / "full")
    with pytest.raises(UserError, match="is a file"):
        run(source, source / "a.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no videos or images"):
        run(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    inside = source / "out"  # an output inside the input is not taken as input
    assert run(source, inside).report["files"]["found"] == 1
    assert run(source, inside).was_complete


def test_nothing_usable_is_an_error_and_can_be_mended(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    put_video(source, "a.mp4", None)
    with pytest.raises(UserError, match=r"1 file: 1 captionless\. a\.mp4: no caption found\. .*report\.json\."):
        run(source, out)
    (source / "a.txt").write_text("now it has one")
    assert run(source, out).report["samples"]["total"] == 1


def test_nothing_usable_says_the_reason_of_most_files(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for i in range(3):
        put_video(source, f"{i}.mp4", "short", first=i, count=3)
    put_image(source, "mute.png", "x", 10)
    (source / "mute.txt").unlink()
    with pytest.raises(UserError) as caught:
        run(source, tmp_path / "out")
    said = str(caught.value)
    assert said.startswith("No sample could be made from 4 files: 3 too short, 1 captionless. 0.mp4: has 3 ")
    assert said.endswith(f"All are in {tmp_path}/out/report.json.")


def test_inputs_that_are_no_folder_of_media(tmp_path: Path, mixed: Path, expected: dict[str, bytes]) -> None:
    file = mixed / "videos/v0.mp4"
    with pytest.raises(UserError, match="is a file: give the folder that it is in"):
        run(file, tmp_path / "out")
    prepared = tmp_path / "prepared"
    put_image(tmp_path / "in", "a.png", "x", 10)
    run(tmp_path / "in", prepared)
    with pytest.raises(UserError, match="is prepared already: train on it"):
        run(prepared, tmp_path / "out")
    (prepared / "prepare.json").unlink()
    write_atomic(prepared / ".work/prepare.json", b"{}")
    with pytest.raises(UserError, match="is being prepared from another folder"):
        run(prepared, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_report_of_an_older_folder_and_a_damaged_plan(expected: dict[str, bytes]) -> None:
    report = json.loads(expected["report.json"])
    old = {key: report[key] for key in ("files", "samples", "sizes", "dropped", "dropped_by_kind", "notes", "ignored")}
    console = Console(width=120, record=True, file=io.StringIO())
    print_report(old, console)
    assert "10 videos, 59 images" in console.export_text()
    for damage in (b"{", b'{"source": 1}\n', b"[]\n", b'{"nobody": 2}\n'):
        with pytest.raises(UserError, match="The plan of the unfinished folder is damaged"):
            read_entries(damage)


def test_two_at_once(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    put_image(source, "a.png", "a", 10)
    with ShardWriter(out, 1000), pytest.raises(UserError, match="Another `wanloom prepare`"):
        run(source, out)
    assert not out.exists()  # neither of them began anything
    run(source, out)


def test_a_full_disk_is_one_sentence_and_loses_nothing(
    mixed: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "ShardWriter", small_shards)
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 9:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"No space left on device; free some space .* nothing is lost"):
            run(mixed, tmp_path / "out", **ALL)
    run(mixed, tmp_path / "out", **ALL)
    assert contents(tmp_path / "out") == expected


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


def test_not_finite_latents_stop_the_run(tmp_path: Path) -> None:
    put_image(tmp_path / "in", "a.png", "a", 10)
    encoders = build_encoders()
    broken = encoders._replace(frames=lambda batch: encoders.frames(batch) * float("nan"))
    with pytest.raises(UserError, match=r"latents of a.png are not finite"):
        run(tmp_path / "in", tmp_path / "out", broken)


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
