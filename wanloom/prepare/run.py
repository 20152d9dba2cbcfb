"""A folder of media to a folder of shards: every sample is encoded once, whatever happens in between.

In: a folder of videos and images with captions, and encoders as callables. Out: `train/` and `val/` shards,
`index.parquet`, `report.json`, `prepare.json` and Energon's metadata. The one decision: a prepared folder belongs to
one input, one set of options and one model. What would change a byte is an error that says what changed; everything
else (workers, ranks, a kill, a full disk, another place of the input) may change at any time. Rank 0 reads the input
for the plan and makes the shards; every rank decodes and encodes.
"""

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch

import wanloom
from wanloom.data.index import INDEX, build_table, encode_index
from wanloom.data.places import DONE, REPORT, SPLITS, WORK, check_folders
from wanloom.data.shards import index_rows
from wanloom.data.tar import scan_tar
from wanloom.dist import rank, together
from wanloom.errors import UserError
from wanloom.files import parse_json, write_atomic
from wanloom.geometry import WAN_21, Geometry
from wanloom.memory import enough_memory
from wanloom.prepare.encode import BatchEncoder, Encoders, FileBlock, Progress, encode_blocks, plan_blocks
from wanloom.prepare.energon import write_energon
from wanloom.prepare.journal import Journal
from wanloom.prepare.listing import InputPlan, build_plan, read_entries
from wanloom.prepare.report import Report, explain_nothing
from wanloom.prepare.settings import PrepareConfig, fit_config
from wanloom.prepare.shard_writer import ShardWriter
from wanloom.prepare.work_queue import COMPLETE, PLANNED, WorkQueue
from wanloom.terminal import plural

FREE = {"workers", "strict", "follow_links"}  # settings that change no byte of the result
PLAN = "plan.jsonl"  # in the work folder


class Prepared(NamedTuple):
    report: dict[str, Any]  # on rank 0, else empty
    was_complete: bool  # nothing was left to do


@dataclass(frozen=True)
class PrepareJob:
    """What a run was asked for, the same on every rank."""

    source: Path
    out: Path
    config: PrepareConfig
    geometry: Geometry  # of the VAE
    identity: dict[str, str]  # names the weights and the device; it is written into every sample
    load_encoders: Callable[[], Encoders]
    on_progress: Callable[[Progress], None] = lambda progress: None


def encode_folder(job: PrepareJob) -> Prepared:
    """Prepare a folder, or go on where an earlier start stopped. Every rank of a run calls it.

    The encoders are loaded when there is something to encode. Raises UserError, the same on every rank, for what a user
    can mend.
    """
    job = replace(job, config=fit_config(job.config, job.geometry))
    out, config = job.out, job.config
    prepared = Prepared({}, False)
    halved = f"`workers={max(1, config.workers // 2)}` in place of {config.workers}"
    helps = [halved, "fewer `frames`, in a new folder", "a smaller size, in a new folder"]
    with together(), _told(out), enough_memory("hold the clips that are read ahead", helps), WorkQueue() as queue:
        if rank() == 0:
            check_folders(job.source, out)
            with ShardWriter(out, config.shard_size << 20) as shards:
                prepared = _lead(job, queue, shards)
            queue.reach(COMPLETE)
            queue.check()  # others that were stopped while they waited for this are gone
        else:
            job.on_progress(Progress("reading", 0, 0, 0))
            queue.wait(lambda: queue.has_reached(PLANNED))
            if not queue.has_reached(COMPLETE):
                _encode(job, queue, Journal(out / WORK), None)
    return prepared


@contextmanager
def _told(out: Path) -> Iterator[None]:
    """What a machine lacks, as a sentence."""
    try:
        yield
    except OSError as error:  # reading the input has its own handling: this is the output folder
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += "; free some space and run the same command again, nothing is lost"
        raise UserError(f"'{out}' cannot be written: {reason}.") from error


def _lead(job: PrepareJob, queue: WorkQueue, shards: ShardWriter) -> Prepared:
    """Rank 0: the plan before the others begin, its share of the blocks, and the result of all."""
    settings = {**settings_of(job.config), **job.identity}
    check_settings(job.out, settings)
    plan = _plan(job, queue, settings, shards.work / PLAN)
    if (job.out / DONE).exists():
        shards.remove()
        return Prepared(_read(job.out / REPORT, "samples"), True)
    shards.load()
    queue.reach(PLANNED)
    _encode(job, queue, shards.journal, shards)
    shards.collect()
    shards.finish()
    return Prepared(_complete(shards, plan, settings, job.geometry), False)


def _encode(job: PrepareJob, queue: WorkQueue, journal: Journal, shards: ShardWriter | None) -> None:
    """Any rank's share of the blocks, until all are finished; with `shards`, which rank 0 has, theirs are made too."""
    journal.refresh()
    blocks = plan_blocks(read_entries((journal.work / PLAN).read_bytes()), job.config)
    total = sum(len(block.entries) for block in blocks)

    def step(block: FileBlock | None = None) -> None:
        queue.check()
        if shards:
            shards.collect()
        own = block if block and block.number not in journal.finished else FileBlock(0, [])
        job.on_progress(Progress("encoding", journal.files + own.files, total, journal.samples + len(own.keys)))

    step()
    encoder = BatchEncoder(journal, job.config, job.load_encoders(), job.identity)
    encode_blocks(job.source, blocks, queue.take(len(blocks)), job.config, job.geometry, encoder, step)
    queue.wait(lambda: len(journal.finished) == len(blocks) if shards else queue.has_reached(COMPLETE), step)


def _plan(job: PrepareJob, queue: WorkQueue, settings: dict[str, Any], saved: Path) -> InputPlan:
    """The plan of the input; from the first start on it is saved, and must be the same."""

    def on_read(done: int, total: int) -> None:
        queue.check()
        job.on_progress(Progress("reading", done, total, 0))

    known = read_entries(saved.read_bytes()) if saved.exists() else []
    plan = build_plan(job.source, job.out, job.config, known, on_read)
    check_input(job.out, plan)
    if job.config.strict:
        refuse_drops(plan)
    if (job.out / DONE).exists():
        return plan
    if not saved.exists():
        # the plan last: where it is, the folder is known to be begun, and with what
        write_atomic(saved.with_name(DONE), _dump({"settings": settings, "input": plan.fingerprint}))
    if not saved.exists() or saved.read_bytes() != plan.to_json():  # the same files may lie elsewhere by now
        write_atomic(saved, plan.to_json())
    return plan


def settings_of(config: PrepareConfig) -> dict[str, Any]:
    """The settings that decide the result, flat, by the names of the options."""
    values = config.model_dump()
    flat = {**values.pop("timing"), **values.pop("framing"), **values.pop("limits"), **values}
    return {name.replace("_", "-"): value for name, value in flat.items() if name not in FREE}


def _started(out: Path) -> dict[str, Any] | None:
    """What the folder was begun, or finished, with."""
    for path in (out / DONE, out / WORK / DONE):
        if path.exists():
            return _read(path, "settings", "input")
    return None


def _read(path: Path, *keys: str) -> dict[str, Any]:
    """A json file of a prepared folder. Raises UserError when it is missing or damaged."""
    try:
        values = parse_json(path.read_bytes())
        if not isinstance(values, dict) or not values.keys() >= set(keys):
            raise ValueError(f"it has no {' and '.join(keys)}")
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read ({error}): restore it, or prepare into a new folder.") from error
    return values


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Raise UserError when the folder was made with other settings or models."""
    begun = (_started(out) or {"settings": settings})["settings"]
    changed = [
        f"{name} was {begun.get(name)}, now {settings.get(name)}"
        for name in sorted(begun.keys() | settings.keys())
        if begun.get(name) != settings.get(name)
    ]
    if changed:
        raise UserError(
            f"'{out}' was made with other settings ({'; '.join(changed)}): give a new output folder or the old ones."
        )


def check_input(out: Path, plan: InputPlan) -> None:
    """Raise UserError when files or captions changed since the folder was begun."""
    begun = _started(out)
    if begun is None or begun["input"] == plan.fingerprint:
        return
    detail = ""
    if (out / WORK / PLAN).exists():
        old = {e.source: (e.sha256, e.caption) for e in read_entries((out / WORK / PLAN).read_bytes())}
        new = {e.source: (e.sha256, e.caption) for e in plan.entries}
        groups = {
            "new": sorted(new.keys() - old.keys()),
            "gone": sorted(old.keys() - new.keys()),
            "changed": sorted(name for name in old.keys() & new.keys() if old[name] != new[name]),
        }
        parts = [f"{len(names)} {what}, such as {names[0]}" for what, names in groups.items() if names]
        detail = f" ({'; '.join(parts)})" if parts else ""
    raise UserError(
        f"The input changed since '{out}' was begun{detail}: put it back, or prepare into a new folder. Two prepared "
        "folders can be trained on together (data.sources)."
    )


def refuse_drops(plan: InputPlan) -> None:
    """`strict`: raise UserError for files that would be left out."""
    lines = [f"{entry.source}: {entry.drop}, {entry.reason}" for entry in plan.entries if entry.drop]
    if lines:
        shown = "\n  ".join(lines[:20]) + (f"\n  and {len(lines) - 20} more" if len(lines) > 20 else "")
        raise UserError(f"`strict`: before any is decoded, {plural(len(lines), 'file')} would be dropped:\n  {shown}")


def _complete(shards: ShardWriter, plan: InputPlan, settings: dict[str, Any], geometry: Geometry) -> dict[str, Any]:
    """Index, report and metadata from the finished shards; the work folder goes last."""
    out, report = shards.out, Report(plan, list(shards.journal.drops.values()), settings, geometry)
    tables: list[pa.Table] = [build_table([])]
    starts: dict[str, list[int]] = {}
    for split in SPLITS:
        for path in shards.files(split):
            name = f"{split}/{path.name}"
            with path.open("rb") as file:
                pairs = list(scan_tar(file, name))
            tables.append(build_table(index_rows(pairs, name, split)))
            starts[name] = [pair.start for pair in pairs] + [pairs[-1].stop]
            for pair in pairs:
                report.add(pair.record)
    summary = report.to_dict()
    write_atomic(out / REPORT, _dump(summary))
    if not starts:
        shards.remove()
        files = plural(len(plan.entries), "file")
        raise UserError(f"No sample could be made from {files}: {explain_nothing(summary)} All are in {out / REPORT}.")
    write_atomic(out / INDEX, encode_index(pa.concat_tables(tables)))
    write_energon(out, starts)
    versions = {"wanloom": wanloom.__version__, "torch": torch.__version__}
    done = {"settings": settings, "input": plan.fingerprint, "versions": versions}
    # a folder that says nothing is of Wan 2.1, as all were before there was another
    done |= {} if geometry == WAN_21 else {"geometry": asdict(geometry)}
    write_atomic(out / DONE, _dump(done))
    shards.remove()
    return summary


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
