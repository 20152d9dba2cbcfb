"""How long ranks wait for each other, simulated at the sizes of the claim."""

import pytest

from benchmarks.c09_balance import bucket_balance, measure, packed_balance
from benchmarks.mixes import CLIP_480P, MIXES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("ranks", [8, 64])
@pytest.mark.parametrize("mix", MIXES)
def test_ranks_wait_at_most_a_twentieth(mix, ranks):
    assert 1 <= packed_balance(mix, ranks, 2 * CLIP_480P, steps=8) <= 1.05
    assert 1.8 < bucket_balance(mix, ranks, 1, steps=8) < 8


def test_the_rows_are_those_of_the_claim():
    rows = measure(toy=True)
    assert len(rows) == 10 and all(row.claim == "C9" and row.ours[0] >= 1 for row in rows)
    assert ["fills such a pack alone" in row.note for row in rows] == [False] * 8 + [True] * 2
    for row in rows:  # who waits after 16 samples waits less, and more than wanloom
        assert row.ours[0] < float(row.note.split()[0]) < row.theirs[0]
