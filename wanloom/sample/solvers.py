"""Solvers: noise to latents along the model's velocity, on an explicit grid of noise levels.

In: a name, the number of steps and the flow shift. Out: a `Solver`, whose `integrate` takes a velocity function and
noise of any shape. UniPC and DPM++ are the schedulers of diffusers; their own grids differ from the published ones
(and between versions), so the grid is made here and handed over, with their shift at 1 that it is not applied twice.

The one decision is which noise level the *model* is told. Wan's own sampling code and diffusers both tell it the whole
timestep, `floor(1000 * sigma)`, while the update uses the exact sigma. `unipc` and `dpm++` do the same, because it is
how the published models were sampled and because WanPipeline's latents cannot be met otherwise (an exact timestep
moves them by 1 to 3% on a random model). `euler` has no published form and tells the model the exact sigma.

Sources: UniPC, Zhao et al. 2023; DPM-Solver++, Lu et al. 2022; grids of Wan 2.1 (`fm_solvers*.py`).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import Tensor

from wanloom.errors import UserError, nearest
from wanloom.sample.settings import MAX_SHIFT, SolverName

NUM_TIMESTEPS = 1000  # timestep = 1000 * sigma
# Wan's UniPC starts at the last of 1000 discrete levels and keeps that number in fp32; its DPM++ starts at 1
UNIPC_START = float(np.float32(0.999))

Velocity = Callable[[Tensor, float], Tensor]  # (x, sigma that the model is told) -> velocity like x


@dataclass(frozen=True)
class Solver:
    """A way from noise to latents. Holds no state of a run: one solver serves any number of packs."""

    name: SolverName
    steps: int
    shift: float

    @property
    def sigmas(self) -> np.ndarray:
        """`(steps + 1,)` fp64 noise levels from almost or exactly 1 down to 0: equal steps of u, shifted."""
        u = np.linspace(UNIPC_START if self.name == "unipc" else 1.0, 0.0, self.steps + 1)
        return self.shift * u / (1 + (self.shift - 1) * u)

    @property
    def model_sigmas(self) -> np.ndarray:
        """`(steps,)` what the model is told in each step."""
        levels = self.sigmas[:-1]
        return levels if self.name == "euler" else np.floor(levels * NUM_TIMESTEPS) / NUM_TIMESTEPS

    def integrate(self, velocity: Velocity, noise: Tensor, on_step: Callable[[], None] | None = None) -> Tensor:
        """Latents of the shape of `noise`, fp32. No step mixes elements, so the first axis may be samples or tokens."""
        x = noise.float()
        sigmas = self.sigmas
        scheduler = None if self.name == "euler" else build_scheduler(self.name, self.shift)
        if scheduler is not None:
            scheduler.set_timesteps(self.steps, device=x.device)
            scheduler.set_begin_index(0)
        for i, told in enumerate(self.model_sigmas.tolist()):
            v = velocity(x, told).float()
            if scheduler is None:
                x = x + float(sigmas[i + 1] - sigmas[i]) * v
            else:
                x = scheduler.step(v, scheduler.timesteps[i], x, return_dict=False)[0]
            if on_step is not None:
                on_step()
        return x


def build_solver(name: str, steps: int, shift: float) -> Solver:
    """Raises UserError for an unknown name, less than one step or a shift out of range."""
    known = get_args(SolverName)
    if name not in known:
        raise UserError(f"There is no solver '{name}', only {', '.join(known)}.{nearest(name, known)}")
    if steps < 1:
        raise UserError(f"The number of steps is {steps}, it must be at least 1.")
    if not 0 < shift <= MAX_SHIFT:
        raise UserError(f"The shift is {shift}, it must be above 0 and at most {MAX_SHIFT}.")
    return Solver(cast(SolverName, name), steps, shift)


def build_scheduler(name: SolverName, shift: float) -> Any:
    """A diffusers scheduler that takes Wan's own grid for any number of steps; `unipc` or `dpm++`.

    `pipe.scheduler = build_scheduler("unipc", shift=5.0)` makes a WanPipeline give what `wanloom generate` gives.
    """
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    kind = UniPCMultistepScheduler if name == "unipc" else DPMSolverMultistepScheduler
    scheduler: Any = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    own_set_timesteps = scheduler.set_timesteps

    def set_timesteps(num_inference_steps: int, device: torch.device | str | None = None) -> None:
        with warnings.catch_warnings():  # diffusers 0.42 turns a tensor into an array in a way that numpy 2 deprecates
            warnings.filterwarnings("ignore", message="__array__ implementation doesn't accept a copy keyword")
            own_set_timesteps(num_inference_steps, device=device)  # clears the history of the run before
        grid = Solver(name, num_inference_steps, shift).sigmas
        scheduler.sigmas = torch.from_numpy(grid.astype(np.float32))
        scheduler.timesteps = torch.from_numpy(grid[:-1] * NUM_TIMESTEPS).to(device, torch.int64)  # cut, as Wan does

    scheduler.set_timesteps = set_timesteps
    return scheduler
