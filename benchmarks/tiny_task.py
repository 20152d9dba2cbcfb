"""The demo's task, with images and clips of several sizes: captioned moving shapes, encoded by the tiny pipeline.

In: how many of which size. Out: a prepared folder, opened, and a run of wanloom's on it, step by step. The one
decision: all is composed by what `wanloom train` calls, of the recipe `tiny`; only the loop is its own, so that a
benchmark can stop between two steps.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from wanloom.codecs.text import TextCodec
from wanloom.codecs.vae import VaeCodec
from wanloom.data.settings import DataConfig
from wanloom.data.shards import Dataset
from wanloom.data.tar import END, tar_pair
from wanloom.demo.shapes import SEEN, build_clip
from wanloom.evaluate.validation import build_validation
from wanloom.files import write_atomic
from wanloom.formats.pipeline import find_pipeline
from wanloom.model.dit import WanDiT
from wanloom.parallel.mesh import ONE_PROCESS, Mesh
from wanloom.runs.build import build_loader, build_parts, build_plan
from wanloom.runs.recipe import build_run
from wanloom.train.settings import EmaConfig
from wanloom.train.step import Batch, StepResult, train_step
from wanloom.variants import VARIANTS

CONFIG = VARIANTS["tiny"].shape
ALONE = Mesh(ONE_PROCESS, torch.device("cpu"))
TINY = build_run("tiny", {"caption_dropout": 0.0})  # a peer would need the same draws
SAMPLES, BUDGET = TINY.batch.samples, TINY.batch.tokens_per_pack
OPTIMIZER, FLOW, CLIP_NORM = TINY.optimizer, TINY.flow, TINY.clip_norm
WARM_UP = TINY.schedule.warmup_steps

Size = tuple[int, int, int]  # frames, height, width in pixels


def write_data(folder: Path, train: Mapping[Size, int], val: Mapping[Size, int]) -> Dataset:
    """So many samples of each size, of scenes and places of their own."""
    pipeline = find_pipeline("tiny")
    vae, text = VaeCodec.load(pipeline, "cpu"), TextCodec.load(pipeline, "cpu")
    number = 0
    for split, counts in (("train", train), ("val", val)):
        pairs = []
        for size, count in counts.items():
            clips = [build_clip(0, number + i, SEEN, *size) for i in range(count)]
            captions = [caption for _, _, caption in clips]
            states = text.encode(captions)
            for i in range(0, count, 8):
                frames = torch.stack([torch.from_numpy(frames) for frames, _, _ in clips[i : i + 8]])
                for j, latents in enumerate(vae.encode_batch(frames), start=i):
                    key = f"{split}-{number + j:05d}"
                    record = {"caption": captions[j], "source": f"{key}.mp4"}
                    pairs.append(tar_pair(key, {"latents": latents.bfloat16(), "text": states[j]}, record))
            number += count
        write_atomic(folder / split / "shard-000000.tar", [*pairs, END])
    return Dataset.open(folder)


def learning_rate(step: int) -> float:
    """Constant after a linear start."""
    return OPTIMIZER.lr * min((step + 1) / WARM_UP, 1.0)


class OwnRun:
    """A run of wanloom's, fp32; the loader's thread reads ahead. Close it."""

    def __init__(self, data: Dataset, seed: int) -> None:
        own = {"seed": seed, "data": DataConfig(path=data.path), "optimizer": OPTIMIZER, "ema": EmaConfig()}
        run = TINY.model_copy(update=own)
        plan = build_plan(run, CONFIG, [data], data_ranks=1)
        self._parts = build_parts(run, CONFIG, ALONE, plan, None)
        self.model, self.steps = self._parts.model, 0
        self._loader = build_loader(run, CONFIG, [data], plan, 0, None, rank=0)
        self._batches = iter(self._loader)

    def next_batch(self) -> Batch:
        return next(self._batches)

    def step(self, batch: Batch | None = None) -> StepResult:
        """One step, on the next batch where none is given."""
        batch = batch or self.next_batch()
        result = train_step(self.model, self._parts.trained, ALONE, batch, FLOW, CLIP_NORM)
        self._parts.optimizer.step(learning_rate(self.steps))
        self.steps += 1
        return result

    def close(self) -> None:
        self._loader.close()


def held_out(model: WanDiT, data: Dataset) -> float:
    """The held-out loss of `wanloom train`."""
    validate = build_validation(model, ALONE, [data], BUDGET)
    assert validate is not None
    return validate()
