"""One optimizer step: samples to model inputs, forward and backward over the packs, clipped gradients.

In: a `Step` of the loader. Out: what happened, as host numbers. The one decision: everything that is random about a
sample is keyed by its name and draw number, so `build_batch` can run in the loader's thread and gives the same inputs
wherever the sample lands. The loss of each pack is divided by the element count of the whole step, over all data ranks,
before backward; the count is known from the index, so gradients are summed over ranks and never averaged.
A loss or gradient that is not finite raises before the weights are touched.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wanloom.data.loader import Step, Totals
from wanloom.dist import gather
from wanloom.geometry import PATCH
from wanloom.model.dit import WanDiT
from wanloom.objective.flow import flow_loss
from wanloom.objective.inputs import Input, Objective, build_input, draw_example, empty_input
from wanloom.objective.settings import FlowConfig
from wanloom.parallel.mesh import Mesh
from wanloom.parallel.params import grad_norm, local, sum_copies
from wanloom.parallel.parts import share_of
from wanloom.parallel.pipeline import run_packs


class Batch(NamedTuple):
    """The inputs of one step for one data rank, on the host."""

    step: int
    inputs: list[Input]
    keys: list[list[str]]  # names of the samples, pack by pack
    totals: Totals
    num_elements: int  # of all data ranks: what the loss is divided by


class StepResult(NamedTuple):
    """What one step did."""

    weighted_loss: float
    loss: float
    grad_norm: float


class NonFiniteError(ArithmeticError):
    """The loss or the gradient of a step is not a number; the weights were not touched.

    `keys` are the samples of the packs where it was seen; `weights` and `samples` those that are not finite themselves.
    """

    def __init__(self, what: str, step: int, keys: Sequence[str], cause: "Cause") -> None:
        super().__init__(f"the {what} of step {step} is not finite")
        self.what, self.step, self.keys = what, step, list(keys)
        self.weights, self.samples = cause


class Cause(NamedTuple):
    """Names of what is not finite before a step computes with it; neither, when it is the computing that overflows."""

    weights: list[str]
    samples: list[str]


def build_batch(step: Step, objective: Objective) -> Batch:
    """All inputs of a step for the data rank that read it."""
    packs = [
        [draw_example(item.sample.tensors, item.name, item.draw, item.position, objective) for item in items]
        for items in step.packs
    ]
    none = empty_input(objective.channels, objective.text_dim)
    return Batch(
        step=step.step,
        inputs=[build_input(examples) if examples else none for examples in packs],
        keys=[[item.sample.key for item in items] for items in step.packs],
        totals=step.totals,
        num_elements=step.totals.num_tokens * objective.channels * math.prod(PATCH),
    )


def forward_backward(
    model: WanDiT, trained: Mapping[str, nn.Parameter], mesh: Mesh, batch: Batch, flow: FlowConfig
) -> tuple[Tensor, Tensor]:
    """Add the gradients of the step's mean loss; returns the weighted and plain loss sums of each pack `(packs,)`.

    The sums are those of this rank's tokens; the gradients are summed over the ranks that share or copy a parameter.
    """
    weighted, plain = torch.zeros(2, len(batch.inputs), device=mesh.device)
    shares = [share_of(pack, sigma, mesh) for pack, _, sigma in batch.inputs]
    packs = [(share.pack.to(mesh.device), share.sigma.to(mesh.device)) for share in shares]

    def loss(i: int, velocity: Tensor) -> Tensor:
        share, sigma = shares[i], packs[i][1]
        target = batch.inputs[i].target[share.tokens].to(mesh.device)
        sums = flow_loss(velocity[: len(target)], target, sigma, share.lens, flow)
        weighted[i], plain[i] = sums.weighted_sum.detach(), sums.plain_sum
        return sums.weighted_sum / batch.num_elements

    run_packs(model, mesh, packs, loss)
    sum_copies(trained.values(), mesh)
    return weighted, plain


def clip_gradients(params: Collection[nn.Parameter], mesh: Mesh, max_norm: float | None) -> Tensor:
    """The norm over all gradients before clipping; None only measures."""
    norm = grad_norm(params, mesh)
    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for part in (local(p.grad) for p in params if p.grad is not None):
            part.mul_(scale)
    return norm


def train_step(
    model: WanDiT,
    trained: Mapping[str, nn.Parameter],
    mesh: Mesh,
    batch: Batch,
    flow: FlowConfig,
    clip_norm: float | None,
) -> StepResult:
    """Gradients of one step, clipped and ready for the optimizer. Raises NonFiniteError, the same on every rank."""
    weighted, plain = forward_backward(model, trained, mesh, batch, flow)
    norm = clip_gradients(trained.values(), mesh, clip_norm)
    totals = torch.stack([weighted.sum(), plain.sum()])
    if mesh.layout.world > 1:
        torch.distributed.all_reduce(totals)
    *sums, weighted_sum, plain_sum, grad = torch.cat([weighted, totals, norm[None]]).tolist()  # the one wait
    if not math.isfinite(weighted_sum):
        bad = [key for i, value in enumerate(sums) if not math.isfinite(value) for key in batch.keys[i]]
        raise NonFiniteError("loss", batch.step, unique(gather(bad)), find_cause(model, batch))
    if not math.isfinite(grad):
        bad = [key for keys in batch.keys for key in keys]
        raise NonFiniteError("gradient", batch.step, unique(gather(bad)), find_cause(model, batch))
    return StepResult(weighted_sum / batch.num_elements, plain_sum / batch.num_elements, grad)


def find_cause(model: nn.Module, batch: Batch) -> Cause:
    """Which weights and samples of any rank are not finite; all ranks ask together."""
    weights = [name for name, p in model.named_parameters() if not local(p.detach()).isfinite().all()]
    samples = []
    for (pack, target, _), keys in zip(batch.inputs, batch.keys, strict=True):
        parts = [values.split(lens) for values, lens in ((target, pack.video_lens), (pack.text, pack.text_lens))]
        finite = [all(bool(part.isfinite().all()) for part in of_sample) for of_sample in zip(*parts, strict=True)]
        samples += [key for key, is_finite in zip(keys, finite, strict=True) if not is_finite]
    return Cause(unique(gather(weights)), unique(gather(samples)))


def unique(keys: Sequence[Sequence[str]]) -> list[str]:
    """All keys once, in order; the ranks that share a pack all name it."""
    return list(dict.fromkeys(key for some in keys for key in some))
