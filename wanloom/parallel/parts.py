"""A pack cut into equal parts for the processes that share it.

In: a pack and its noise levels. Out: the part of one process, as a pack, and which of the pack's tokens it answers for.
The one decision: a length that does not divide is filled up by one more sample of its own, without text, which attends
to itself alone and is left out of the loss. So nothing needs a mask, a cut may fall anywhere in a sample, and a data
rank without samples still takes part in every exchange, with a pack of filler.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from wanloom.model.sequence import Pack
from wanloom.parallel.mesh import Mesh

FILLER_SIGMA = 0.5


class Share(NamedTuple):
    """What one process gets of a pack."""

    pack: Pack
    sigma: Tensor  # (M,) of the segments in `pack`
    tokens: slice  # of the whole pack's tokens; the first rows of `pack.tokens` are these, the rest is filler

    @property
    def lens(self) -> tuple[int, ...]:
        """Tokens of each segment of `pack`, but for the filler."""
        *lens, last = self.pack.level_lens
        filler = len(self.pack.tokens) - (self.tokens.stop - self.tokens.start)
        return (*lens, last - filler)


def share_of(pack: Pack, sigma: Tensor, mesh: Mesh) -> Share:
    """The part of this process: its residual stream is one of cp * tp equal parts, its queries one of cp."""
    count, tp = len(pack.tokens), mesh.layout.tp
    num_parts = mesh.layout.cp * tp
    if num_parts == 1 and count:
        return Share(pack, sigma, slice(0, count))
    width = max(-(-count // num_parts), 1)
    filled = fill_up(pack, width * num_parts - count)
    sigma = torch.cat([sigma, sigma.new_full((len(filled.level_lens) - len(sigma),), FILLER_SIGMA)])
    first = mesh.cp_rank * tp * width
    start = first + mesh.place["tp"] * width
    here = _overlaps(filled.video_lens, first, first + tp * width)
    samples = [i for i, length in enumerate(here) if length]
    # of the segments those that attend here, also where none of their tokens is in the stream: tp ranks have the same
    segments = [i for i, length in enumerate(_overlaps(filled.level_lens, first, first + tp * width)) if length]
    stream = _overlaps(filled.level_lens, start, start + width)
    texts = filled.text.split(filled.text_lens)
    part = Pack(
        tokens=filled.tokens[start : start + width],
        positions=filled.positions[first : first + tp * width],
        text=torch.cat([texts[i] for i in samples]),
        video_lens=tuple(here[i] for i in samples),
        text_lens=tuple(filled.text_lens[i] for i in samples),
        level_lens=tuple(stream[i] for i in segments),
        sequence_lens=filled.sequence_lens,
    )
    return Share(part, sigma[segments], slice(min(start, count), min(start + width, count)))


def gather_parts(part: Tensor, count: int, mesh: Mesh) -> Tensor:
    """The other way round, on every process: of each data rank all rows of its pack, `(T_part, C)` -> `(D, count, C)`.

    For data ranks whose packs have `count` tokens each, and a layout without stages. Has no gradient.
    """
    if mesh.layout.world == 1:
        return part[None]
    # the ranks are ordered as the parts are: data ranks first, then cp, then tp
    whole = part.new_empty(mesh.layout.world * len(part), part.shape[1])
    dist.all_gather(list(whole.chunk(mesh.layout.world)), part.contiguous())
    return whole.unflatten(0, (mesh.layout.data_ranks, -1))[:, :count]


def fill_up(pack: Pack, fill: int) -> Pack:
    """The pack with a last sample of `fill` zero tokens and no text; the pack itself for 0."""
    if not fill:
        return pack
    return replace(
        pack,
        tokens=torch.cat([pack.tokens, pack.tokens.new_zeros(fill, pack.tokens.shape[1])]),
        positions=torch.cat([pack.positions, pack.positions.new_zeros(fill, 3)]),
        video_lens=(*pack.video_lens, fill),
        text_lens=(*pack.text_lens, 0),
        level_lens=(*pack.level_lens, fill),
        sequence_lens=(*pack.sequence_lens, fill),
    )


def _overlaps(lens: Sequence[int], start: int, stop: int) -> list[int]:
    """How many tokens of each length lie between `start` and `stop` of the sequence."""
    out, first = [], 0
    for length in lens:
        out.append(max(min(first + length, stop) - max(first, start), 0))
        first += length
    return out
