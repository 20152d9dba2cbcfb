"""Classifier-free guidance: both branches are samples of one pack.

In: the samples' sizes, the text states of their prompts and, for guidance other than 1, of their negative prompts.
Out: the guided velocity, `negative + guidance * (prompt - negative)`, in fp32. The one decision: the branches share one
call of the model, the prompts first and the negatives after them, so that neighbours of one text length meet in one
attention call; or each is the pack of one of two data ranks. Every process gets both and combines them as one process
does. Source: Ho & Salimans 2022.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from wanloom.model.dit import TextKV, WanDiT
from wanloom.model.sequence import Pack
from wanloom.objective.inputs import Example, build_input
from wanloom.parallel.mesh import Mesh
from wanloom.parallel.parts import Share, gather_parts, share_of


def build_branches(noise: Sequence[Tensor], text: Sequence[Tensor], negative: Sequence[Tensor]) -> Pack:
    """A pack of N samples that are noise `(C, F, H, W)` yet, or of 2N when there are N negatives.

    Text states are `(L_i, text_dim)`.
    """
    if len(negative) not in (0, len(noise)) or len(text) != len(noise):
        raise ValueError(f"{len(noise)} samples, {len(text)} texts and {len(negative)} negatives do not fit together")
    noises, texts = [*noise, *noise] if negative else noise, [*text, *negative]
    clean = [{"latents": torch.zeros_like(z), "text": t} for z, t in zip(noises, texts, strict=True)]
    return build_input([Example(x, z, [(z.shape[1], 1.0)]) for x, z in zip(clean, noises, strict=True)]).pack


def share_at(branches: Pack, sigma: float, mesh: Mesh) -> Share:
    """The part of this process, all samples at one noise level."""
    level = torch.full((len(branches.level_lens),), sigma, dtype=torch.float32, device=branches.tokens.device)
    return share_of(branches, level, mesh)


def build_text_kv(model: WanDiT, branches: Pack, mesh: Mesh) -> TextKV:
    """Keys and values of the text for every step: which text a process has follows from the lengths alone."""
    return model.text_kv(share_at(branches, 1.0, mesh).pack)


def guided_velocity(
    model: WanDiT, branches: Pack, text_kv: TextKV | None, tokens: Tensor, sigma: float, guidance: float, mesh: Mesh
) -> Tensor:
    """Velocity `(T, C*4)` fp32 of the N samples `tokens (T, C*4)`, all at one noise level; the same on every process.

    `branches` is what this data rank predicts: all there is, or with two data ranks the prompts or the negatives;
    `text_kv` is what `build_text_kv` gives for them; without it the text is read anew.
    """
    copies = len(branches.tokens) // len(tokens)
    share = share_at(replace(branches, tokens=tokens.repeat(copies, 1)), sigma, mesh)
    part = model(share.pack, share.sigma, text_kv=text_kv)
    assert isinstance(part, Tensor)
    velocity = gather_parts(part, len(branches.tokens), mesh).flatten(0, 1)
    if len(velocity) == len(tokens):
        return velocity
    prompt, negative = velocity.chunk(2)
    return negative + guidance * (prompt - negative)
