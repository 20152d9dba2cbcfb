"""The demo's task, with images and clips of several sizes: captioned moving shapes, encoded by the tiny pipeline.

In: how many of which size. Out: a prepared folder, opened, and a run of wanloom's on it, step by step. The one
decision: everything is done by the code that `wanloom train` runs (plan, loader, packs, keyed draws, step, optimizer),
put together here so that a benchmark can stop between two steps.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from wanloom.codecs.text import TextCodec
from wanloom.codecs.vae import VaeCodec
from wanloom.data.loader import Loader, Plan
from wanloom.data.settings import BatchConfig, SourceConfig
from wanloom.data.shards import Dataset
from wanloom.data.tar import END, tar_pair
from wanloom.demo.shapes import SEEN, build_clip
from wanloom.evaluate.validation import build_validation
from wanloom.files import write_atomic
from wanloom.formats.pipeline import find_pipeline
from wanloom.model.dit import WanDiT
from wanloom.model.flops import train_flops
from wanloom.model.init import init_weights
from wanloom.objective.inputs import Objective
from wanloom.objective.settings import FlowConfig
from wanloom.parallel.mesh import ONE_PROCESS, Mesh
from wanloom.train.optim import AdamW
from wanloom.train.settings import OptimizerConfig
from wanloom.train.step import Batch, StepResult, build_batch, train_step
from wanloom.variants import VARIANTS

CONFIG = VARIANTS["tiny"].shape
ALONE = Mesh(ONE_PROCESS, torch.device("cpu"))
SAMPLES, BUDGET = 16, 1280  # of a step, and tokens of a pack: as recipes/tiny.yaml has them
OPTIMIZER = OptimizerConfig(lr=4e-3, betas=(0.9, 0.99), weight_decay=0.01)
WARM_UP = 40  # steps
CLIP_NORM = 1.0
FLOW = FlowConfig(sampler="uniform", shift=3.0, stratified=True)

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


def build_objective(seed: int, flow: FlowConfig = FLOW) -> Objective:
    """Captions are never dropped: a peer would need the same draws."""
    return Objective(
        flow=flow,
        seed=seed,
        num_samples=SAMPLES,
        caption_dropout=0.0,
        empty_text=None,
        channels=CONFIG.in_channels,
        text_dim=CONFIG.text_dim,
    )


def build_plan(data: Dataset, seed: int) -> Plan:
    """Which samples make a step."""
    batch = BatchConfig(samples=SAMPLES, tokens_per_pack=BUDGET)
    return Plan([data], [SourceConfig(path=data.path)], batch, seed, partial(train_flops, CONFIG))


def learning_rate(step: int) -> float:
    """Constant after a linear start."""
    return OPTIMIZER.lr * min((step + 1) / WARM_UP, 1.0)


class OwnRun:
    """A run of wanloom's, fp32; the loader's thread reads ahead. Close it."""

    def __init__(self, data: Dataset, seed: int) -> None:
        self.model = WanDiT(CONFIG)
        init_weights(self.model, seed)
        self.steps = 0
        self._optimizer = AdamW(dict(self.model.named_parameters()), OPTIMIZER)
        assemble = partial(build_batch, objective=build_objective(seed))
        self._loader = Loader([data], build_plan(data, seed), 0, assemble)
        self._batches = iter(self._loader)

    def next_batch(self) -> Batch:
        return next(self._batches)

    def step(self, batch: Batch | None = None) -> StepResult:
        """One step, on the next batch where none is given."""
        batch = batch or self.next_batch()
        result = train_step(self.model, self._optimizer.named, ALONE, batch, FLOW, CLIP_NORM)
        self._optimizer.step(learning_rate(self.steps))
        self.steps += 1
        return result

    def close(self) -> None:
        self._loader.close()


def held_out(model: WanDiT, data: Dataset) -> float:
    """The held-out loss of `wanloom train`."""
    validate = build_validation(model, ALONE, [data], BUDGET)
    assert validate is not None
    return validate()
