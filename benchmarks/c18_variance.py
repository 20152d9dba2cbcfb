"""How much the loss of a batch varies with its noise levels, drawn one by one or stratified over the batch (C18).

16 samples, 200 seeds for each, one fixed network, and the loss that training minimises; every draw is that of `wanloom
train`. The network is the tiny one after 150 steps on the demo's task, so that its loss depends on the noise level as
that of a trained one does. Two questions: with the same 16 samples every time only noise and levels vary, which is what
stratification is for; with 16 other samples every time, as in training, the samples vary too. Nothing is timed, all is
seeded; one thread, for tiny work.
"""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import Row, main
from benchmarks.tiny_task import CONFIG, SAMPLES, TINY, OwnRun, Size, held_out, write_data
from wanloom.data.shards import Sample
from wanloom.model.sequence import Pack
from wanloom.objective.flow import flow_loss
from wanloom.objective.inputs import build_input, draw_example
from wanloom.objective.settings import PRESETS, FlowConfig
from wanloom.runs.build import build_objective

SIZES: dict[Size, int] = {(17, 64, 64): 80, (9, 96, 64): 48, (1, 64, 64): 48}
Network = Callable[[Pack, Tensor], Tensor]


def batch_losses(network: Network, samples: Sequence[Sample], flow: FlowConfig, seeds: int, same: bool) -> list[float]:
    """The loss of a batch for every seed; of the `same` samples, or of others for each seed."""
    out = []
    for seed in range(seeds):
        chosen = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0 if same else seed))
        own = TINY.model_copy(update={"seed": seed, "flow": flow})
        objective, taken = build_objective(own, CONFIG, None), [samples[i] for i in chosen[:SAMPLES].tolist()]
        made = build_input([draw_example(s.tensors, s.key, 0, place, objective) for place, s in enumerate(taken)])
        found = flow_loss(network(made.pack, made.sigma), made.target, made.sigma, made.pack.level_lens, flow)
        out.append(found.weighted_sum.item() / made.target.numel())
    return out


def spreads(network: Network, samples: Sequence[Sample], preset: str, seeds: int, same: bool) -> dict[bool, float]:
    """The standard deviation without and with stratification."""
    flows = {on: FlowConfig(**PRESETS[preset], stratified=on) for on in (False, True)}
    losses = {on: batch_losses(network, samples, flow, seeds, same) for on, flow in flows.items()}
    return {on: statistics.stdev(found) for on, found in losses.items()}


def measure(toy: bool) -> list[Row]:
    """Both questions, for the noise levels of the preset `finetune`."""
    steps, seeds = (4, 10) if toy else (150, 200)
    sizes = dict.fromkeys(SIZES, 8) if toy else SIZES
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder), sizes, dict.fromkeys(sizes, 4))
        run = OwnRun(data, seed=0)
        for _ in range(steps):
            run.step()
        run.close()
        facts = {"seeds": seeds, "steps": steps, "held_out_loss": held_out(run.model, data)}
        rows = data.rows("train")
        samples = [data.read(rows[i]) for i in range(len(rows))]
        network = run.model.requires_grad_(False)
        found = {same: spreads(network, samples, "finetune", seeds, same) for same in (True, False)}
    what, peer = f"spread of the loss of a batch of {SAMPLES}", "a level for each sample by itself"
    limit = "sqrt((between + within) / within), the variances between and within noise levels"
    lower = "the rest is the spread between samples, which no draw of noise levels lowers"
    return [
        Row(
            "C18",
            f"{what}, the same samples",
            "",
            [found[True][True]],
            peer,
            [found[True][False]],
            target=2,
            limit=limit,
            facts=facts,
        ),
        Row(
            "C18",
            f"{what}, other samples each time, as in training",
            "",
            [found[False][True]],
            peer,
            [found[False][False]],
            note=lower,
            facts=facts,
        ),
    ]


if __name__ == "__main__":
    main(__spec__, measure, threads=1)
