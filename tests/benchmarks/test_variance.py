"""Stratified noise levels: what they save where the best answer is known, and the benchmark whole."""

import pytest
import torch

from benchmarks import c18_variance
from wanloom.data.shards import Sample
from wanloom.model.sequence import Pack

pytestmark = pytest.mark.slow

VARIANCE = 0.5


def best_velocity(pack: Pack, sigma: torch.Tensor) -> torch.Tensor:
    """E[noise - clean | noisy] for clean values that are independent normals of a known variance."""
    level = torch.cat([s.expand(n) for s, n in zip(sigma, pack.video_lens, strict=True)])[:, None]
    total = (1 - level) ** 2 * VARIANCE + level**2
    return pack.tokens * (level - (1 - level) * VARIANCE) / total


def test_the_spread_is_less_than_half_with_the_best_network_for_gaussian_data():
    """The loss of the best network is known too: VARIANCE / total, by which the batch losses must average."""
    g = torch.Generator().manual_seed(0)
    clean = [VARIANCE**0.5 * torch.randn(16, 2, 8, 8, generator=g) for _ in range(16)]
    samples = [Sample(f"{i}", {"latents": x, "text": torch.zeros(1, 64)}, "") for i, x in enumerate(clean)]
    for preset in ("pretrain", "finetune"):
        found = c18_variance.spreads(best_velocity, samples, preset, 200, same=True)
        assert found[False] >= 2 * found[True] > 0, preset
    flow = c18_variance.FlowConfig(sampler="uniform", shift=1.0, weighting="none", stratified=True)
    losses = c18_variance.batch_losses(best_velocity, samples, flow, 50, same=True)
    s = (torch.arange(10_000) + 0.5) / 10_000
    expected = (VARIANCE / ((1 - s) ** 2 * VARIANCE + s**2)).mean().item()
    assert abs(sum(losses) / 50 / expected - 1) < 0.01


def test_every_row_is_measured():
    rows = c18_variance.measure(toy=True)
    assert [row.target for row in rows] == [2, None]
    assert all(row.claim == "C18" and row.ours[0] > 0 and row.theirs[0] > 0 for row in rows)
