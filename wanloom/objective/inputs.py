"""Samples to what the model takes and what it should answer: the one place where noise meets latents.

A sample is named tensors of any dtype: `latents (C, F, H, W)`, `text (L, text_dim)`. Training, the held-out loss and
guidance all come through here; they differ in where noise and noise level are from. What is random about a training
sample is keyed by its name and draw number, so it does not depend on the rank, the packing or on what was drawn before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from wanloom.keys import draw_noise, keyed_fractions
from wanloom.model.sequence import Pack, build_pack, empty_pack, grid_of, patchify
from wanloom.objective.flow import noisy_and_velocity, sample_sigma, stratify
from wanloom.objective.settings import FlowConfig


class Example(NamedTuple):
    """A sample and what is drawn for it."""

    tensors: Mapping[str, Tensor]
    noise: Tensor  # (C, F, H, W) fp32
    levels: Sequence[tuple[int, float]]  # of each segment its frames and its sigma, 0 where they are known


class Input(NamedTuple):
    """One pack for the model, with what it should answer."""

    pack: Pack
    target: Tensor  # velocity tokens (T, C*4) fp32
    sigma: Tensor  # (M,) fp32, of each segment


@dataclass(frozen=True)
class Objective:
    """What turns a sample into an input and a target."""

    flow: FlowConfig
    seed: int
    num_samples: int  # of a step, for stratified noise levels
    caption_dropout: float
    empty_text: Tensor | None  # states of the empty caption (L, text_dim); what guidance contrasts with
    channels: int  # of the latents
    text_dim: int


def draw_example(tensors: Mapping[str, Tensor], name: str, draw: int, position: int, objective: Objective) -> Example:
    """What training makes of a sample that it uses for the `draw`-th time, at a position in the global order."""
    shape = tuple(tensors["latents"].shape)
    level, mix = keyed_fractions(2, objective.seed, "sigma", name, draw)
    if objective.flow.stratified:
        level = stratify(level, position % objective.num_samples, objective.num_samples)
    frames, rows, cols = grid_of(shape)
    return Example(
        tensors={**tensors, "text": choose_text(tensors["text"], name, draw, objective)},
        noise=draw_noise(shape, objective.seed, name, draw),
        levels=[(frames, sample_sigma(objective.flow, (level, mix), frames * rows * cols))],
    )


def choose_text(text: Tensor, name: str, draw: int, objective: Objective) -> Tensor:
    """The caption's states, or those of the empty caption for `caption_dropout` of the draws."""
    if objective.caption_dropout > 0 and objective.empty_text is not None:
        (u,) = keyed_fractions(1, objective.seed, "caption_dropout", name, draw)
        if u < objective.caption_dropout:
            return objective.empty_text
    return text


def build_input(examples: Sequence[Example]) -> Input:
    """The samples of one pack, noised."""
    noisy, targets, sigmas, level_lens = [], [], list[float](), list[int]()
    for tensors, noise, levels in examples:
        _, rows, cols = grid_of(noise.shape)
        lens = [frames * rows * cols for frames, _ in levels]
        clean = patchify(tensors["latents"].float()).split(lens)
        segments = zip(clean, patchify(noise).split(lens), levels, strict=True)
        pairs = [noisy_and_velocity(x, z, sigma) for x, z, (_, sigma) in segments]
        noisy.append(torch.cat([mixed for mixed, _ in pairs]))
        targets += [velocity for _, velocity in pairs]
        sigmas += [sigma for _, sigma in levels]
        level_lens += lens
    grids, texts = [grid_of(one.noise.shape) for one in examples], [one.tensors["text"].float() for one in examples]
    pack = build_pack(noisy, grids, texts, level_lens)
    return Input(pack, torch.cat(targets), torch.tensor(sigmas, dtype=torch.float32))


def empty_input(channels: int, text_dim: int) -> Input:
    """No samples: what a process without work starts from."""
    pack = empty_pack(channels, text_dim)
    return Input(pack, pack.tokens, torch.zeros(0))
