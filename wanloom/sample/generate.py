"""Text states and noise to latents: packs requests of any size, integrates the model's velocity with guidance.

In: a model and requests, each with the seed of its noise and the text states of both its prompts. Out: latents
`(C, F, H, W)` fp32 on the CPU, in the order of the requests. The one decision: as many requests as fit the token budget
share each call of the model, both branches of each; a request alone is always a pack, however large. Noise is drawn
on the CPU from the request's own seed, so it does not depend on the device, its neighbours or its place in the list.
The text does not change with the noise level: its keys and values are computed once a pack and kept over the steps.
Several processes make the same packs as one does and share each of them: the tokens by context and tensor parallelism,
the branches of guidance between two data ranks. Every process takes every step of the solver.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wanloom.keys import draw_noise
from wanloom.model.dit import WanDiT
from wanloom.model.sequence import grid_of, unpatchify
from wanloom.parallel.mesh import ONE_PROCESS, Mesh
from wanloom.sample.guidance import build_branches, build_text_kv, guided_velocity
from wanloom.sample.settings import GenerateConfig
from wanloom.sample.solvers import Solver, build_solver

TOKENS_PER_PACK = 16_384  # of both branches; past it, a call of the model gains nothing


@dataclass(frozen=True)
class Request:
    """One video or image to make."""

    shape: tuple[int, int, int, int]  # of its latents, (C, F, H, W)
    seed: int  # of its noise
    text: Tensor  # (L, text_dim) states of the prompt
    negative: Tensor  # (L', text_dim) states of the negative prompt; not read when guidance is 1

    @property
    def noise(self) -> Tensor:
        """Drawn anew for whoever asks: that of a 480p video has 8 MB, and there may be thousands of requests."""
        return draw_request_noise(self.shape, self.seed)


def draw_request_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """The noise of the request with this seed."""
    return draw_noise(shape, seed, "generate", 0)


def plan_packs(requests: Sequence[Request], config: GenerateConfig) -> list[list[int]]:
    """Indices of the requests of each pack, in order, under the token budget."""
    branches = 1 if config.guidance == 1 else 2
    packs: list[list[int]] = []
    room = 0
    for i, request in enumerate(requests):
        frames, rows, cols = grid_of(request.shape)
        tokens = branches * frames * rows * cols
        if not packs or tokens > room:
            packs.append([])
            room = TOKENS_PER_PACK
        packs[-1].append(i)
        room -= tokens
    return packs


@torch.no_grad()
def generate(
    model: WanDiT,
    requests: Sequence[Request],
    config: GenerateConfig,
    on_step: Callable[[int], None] | None = None,
    mesh: Mesh | None = None,
    done: Collection[int] = (),
) -> Iterator[tuple[int, Tensor]]:
    """Yields (index of the request, latents) pack by pack; `on_step` gets the number of requests that moved a step.

    Requests that are `done` are left out; packs stay what they are without, so that the others get the same bits.

    With a mesh, the model is the part of this process (`apply_layout`) and every process gets all the latents. Two data
    ranks take one branch of guidance each. Raises ValueError for more of them than branches.
    """
    mesh = mesh or Mesh(ONE_PROCESS, next(model.parameters()).device)
    if mesh.layout.data_ranks > (1 if config.guidance == 1 else 2):
        raise ValueError(f"guidance {config.guidance} has no branches for {mesh.layout.data_ranks} data ranks")
    solver = build_solver(config.solver, config.steps, config.shift)
    for pack in plan_packs(requests, config):
        if all(i in done for i in pack):
            continue
        # equal sizes and text lengths side by side: the attention takes neighbours that agree as one batch
        pack.sort(key=lambda i: (requests[i].shape, requests[i].text.shape[0]))
        chosen = [requests[i] for i in pack]
        latents = _integrate(model, chosen, solver, config.guidance, on_step, mesh)
        made = sorted(zip(pack, latents, strict=True), key=lambda pair: pair[0])
        yield from ((i, made_one) for i, made_one in made if i not in done)


def _integrate(
    model: WanDiT,
    requests: Sequence[Request],
    solver: Solver,
    guidance: float,
    on_step: Callable[[int], None] | None,
    mesh: Mesh,
) -> list[Tensor]:
    """Latents of the requests of one pack."""
    text = [request.text for request in requests]
    negatives = [] if guidance == 1 else [request.negative for request in requests]
    if mesh.layout.data_ranks == 2:
        text, negatives = negatives if mesh.data_rank else text, []
    branches = build_branches([request.noise for request in requests], text, negatives).to(mesh.device)
    text_kv = build_text_kv(model, branches, mesh)
    grids = [grid_of(request.shape) for request in requests]
    lengths = [frames * rows * cols for frames, rows, cols in grids]
    noise = branches.tokens[: sum(lengths)]

    def velocity(tokens: Tensor, sigma: float) -> Tensor:
        return guided_velocity(model, branches, text_kv, tokens, sigma, guidance, mesh)

    def moved() -> None:
        if on_step is not None:
            on_step(len(requests))

    tokens = solver.integrate(velocity, noise, moved).cpu()
    return [unpatchify(part, grid) for part, grid in zip(tokens.split(lengths), grids, strict=True)]
