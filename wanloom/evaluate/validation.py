"""The held-out loss: mean squared error of the velocity on the val split, at fixed noise levels.

In: a model and the val split. Out: one number that does not depend on how the training run draws or weights its noise
levels, so runs with other settings can be compared. The one decision: the same samples with the same noise every time,
at five levels, so what moves is the model.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from wanloom.data.loader import Source
from wanloom.data.packing import pack_samples
from wanloom.data.shards import Row
from wanloom.model.sequence import build_pack, grid_of, patchify
from wanloom.objective.flow import noisy_and_velocity
from wanloom.objective.noise import draw_noise

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
MAX_SAMPLES = 64  # of each source, from the start of its val split
SEED = 0  # not the run's: the same noise for every run

Case = tuple[Source, Row, float]


def build_validation(
    model: nn.Module, sources: Sequence[Source], budget: int, device: torch.device, bf16: bool
) -> Callable[[], float] | None:
    """What computes the held-out loss, in packs of `budget` tokens or of one sample; None without a val split."""
    cases: list[Case] = []
    for source in sources:
        index = source.rows("val")
        rows = [index[i] for i in range(min(len(index), MAX_SAMPLES))]
        cases += [(source, row, sigma) for row in rows for sigma in SIGMAS]
    if not cases:
        return None
    tokens = [row.tokens for _, row, _ in cases]
    packs = pack_samples(tokens, max(budget, *tokens), [float(n) for n in tokens])

    @torch.no_grad()
    def validate() -> float:
        error, count = 0.0, 0
        for pack in packs:
            squares, elements = _squared_error(model, [cases[i] for i in pack], device, bf16)
            error, count = error + float(squares), count + elements
        return error / count

    return validate


def _squared_error(model: nn.Module, cases: Sequence[Case], device: torch.device, bf16: bool) -> tuple[Tensor, int]:
    noisy, target, grids, texts = [], [], [], []
    for source, row, sigma in cases:
        sample = source.read(row)
        clean = sample.latents.float()
        noise = draw_noise(tuple(clean.shape), SEED, f"validation/{sample.key}/{sigma}", 0)
        mixed, velocity = noisy_and_velocity(patchify(clean), patchify(noise), sigma)
        noisy.append(mixed)
        target.append(velocity)
        grids.append(grid_of(clean.shape))
        texts.append(sample.text.float())
    pack = build_pack(noisy, grids, texts).to(device)
    sigmas = torch.tensor([sigma for _, _, sigma in cases], dtype=torch.float32, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        velocity = model(pack, sigmas)
    wanted = torch.cat(target).to(device)
    return (velocity.float() - wanted).square().sum(), wanted.numel()
