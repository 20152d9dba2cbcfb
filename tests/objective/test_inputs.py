"""What becomes of samples: the inputs of training, of a held-out loss and of guidance are these."""

import pytest
import torch

from wanloom.keys import draw_noise
from wanloom.model.sequence import patchify, unpatchify
from wanloom.objective.inputs import Example, Objective, build_input, choose_text, empty_input
from wanloom.objective.settings import FlowConfig

TEXT_DIM = 64
EMPTY = torch.randn(1, TEXT_DIM, generator=torch.Generator().manual_seed(3))


def test_no_samples_have_an_input_of_the_same_kind():
    made = empty_input(16, TEXT_DIM)
    assert made.pack.tokens.shape == made.target.shape == (0, 64) and made.pack.positions.shape == (0, 3)
    assert made.pack.text.shape == (0, TEXT_DIM) and made.sigma.shape == (0,)
    assert made.pack.video_lens == made.pack.text_lens == ()
    shape = (16, 2, 4, 4)
    tensors = {"latents": torch.zeros(shape).bfloat16(), "text": torch.zeros(3, TEXT_DIM).bfloat16()}
    full = build_input([Example(tensors, draw_noise(shape, 0, "a", 0), [(2, 0.5)])])
    for a, b in ((made.pack.tokens, full.pack.tokens), (made.pack.positions, full.pack.positions)):
        assert a.dtype == b.dtype and a.shape[1:] == b.shape[1:]
    assert made.pack.text.shape[1:] == full.pack.text.shape[1:] and made.pack.text.dtype == full.pack.text.dtype
    assert made.target.dtype == full.target.dtype and made.sigma.dtype == full.sigma.dtype


def test_each_segment_is_noised_by_its_own_level():
    """A known first frame is itself; its neighbours are of one level."""
    g = torch.Generator().manual_seed(0)
    clip, still = (torch.randn(2, 16, frames, 4, 6, generator=g) for frames in (3, 1))
    text = torch.zeros(2, TEXT_DIM)
    made = build_input(
        [
            Example({"latents": clip[0], "text": text}, clip[1], [(1, 0.0), (2, 0.7)]),
            Example({"latents": still[0], "text": text}, still[1], [(1, 0.4)]),
        ]
    )
    assert made.pack.video_lens == (18, 6) and made.pack.level_lens == (6, 12, 6)
    assert made.sigma.tolist() == pytest.approx([0.0, 0.7, 0.4])
    level = torch.tensor([0.0, 0.7, 0.7]).view(3, 1, 1)
    noisy, first = made.pack.tokens.split(made.pack.video_lens)
    torch.testing.assert_close(unpatchify(noisy, (3, 2, 3)), (1 - level) * clip[0] + level * clip[1])
    torch.testing.assert_close(unpatchify(first, (1, 2, 3)), 0.6 * still[0] + 0.4 * still[1])
    assert torch.equal(noisy[:6], patchify(clip[0])[:6])
    assert torch.equal(made.target, torch.cat([patchify(z - x) for x, z in (clip, still)]))


@pytest.mark.parametrize("length", [0, 1, 2, 3, 512])
def test_captions_of_every_length_are_dropped_as_often(length):
    text = torch.full((length, TEXT_DIM), 2.0)
    for dropout, low, high in ((1.0, 400, 400), (0.3, 90, 150), (0.0, 0, 0)):
        objective = Objective(FlowConfig(), 5, 7, dropout, EMPTY, 16, TEXT_DIM)
        texts = [choose_text(text, "0/clip", draw, objective) for draw in range(400)]
        dropped = [chosen is EMPTY for chosen in texts]
        assert low <= sum(dropped) <= high
        assert all(chosen is (EMPTY if out else text) for chosen, out in zip(texts, dropped, strict=True))
