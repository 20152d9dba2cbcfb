"""Packs: within budget, every sample once, few, balanced, the same every time."""

import random

import pytest

from wanloom.config import UserError
from wanloom.data.packing import pack_samples


def attention_cost(tokens: int) -> float:
    return 4e4 * tokens + tokens**2


@pytest.mark.parametrize("seed", range(8))
def test_packs_hold_every_sample_within_budget_in_few_and_even_packs(seed):
    r = random.Random(seed)
    tokens = [r.choice([390, 1560, 8190, r.randint(100, 20_000)]) for _ in range(r.randint(1, 90))]
    cost = [attention_cost(n) for n in tokens]
    budget = 32_760
    packs = pack_samples(tokens, budget, cost)
    assert sorted(i for pack in packs for i in pack) == list(range(len(tokens)))
    assert all(sum(tokens[i] for i in pack) <= budget for pack in packs)
    least = -(-sum(tokens) // budget)
    assert len(packs) <= least * 11 / 9 + 1  # the bound of best-fit decreasing
    work = [sum(cost[i] for i in pack) for pack in packs]
    assert work == sorted(work, reverse=True)
    assert pack_samples(tokens, budget, cost) == packs


def test_packs_are_balanced_by_cost_and_not_by_tokens():
    tokens = [8000, 8000] + [1000] * 16
    cost = [attention_cost(n) for n in tokens]
    packs = pack_samples(tokens, 17_000, cost)
    assert len(packs) == 2 and [sum(i < 2 for i in pack) for pack in packs] == [1, 1]
    mixed = pack_samples([4] + [1] * 16, 12, [64.0] + [1.0] * 16)
    assert sorted(len(p) for p in mixed) == [5, 12]  # the costly one in the pack with fewer others


def test_balancing_never_makes_more_packs():
    # by cost alone the first pack would be filled so that the last sample finds no room
    packs = pack_samples([6, 5, 5, 4], 10, [1.0, 9.0, 8.0, 9.5])
    assert len(packs) == 2 and all(sum([6, 5, 5, 4][i] for i in pack) == 10 for pack in packs)


def test_a_sample_over_the_budget_is_an_error():
    with pytest.raises(UserError, match="Sample 1 has 11 tokens"):
        pack_samples([10, 11], 10, [1.0, 1.0])
