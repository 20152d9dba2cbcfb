"""Solvers: grids against the published formulas, integration against a flow with a known solution."""

import numpy as np
import pytest
import torch
from torch import Tensor

from wanloom.errors import UserError
from wanloom.sample.solvers import Solver, build_scheduler, build_solver

SPREAD = 0.5  # standard deviation of the made-up data


def shifted(u: float, shift: float) -> float:
    return shift * u / (1 + (shift - 1) * u)


def test_grids_are_the_published_ones():
    # first and last three noise levels at 50 steps and shift 5, to six digits (facts on Wan 2.1's samplers)
    published = {
        "unipc": ((0.999800, 0.995732, 0.991530), (0.241740, 0.172265, 0.092507)),
        "dpm++": ((1.0, 0.995935, 0.991736), (0.241935, 0.172414, 0.092593)),
    }
    for name, (first, last) in published.items():
        sigmas = build_solver(name, 50, 5.0).sigmas
        np.testing.assert_allclose(sigmas[:3], first, atol=6e-7)
        np.testing.assert_allclose(sigmas[-4:-1], last, atol=6e-7)
        assert sigmas[-1] == 0 and len(sigmas) == 51


@pytest.mark.parametrize("shift", [1.0, 2.5, 12.0])
@pytest.mark.parametrize("steps", [1, 7, 40])
def test_grids_follow_the_formula(steps, shift):
    start = float(np.float32(0.999))
    for name, top in (("unipc", start), ("dpm++", 1.0), ("euler", 1.0)):
        want = [shifted(top * (1 - i / steps), shift) for i in range(steps)] + [0.0]
        np.testing.assert_allclose(build_solver(name, steps, shift).sigmas, want, rtol=1e-12, atol=1e-15)


def test_the_scheduler_holds_our_grid_and_cuts_timesteps():
    for name in ("unipc", "dpm++"):
        solver = build_solver(name, 9, 5.0)
        scheduler = build_scheduler(name, 5.0)
        scheduler.set_timesteps(9)
        # handed over in fp32 and shifted once, whatever the scheduler's own grid is
        np.testing.assert_array_equal(scheduler.sigmas.numpy(), solver.sigmas.astype(np.float32))
        assert scheduler.timesteps.tolist() == [int(1000 * s) for s in solver.sigmas[:-1]]
        np.testing.assert_array_equal(solver.model_sigmas, scheduler.timesteps.numpy() / 1000)
    euler = build_solver("euler", 9, 5.0)
    np.testing.assert_array_equal(euler.model_sigmas, euler.sigmas[:-1])


def test_whole_levels_are_not_cut_below_themselves():
    # at shift 1 every ninth of 0.999 is whole; 0.999 in fp64 would fall to 887, Wan's fp32 0.999 does not
    assert (build_solver("unipc", 9, 1.0).model_sigmas * 1000).round(6).tolist() == [999 - 111 * i for i in range(9)]


class GaussianFlow:
    """Velocity of data N(mean, SPREAD^2): straight from the marginals, with a closed-form solution."""

    def __init__(self, solver: Solver, mean: Tensor) -> None:
        self.levels = iter(solver.sigmas[:-1].tolist())
        self.told = iter(solver.model_sigmas.tolist())
        self.mean = mean

    def __call__(self, x: Tensor, told: float) -> Tensor:
        s = next(self.levels)
        assert told == next(self.told)
        variance = (1 - s) ** 2 * SPREAD**2 + s**2
        centred = x - (1 - s) * self.mean
        # E[noise - clean | x]
        return centred * (s - (1 - s) * SPREAD**2) / variance - self.mean

    def solution(self, noise: Tensor, start: float, end: float) -> Tensor:
        deviation = [((1 - s) ** 2 * SPREAD**2 + s**2) ** 0.5 for s in (start, end)]
        return (1 - end) * self.mean + (noise - (1 - start) * self.mean) * deviation[1] / deviation[0]


def error(name: str, steps: int) -> float:
    solver = build_solver(name, steps, 3.0)
    generator = torch.Generator().manual_seed(11)
    noise = torch.randn(6, 5, 4, generator=generator)
    flow = GaussianFlow(solver, torch.randn(5, 4, generator=generator))
    got = solver.integrate(flow, noise)
    want = flow.solution(noise, solver.sigmas[0], 0.0)
    assert got.shape == noise.shape and got.dtype == torch.float32
    return ((got - want).norm() / want.norm()).item()


def test_the_known_flow_is_solved_with_the_order_of_the_solver():
    euler = [error("euler", steps) for steps in (20, 40, 80)]
    assert 1.7 < euler[0] / euler[1] < 2.3 and 1.7 < euler[1] / euler[2] < 2.3
    for name in ("unipc", "dpm++"):
        assert error(name, 10) / error(name, 20) > 4  # second order
        assert error(name, 40) < euler[1] / 2


@pytest.mark.parametrize("name", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_are_finite_and_one_step_is_the_prediction(name, steps):
    solver = build_solver(name, steps, 5.0)
    clean, noise = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    got = solver.integrate(lambda x, _: noise - clean, noise)
    # a constant velocity is a straight line, except for the little that UniPC's first level lies below 1
    torch.testing.assert_close(got, clean, atol=1e-3, rtol=0)


def test_a_solver_can_be_used_again():
    solver = build_solver("unipc", 6, 3.0)
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    steps = []
    first = solver.integrate(lambda x, s: torch.tanh(x) * s, noise, lambda: steps.append(1))
    assert torch.equal(first, solver.integrate(lambda x, s: torch.tanh(x) * s, noise)) and len(steps) == 6


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"no solver 'unipcc', only unipc, dpm\+\+, euler\. Did you mean 'unipc'\?"):
        build_solver("unipcc", 5, 3.0)
    with pytest.raises(UserError, match="steps is 0"):
        build_solver("euler", 0, 3.0)
    with pytest.raises(UserError, match="shift is 0"):
        build_solver("euler", 5, 0.0)
    with pytest.raises(UserError, match="shift is nan"):
        build_solver("euler", 5, float("nan"))
