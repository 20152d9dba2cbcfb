"""Prepare on several processes: the same bytes for any number, whoever dies, fails or is stopped on the way."""

import json
import multiprocessing
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_encoders import IDENTITY, build_encoders
from small_folders import ALL, config, contents, put_image, put_video, small_shards

from wanloom.data.shards import Dataset
from wanloom.dist import process_group
from wanloom.errors import UserError
from wanloom.geometry import WAN_21
from wanloom.prepare import run as prepare_module
from wanloom.prepare.encode import Encoders, Progress, plan_blocks
from wanloom.prepare.journal import Journal
from wanloom.prepare.listing import MediaEntry
from wanloom.prepare.run import PrepareJob, encode_folder
from wanloom.prepare.settings import PrepareConfig

pytestmark = pytest.mark.slow

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["wanloom.prepare.run", "torch.distributed", "pytest"])
Trouble = Callable[[pytest.MonkeyPatch], None]


def encoders(log: Path | None = None, seconds: float = 0.0) -> Encoders:
    """Latents that tell which clips shared a batch, and in which order, as rounding does."""
    plain = build_encoders(log, seconds)
    weights = torch.arange(1, 17)

    def frames(batch: torch.Tensor) -> torch.Tensor:
        mates = (batch.float().mean(dim=(1, 2, 3, 4)) * weights[: len(batch)]).sum() / 100
        return plain.frames(batch) + mates

    return plain._replace(frames=frames)


@pytest.fixture(scope="module")
def expected(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "ShardWriter", small_shards)
        encode_folder(PrepareJob(mixed, out, config(**ALL), WAN_21, IDENTITY, encoders))
    return contents(out)


def member(environment: dict[str, str], source: Path, out: Path, logs: Path, trouble: Trouble | None, **values) -> None:
    """One rank. How it ended is in `logs`, and a line for every sample that it encoded."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    rank = environment["RANK"]
    progress: list[Progress] = []
    with pytest.MonkeyPatch.context() as patch, process_group():
        patch.setattr(prepare_module, "ShardWriter", small_shards)
        if trouble:
            trouble(patch)
        settings, load = config(**{**ALL, **values}), lambda: encoders(logs / f"encoded{rank}", seconds=0.02)
        try:
            done = encode_folder(PrepareJob(source, out, settings, WAN_21, IDENTITY, load, progress.append))
            said = f"was complete: {done.was_complete}, samples: {done.report.get('samples', {}).get('total')}"
        except UserError as error:
            said = f"UserError: {error}"
        except KeyboardInterrupt:
            said = "stopped"
    (logs / f"said{rank}").write_text(said)
    (logs / f"progress{rank}").write_text(json.dumps(progress))


class Ranks:
    """`size` processes that prepare `source`; `troubles` are what happens to some of them."""

    def __init__(
        self, size: int, source: Path, out: Path, logs: Path, troubles: dict[int, Trouble] | None = None, **values
    ) -> None:
        self.logs = logs
        logs.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.processes = []
        for rank in range(size):
            environment = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
            environment |= {"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            arguments = (environment, source, out, logs, (troubles or {}).get(rank))
            process = PROCESSES.Process(target=member, args=arguments, kwargs=values)
            process.start()
            self.processes.append(process)

    def said(self) -> list[str]:
        """How each rank ended, once all have."""
        for process in self.processes:
            process.join(60)
        self.kill()
        return [(self.logs / f"said{rank}").read_text() for rank in range(len(self.processes))]

    def kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join()


def encoded(*logs: Path) -> list[Counter[str]]:
    """The samples that each rank of these starts encoded."""
    return [Counter(path.read_text().split()) for log in logs for path in sorted(log.glob("encoded*"))]


def total(counts: list[Counter[str]]) -> Counter[str]:
    return sum(counts, Counter())


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_change_no_byte_and_share_the_work(
    mixed: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    size: int,
) -> None:
    out, logs = tmp_path / "out", tmp_path / "logs"
    said = Ranks(size, mixed, out, logs, workers=2).said()
    samples = json.loads(expected["report.json"])["samples"]["total"]
    assert said == [f"was complete: False, samples: {samples}"] + ["was complete: False, samples: None"] * (size - 1)
    assert contents(out) == expected
    counts = encoded(logs)
    assert len(counts) == size and all(count.total() >= samples / size / 3 for count in counts), counts
    assert max(total(counts).values()) == 1 and total(counts).total() == samples
    seen = [Progress(*values) for values in json.loads((logs / "progress0").read_text()) if values[0] == "encoding"]
    assert [p.samples for p in seen] == sorted(p.samples for p in seen) and seen[-1].samples > counts[0].total()
    if size == 2:  # a finished folder is left alone
        said = Ranks(2, mixed, out, tmp_path / "again").said()
        assert [words.split(",")[0] for words in said] == ["was complete: True", "was complete: False"]
        assert contents(out) == expected


def die_at(moment: int) -> Trouble:
    """End the process, without any clearing up, right after its write number `moment`."""

    def trouble(patch: pytest.MonkeyPatch) -> None:
        replace, note, calls = Path.replace, Journal._write, []

        def dying(real: Callable) -> Callable:
            def call(*arguments):
                real(*arguments)
                calls.append(arguments)
                if len(calls) == moment:
                    os._exit(7)

            return call

        patch.setattr(Path, "replace", dying(replace))
        patch.setattr(Journal, "_write", dying(note))

    return trouble


def test_a_rank_that_is_killed_and_other_numbers_of_ranks_after_it(
    mixed: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
) -> None:
    """Killed in turn: a rank of three, rank 0 of two, the one rank; then finished by two."""
    out, logs = tmp_path / "out", [tmp_path / f"logs{i}" for i in range(4)]
    for log, (size, victim, moment) in zip(logs, ((3, 2, 6), (2, 0, 9), (1, 0, 7)), strict=False):
        ranks = Ranks(size, mixed, out, log, {victim: Die(moment)})
        ranks.processes[victim].join(60)
        assert ranks.processes[victim].exitcode == 7
        ranks.kill()  # as the launcher does
        assert not (out / "prepare.json").exists()
    Ranks(2, mixed, out, logs[3]).said()
    assert contents(out) == expected
    counts = total(encoded(*logs))
    samples = json.loads(expected["report.json"])["samples"]["total"]
    assert len(counts) == samples and counts.total() <= samples + 3 * (3 + 2 + 1)  # a batch under way on each rank
    assert total(encoded(logs[3])).total() < samples / 2


class Die:
    """`die_at` that can be sent to another process."""

    def __init__(self, moment: int) -> None:
        self.moment = moment

    def __call__(self, patch: pytest.MonkeyPatch) -> None:
        die_at(self.moment)(patch)


def fill_the_disk(patch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        real(descriptor)

    patch.setattr(os, "fsync", fsync)


def interrupt(patch: pytest.MonkeyPatch) -> None:
    real, calls = Journal.keep, []

    def keep(*arguments) -> None:
        real(*arguments)
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt

    patch.setattr(Journal, "keep", keep)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("trouble", [fill_the_disk, interrupt])
def test_what_stops_one_rank_stops_all_and_loses_nothing(
    mixed: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    victim: int,
    trouble: Trouble,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, logs = tmp_path / "out", tmp_path / "logs"
    began = time.monotonic()
    said = Ranks(2, mixed, out, logs, {victim: trouble}).said()
    assert time.monotonic() - began < 9  # nobody waits for one who is gone
    if trouble is interrupt:
        assert said == ["stopped", "stopped"]
    else:
        where = "On rank 1: " if victim else ""
        assert said[0] == said[1] and said[0].startswith(f"UserError: {where}'{out}' cannot be written: No "), said
    before = total(encoded(logs))
    assert 0 < before.total() < json.loads(expected["report.json"])["samples"]["total"]
    monkeypatch.setattr(prepare_module, "ShardWriter", small_shards)
    encode_folder(PrepareJob(mixed, out, config(**ALL), WAN_21, IDENTITY, lambda: encoders(tmp_path / "log")))
    assert contents(out) == expected
    twice = before & Counter((tmp_path / "log").read_text().split())
    assert twice.total() <= (3 if trouble is fill_the_disk else 0)  # what could not be written


def test_a_mistake_that_rank_0_finds_is_told_by_all(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    put_video(source, "short.mp4", "too short", count=3)
    put_image(source, "a.png", "one", level=9)
    encode_folder(PrepareJob(source, out, config(**ALL), WAN_21, IDENTITY, encoders))
    said = Ranks(2, source, out, tmp_path / "logs", dtype="fp32").said()
    assert said[0] == said[1] and "dtype was bf16, now fp32" in said[0]
    said = Ranks(2, source, tmp_path / "new", tmp_path / "strict", strict=True).said()
    assert said[0] == said[1] and "`strict`: short.mp4 would be dropped: too short, has" in said[0]
    assert sum(len(Dataset.open(out).rows(split)) for split in ("train", "val")) == 1


def test_a_block_is_about_one_batch_of_neighbours() -> None:
    def blocks(kinds: str, config: PrepareConfig) -> list[str]:
        entries = [
            MediaEntry(f"{i:03d}", "video" if kind == "v" else "image", 1, 1, drop="broken" if kind == "x" else "")
            for i, kind in enumerate(kinds)
        ]
        made = plan_blocks(entries, config)
        assert [block.number for block in made] == list(range(len(made)))
        taken = [entry.source for block in made for entry in block.entries]
        assert taken == [entry.source for entry in entries if not entry.drop]
        return ["".join(entry.kind[0] for entry in block.entries) for block in made]

    large = PrepareConfig()  # 81 frames of 399360 pixels
    assert blocks("vvxvi" + 12 * "i" + "v", large) == ["v", "v", "v", 10 * "i", "iii", "v"]
    assert blocks("vvivi", config(timing={"mode": "frames"}, framing={"height": 480, "width": 832})) == ["vvivi"]
    assert blocks(20 * "v", config()) == [16 * "v", "vvvv"]
    assert blocks("vvvvv", config(batch_size=2)) == ["vv", "vv", "v"]
