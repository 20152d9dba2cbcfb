"""A folder of media to a folder of shards: every sample is encoded once, whatever happens in between.

In: a folder of videos and images with captions, and encoders as callables. Out: `train/` and `val/` shards,
`index.parquet`, `report.json`, `prepare.json` and Energon's metadata. The one decision: a prepared folder belongs to
one input, one set of options and one model. What would change a byte is an error that says what changed; everything
else (workers, a kill, a full disk, another place of the input) may change at any time.
"""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch

import wanloom
from wanloom.config import UserError
from wanloom.data.encode import Encoders, PrepareConfig, Progress, Writer, encode_all
from wanloom.data.energon import write_energon
from wanloom.data.plan import Plan, build_plan, read_entries
from wanloom.data.report import Report
from wanloom.data.shards import DONE, INDEX, WORK, build_table, encode_index, index_rows
from wanloom.data.spool import SPLITS, Spool
from wanloom.data.tar import scan_tar
from wanloom.files import write_atomic

FREE = {"workers", "strict"}  # settings that change no byte of the result
REPORT = "report.json"


class Finished(NamedTuple):
    report: dict[str, Any]
    was_complete: bool  # nothing was left to do


def prepare(
    source: Path,
    out: Path,
    config: PrepareConfig,
    identity: dict[str, str],
    load_encoders: Callable[[], Encoders],
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Finished:
    """Prepare `source` into `out`, or go on where an earlier start stopped.

    `identity` names the weights and the device; it is written into every sample. The encoders are loaded when there is
    something to encode. Raises UserError for what a user can mend.
    """
    check_folders(source, out)
    try:
        with Spool(out, config.shard_size << 20) as spool:
            return _prepare(source, spool, config, identity, load_encoders, on_progress)
    except OSError as error:  # reading the input has its own handling: this is the output folder
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += "; free some space and run the same command again, nothing is lost"
        raise UserError(f"'{out}' cannot be written: {reason}.") from error


def check_folders(source: Path, out: Path) -> None:
    """Raise UserError when the two folders are in each other's way or `out` holds something else."""
    here, there = source.resolve(), out.resolve()
    if not source.is_dir():
        raise UserError(f"There is no folder '{source}'.")
    if here == there or here.is_relative_to(there):
        raise UserError(f"The output folder '{out}' would hold the input '{source}': give another output folder.")
    if out.exists() and not out.is_dir():
        raise UserError(f"'{out}' is a file, not a folder.")
    if out.is_dir() and not (out / DONE).exists() and not (out / WORK).exists():
        other = sorted(path.name for path in out.iterdir() if path.name != REPORT)
        if other:
            raise UserError(f"'{out}' is not empty and was not made by prepare (it holds '{other[0]}').")


def _prepare(
    source: Path,
    spool: Spool,
    config: PrepareConfig,
    identity: dict[str, str],
    load_encoders: Callable[[], Encoders],
    on_progress: Callable[[Progress], None],
) -> Finished:
    out = spool.out
    settings = {**settings_of(config), **identity}
    check_settings(out, settings)
    saved = spool.work / "plan.jsonl"
    plan = build_plan(
        source,
        out,
        config.timing.mode,
        config.caption_key,
        config.val_fraction,
        config.seed,
        known=read_entries(saved.read_bytes()) if saved.exists() else (),
        workers=config.workers,
        on_read=lambda done, total: on_progress(Progress("reading", done, total, 0)),
    )
    check_input(out, plan)
    if config.strict:
        refuse_drops(plan)
    if (out / DONE).exists():
        spool.remove()
        return Finished(_read(out / REPORT, "samples"), True)
    if not saved.exists():
        # the plan last: where it is, the folder is known to be begun, and with what
        write_atomic(spool.work / DONE, _dump({"settings": settings, "input": plan.fingerprint}))
        write_atomic(saved, plan.to_json())
    spool.load()
    encode_all(source, plan, config, Writer(spool, config, load_encoders(), identity), on_progress)
    spool.finish()
    return Finished(_complete(spool, plan, settings), False)


def settings_of(config: PrepareConfig) -> dict[str, Any]:
    """The settings that decide the result, flat, by the names of the options."""
    values = config.model_dump()
    flat = {**values.pop("timing"), **values.pop("framing"), **values}
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
        values = json.loads(path.read_bytes())
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


def check_input(out: Path, plan: Plan) -> None:
    """Raise UserError when files or captions changed since the folder was begun."""
    begun = _started(out)
    if begun is None or begun["input"] == plan.fingerprint:
        return
    detail = ""
    if (out / WORK / "plan.jsonl").exists():
        old = {e.source: (e.sha256, e.caption) for e in read_entries((out / WORK / "plan.jsonl").read_bytes())}
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


def refuse_drops(plan: Plan) -> None:
    """--strict: raise UserError for files that would be left out."""
    lines = [f"{entry.source}: {entry.drop}, {entry.reason}" for entry in plan.entries if entry.drop]
    if lines:
        shown = "\n  ".join(lines[:20]) + (f"\n  and {len(lines) - 20} more" if len(lines) > 20 else "")
        raise UserError(f"--strict: {len(lines)} files would be dropped:\n  {shown}")


def _complete(spool: Spool, plan: Plan, settings: dict[str, Any]) -> dict[str, Any]:
    """Index, report and metadata from the finished shards; the work folder goes last."""
    out, report = spool.out, Report(plan, list(spool.drops.values()))
    tables: list[pa.Table] = [build_table([])]
    starts: dict[str, list[int]] = {}
    for split in SPLITS:
        for path in spool.shards(split):
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
        spool.remove()
        raise UserError(f"No sample could be made from {len(plan.entries)} files: see {out / REPORT}.")
    write_atomic(out / INDEX, encode_index(pa.concat_tables(tables)))
    write_energon(out, starts)
    versions = {"wanloom": wanloom.__version__, "torch": torch.__version__}
    write_atomic(out / DONE, _dump({"settings": settings, "input": plan.fingerprint, "versions": versions}))
    spool.remove()
    return summary


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
