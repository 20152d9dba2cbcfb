"""Samples to packs: few packs of at most `budget` tokens, balanced over the ranks by what they cost to compute.

In: tokens and cost of every sample of a step. Out: lists of indices. With several ranks packs are dealt in rounds:
round k is `packs[k * ranks : (k + 1) * ranks]`, one pack for each rank. The one decision: all ranks of a round wait for
each other, because weights are gathered layer by layer, so a step takes as long as the costliest packs of its rounds
together, and that sum is made small. The number of rounds is the least that best-fit decreasing finds. The samples are
dealt to that many packs, the most expensive first to the cheapest pack that has room (LPT, Graham 1969), because
attention makes equal tokens unequal work; then they are exchanged between packs as long as the sum falls. One round
more is taken only where it saves more than it costs, which is where the packs are too full to be balanced.
Deterministic: ties go to the lower index.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from wanloom.errors import UserError

GOOD = 1.002  # max over mean at which nothing more is tried
RATIOS = (1.0, 0.7, 0.5)  # work of a round over that of the round before
ROUND_COST = 0.03  # of a step: one more round gathers all weights once more
MOVES = 2  # exchanges for each pack, at most


def pack_samples(tokens: Sequence[int], budget: int, cost: Sequence[float], ranks: int = 1) -> list[list[int]]:
    """Indices of the samples of each pack, rising, the most expensive pack first.

    `cost` is positive. The number of packs is a multiple of `ranks`; some are empty only where there are fewer samples
    than packs. Raises UserError when a sample has more than `budget` tokens.
    """
    over = [i for i, count in enumerate(tokens) if count > budget]
    if over:
        raise UserError(f"Sample {over[0]} has {tokens[over[0]]} tokens, more than a pack of {budget}.")
    densest = _best_fit(tokens, budget)
    rounds = -(-len(densest) // ranks)
    packs = _pack_rounds(tokens, budget, cost, ranks, rounds, densest)
    balance = max_over_mean(_work(packs, cost), ranks)
    if balance > 1 + ROUND_COST and (rounds + 1) * ranks <= len(tokens):
        more = _pack_rounds(tokens, budget, cost, ranks, rounds + 1, densest)
        if max_over_mean(_work(more, cost), ranks) + ROUND_COST < balance:
            packs = more
    return sorted((sorted(pack) for pack in packs), key=lambda pack: (-sum(cost[i] for i in pack), pack))


def max_over_mean(work: Sequence[float], ranks: int) -> float:
    """How much longer a step takes than with equal packs: from the cost of each of its packs, in any order."""
    total = sum(work)
    return sum(sorted(work, reverse=True)[::ranks]) * ranks / total if total else 1.0


def _work(packs: list[list[int]], cost: Sequence[float]) -> list[float]:
    return [sum(cost[i] for i in pack) for pack in packs]


def _best_fit(tokens: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing: every sample to the fullest pack that has room, or to a new one."""
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of every pack, with its number; sorted
    for i in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        at = bisect_left(room, (tokens[i], 0))
        if at == len(room):
            packs.append([])
            room.append((budget, len(packs) - 1))
        left, best = room.pop(at)
        packs[best].append(i)
        insort(room, (left - tokens[i], best))
    return packs


def _pack_rounds(
    tokens: Sequence[int], budget: int, cost: Sequence[float], ranks: int, rounds: int, densest: list[list[int]]
) -> list[list[int]]:
    """`rounds * ranks` packs, from rounds of equal or of falling work, or from `densest` where those find no room.

    Falling work suits a few long clips among many short ones: put together in one round, they keep nobody waiting.
    """
    count, share = rounds * ranks, sum(cost) / ranks
    best, start = float("inf"), densest
    for ratio in RATIOS:
        parts = [ratio**k for k in range(rounds)]
        ahead = [share * (parts[0] - parts[p // ranks]) / sum(parts) for p in range(count)]
        packs = _deal(tokens, budget, cost, ahead)
        if packs and (balance := max_over_mean(_work(packs, cost), ranks)) < best:
            best, start = balance, packs
        if rounds == 1 or best <= GOOD:
            break
    start = _fill_empty(start, cost, count)
    return _Exchange(tokens, budget, cost, ranks, start).run() if ranks > 1 else start


def _deal(tokens: Sequence[int], budget: int, cost: Sequence[float], ahead: list[float]) -> list[list[int]] | None:
    """Every sample to the pack with the least work that has room, or None where there is none.

    `ahead` is the work that each pack is taken to have at the start.
    """
    packs: list[list[int]] = [[] for _ in ahead]
    room = [budget] * len(ahead)
    work = [(start, p) for p, start in enumerate(ahead)]
    heapq.heapify(work)
    full: list[tuple[int, float, int]] = []  # packs without room for the sample before; a heap, the most room first
    for i in sorted(range(len(tokens)), key=lambda i: (-cost[i], -tokens[i], i)):
        while full and -full[0][0] >= tokens[i]:
            heapq.heappush(work, heapq.heappop(full)[1:])
        while work and room[work[0][1]] < tokens[i]:
            done, p = heapq.heappop(work)
            heapq.heappush(full, (-room[p], done, p))
        if not work:
            return None
        done, best = work[0]
        packs[best].append(i)
        room[best] -= tokens[i]
        heapq.heapreplace(work, (done + cost[i], best))
    return packs


def _fill_empty(packs: list[list[int]], cost: Sequence[float], count: int) -> list[list[int]]:
    """`count` packs: from the most expensive pack of several samples the most expensive one moves to an empty pack."""
    packs = [list(pack) for pack in packs if pack]
    while len(packs) < count:
        source = max((pack for pack in packs if len(pack) > 1), key=lambda pack: sum(cost[i] for i in pack), default=[])
        taken = max(source, key=lambda i: cost[i], default=None)
        if taken is not None:
            source.remove(taken)
        packs.append([] if taken is None else [taken])
    return packs


class _Exchange:
    """Local search: the costliest pack of a round gives a sample away, or swaps it for a cheaper one.

    The other pack stays below the costliest of its own round, so no round becomes longer. Of all such exchanges the one
    is done after which both packs are furthest below.
    """

    def __init__(
        self, tokens: Sequence[int], budget: int, cost: Sequence[float], ranks: int, packs: list[list[int]]
    ) -> None:
        self.ranks, self.num_packs, self.num_samples = ranks, len(packs), len(tokens)
        # behind the samples stands one nothing of each pack: giving away is a swap for it
        self.tokens = np.array([*tokens, *[0] * len(packs)], dtype=np.int64)
        self.cost = np.array([*cost, *[0.0] * len(packs)], dtype=np.float64)
        self.pack_of = np.arange(-len(tokens), len(packs))
        for p, pack in enumerate(packs):
            self.pack_of[pack] = p
        self.work = np.bincount(self.pack_of, self.cost, len(packs))
        self.room = budget - np.bincount(self.pack_of, self.tokens, len(packs)).astype(np.int64)

    def run(self) -> list[list[int]]:
        """The packs after the last exchange."""
        goal = GOOD * self.cost.sum() / self.ranks
        for _ in range(MOVES * self.num_packs):
            order = np.argsort(-self.work, kind="stable")
            costliest = order[:: self.ranks]
            if self.work[costliest].sum() <= goal:
                break
            below = np.empty(self.num_packs)  # how far each pack is below the costliest of its round
            below[order] = np.repeat(self.work[costliest], self.ranks) - self.work[order]
            if not any(self._lower(int(pack), below) for pack in costliest):
                break
        packs: list[list[int]] = [[] for _ in range(self.num_packs)]
        for i in range(self.num_samples):
            packs[self.pack_of[i]].append(i)
        return packs

    def _lower(self, pack: int, below: np.ndarray) -> bool:
        """Exchange one sample of `pack`; False where none makes it cheaper."""
        own = np.flatnonzero(self.pack_of[: self.num_samples] == pack)
        gives = own[np.unique(self.cost[own], return_index=True)[1]]  # one of each cost
        less = self.cost[gives, None] - self.cost
        gain = np.minimum(less, below[self.pack_of] - less)
        more = self.tokens[gives, None] - self.tokens
        gain[(more > self.room[self.pack_of]) | (-more > self.room[pack])] = 0
        if len(own) <= 1:
            gain[:, self.num_samples :] = 0  # no pack becomes empty
        if not gain.size or gain.max() <= 1e-9 * self.work[pack]:
            return False
        row, takes = divmod(int(gain.argmax()), gain.shape[1])
        other = self.pack_of[takes]
        for place, sign in ((pack, 1), (other, -1)):
            self.work[place] -= sign * less[row, takes]
            self.room[place] += sign * more[row, takes]
        self.pack_of[gives[row]] = other
        if takes < self.num_samples:
            self.pack_of[takes] = pack
        return True
