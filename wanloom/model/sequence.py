"""Packed token sequences: latents to tokens and back, positions, rotary angles, and the Pack.

In: latents `(C, F, H, W)` of samples of any size. Out: one sequence `(T, C*4)` with the samples one after the other.
The one decision: a token's 4*C values are ordered (channel, row, column) on the way in *and* out, so the noisy tokens,
the velocity and the loss share one layout; the model turns the head's own (row, column, channel) order around.
Rotary embedding: Su et al. 2021, split over frame, row and column as in Wan 2.1 (head_dim 128 = 44 + 42 + 42).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from wanloom.geometry import PATCH

ROPE_THETA = 10_000.0

Grid = tuple[int, int, int]  # frames, rows, columns of tokens


@dataclass(frozen=True)
class Pack:
    """One packed sequence of N samples: what one forward pass takes.

    tokens `(T, C*4)`, positions `(T, 3)` int64 (frame, row, column inside the sample), text `(L, text_dim)` unpadded.
    The lengths are host integers: every kernel needs them on the host, and reading them back from a GPU would stall it.
    A sample is one or more segments, each with a noise level of its own. Where several processes share a sequence, each
    has a part: `positions` and `video_lens` are the tokens that attend here, `tokens` and `level_lens` those of them
    whose residual stream is here, and `sequence_lens` is of the whole sequence.
    """

    tokens: Tensor
    positions: Tensor
    text: Tensor
    video_lens: tuple[int, ...]  # tokens of each sample; sums to the rows of positions
    text_lens: tuple[int, ...]  # text states of each sample; sums to L, 0 is allowed
    level_lens: tuple[int, ...]  # tokens of each segment; sums to the rows of tokens, 0 is allowed in a part
    sequence_lens: tuple[int, ...]  # tokens of each sample of the whole sequence; self-attention spans it

    def __post_init__(self) -> None:
        if sum(self.level_lens) != self.tokens.shape[0] or self.positions.shape != (sum(self.video_lens), 3):
            raise ValueError(
                f"level_lens {self.level_lens}, tokens {tuple(self.tokens.shape)}, video_lens {self.video_lens}, "
                f"positions {tuple(self.positions.shape)} disagree"
            )
        if sum(self.text_lens) != self.text.shape[0] or len(self.text_lens) != len(self.video_lens):
            raise ValueError(f"text_lens {self.text_lens}, text {tuple(self.text.shape)} disagree")

    def to(self, device: torch.device | str) -> "Pack":
        """The same pack on another device."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            positions=self.positions.to(device),
            text=self.text.to(device),
        )


class Neighbours(NamedTuple):
    """Neighbouring samples of equal lengths: they can be computed as one batch without padding."""

    first: int  # index of the first sample
    samples: int
    lens: tuple[int, ...]  # the length of each sample, one for each sequence asked for


def runs(*lens: Sequence[int]) -> Iterator[Neighbours]:
    """Group neighbouring samples whose lengths agree in every one of the sequences."""
    rows = list(zip(*lens, strict=True))
    first = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[first]:
            yield Neighbours(first, i - first, rows[first])
            first = i


def grid_of(latents_shape: Sequence[int]) -> Grid:
    """Token grid of latents `(C, F, H, W)`. Raises ValueError when H or W is odd."""
    _, frames, height, width = latents_shape
    if height % PATCH[1] or width % PATCH[2]:
        raise ValueError(f"latents of {height}x{width} do not divide into 2x2 patches")
    return frames, height // PATCH[1], width // PATCH[2]


def patchify(latents: Tensor) -> Tensor:
    """Latents `(C, F, H, W)` to tokens `(T, C*4)`, row-major over (frame, row, column)."""
    channels = latents.shape[0]
    frames, rows, cols = grid_of(latents.shape)
    x = latents.reshape(channels, frames, rows, PATCH[1], cols, PATCH[2])
    return x.permute(1, 2, 4, 0, 3, 5).reshape(frames * rows * cols, channels * PATCH[1] * PATCH[2])


def unpatchify(tokens: Tensor, grid: Grid) -> Tensor:
    """Tokens `(T, C*4)` back to latents `(C, F, H, W)`."""
    frames, rows, cols = grid
    x = tokens.reshape(frames, rows, cols, -1, PATCH[1], PATCH[2])
    return x.permute(3, 0, 1, 4, 2, 5).reshape(-1, frames, rows * PATCH[1], cols * PATCH[2])


def grid_positions(grid: Grid) -> Tensor:
    """`(T, 3)` int64: frame, row and column of every token of one sample."""
    axes = [torch.arange(size) for size in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def build_pack(
    tokens: Sequence[Tensor], grids: Sequence[Grid], texts: Sequence[Tensor], level_lens: Sequence[int] | None = None
) -> Pack:
    """Join samples: tokens `(T_i, C*4)`, grids, and text states `(L_i, text_dim)`.

    Without `level_lens` each sample is one segment.
    """
    video_lens = tuple(t.shape[0] for t in tokens)
    return Pack(
        tokens=torch.cat(list(tokens)),
        positions=torch.cat([grid_positions(grid) for grid in grids]).to(tokens[0].device),
        text=torch.cat(list(texts)),
        video_lens=video_lens,
        text_lens=tuple(t.shape[0] for t in texts),
        level_lens=video_lens if level_lens is None else tuple(level_lens),
        sequence_lens=video_lens,
    )


def empty_pack(channels: int, text_dim: int) -> Pack:
    """A pack of no samples, for latents of so many channels: what a process without work starts from."""
    positions = torch.zeros(0, len(PATCH), dtype=torch.int64)
    return Pack(torch.zeros(0, channels * math.prod(PATCH)), positions, torch.zeros(0, text_dim), (), (), (), ())


def rope_table(positions: Tensor, head_dim: int) -> Tensor:
    """Rotations `(T, head_dim/2, 2)` fp32: cosine and sine of each angle, the angles computed in fp64.

    Rows and columns get 2*(head_dim//6) dimensions each, frames the rest; each axis has its own frequencies
    theta^(-2i/dims).
    """
    side = 2 * (head_dim // 6)
    angles = []
    for axis, dims in enumerate((head_dim - 2 * side, side, side)):
        steps = torch.arange(0, dims, 2, dtype=torch.float64, device=positions.device) / dims
        angles.append(positions[:, axis, None].double() / ROPE_THETA**steps)
    angle = torch.cat(angles, dim=-1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()


def apply_rope(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate neighbouring pairs of `x (T, heads, head_dim)` by `rotation (T, head_dim/2, 2)`; products in fp32.

    A pair is a complex number: one multiplication, 7 times faster on a CPU than products of every second value. A
    compiler knows no complex numbers; it fuses products with the pairs turned round, of which no half is written alone.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        cos, sin = rotation[:, None, :, 0, None], rotation[:, None, :, 1, None]
        sign = 2 * torch.arange(2, device=x.device) - 1  # (a, b) turns to (a cos - b sin, b cos + a sin)
        turned = pairs * cos + pairs.flip(-1) * (sin * sign)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation)[:, None])
    return turned.flatten(-2).to(x.dtype)
