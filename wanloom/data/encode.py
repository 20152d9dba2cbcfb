"""Clips to encoded samples, in batches that any start would form alike.

In: the plan, and what the spool has already. Out: batches of encoded samples in the spool. The one decision: a batch is
filled in the order of the plan with clips of one shape, and never crosses a block of 64 files; so its members, and with
them every bit of the result, do not depend on workers, kills or restarts, and blocks can be encoded apart.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from wanloom.config import Config, UserError
from wanloom.data.framing import Frame, FramingConfig, aspect_change, choose_frame
from wanloom.data.picture import Clip, MediaError
from wanloom.data.plan import Entry, Plan
from wanloom.data.readers import read_ahead
from wanloom.data.spool import Spool
from wanloom.data.tar import tar_pair
from wanloom.data.video import TimingConfig, read_clips

BLOCK = 64  # files; a batch never crosses a block
MOST_CLIPS, MOST_PIXELS = 16, 4_000_000  # of a batch; one clip of 81 frames 480x832 has 32 million pixels
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class PrepareConfig(Config):
    """The settings of `wanloom prepare`; its --help explains each."""

    timing: TimingConfig = TimingConfig()
    framing: FramingConfig = FramingConfig()
    caption_key: str | None = None
    max_text_length: int = 512
    val_fraction: float = 0.05
    shard_size: int = 512  # MiB
    batch_size: int | None = None  # None: by `default_batch`
    dtype: str = "bf16"
    seed: int = 0
    workers: int = Field(default_factory=lambda: min(8, max(1, (os.cpu_count() or 2) // 2)))
    strict: bool = False

    @model_validator(mode="after")
    def _check(self) -> "PrepareConfig":
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"--val-fraction {self.val_fraction:g} is not between 0 and 1")
        for name in ("max_text_length", "shard_size", "batch_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is at least 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype} is not one of {', '.join(DTYPES)}")
        return self


class Encoders(NamedTuple):
    """What the models do, and which they are."""

    frames: Callable[[Tensor], Tensor]  # (B, F, H, W, 3) uint8 -> latents (B, C, F', H', W')
    text: Callable[[str, int], Tensor]  # caption, longest length -> states (L, D)
    count_tokens: Callable[[str], int]


class Progress(NamedTuple):
    """Where it is: `stage` is "reading" or "encoding"."""

    stage: str
    done: int  # files
    total: int
    samples: int


def sample_key(source: str, number: int) -> str:
    """A name for one sample that only follows from its file's path; readable, unique, safe in any tar reader."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", source.rsplit(".", 1)[0]).strip("-")[-48:]
    return f"{stem}-{hashlib.blake2b(source.encode(), digest_size=5).hexdigest()}-{number:05d}"


def encode_all(
    source: Path,
    plan: Plan,
    config: PrepareConfig,
    writer: "Writer",
    on_progress: Callable[[Progress], None],
) -> None:
    """Encode what is not in the spool yet. Files before the newest encoded sample are finished: order is fixed."""
    spool = writer.spool
    last = max(spool.done.values(), default="")
    jobs = [(i, entry) for i, entry in enumerate(plan.entries) if not entry.drop and entry.source >= last]
    total = sum(1 for entry in plan.entries if not entry.drop)

    def read(job: tuple[int, Entry]) -> Iterator[Clip | MediaError | None]:
        entry = job[1]

        def choose(width: float, height: float, number: int) -> Frame:
            return choose_frame(width, height, config.framing, config.seed, sample_key(entry.source, number))

        try:
            yield from read_clips(source / entry.source, entry.kind, config.timing, choose)
        except MediaError as error:
            yield error
        yield None

    finished, block = total - len(jobs), -1
    on_progress(Progress("encoding", finished, total, len(spool.done)))
    clips = read_ahead(jobs, read, config.workers)
    try:
        for (i, entry), result in clips:
            if i // BLOCK != block:
                writer.flush()
                block = i // BLOCK
            if isinstance(result, Clip):
                key = sample_key(entry.source, result.number)
                if key not in spool.done:
                    writer.add(key, entry, result)
            elif result is None:
                finished += 1
            else:
                if config.strict:
                    raise UserError(f"--strict: {entry.source} would be dropped: {result.kind}, {result}.")
                spool.drop(entry.source, result.kind, str(result))
            on_progress(Progress("encoding", finished, total, len(spool.done)))
        writer.flush()
    finally:
        clips.close()


def default_batch(pixels: np.ndarray) -> int:
    """Clips of this shape to encode together: many small ones, one large one."""
    return max(1, min(MOST_CLIPS, MOST_PIXELS // (pixels.size // 3)))


class Writer:
    """Collects clips of one shape and encodes them together."""

    def __init__(self, spool: Spool, config: PrepareConfig, encoders: Encoders, identity: dict[str, str]) -> None:
        self.spool = spool
        self.config = config
        self.encoders = encoders
        self.identity = identity
        self.clips: list[tuple[str, Entry, Clip]] = []
        self.text: tuple[str, Tensor, int] = ("", torch.empty(0), 0)  # of the latest caption

    def add(self, key: str, entry: Entry, clip: Clip) -> None:
        """Take a clip; the batch is encoded when it is full or the next clip has another shape."""
        if self.clips and self.clips[0][2].pixels.shape != clip.pixels.shape:
            self.flush()
        self.clips.append((key, entry, clip))
        if len(self.clips) >= (self.config.batch_size or default_batch(clip.pixels)):
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
            record = build_record(entry, clip, self.config, num_tokens, len(text)) | self.identity
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
