"""Clips to encoded samples, in batches that any start and any number of ranks would form alike.

In: the blocks of a plan, and what is encoded already. Out: batches of encoded samples in the journal. The one decision:
a block is a few neighbouring files, chosen by the plan and the settings alone; a batch is filled in the order of the
plan with clips of one shape and never crosses a block. So its members, and with them every bit of the result, do not
depend on workers, kills, restarts or ranks, and each rank decodes and encodes blocks of its own.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wanloom.data.tar import tar_pair
from wanloom.dist import world_size
from wanloom.errors import UserError
from wanloom.geometry import Geometry
from wanloom.media.decoding import MediaError
from wanloom.media.framing import Crop, aspect_change, choose_crop
from wanloom.media.picture import Clip
from wanloom.media.readers import read_ahead
from wanloom.media.video import read_clips
from wanloom.memory import enough_memory
from wanloom.prepare.content import Content
from wanloom.prepare.journal import Journal
from wanloom.prepare.listing import MediaEntry
from wanloom.prepare.report import advise_short
from wanloom.prepare.settings import PrepareConfig, describe_batch, find_helps

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Encoders(NamedTuple):
    """What the models do."""

    frames: Callable[[Tensor], Tensor]  # (B, F, H, W, 3) uint8 -> latents (B, C, F', H', W')
    text: Callable[[str, int], Tensor]  # caption, longest length -> states (L, D)
    count_tokens: Callable[[str], int]


class Progress(NamedTuple):
    """Where it is, on rank 0 of all ranks together: `stage` is "reading" or "encoding"."""

    stage: str
    done: int  # files
    total: int
    samples: int


def sample_key(source: str, number: int) -> str:
    """A name for one sample that only follows from its file's path; readable, unique, safe in any tar reader."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", source.rsplit(".", 1)[0]).strip("-")[-48:]
    return f"{stem}-{hashlib.blake2b(source.encode(), digest_size=8).hexdigest()}-{number:05d}"


@dataclass
class FileBlock:
    """Neighbouring files that one rank encodes, in batches of their own."""

    number: int
    entries: list[MediaEntry]
    files: int = 0  # read to the end
    batches: int = 0  # in the journal
    keys: set[str] = field(default_factory=set)  # of the samples in the journal


def plan_blocks(entries: list[MediaEntry], config: PrepareConfig) -> list[FileBlock]:
    """The files that are not dropped, in blocks of about one batch, so that few files also make work for many ranks."""
    blocks: list[FileBlock] = []
    room = 0
    for entry in entries:
        if entry.drop:
            continue
        wish = most_files(entry.kind, config)
        if not blocks or wish != room or len(blocks[-1].entries) == room:
            blocks.append(FileBlock(len(blocks), []))
        blocks[-1].entries.append(entry)
        room = wish
    return blocks


def most_files(kind: str, config: PrepareConfig) -> int:
    """Files of a block: as many as a batch has clips at the largest size that the settings allow."""
    timing, framing = config.timing, config.framing
    frames = timing.frames if kind == "video" and timing.mode == "video" else 1
    area = framing.area or (framing.height or 0) * (framing.width or 0)
    return config.clips_of_batch(frames * area)


def encode_blocks(
    source: Path,
    blocks: list[FileBlock],
    numbers: Iterator[int],
    config: PrepareConfig,
    geometry: Geometry,
    encoder: "BatchEncoder",
    on_step: Callable[[FileBlock], None],
) -> None:
    """Encode what is not finished yet of the blocks whose numbers come; `on_step` is called after every clip."""
    journal = encoder.journal
    # a rank that has taken files ahead keeps them from the others: no more than its share
    left = sum(len(block.entries) for block in blocks) - journal.files
    workers = max(1, min(config.workers, -(-left // world_size())))
    files = _files_left(blocks, numbers, journal)
    with closing(read_ahead(files, partial(_read_file, source, config, geometry), workers)) as results:
        for (block, entry), result in results:
            if isinstance(result, Clip):
                encoder.add(block, entry, result)
            elif result is None:
                encoder.end_file(block)
            elif config.strict:
                raise UserError(f"`strict`: {entry.source} would be dropped: {result.kind}, {result}.")
            else:
                journal.drop(entry.source, result.kind, str(result), result.frames)
            on_step(block)


def _files_left(
    blocks: list[FileBlock], numbers: Iterator[int], journal: Journal
) -> Iterator[tuple[FileBlock, MediaEntry]]:
    """The files of the blocks whose numbers come that an earlier start has not read to their ends."""
    for number in numbers:
        if number not in journal.finished:
            find_begun(blocks[number], journal)
            for entry in blocks[number].entries[blocks[number].files :]:
                yield blocks[number], entry


def _read_file(
    source: Path, config: PrepareConfig, geometry: Geometry, file: tuple[FileBlock, MediaEntry]
) -> Iterator[Clip | MediaError | None]:
    """The clips of a file, why there are no more where something is wrong with it, and None at its end."""
    _, entry = file

    def choose(width: float, height: float, number: int) -> Crop:
        return choose_crop(width, height, config.framing, geometry.grid, config.seed, sample_key(entry.source, number))

    path, content = source / entry.source, Content(entry.stamp, entry.sha256)
    try:
        yield from read_clips(path, entry.kind, config.timing, choose, content.check, config.limits)
    except MediaError as error:
        way = "" if error.frames is None else f"; {advise_short(error.frames, geometry)}"
        yield MediaError(error.kind, f"{error}{way}", error.frames)
    yield None


def find_begun(block: FileBlock, journal: Journal) -> None:
    """Go on where an earlier start left a block: files before the newest encoded sample are finished, as order is."""
    batches = journal.begun(block.number)
    found = {key: source for batch in batches for key, source in batch.items()}
    block.batches, block.keys = len(batches), set(found)
    last = max(found.values(), default="")
    block.files = sum(entry.source < last for entry in block.entries)


class BatchEncoder:
    """Collects clips of one shape and encodes them together."""

    def __init__(self, journal: Journal, config: PrepareConfig, encoders: Encoders, identity: dict[str, str]) -> None:
        self.journal = journal
        self.config = config
        self.encoders = encoders
        self.identity = identity
        self.clips: list[tuple[str, MediaEntry, Clip]] = []  # all of one block
        self.text: tuple[str, Tensor, int] = ("", torch.empty(0), 0)  # of the latest caption

    def add(self, block: FileBlock, entry: MediaEntry, clip: Clip) -> None:
        """Take a clip, unless it is encoded; the batch goes when it is full or the next clip has another shape."""
        key = sample_key(entry.source, clip.number)
        if key in block.keys:
            return
        if self.clips and self.clips[0][2].pixels.shape != clip.pixels.shape:
            self.flush(block)
        self.clips.append((key, entry, clip))
        if len(self.clips) >= self.config.clips_of_batch(clip.pixels.size // 3):
            self.flush(block)

    def end_file(self, block: FileBlock) -> None:
        """A file gives no more; with its last file a block is finished."""
        block.files += 1
        if block.files == len(block.entries):
            self.flush(block)
            self.journal.finish(block.number, block.batches, block.files, len(block.keys))

    def flush(self, block: FileBlock) -> None:
        """Encode the clips at hand and keep them as one unit."""
        if not self.clips:
            return
        count, (frames, height, width, _) = len(self.clips), self.clips[0][2].pixels.shape
        shape = count, frames, height, width
        with enough_memory(describe_batch(shape), find_helps(self.config, shape)):
            pixels = torch.from_numpy(np.stack([clip.pixels for _, _, clip in self.clips]))
            encoded = self._encode(self.encoders.frames(pixels))
        self.journal.keep(block.number, block.batches, encoded)
        block.batches += 1
        block.keys |= {key for key, _, _ in self.clips}
        self.clips = []

    def _encode(self, batch: Tensor) -> list[bytes]:
        """The members of the shard, one for each clip at hand."""
        pairs = []
        for latents, (key, entry, clip) in zip(batch, self.clips, strict=True):
            text, num_tokens = self._encode_text(entry.caption)
            for what, values in (("latents", latents), ("text states", text)):
                if not torch.isfinite(values).all():
                    raise UserError(f"The {what} of {entry.source} are not finite: the model or its dtype is at fault.")
            record = build_record(entry, clip, self.config, num_tokens, len(text)) | self.identity
            dtype = DTYPES[self.config.dtype]
            pairs.append(tar_pair(key, {"latents": latents.to(dtype), "text": text.to(dtype)}, record))
        return pairs

    def _encode_text(self, caption: str) -> tuple[Tensor, int]:
        if self.text[0] != caption:
            states = self.encoders.text(caption, self.config.max_text_length)
            self.text = (caption, states, self.encoders.count_tokens(caption))
        return self.text[1], self.text[2]


def build_record(
    entry: MediaEntry, clip: Clip, config: PrepareConfig, num_tokens: int, text_len: int
) -> dict[str, Any]:
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
        "source_s": None if clip.source_seconds is None else round(clip.source_seconds, 3),
        "source_fps": clip.source_fps,
        "fps": config.timing.fps if is_video else None,
        "frames": clip.pixels.shape[0],
        "source_size": clip.source_size,
        "display_size": [round(side, 3) for side in clip.display_size],
        "resized": clip.crop.resized,
        "crop": [*clip.crop.corner, *clip.crop.size],
        "size": clip.crop.size,
        "aspect_change": round(aspect_change(*clip.display_size, clip.crop), 6),
        "colour": clip.colour.said,
        "colour_guessed": clip.colour.guessed,
        "notes": clip.notes,
    }
