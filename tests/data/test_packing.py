"""Packs: within budget, every sample once, few, balanced over samples and ranks, the same every time."""

import itertools
import random
import time

import pytest

from wanloom.data.packing import _best_fit, max_over_mean, pack_samples
from wanloom.errors import UserError

IMAGE, CLIP_240P, CLIP_480P = 390, 8190, 32760  # tokens; the clips have 81 frames
MIXES = {
    "50/50 image, 240p": lambda r: r.choice([IMAGE, CLIP_240P]),
    "90/10 image, 240p": lambda r: r.choices([IMAGE, CLIP_240P], [9, 1])[0],
    "480p of 1 to 81 frames": lambda r: 1560 * r.randint(1, 21),
    "40/40/20 image, 240p, 480p": lambda r: r.choices([IMAGE, CLIP_240P, CLIP_480P], [4, 4, 2])[0],
}


def attention_cost(tokens: int) -> float:
    return 4e4 * tokens + tokens**2


def work_of(packs, cost) -> list[float]:
    return [sum(cost[i] for i in pack) for pack in packs]


def possible(cost, ranks: int) -> float:
    """A bound on max over mean for any packs: of k * ranks + 1 samples some rank has k + 1, each at least the least."""
    falling = sorted(cost, reverse=True)
    most = max((k + 1) * falling[k * ranks] for k in range(-(-len(cost) // ranks)))
    return max(1.0, most / (sum(cost) / ranks))


@pytest.mark.parametrize("ranks", [1, 2, 7])
@pytest.mark.parametrize("seed", range(8))
def test_packs_hold_every_sample_within_budget_in_few_and_even_packs(seed, ranks):
    r = random.Random(seed)
    tokens = [r.choice([390, 1560, 8190, r.randint(100, 20_000)]) for _ in range(r.randint(1, 90))]
    cost = [attention_cost(n) for n in tokens]
    budget = 32_760
    packs = pack_samples(tokens, budget, cost, ranks)
    assert sorted(i for pack in packs for i in pack) == list(range(len(tokens)))
    assert all(sum(tokens[i] for i in pack) <= budget for pack in packs)
    least = -(-sum(tokens) // budget)
    # the bound of best-fit decreasing, a whole number of rounds, and one round more for balance
    assert len(packs) % ranks == 0 and len(packs) < least * 11 / 9 + 1 + (2 * ranks if ranks > 1 else 1)
    assert all(packs) or len(tokens) < len(packs)
    assert all(pack == sorted(pack) for pack in packs)
    work = work_of(packs, cost)
    assert work == sorted(work, reverse=True)
    assert pack_samples(tokens, budget, cost, ranks) == packs


def test_small_steps_of_every_kind_are_packed_whole():
    for seed in range(2000):
        r = random.Random(seed)
        ranks, most = r.randint(1, 5), r.choice([3, 10])
        tokens = [r.randint(1, most) for _ in range(r.randint(1, 14))]
        cost = [float(n ** r.choice([0, 1, 2, 4])) for n in tokens]
        packs = pack_samples(tokens, 10, cost, ranks)
        assert sorted(i for pack in packs for i in pack) == list(range(len(tokens)))
        assert all(sum(tokens[i] for i in pack) <= 10 for pack in packs) and len(packs) % ranks == 0
        assert sum(not pack for pack in packs) == max(0, len(packs) - len(tokens))


@pytest.mark.parametrize("budget", [CLIP_480P, 2 * CLIP_480P])
@pytest.mark.parametrize("ranks", [8, 64])
@pytest.mark.parametrize("mix", MIXES)
def test_ranks_wait_little_for_each_other(mix, ranks, budget):
    """Every rank has 16 samples in the mean; single steps are as good as whole clips allow."""
    balances, bounds = [], []
    for seed in range(8):
        r = random.Random(seed)
        tokens = [MIXES[mix](r) for _ in range(16 * ranks)]
        cost = [attention_cost(n) for n in tokens]
        balances.append(max_over_mean(work_of(pack_samples(tokens, budget, cost, ranks), cost), ranks))
        bounds.append(possible(cost, ranks))
    # a 480p clip fills a pack of this budget alone: what is beside it in its round cannot cost as much
    slack = 0.12 if budget == CLIP_480P and "480p" in mix and "image" in mix else 0.02
    assert sum(balances) / 8 <= max(1.05, sum(bounds) / 8 + slack)
    if budget > CLIP_480P:
        assert all(found <= max(1.05, bound + 0.02) for found, bound in zip(balances, bounds, strict=True))


def test_images_level_out_clips_that_do_not_divide_over_the_ranks():
    # 24 packs: twelve of 3 clips, twelve of 2; every image belongs beside the 2 clips that wait for 3
    cost = [attention_cost(n) for n in [CLIP_240P] * 60 + [IMAGE] * 68]
    packs = pack_samples([CLIP_240P] * 60 + [IMAGE] * 68, 30_000, cost, 8)
    assert len(packs) == 24 and 1 < possible(cost, 8) < 1.03
    assert max_over_mean(work_of(packs, cost), 8) == pytest.approx(possible(cost, 8))


def test_long_clips_that_do_not_divide_over_the_ranks_share_one_round():
    # 192 packs for 205 long clips: dealt evenly, 13 packs have two of them and 51 others wait
    tokens = [CLIP_480P] * 205 + [CLIP_240P] * 410 + [IMAGE] * 409
    cost = [attention_cost(n) for n in tokens]
    packs = pack_samples(tokens, 2 * CLIP_480P, cost, 64)
    assert len(packs) == 192 and max_over_mean(work_of(packs, cost), 64) < 1.05


@pytest.mark.parametrize("seed", range(6))
def test_the_balance_is_near_the_best_of_all_packings(seed):
    r = random.Random(seed)
    tokens, ranks, budget = [r.randint(2, 12) for _ in range(8)], 2, 18
    cost = [float(n * n) for n in tokens]
    packs = pack_samples(tokens, budget, cost, ranks)
    best = float("inf")
    for choice in itertools.product(range(len(packs)), repeat=7):
        dealt = [[7], *([] for _ in packs[1:])]  # packs have no names: the last sample is in the first
        for i, p in enumerate(choice):
            dealt[p].append(i)
        if all(sum(tokens[i] for i in pack) <= budget for pack in dealt):
            best = min(best, max_over_mean(work_of(dealt, cost), ranks))
    assert best - 1e-9 <= max_over_mean(work_of(packs, cost), ranks) <= best + 0.03


def test_the_longest_of_each_round_is_what_a_step_takes():
    assert max_over_mean([4.0, 4.0, 1.0, 1.0], 2) == 1.0  # rounds of equal packs, whatever the other rounds are
    assert max_over_mean([1.0, 4.0, 3.0, 2.0], 2) == (4 + 2) / 5
    assert max_over_mean([1.0, 4.0, 3.0, 2.0], 1) == 1.0
    # one sample costs more than all others: the step takes as long as it
    cost = [100.0] + [1.0] * 20
    packs = pack_samples([10] + [1] * 20, 10, cost, 4)
    assert max_over_mean(work_of(packs, cost), 4) == pytest.approx(100 / 30)


def test_packs_are_empty_only_where_samples_are_too_few():
    packs = pack_samples([10] * 10, 10, [1.0] * 10, 4)
    assert [len(pack) for pack in packs] == [1] * 10 + [0, 0]
    assert [len(pack) for pack in pack_samples([1] * 10, 10, [1.0] * 10, 4)] == [3, 3, 2, 2]
    assert [len(pack) for pack in pack_samples([1, 1, 1], 10, [1.0] * 3, 8)] == [1] * 3 + [0] * 5


def test_a_sample_goes_to_the_fullest_pack_that_has_room():
    # 3 finds room for 3 and for 4: in the larger one it would leave no place for both of the last two
    assert _best_fit([7, 6, 3, 2, 2], 10) == [[0, 2], [1, 3, 4]]
    assert len(pack_samples([7, 6, 3, 2, 2], 10, [1.0] * 5)) == 2
    several = 0
    for seed in range(300):
        r = random.Random(seed)
        tokens = [r.randint(1, 40) for _ in range(r.randint(1, 40))]
        packs: list[list[int]] = []
        for i in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):  # the definition, as it reads
            left = [40 - sum(tokens[j] for j in pack) for pack in packs]
            fits = [(room, p) for p, room in enumerate(left) if room >= tokens[i]]
            several += len(fits) > 1
            if fits:
                packs[min(fits)[1]].append(i)
            else:
                packs.append([i])
        assert _best_fit(tokens, 40) == packs
    assert several > 300


def test_one_round_more_is_taken_where_full_packs_cannot_be_balanced():
    tokens = [5, 5, 4, 3, 3]
    cost = [float(n * n) for n in tokens]
    packs = pack_samples(tokens, 10, cost, 2)
    assert len(packs) == 4 and max_over_mean(work_of(packs, cost), 2) < 1.03  # two packs: 50 against 34
    assert len(pack_samples(tokens, 10, cost)) == 2  # one rank waits for nobody


def test_packing_a_large_step_is_quick():
    r = random.Random(0)
    tokens = [int(min(CLIP_480P, max(IMAGE, r.lognormvariate(8.5, 1.0)))) for _ in range(1024)]
    cost = [attention_cost(n) for n in tokens]
    start = time.process_time()
    pack_samples(tokens, CLIP_480P, cost, 64)
    assert time.process_time() - start < 0.5  # 0.06 on a quiet machine; it runs beside every step


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
