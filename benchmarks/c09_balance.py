"""C9: how long ranks wait for each other: the cost of the costliest rank over the mean, in FLOPs of the 14B, simulated.

The peer is a random bucket for each rank: every rank takes one sample of a size drawn by the shares of the mix, all
wait for the longest, as trainers with buckets by shape do. One that accumulates 16 samples on each rank before it waits
evens them out: its value is in the row's note. Wanloom deals a step of 16 samples for each rank to packs of 65,520
tokens, and all wait for the costliest pack of every round. Costs are exact; steps are drawn with fixed seeds. Every
value is a ratio of sums: what is waited for in all steps over what equal ranks would take. Nothing is timed, and no
gradient depends on it.
"""

from functools import partial
from statistics import fmean

from benchmarks.measure import Row, main
from benchmarks.mixes import CLIP_480P, MIXES, draw
from wanloom.data.packing import max_over_mean, pack_samples
from wanloom.model.flops import train_flops
from wanloom.variants import VARIANTS

PER_RANK, STEPS, TOY_STEPS = 16, 8, 1
cost_of = partial(train_flops, VARIANTS["wan2.1-t2v-14b"].shape)


def packed_balance(mix: str, ranks: int, budget: int, steps: int) -> float:
    """Max over mean of packs."""
    found, weights = [], []
    for seed in range(steps):
        tokens = draw(mix, PER_RANK * ranks, seed)
        cost = [float(cost_of(count)) for count in tokens]
        packs = pack_samples(tokens, budget, cost, ranks)
        found.append(max_over_mean([sum(cost[i] for i in pack) for pack in packs], ranks))
        weights.append(sum(cost))
    return fmean(found, weights)  # a ratio of sums, as that of the peer


def bucket_balance(mix: str, ranks: int, each: int, steps: int) -> float:
    """Max over mean of ranks that take `each` samples at random before they wait."""
    most = mean = 0.0
    for seed in range(PER_RANK // each * steps):
        tokens = draw(mix, each * ranks, seed)
        work = [sum(map(cost_of, tokens[rank::ranks])) for rank in range(ranks)]
        most, mean = most + max(work), mean + fmean(work)
    return most / mean


def row_of(mix: str, ranks: int, budget: int, steps: int) -> Row:
    note = (
        f"{bucket_balance(mix, ranks, PER_RANK, steps):.2f} where random buckets accumulate {PER_RANK} samples a rank."
    )
    if mix == "F" and budget == CLIP_480P:
        note += (
            " A 480p clip fills such a pack alone, and what fits beside it in its round cannot cost as much: attention "
            "makes the same tokens in shorter clips cheaper. Twice the tokens for a pack are enough."
        )
    packs = ", packs of one 480p clip" if budget == CLIP_480P else ""
    return Row(
        "C9",
        f"{MIXES[mix][0]}, {ranks} ranks, max over mean{packs}",
        "",
        [packed_balance(mix, ranks, budget, steps)],
        "a random bucket for each rank",
        [bucket_balance(mix, ranks, 1, steps)],
        1.05,
        at_most=True,
        limit="1.0",
        note=note,
    )


def measure(toy: bool) -> list[Row]:
    """How long ranks wait for the costliest of them."""
    steps = TOY_STEPS if toy else STEPS
    rows = [row_of(mix, ranks, 2 * CLIP_480P, steps) for mix in MIXES for ranks in (8, 64)]
    return rows + [row_of("F", ranks, CLIP_480P, steps) for ranks in (8, 64)]


if __name__ == "__main__":
    main(__spec__, measure)
