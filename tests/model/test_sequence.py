import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from wanloom.model.sequence import (
    Pack,
    apply_rope,
    build_pack,
    grid_of,
    grid_positions,
    patchify,
    rope_table,
    runs,
    unpatchify,
)

SHAPES = [(16, 1, 2, 2), (16, 3, 4, 6), (4, 5, 8, 2), (48, 2, 6, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_unpatchify_undoes_patchify(shape):
    latents = torch.randn(shape)
    tokens = patchify(latents)
    assert tokens.shape == (shape[1] * shape[2] * shape[3] // 4, shape[0] * 4)
    assert torch.equal(unpatchify(tokens, grid_of(shape)), latents)


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_are_ordered_as_a_convolution_reads_them(shape):
    """A Linear over tokens is the published Conv3d, in the order frame, row, column."""
    latents, weight = torch.randn(shape), torch.randn(7, shape[0], 1, 2, 2)
    expected = F.conv3d(latents[None], weight, stride=(1, 2, 2))[0].flatten(1).T
    torch.testing.assert_close(patchify(latents) @ weight.flatten(1).T, expected, rtol=1e-4, atol=1e-4)


def test_odd_latents_have_no_grid():
    with pytest.raises(ValueError, match="3x4 do not divide"):
        grid_of((16, 1, 3, 4))


def test_positions_are_row_major():
    positions = grid_positions((2, 3, 4))
    assert positions.tolist() == [[f, r, c] for f in range(2) for r in range(3) for c in range(4)]


@pytest.mark.parametrize("head_dim", [128, 32, 12, 24, 20])
def test_rope_is_a_complex_rotation_of_each_axis(head_dim):
    """Every element from the formula, in float64."""
    positions = torch.tensor([[0, 0, 0], [20, 29, 51], [1, 1023, 5], [7, 0, 300]])
    x = torch.randn(4, 3, head_dim)
    side = 2 * (head_dim // 6)
    dims = [head_dim - 2 * side] + [side] * 2
    expected = torch.empty(4, 3, head_dim // 2, dtype=torch.complex128)
    pair = 0
    for axis, size in enumerate(dims):
        for i in range(size // 2):
            angle = positions[:, axis].double() * 10_000.0 ** (-2 * i / size)
            number = torch.complex(x[..., 2 * pair].double(), x[..., 2 * pair + 1].double())
            expected[..., pair] = number * torch.exp(1j * angle)[:, None]
            pair += 1
    out = apply_rope(x, rope_table(positions, head_dim))
    torch.testing.assert_close(out.double(), torch.view_as_real(expected).flatten(-2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head_dim", [128, 24])
def test_rope_table_equals_diffusers(head_dim):
    grid = (3, 4, 5)
    cos, sin = WanRotaryPosEmbed(head_dim, (1, 2, 2), 64)(torch.zeros(1, 16, grid[0], 2 * grid[1], 2 * grid[2]))
    table = rope_table(grid_positions(grid), head_dim)
    torch.testing.assert_close(table[..., 0], cos[0, :, 0, 0::2], rtol=0, atol=1e-6)
    torch.testing.assert_close(table[..., 1], sin[0, :, 0, 1::2], rtol=0, atol=1e-6)


def test_rope_keeps_the_dtype_and_multiplies_in_fp32():
    x = torch.randn(5, 2, 24)
    table = rope_table(torch.randint(0, 50, (5, 3)), 24)
    half = apply_rope(x.bfloat16(), table)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, apply_rope(x.bfloat16().float(), table).bfloat16())


def test_runs_group_neighbours_that_agree_everywhere():
    video, text = (4, 4, 4, 9, 4), (7, 7, 5, 5, 5)
    assert [tuple(run) for run in runs(video)] == [(0, 3, (4,)), (3, 1, (9,)), (4, 1, (4,))]
    assert [tuple(run) for run in runs(video, text)] == [
        (0, 2, (4, 7)),
        (2, 1, (4, 5)),
        (3, 1, (9, 5)),
        (4, 1, (4, 5)),
    ]
    assert list(runs(())) == []


def test_build_pack_starts_the_positions_of_each_sample_at_zero():
    latents = [torch.randn(16, 2, 4, 4), torch.randn(16, 1, 2, 4)]
    texts = [torch.randn(3, 8), torch.randn(0, 8)]
    pack = build_pack([patchify(x) for x in latents], [grid_of(x.shape) for x in latents], texts)
    assert pack.video_lens == (8, 2)
    assert pack.text_lens == (3, 0)
    assert torch.equal(pack.positions[8:], grid_positions((1, 1, 2)))
    assert torch.equal(unpatchify(pack.tokens.split(pack.video_lens)[1], (1, 1, 2)), latents[1])
    assert pack.to("cpu").video_lens == pack.video_lens


@pytest.mark.parametrize(
    "change", [{"video_lens": (8,)}, {"level_lens": (8,)}, {"text_lens": (3, 1)}, {"text_lens": (3,)}]
)
def test_a_pack_whose_lengths_disagree_is_an_error(change):
    good = {
        "tokens": torch.zeros(10, 64),
        "positions": torch.zeros(10, 3, dtype=torch.int64),
        "text": torch.zeros(3, 8),
        "video_lens": (8, 2),
        "text_lens": (3, 0),
        "level_lens": (2, 6, 2),
        "sequence_lens": (8, 2),
    }
    Pack(**good)
    with pytest.raises(ValueError, match="disagree"):
        Pack(**(good | change))


def test_rope_compiled_is_real_and_the_same():
    x, table = torch.randn(5, 2, 24), rope_table(torch.randint(0, 50, (5, 3)), 24)
    graphs = []
    compiled = torch.compile(apply_rope, backend=lambda g, _: graphs.append(g) or g, fullgraph=True)
    torch.testing.assert_close(compiled(x, table), apply_rope(x, table), rtol=1e-6, atol=1e-6)
    assert "complex" not in graphs[0].code
