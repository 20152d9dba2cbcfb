"""The held-out loss: mean squared error of the velocity on the val split, at fixed noise levels.

In: a model and the val split. Out: one number that does not depend on how the training run draws or weights its noise
levels, so runs with other settings can be compared. The one decision: the same samples with the same noise every time,
at five levels, so what moves is the model.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wanloom.data.index import Row
from wanloom.data.loader import Source
from wanloom.data.packing import pack_samples
from wanloom.dist import together
from wanloom.keys import draw_noise
from wanloom.model.dit import WanDiT
from wanloom.objective.inputs import Example, build_input, empty_input
from wanloom.parallel.mesh import Mesh
from wanloom.parallel.parts import share_of
from wanloom.parallel.pipeline import predict

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
MAX_SAMPLES = 64  # of each source, from the start of its val split
SEED = 0  # not the run's: the same noise for every run

Case = tuple[Source, Row, float]


def build_validation(model: WanDiT, mesh: Mesh, sources: Sequence[Source], budget: int) -> Callable[[], float] | None:
    """What computes the held-out loss, in packs of `budget` tokens or of one sample; None without a val split.

    Every rank calls it, and every rank gets the loss.
    """
    cases: list[Case] = []
    for source in sources:
        index = source.rows("val")
        rows = [index[i] for i in range(min(len(index), MAX_SAMPLES))]
        cases += [(source, row, sigma) for row in rows for sigma in SIGMAS]
    if not cases:
        return None
    tokens = [row.tokens for _, row, _ in cases]
    ranks = mesh.layout.data_ranks
    packs = pack_samples(tokens, max(budget, *tokens), [float(n) for n in tokens], ranks)

    def validate() -> float:
        sums = torch.zeros(2, dtype=torch.float64)
        for pack in packs[mesh.data_rank :: ranks]:
            sums += _squared_error(model, mesh, [cases[i] for i in pack])
        if mesh.layout.world > 1:
            torch.distributed.all_reduce(sums)
        error, count = sums.tolist()
        return error / count

    return validate


def _squared_error(model: WanDiT, mesh: Mesh, cases: Sequence[Case]) -> Tensor:
    """Sum of squares and count of elements `(2,)` fp64 of this rank's tokens of a pack, which may have no sample."""
    examples = []
    with together():  # every rank has as many packs
        for source, row, sigma in cases:
            tensors = source.read(row).tensors
            noise = draw_noise(tuple(tensors["latents"].shape), SEED, f"validation/{row.key}/{sigma}", 0)
            examples.append(Example(tensors, noise, [(row.frames, sigma)]))
    none = empty_input(model.config.out_channels, model.config.text_dim)
    pack, wanted, sigma = build_input(examples) if examples else none
    share = share_of(pack, sigma, mesh)
    velocity = predict(model, mesh, share.pack.to(mesh.device), share.sigma.to(mesh.device))
    if velocity is None:
        return torch.zeros(2, dtype=torch.float64)
    wanted = wanted[share.tokens].to(mesh.device)
    error = (velocity[: len(wanted)].float() - wanted).square().sum()
    return torch.tensor([error.item(), wanted.numel()], dtype=torch.float64)
