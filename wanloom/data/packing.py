"""Samples to packs: few packs of at most `budget` tokens, balanced by what they cost to compute.

In: tokens and cost of every sample of a step. Out: lists of indices. The one decision: first the number of packs is
made small by best-fit decreasing, then the samples are dealt anew to that many packs, the most expensive first to the
cheapest pack that has room (LPT, Graham 1969), because attention makes equal tokens unequal work. If that does not
work out for the tokens, the first answer stands. Deterministic: ties go to the lower index.
"""

from collections.abc import Sequence

from pydantic import Field

from wanloom.config import Config, UserError


class BatchConfig(Config):
    """What makes a step; results do not depend on `tokens_per_pack`, speed and memory do."""

    samples: int = Field(gt=0)  # per optimizer step, over all ranks
    tokens_per_pack: int = Field(gt=0)  # video tokens of one forward pass


def pack_samples(tokens: Sequence[int], budget: int, cost: Sequence[float]) -> list[list[int]]:
    """Indices of the samples of each pack, rising, the most expensive pack first. Raises UserError over budget."""
    over = [i for i, count in enumerate(tokens) if count > budget]
    if over:
        raise UserError(f"Sample {over[0]} has {tokens[over[0]]} tokens, more than a pack of {budget}.")
    packs = _best_fit(tokens, budget)
    packs = _balance(tokens, budget, cost, len(packs)) or packs
    return sorted((sorted(pack) for pack in packs), key=lambda pack: (-sum(cost[i] for i in pack), pack))


def _best_fit(tokens: Sequence[int], budget: int) -> list[list[int]]:
    packs: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        fits = [p for p, left in enumerate(room) if left >= tokens[i]]
        if fits:
            best = min(fits, key=lambda p: (room[p], p))
        else:
            best = len(packs)
            packs.append([])
            room.append(budget)
        packs[best].append(i)
        room[best] -= tokens[i]
    return packs


def _balance(tokens: Sequence[int], budget: int, cost: Sequence[float], count: int) -> list[list[int]] | None:
    """The samples dealt to `count` packs of nearly equal cost, or None where some sample finds no room."""
    packs: list[list[int]] = [[] for _ in range(count)]
    room = [budget] * count
    work = [0.0] * count
    for i in sorted(range(len(tokens)), key=lambda i: (-cost[i], -tokens[i], i)):
        fits = [p for p in range(count) if room[p] >= tokens[i]]
        if not fits:
            return None
        best = min(fits, key=lambda p: (work[p], p))
        packs[best].append(i)
        room[best] -= tokens[i]
        work[best] += cost[i]
    return packs
