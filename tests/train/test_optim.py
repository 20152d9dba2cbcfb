"""AdamW against its formula in float64, the schedules at their corners, the average against its definition."""

import itertools

import pytest
import torch
from torch import nn

from wanloom.train.ema import Ema
from wanloom.train.optim import AdamW, learning_rate
from wanloom.train.settings import OptimizerConfig, ScheduleConfig


def build_params() -> dict[str, nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    shapes = {"linear.weight": (5, 3), "linear.bias": (5,), "modulation.weight": (1, 6, 4), "norm.weight": (3,)}
    return {name: nn.Parameter(torch.randn(shape, generator=g)) for name, shape in shapes.items()}


def test_updates_are_those_of_the_formula_and_only_matrices_decay():
    params = build_params()
    config = OptimizerConfig(lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    optimizer = AdamW(params, config)
    expected = {name: p.detach().double() for name, p in params.items()}
    first = {name: torch.zeros_like(x) for name, x in expected.items()}
    second = {name: torch.zeros_like(x) for name, x in expected.items()}
    g = torch.Generator().manual_seed(1)
    for t, lr in enumerate((0.1, 0.05, 0.2), start=1):
        for name, p in params.items():
            p.grad = torch.randn(p.shape, generator=g)
            grad = p.grad.double()
            first[name] = 0.8 * first[name] + 0.2 * grad
            second[name] = 0.9 * second[name] + 0.1 * grad**2
            decay = 0.3 if name == "linear.weight" else 0.0
            update = (first[name] / (1 - 0.8**t)) / ((second[name] / (1 - 0.9**t)).sqrt() + 1e-6)
            expected[name] = expected[name] * (1 - lr * decay) - lr * update
        optimizer.step(lr)
        assert all(p.grad is None for p in params.values())
    for name, p in params.items():
        torch.testing.assert_close(p.detach().double(), expected[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(optimizer.state()[f"exp_avg.{name}"].double(), first[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(optimizer.state()[f"exp_avg_sq.{name}"].double(), second[name], rtol=1e-5, atol=1e-6)


def test_a_restored_optimizer_goes_on_bit_for_bit():
    def steps(optimizer, params, numbers):
        for number in numbers:
            g = torch.Generator().manual_seed(number)
            for p in params.values():
                p.grad = torch.randn(p.shape, generator=g)
            optimizer.step(0.1)

    straight, config = build_params(), OptimizerConfig(lr=0.1)
    optimizer = AdamW(straight, config)
    steps(optimizer, straight, range(3))
    saved = {name: t.clone() for name, t in optimizer.state().items()}
    weights = {name: p.detach().clone() for name, p in straight.items()}
    steps(optimizer, straight, range(3, 6))

    resumed = build_params()
    other = AdamW(resumed, config)
    for name, tensor in other.state().items():
        tensor.copy_(saved[name])
    other.set_step_count(3)
    with torch.no_grad():
        for name, p in resumed.items():
            p.copy_(weights[name])
    steps(other, resumed, range(3, 6))
    assert all(torch.equal(p, resumed[name]) for name, p in straight.items())


@pytest.mark.parametrize(
    ("kind", "middle", "end"), [("constant", 1.0, 1.0), ("linear", 0.55, 0.1), ("cosine", 0.55, 0.1)]
)
def test_schedules(kind, middle, end):
    config = ScheduleConfig(kind=kind, warmup_steps=4, min_lr_ratio=0.1)
    found = [learning_rate(config, 2.0, step, 104) for step in range(105)]
    assert found[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert found[54] == pytest.approx(2 * middle) and found[104] == pytest.approx(2 * end)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(found[3:]))
    assert learning_rate(config, 2.0, 500, 104) == pytest.approx(2 * end)
    if kind == "cosine":
        assert found[29] == pytest.approx(2 * (0.1 + 0.9 * (1 + 0.5**0.5) / 2))


def test_the_average_follows_its_warm_up_and_then_its_decay():
    params = build_params()
    ema = Ema(params, decay=0.5)
    expected = {name: p.detach().double() for name, p in params.items()}
    decay = 0.0
    for count in range(12):
        with torch.no_grad():
            for p in params.values():
                p.add_(count + 1)
        ema.update(count)
        decay = min(0.5, (1 + count) / (10 + count))
        expected = {name: decay * x + (1 - decay) * params[name].detach().double() for name, x in expected.items()}
    assert decay == 0.5
    for name, x in expected.items():
        torch.testing.assert_close(ema.tensors()[name].double(), x, rtol=1e-6, atol=1e-6)
