"""Preparation that is killed, or whose disk, folder or model fails: nothing is lost, and the reason is said."""

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

import pytest
from fake_encoders import IDENTITY, build_encoders
from rich.console import Console
from small_folders import ALL, config, contents, put_image, put_video, run, small_shards

from wanloom.cli.prepare_report import print_report
from wanloom.errors import UserError
from wanloom.files import write_atomic
from wanloom.geometry import WAN_21
from wanloom.prepare import run as prepare_module
from wanloom.prepare.journal import Journal
from wanloom.prepare.listing import read_entries
from wanloom.prepare.run import PrepareJob, encode_folder
from wanloom.prepare.shard_writer import ShardWriter

pytestmark = pytest.mark.slow


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["wanloom.prepare.run", "pytest"])


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


def test_not_finite_latents_stop_the_run(tmp_path: Path) -> None:
    put_image(tmp_path / "in", "a.png", "a", 10)
    encoders = build_encoders()
    broken = encoders._replace(frames=lambda batch: encoders.frames(batch) * float("nan"))
    with pytest.raises(UserError, match=r"latents of a.png are not finite"):
        run(tmp_path / "in", tmp_path / "out", broken)
