"""A folder of media to a folder of shards: encode every sample once, whatever happens in between.

In: a folder of videos and images with captions, and encoders as callables. Out: `train/` and `val/` shards,
`index.parquet`, `report.json`, `prepare.json` and Energon's metadata. The one decision: everything that decides a
sample's bytes follows from the input and the settings in a fixed order; a batch is filled in that order and never
crosses a block of 64 files. Workers, kills and restarts change nothing in the result.
"""

import errno
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

import wanloom
from wanloom.config import Config, UserError
from wanloom.data.energon import write_energon
from wanloom.data.framing import FramingConfig, aspect_change, choose_frame
from wanloom.data.picture import Clip, MediaError
from wanloom.data.plan import Entry, Plan, build_plan, read_entries
from wanloom.data.readers import read_ahead
from wanloom.data.report import build_report
from wanloom.data.shards import DONE, INDEX, WORK, build_table, encode_index, index_rows
from wanloom.data.spool import SPLITS, Spool
from wanloom.data.tar import Pair, scan_tar, tar_pair, write_atomic
from wanloom.data.video import TimingConfig, read_clips

BLOCK = 64  # files; a batch never crosses a block, so that blocks can be encoded apart from each other
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FREE = {"workers", "strict"}  # settings that change no byte of the result
REPORT = "report.json"


class PrepareConfig(Config):
    """The settings of `wanloom prepare`; its --help explains each."""

    timing: TimingConfig = TimingConfig()
    framing: FramingConfig = FramingConfig()
    caption_key: str | None = None
    max_text_length: int = 512
    val_fraction: float = 0.05
    shard_size: int = 512  # MiB
    batch_size: int = 1
    dtype: str = "bf16"
    seed: int = 0
    workers: int = 2
    strict: bool = False

    @model_validator(mode="after")
    def _check(self) -> "PrepareConfig":
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"--val-fraction {self.val_fraction:g} is not between 0 and 1")
        for name in ("max_text_length", "shard_size", "batch_size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is at least 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype} is not one of {', '.join(DTYPES)}")
        return self


class Encoders(NamedTuple):
    """What the models do, and which they are."""

    frames: Callable[[Tensor], Tensor]  # (B, F, H, W, 3) uint8 -> latents (B, C, F', H', W')
    text: Callable[[str, int], Tensor]  # caption, longest length -> states (L, D)
    count_tokens: Callable[[str], int]
    identity: dict[str, str]  # names of the weights and the device, written into every sample


class Progress(NamedTuple):
    """Where it is: `stage` is "reading" or "encoding"."""

    stage: str
    done: int  # files
    total: int
    samples: int


class Finished(NamedTuple):
    report: dict[str, Any]
    was_complete: bool  # nothing was left to do


def prepare(
    source: Path,
    out: Path,
    config: PrepareConfig,
    load_encoders: Callable[[], Encoders],
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Finished:
    """Prepare `source` into `out`, or go on where an earlier start stopped. Raises UserError for a user's mistake."""
    check_folders(source, out)
    try:
        with Spool(out, config.shard_size << 20) as spool:
            return _prepare(source, spool, config, load_encoders(), on_progress)
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
    source: Path, spool: Spool, config: PrepareConfig, encoders: Encoders, on_progress: Callable[[Progress], None]
) -> Finished:
    out = spool.out
    settings = {**settings_of(config), **encoders.identity}
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
        refuse_drops([f"{e.source}: {e.drop}, {e.reason}" for e in plan.entries if e.drop])
    if (out / DONE).exists():
        spool.remove()
        return Finished(json.loads((out / REPORT).read_text()), True)
    if not saved.exists():
        write_atomic(saved, plan.to_json())
        write_atomic(spool.work / DONE, _dump({"settings": settings, "input": plan.fingerprint}))
    spool.load()
    encode_all(source, plan, spool, config, encoders, on_progress)
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
            return json.loads(path.read_text())
    return None


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


def refuse_drops(lines: list[str]) -> None:
    """--strict: raise UserError for files that would be left out."""
    if lines:
        shown = "\n  ".join(lines[:20]) + (f"\n  and {len(lines) - 20} more" if len(lines) > 20 else "")
        raise UserError(f"--strict: {len(lines)} files would be dropped:\n  {shown}")


def sample_key(source: str, number: int) -> str:
    """A name for one sample that only follows from its file's path; readable, unique, safe in any tar reader."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", source.rsplit(".", 1)[0]).strip("-")[-48:]
    return f"{stem}-{hashlib.blake2b(source.encode(), digest_size=5).hexdigest()}-{number:05d}"


def encode_all(
    source: Path,
    plan: Plan,
    spool: Spool,
    config: PrepareConfig,
    encoders: Encoders,
    on_progress: Callable[[Progress], None],
) -> None:
    """Encode what is not in the spool yet. Files before the newest encoded sample are finished: order is fixed."""
    last = max(spool.done.values(), default="")
    jobs = [(i, entry) for i, entry in enumerate(plan.entries) if not entry.drop and entry.source >= last]
    total = sum(1 for entry in plan.entries if not entry.drop)
    writer = Writer(spool, config, encoders)

    def read(job: tuple[int, Entry]) -> Iterator[Clip | MediaError | None]:
        entry = job[1]

        def choose(width: float, height: float, number: int):
            return choose_frame(width, height, config.framing, config.seed, sample_key(entry.source, number))

        try:
            yield from read_clips(source / entry.source, entry.kind, config.timing, choose)
        except MediaError as error:
            yield error
        yield None

    finished, made, block = total - len(jobs), 0, -1
    clips = read_ahead(jobs, read, config.workers)
    try:
        for (i, entry), result in clips:
            if i // BLOCK != block:
                writer.flush()
                block = i // BLOCK
            if isinstance(result, Clip):
                made += 1
                key = sample_key(entry.source, result.number)
                if key not in spool.done:
                    writer.add(key, entry, result)
            elif result is None:
                finished, made = finished + 1, 0
            else:
                if config.strict:
                    refuse_drops([f"{entry.source}: {result.kind}, {result}"])
                spool.drop(entry.source, result.kind, str(result), made)
            on_progress(Progress("encoding", finished, total, len(spool.done)))
        writer.flush()
    finally:
        clips.close()


class Writer:
    """Collects clips of one shape and encodes them together."""

    def __init__(self, spool: Spool, config: PrepareConfig, encoders: Encoders) -> None:
        self.spool = spool
        self.config = config
        self.encoders = encoders
        self.clips: list[tuple[str, Entry, Clip]] = []
        self.text: tuple[str, Tensor, int] = ("", torch.empty(0), 0)  # of the latest caption

    def add(self, key: str, entry: Entry, clip: Clip) -> None:
        """Take a clip; the batch is encoded when it is full or the next clip has another shape."""
        if self.clips and self.clips[0][2].pixels.shape != clip.pixels.shape:
            self.flush()
        self.clips.append((key, entry, clip))
        if len(self.clips) == self.config.batch_size:
            self.flush()

    def flush(self) -> None:
        """Encode the clips at hand and give them to the spool as one unit."""
        if not self.clips:
            return
        pixels = torch.from_numpy(np.stack([clip.pixels for _, _, clip in self.clips]))
        batch = self.encoders.frames(pixels)
        pairs = []
        for latents, (key, entry, clip) in zip(batch, self.clips, strict=True):
            text, num_tokens = self._encode_text(entry.caption)
            for what, values in (("latents", latents), ("text states", text)):
                if not torch.isfinite(values).all():
                    raise UserError(f"The {what} of {entry.source} are not finite: the model or its dtype is at fault.")
            record = build_record(entry, clip, self.config, num_tokens, len(text)) | self.encoders.identity
            dtype = DTYPES[self.config.dtype]
            pairs.append(tar_pair(key, latents.to(dtype), text.to(dtype), record))
        self.clips = []
        self.spool.add(pairs)

    def _encode_text(self, caption: str) -> tuple[Tensor, int]:
        if self.text[0] != caption:
            states = self.encoders.text(caption, self.config.max_text_length)
            self.text = (caption, states, self.encoders.count_tokens(caption))
        return self.text[1], self.text[2]


def build_record(entry: Entry, clip: Clip, config: PrepareConfig, num_tokens: int, text_len: int) -> dict[str, Any]:
    """The json member of a sample, without the hash of its tensors. Sizes are (width, height) in pixels."""
    is_video = clip.pixels.shape[0] > 1
    return {
        "caption": entry.caption,
        "caption_source": entry.caption_source,
        "caption_tokens": num_tokens,
        "text_len": text_len,
        "source": entry.source,
        "source_sha256": entry.sha256,
        "split": entry.split,
        "clip": clip.number,
        "start_s": clip.start,
        "end_s": clip.stop,
        "source_fps": clip.source_fps,
        "fps": config.timing.fps if is_video else None,
        "frames": clip.pixels.shape[0],
        "source_size": clip.source_size,
        "display_size": [round(side, 3) for side in clip.display_size],
        "resized": clip.frame.resized,
        "crop": [*clip.frame.corner, *clip.frame.size],
        "size": clip.frame.size,
        "aspect_change": round(aspect_change(*clip.display_size, clip.frame), 6),
        "notes": clip.notes,
    }


def _complete(spool: Spool, plan: Plan, settings: dict[str, Any]) -> dict[str, Any]:
    """Index, report and metadata from the finished shards; the work folder goes last."""
    out, rows, records, shards = spool.out, [], [], {}
    for split in SPLITS:
        for path in spool.shards(split):
            name = f"{split}/{path.name}"
            with path.open("rb") as file:
                pairs: list[Pair] = list(scan_tar(file, name))
            rows += index_rows(pairs, name, split)
            records += [pair.record for pair in pairs]
            shards[name] = pairs
    report = build_report(plan, list(spool.drops.values()), records)
    write_atomic(out / REPORT, _dump(report))
    if not rows:
        spool.remove()
        raise UserError(f"No sample could be made from {len(plan.entries)} files: see {out / REPORT}.")
    write_atomic(out / INDEX, encode_index(build_table(rows)))
    write_energon(out, shards)
    versions = {"wanloom": wanloom.__version__, "torch": torch.__version__}
    write_atomic(out / DONE, _dump({"settings": settings, "input": plan.fingerprint, "versions": versions}))
    spool.remove()
    return report


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
