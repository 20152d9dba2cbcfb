"""Noise levels against the published distributions, and the loss against a plain loop in float64."""

import math

import pytest
import torch

from wanloom.config import build_config
from wanloom.errors import UserError
from wanloom.keys import keyed_fractions
from wanloom.objective.flow import flow_loss, loss_weight, noisy_and_velocity, sample_sigma, stratify
from wanloom.objective.settings import PRESETS, FlowConfig

GRID = [(i + 0.5) / 4000 for i in range(4000)]


def levels(num_tokens: int = 100, mix: float = 0.999, **values) -> torch.Tensor:
    config = build_config(FlowConfig, values)
    return torch.tensor([sample_sigma(config, (u, mix), num_tokens) for u in GRID], dtype=torch.float64)


def assert_same_distribution(sigmas: torch.Tensor, samples: torch.Tensor) -> None:
    """Kolmogorov-Smirnov distance of quantiles on a grid and random samples."""
    ranks = torch.searchsorted(samples.sort().values, sigmas) / len(samples)
    assert (ranks - torch.tensor(GRID)).abs().max() < 1.9 / len(samples) ** 0.5


def test_samplers_follow_their_published_formulas():
    g = torch.Generator().manual_seed(0)
    n = 40_000
    u = torch.rand(n, generator=g, dtype=torch.float64)
    z = torch.randn(n, generator=g, dtype=torch.float64)
    assert_same_distribution(levels(sampler="uniform", shift=1.0), u)
    shifted = 3 / (3 + (1 / u - 1))  # how the reference recipe writes the shift
    assert_same_distribution(levels(sampler="uniform", shift=3.0), shifted)
    logit_normal = torch.sigmoid(0.4 + 1.5 * z)
    assert_same_distribution(levels(sampler="logit_normal", logit_mean=0.4, logit_std=1.5, shift=1.0), logit_normal)
    mode = 1 - u - 1.29 * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)  # SD3, equation 20
    assert_same_distribution(levels(sampler="mode", mode_scale=1.29, shift=1.0), mode)
    torch.manual_seed(0)
    beta = torch.distributions.Beta(torch.tensor(2.5).double(), torch.tensor(1.5).double()).sample((n,))
    assert_same_distribution(levels(sampler="beta", beta_alpha=2.5, beta_beta=1.5, shift=1.0), beta)


@pytest.mark.parametrize(
    ("mode", "mean", "p10", "p90"), [("pretrain", 0.656, 0.26, 0.948), ("finetune", 0.677, 0.253, 0.964)]
)
def test_presets_give_the_reference_recipes_noise_levels(mode, mean, p10, p90):
    config = build_config(FlowConfig, PRESETS[mode])
    draws = [keyed_fractions(2, 1, "sigma", f"0/{i}", 0) for i in range(20_000)]
    sigmas = torch.tensor([sample_sigma(config, u, 100) for u in draws])
    assert abs(sigmas.mean().item() - mean) < 0.01
    assert abs(sigmas.quantile(0.1).item() - p10) < 0.01
    assert abs(sigmas.quantile(0.9).item() - p90) < 0.01


def test_a_share_of_the_samples_is_uniform():
    config = FlowConfig(sampler="logit_normal", logit_std=0.1, mix_uniform_ratio=0.2, shift=1.0)
    assert sample_sigma(config, (0.01, 0.19), 1) == pytest.approx(0.01)
    assert sample_sigma(config, (0.01, 0.21), 1) == pytest.approx(1 / (1 + math.exp(0.1 * 2.3263479)), abs=1e-6)


def test_stratified_draws_cover_the_step_evenly():
    levels = sorted(stratify(keyed_fractions(1, 1, "sigma", f"0/{i}", 0)[0], i, 64) for i in range(64))
    assert all(i / 64 <= level < (i + 1) / 64 for i, level in enumerate(levels))


def test_shift_grows_with_the_square_root_of_the_tokens():
    config = FlowConfig(shift=3.0, shift_tokens=100)
    assert sample_sigma(config, (0.5, 0.9), 100) == pytest.approx(0.75)
    assert sample_sigma(config, (0.5, 0.9), 400) == pytest.approx(6 * 0.5 / (1 + 5 * 0.5))
    assert sample_sigma(FlowConfig(shift=3.0), (0.5, 0.9), 400) == pytest.approx(0.75)


@pytest.mark.parametrize("sampler", ["uniform", "logit_normal", "mode", "beta"])
def test_every_sampler_stays_inside_and_rises(sampler):
    config = FlowConfig(sampler=sampler)
    sigmas = [sample_sigma(config, (u, 0.9), 7) for u in (0.0, 1e-12, *GRID, 1 - 2**-53)]
    assert all(0 <= s <= 1 for s in sigmas)
    assert sigmas == sorted(sigmas)


@pytest.mark.parametrize("weighting", ["linear", "none"])
def test_loss_and_gradient_are_those_of_a_plain_loop(weighting):
    config = FlowConfig(weighting=weighting, shift=2.5)
    g = torch.Generator().manual_seed(1)
    lens, sigma = (3, 7, 7, 1), torch.tensor([0.1, 0.5, 0.99, 0.0])
    velocity = torch.randn(18, 8, generator=g, requires_grad=True)
    target = torch.randn(18, 8, generator=g)
    loss = flow_loss(velocity, target, sigma, lens, config)
    loss.weighted_sum.backward()

    plain = velocity.detach().double().requires_grad_()
    weighted_sum, plain_sum, first = 0.0, 0.0, 0
    for n, s in zip(lens, sigma.double(), strict=True):
        square = (s > 0) * (plain[first : first + n] - target[first : first + n].double()).square().sum()
        weighted_sum = weighted_sum + (1 + 2.5 * s if weighting == "linear" else 1) * square
        plain_sum = plain_sum + square
        first += n
    weighted_sum.backward()
    torch.testing.assert_close(loss.weighted_sum.double(), weighted_sum, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.plain_sum.double(), plain_sum, rtol=1e-6, atol=0)
    torch.testing.assert_close(velocity.grad.double(), plain.grad, rtol=1e-6, atol=1e-7)


def test_noise_and_data_meet_at_the_ends():
    clean, noise = torch.randn(2, 5, 4).unbind()
    assert torch.equal(noisy_and_velocity(clean, noise, 0.0)[0], clean)
    assert torch.equal(noisy_and_velocity(clean, noise, 1.0)[0], noise)
    noisy, velocity = noisy_and_velocity(clean, noise, 0.3)
    torch.testing.assert_close(noisy, 0.7 * clean + 0.3 * noise)
    torch.testing.assert_close(noisy - 0.3 * velocity, clean)
    assert loss_weight(FlowConfig(shift=3.0), torch.tensor([0.5])).item() == 2.5


def test_wrong_settings_are_named():
    with pytest.raises(UserError, match="logitnormal"):
        build_config(FlowConfig, {"sampler": "logitnormal"})
    with pytest.raises(UserError, match="mode_scale"):
        build_config(FlowConfig, {"mode_scale": 2.0})
