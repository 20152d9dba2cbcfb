"""Guidance: both branches in one pack against two calls of the model for each sample alone."""

import pytest
import torch

from wanloom.model.dit import WanDiT
from wanloom.model.sequence import Grid, Pack, build_pack, patchify
from wanloom.model.settings import DiTConfig
from wanloom.parallel.mesh import ONE_PROCESS, Mesh
from wanloom.sample.guidance import build_branches, build_text_kv, guided_velocity

ALONE = Mesh(ONE_PROCESS, torch.device("cpu"))
CONFIG = DiTConfig(
    dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=24, freq_dim=32, text_slots=9
)  # few: the text weighs more
GRIDS: list[Grid] = [(3, 2, 4), (1, 3, 3), (3, 2, 4), (2, 1, 5)]
TEXT_LENS = (5, 1, 5, 7)
NEGATIVE_LENS = (2, 2, 6, 1)


@pytest.fixture(scope="module")
def model() -> WanDiT:
    torch.manual_seed(0)
    model = WanDiT(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return model.requires_grad_(False)


def states(lens: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, CONFIG.text_dim, generator=generator) for length in lens]


def noise_of(grid: Grid, seed: int) -> torch.Tensor:
    frames, rows, cols = grid
    return torch.randn(16, frames, 2 * rows, 2 * cols, generator=torch.Generator().manual_seed(seed))


NOISES = [noise_of(grid, i) for i, grid in enumerate(GRIDS)]


def guided(model: WanDiT, branches: Pack, tokens: torch.Tensor, sigma: float, guidance: float) -> torch.Tensor:
    return guided_velocity(model, branches, build_text_kv(model, branches, ALONE), tokens, sigma, guidance, ALONE)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_one_pack_equals_separate_calls(model, guidance):
    text, negative = states(TEXT_LENS, 1), states(NEGATIVE_LENS, 2)
    samples = [patchify(noise) for noise in NOISES]
    branches = build_branches(NOISES, text, negative if guidance != 1 else [])
    assert len(branches.video_lens) == (4 if guidance == 1 else 8)
    assert torch.equal(branches.tokens, torch.cat(samples if guidance == 1 else samples * 2)), "the noise itself"
    got = guided(model, branches, torch.cat(samples), 0.37, guidance)

    def alone(tokens, grid, states):
        return model(build_pack([tokens], [grid], [states]), torch.tensor([0.37]))

    want = []
    for i, (tokens, grid) in enumerate(zip(samples, GRIDS, strict=True)):
        prompt, without = alone(tokens, grid, text[i]), alone(tokens, grid, negative[i])
        want.append(without + guidance * (prompt - without))
    scale = torch.cat(want).abs().max()
    assert (got - torch.cat(want)).abs().max() < 1e-5 * scale
    assert got.dtype == torch.float32


def test_kept_text_is_that_of_each_branch(model):
    """The prompts' keys and values first, then the negatives', each as a branch alone has them; no level of noise."""
    text, negative = states(TEXT_LENS, 1), states(NEGATIVE_LENS, 2)
    both = build_text_kv(model, build_branches(NOISES, text, negative), ALONE)
    first = build_text_kv(model, build_branches(NOISES, text, []), ALONE)
    second = build_text_kv(model, build_branches(NOISES, negative, []), ALONE)
    slots = CONFIG.text_slots
    keys = [sum(n + (n < slots) for n in lens) for lens in (TEXT_LENS, NEGATIVE_LENS)]
    assert both.keys() == {str(i) for i in range(CONFIG.num_layers)}
    for name, kept in both.items():
        for found, prompts, negatives in zip(kept, first[name], second[name], strict=True):
            assert (len(prompts), len(negatives)) == (keys[0], keys[1])
            torch.testing.assert_close(found, torch.cat([prompts, negatives]), rtol=1e-5, atol=1e-6)
            assert (prompts[:1] - negatives[:1]).norm() > 0.1 * prompts[:1].norm()


def test_the_branches_differ_enough_to_notice_a_swap(model):
    text, negative = states((4,), 1), states((2,), 2)
    noise = noise_of((2, 2, 2), 0)
    tokens = patchify(noise)
    one = guided(model, build_branches([noise], text, negative), tokens, 0.5, 5.0)
    other = guided(model, build_branches([noise], negative, text), tokens, 0.5, 5.0)
    assert (one - other).norm() > 0.05 * one.norm()


def test_lists_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="2 samples, 2 texts and 1 negatives"):
        build_branches(NOISES[:2], states((1, 1), 0), states((1,), 0))
