"""E1: training to the same held-out loss, from the same weights, on clips and images of three sizes.

The peer is a plain loop over diffusers' WanTransformer3DModel, as trainers of Wan have it (musubi-tuner,
diffusion-pipe): buckets of one size, a step is 16 samples of one bucket, captions padded with zeros to 512 states, a
noise level for each sample drawn by itself, the mean of the weighted squared error. Wanloom is the code of `wanloom
train`: 16 samples of any size in packs, stratified noise levels. Both are fp32 and eager, with the same initial
weights, fused AdamW and its settings, learning rate, warm-up, weighting, clipping and number of threads. They train in
turns of 25 steps.

The held-out loss is that of `wanloom train`, for both computed by one function in one model that the weights are copied
to. Wanloom minimises its mean over tokens, as it reports it; a loop over buckets minimises the mean over samples, where
an image counts as much as a clip. Both means are rows; seconds are those to the mean over samples, the peer's. Each of
these rows is the mean over the seeds.

Timed are the steps. Preparing the data, held-out losses and building models are outside. The peer has all latents and
padded captions in memory; wanloom reads shards in its loader's thread, inside.

How much of it is arithmetic alone is a row of its own: the same 16 samples, noise and levels through diffusers, one
sample after the other with gradient accumulation, or together where sizes agree; the gradients are equal to wanloom's.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from benchmarks.measure import Row, main, take_turns
from benchmarks.pair import relative
from benchmarks.peer import build_diffusers
from benchmarks.tiny_task import (
    ALONE,
    BUDGET,
    CLIP_NORM,
    CONFIG,
    FLOW,
    OPTIMIZER,
    SAMPLES,
    OwnRun,
    Size,
    learning_rate,
    write_data,
)
from wanloom.data.index import Index, build_table, read_table
from wanloom.data.index import Row as Sampled
from wanloom.data.shards import Dataset, Sample
from wanloom.evaluate.validation import build_validation
from wanloom.formats.transformer import state_dict_as
from wanloom.model.dit import WanDiT
from wanloom.model.flops import train_flops
from wanloom.model.sequence import unpatchify
from wanloom.train.step import Batch, forward_backward

TRAIN: dict[Size, int] = {(17, 64, 64): 160, (9, 96, 64): 96, (1, 64, 64): 96}  # whole batches of each size
VAL: dict[Size, int] = {(17, 64, 64): 24, (9, 96, 64): 12, (1, 64, 64): 12}
TOY: dict[Size, int] = {(5, 32, 32): SAMPLES, (1, 32, 32): SAMPLES}
SEEDS, TURNS, TURN = 2, 4, 25  # TURN steps each, TURNS times
PADDING = (
    "The ratio of the FLOPs comes of the padded captions: 512 states weigh much beside 16 to 80 video tokens, and "
    "about 1% at 480p."
)
SEED = (
    "Another seed moves a side's samples by a tenth, so this only says that wanloom does not need more of them. The "
    "learning rate is wanloom's; with half of it the loop needed more samples."
)


class Point(NamedTuple):
    """Of a curve: seconds and samples so far, and the held-out loss, its mean over tokens and over samples."""

    seconds: float
    samples: float
    by_tokens: float
    by_samples: float


def build_theirs(ours: WanDiT) -> WanTransformer3DModel:
    """With the weights of ours."""
    theirs = build_diffusers(CONFIG)
    theirs.load_state_dict(state_dict_as(ours.state_dict(), "diffusers"))
    return theirs


def pad(text: Tensor) -> Tensor:
    """States `(L, text_dim)` padded with zeros to what the model takes."""
    return torch.cat([text, text.new_zeros(CONFIG.text_slots - len(text), CONFIG.text_dim)])


def shift_levels(u: Tensor) -> Tensor:
    """The noise levels for uniforms."""
    return FLOW.shift * u / (1 + (FLOW.shift - 1) * u)


def add_gradients(
    model: nn.Module, noisy: Tensor, target: Tensor, sigma: Tensor, text: Tensor, num_elements: int
) -> None:
    """Those of the weighted squared error of samples of one size, over `num_elements`."""
    velocity = model(noisy, 1000 * sigma, text, return_dict=False)[0]
    weight = (1 + FLOW.shift * sigma).view(-1, 1, 1, 1, 1)
    ((weight * (velocity - target).square()).sum() / num_elements).backward()


class BucketRun:
    """The peer's run."""

    def __init__(self, data: Dataset, model: WanTransformer3DModel, seed: int) -> None:
        self.model = model
        self.steps = 0
        self._draws = torch.Generator().manual_seed(seed)
        rows, samples = data.rows("train"), dict[tuple[int, ...], list[tuple[Tensor, Tensor]]]()
        for sample in (data.read(rows[i]) for i in range(len(rows))):
            latents, text = sample.tensors["latents"], sample.tensors["text"]
            samples.setdefault(tuple(latents.shape), []).append((latents.float(), pad(text)))
        self._buckets = [tuple(torch.stack(parts) for parts in zip(*found, strict=True)) for found in samples.values()]
        matrices = [p for p in model.parameters() if p.dim() in (2, 5)]  # the patch embedding is a convolution here
        others = [p for p in model.parameters() if p.dim() not in (2, 5)]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
            lr=OPTIMIZER.lr,
            betas=OPTIMIZER.betas,
            eps=OPTIMIZER.eps,
            weight_decay=OPTIMIZER.weight_decay,
            fused=True,
        )
        self._batches = self._epochs()

    def _epochs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Latents and captions of a batch; every epoch shuffles inside the buckets, and then the batches of all."""
        while True:
            batches = []
            for latents, texts in self._buckets:
                order = torch.randperm(len(latents), generator=self._draws)
                batches += [(latents[chosen], texts[chosen]) for chosen in order.split(SAMPLES)]
            for i in torch.randperm(len(batches), generator=self._draws).tolist():
                yield batches[i]

    def step(self) -> None:
        clean, text = next(self._batches)
        sigma = shift_levels(torch.rand(len(clean), generator=self._draws))
        noise = torch.randn(clean.shape, generator=self._draws)
        noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
        add_gradients(self.model, noisy, noise - clean, sigma, text, clean.numel())
        self.update()

    def update(self) -> None:
        """What follows on the gradients."""
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.steps)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.steps += 1


class OneSize:
    """The samples of one size of a dataset."""

    def __init__(self, data: Dataset, tokens: int) -> None:
        self.path, self.tokens = data.path, tokens
        self._data = data

    def rows(self, split: str) -> Index:
        index = self._data.rows(split)
        rows = [index[int(i)] for i in (index.tokens == self.tokens).nonzero()[0]]
        return read_table(build_table(rows), self.path).splits[split]

    def read(self, row: Sampled) -> Sample:
        return self._data.read(row)


class Judge:
    """The held-out loss of any weights."""

    def __init__(self, data: Dataset) -> None:
        self.model = WanDiT(CONFIG)
        self._places = state_dict_as(self.model.state_dict(), "diffusers")
        sizes = [OneSize(data, tokens) for tokens in sorted(set(data.rows("val").tokens.tolist()))]
        self._parts = [
            (size.tokens, len(size.rows("val")), build_validation(self.model, ALONE, [size], BUDGET)) for size in sizes
        ]

    def losses(self, run: "OwnRun | BucketRun") -> tuple[float, float]:
        """Its mean over tokens, which is the one that wanloom reports, and over samples."""
        state = run.model.state_dict()
        for name, value in (state_dict_as(state, "diffusers") if isinstance(run, OwnRun) else state).items():
            self._places[name].copy_(value)
        found = [(tokens, count, validate()) for tokens, count, validate in self._parts if validate is not None]
        tokens, samples = sum(n * count for n, count, _ in found), sum(count for _, count, _ in found)
        by_tokens = sum(n * count * loss for n, count, loss in found) / tokens
        return by_tokens, sum(count * loss for _, count, loss in found) / samples


def train_both(data: Dataset, seed: int, turns: int, turn: int) -> list[list[Point]]:
    """The curves of wanloom and of the peer, from step 0."""
    judge = Judge(data)
    with closing(OwnRun(data, seed)) as ours:
        theirs = BucketRun(data, build_theirs(ours.model), seed)
        curves = [[Point(0.0, 0, *judge.losses(run))] for run in (ours, theirs)]
        assert curves[0] == curves[1]
        for _ in range(turns):
            for run, curve in zip((ours, theirs), curves, strict=True):
                began = time.perf_counter()
                for _ in range(turn):
                    run.step()
                seconds = curve[-1].seconds + time.perf_counter() - began
                curve.append(Point(seconds, run.steps * SAMPLES, *judge.losses(run)))
    return curves


def reach(curve: Sequence[Point], which: str, loss: float) -> Point:
    """Where the held-out loss first is as low, on straight lines between the points."""
    for before, after in pairwise(curve):
        high, low = getattr(before, which), getattr(after, which)
        if low <= loss:
            part = (high - loss) / (high - low)
            return Point(*(a + part * (b - a) for a, b in zip(before, after, strict=True)))
    raise ValueError(f"the loss {loss} is not reached, only {min(getattr(point, which) for point in curve)}")


def group_samples(batch: Batch, together: bool) -> list[list[Tensor]]:
    """Noisy latents, velocity, noise levels and padded captions of a step, stacked: by size, or sample by sample."""
    groups = dict[object, list[tuple[Tensor, Tensor, Tensor, Tensor]]]()
    for pack, target, sigma in batch.inputs:
        parts = (x.split(pack.video_lens) for x in (pack.tokens, target, pack.positions))
        for *sample, s, text in zip(*parts, sigma, pack.text.split(pack.text_lens), strict=True):
            tokens, wanted, place = sample
            grid = tuple((place.amax(0) + 1).tolist())
            key = grid if together else len(groups)
            groups.setdefault(key, []).append((unpatchify(tokens, grid), unpatchify(wanted, grid), s, pad(text)))
    return [[torch.stack(parts) for parts in zip(*group, strict=True)] for group in groups.values()]


def compare_steps(ours: OwnRun, rounds: int) -> tuple[dict[str, list[float]], str]:
    """Seconds of forward and backward on one step's samples, and how equal the gradients were."""
    batch, model, theirs = ours.next_batch(), ours.model, build_theirs(ours.model)
    groups = {"one by one": group_samples(batch, False), "size by size": group_samples(batch, True)}

    def run_ours() -> None:
        model.zero_grad()
        forward_backward(model, dict(model.named_parameters()), ALONE, batch, FLOW)

    def run_theirs(name: str) -> None:
        theirs.zero_grad()
        for group in groups[name]:
            noisy, target, sigma, text = group
            add_gradients(theirs, noisy, target, sigma, text, batch.num_elements)

    run_ours()
    expected = state_dict_as(
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, "diffusers"
    )
    worst = 0.0
    for name in groups:
        run_theirs(name)
        found = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys()
        worst = max(worst, *(relative(found[n], expected[n]) for n in expected))
    assert worst < 1e-3, worst
    functions = {name: lambda name=name: run_theirs(name) for name in groups}
    return take_turns({**functions, "wanloom": run_ours}, rounds), f"every gradient within {worst:.0e}, relative norms"


def rows_of_curves(curves: Sequence[list[list[Point]]], facts: dict[str, object], flops: float) -> list[Row]:
    """Seconds and samples to the highest of all the last losses, means over seeds; `curves` by seed and side."""
    out = []
    for which, unit in (("by_samples", "s"), ("by_samples", "samples"), ("by_tokens", "samples")):
        loss = max(min(getattr(point, which) for point in curve) for pair in curves for curve in pair)
        ours, theirs = zip(*([reach(curve, which, loss) for curve in pair] for pair in curves), strict=True)
        seconds = unit == "s"
        values = [[point.seconds if seconds else point.samples for point in side] for side in (ours, theirs)]
        ratios = ", ".join(f"{b / a:.2f}" for a, b in zip(*values, strict=True))
        out.append(
            Row(
                "E1",
                f"{'seconds' if seconds else 'samples'} to a held-out loss of {loss:.3f}, mean over {which[3:]}",
                unit,
                [fmean(values[0])],
                "diffusers, size buckets",
                [fmean(values[1])],
                target=None if seconds else 1.0,
                limit=f"{flops:.1f}x FLOPs" if seconds else "",
                note=f"The mean of {len(curves)} seeds, whose ratios are {ratios}. {PADDING if seconds else SEED}",
                facts=facts,
            )
        )
    return out


def flops_ratio(data: Dataset) -> float:
    """With 512 states of a caption over those it has and one for the rest."""
    rows = data.rows("train")
    tokens, texts = rows.tokens.tolist(), rows.columns["text_len"].tolist()
    own = sum(train_flops(CONFIG, n, text + 1) for n, text in zip(tokens, texts, strict=True))
    return sum(train_flops(CONFIG, n) for n in tokens) / own


def measure(toy: bool) -> list[Row]:
    """Seconds and samples to the same held-out loss; seconds of a step with the same samples."""
    train, val = (TOY, dict.fromkeys(TOY, 2)) if toy else (TRAIN, VAL)
    seeds, turns, turn, rounds = (1, 2, 2, 1) if toy else (SEEDS, TURNS, TURN, 7)
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder), train, val)
        with closing(OwnRun(data, seed=seeds)) as ours:
            steps, checked = compare_steps(ours, rounds)
        curves = [train_both(data, seed, turns, turn) for seed in range(seeds)]
        flops = flops_ratio(data)
    facts = {"curves": curves, "turn": turn}
    out = rows_of_curves(curves, facts, flops)
    what = f"forward and backward of the same {SAMPLES} samples"
    for name in ("one by one", "size by size"):
        taken = steps["wanloom"], f"diffusers, {name}", steps[name]
        out.append(Row("E1", what, "s", *taken, limit=f"{flops:.1f}x FLOPs", checked=checked))
    return out


if __name__ == "__main__":
    main(__spec__, measure)
