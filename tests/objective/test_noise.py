"""Draws are functions of their key alone."""

import torch

from wanloom.objective.noise import draw_noise, draw_uniform


def test_a_draw_depends_on_every_part_of_its_key_and_on_nothing_else():
    shape = (2, 3, 4, 6)
    base = draw_noise(shape, 1, "0/clip", 2)
    torch.manual_seed(5)
    draw_noise((7,), 1, "0/other", 2)
    assert torch.equal(base, draw_noise(shape, 1, "0/clip", 2))
    for key in ((2, "0/clip", 2), (1, "1/clip", 2), (1, "0/clip", 3)):
        assert not torch.equal(base, draw_noise(shape, *key))
    # parts do not run into each other
    assert draw_uniform(1, "a", "1", 2) != draw_uniform(1, "a", "12", 0)
    assert draw_uniform(1, "a", "b", 0) != draw_uniform(1, "ab", "", 0)
    assert draw_uniform(1, "a", "b", 0) != draw_uniform(1, "a", "b", 1) != draw_uniform(2, "a", "b", 1)


def test_draws_of_many_keys_have_the_right_distribution():
    noise = torch.stack([draw_noise((16, 2, 4, 4), 3, f"0/{i}", 0) for i in range(400)])
    assert noise.dtype == torch.float32
    assert abs(noise.mean().item()) < 0.01 and abs(noise.std().item() - 1) < 0.01
    # the same element over samples, and pairs of samples, are independent too
    assert (noise.mean(0).abs() < 6 / 20).all()
    flat = noise.flatten(1)
    correlation = torch.corrcoef(flat) - torch.eye(400)
    assert correlation.abs().max() < 6 / flat.shape[1] ** 0.5
    u = torch.tensor([draw_uniform(3, "sigma", f"0/{i}", 0, 2) for i in range(4000)])
    assert (u >= 0).all() and (u < 1).all()
    assert torch.allclose(u.mean(0), torch.tensor(0.5, dtype=u.dtype), atol=0.02)
    assert abs(torch.corrcoef(u.T)[0, 1].item()) < 0.06
