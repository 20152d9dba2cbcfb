"""The order of samples: exact mixing, every sample once per pass, nothing remembered."""

import hashlib
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from wanloom.data.order import Order, source_weights
from wanloom.data.settings import SourceConfig
from wanloom.errors import UserError


def test_every_pass_has_every_sample_once_and_another_order():
    order = Order([37], [Fraction(1)], seed=3)
    entries = [order.at(p) for p in range(37 * 3)]
    passes = [entries[i * 37 : (i + 1) * 37] for i in range(3)]
    for number, entries in enumerate(passes):
        assert sorted(e.index for e in entries) == list(range(37))
        assert {e.draw for e in entries} == {number}
    assert [e.index for e in passes[0]] != [e.index for e in passes[1]]


@pytest.mark.parametrize("weights", [(1, 3, 0.5), (1, 1), (0.7, 0.3), (5, 1e-3, 2, 9)])
def test_sources_are_mixed_exactly_and_each_in_its_own_order(weights):
    sizes = [11, 7, 5, 3][: len(weights)]
    fractions = [Fraction(str(w)) for w in weights]
    order = Order(sizes, fractions, seed=1)
    total, used = sum(fractions), Counter()
    for position in range(3000):
        entry = order.at(position)
        number = used[entry.source]
        assert entry.draw == number // sizes[entry.source]
        alone = Order([*sizes], [Fraction(1)] * len(sizes), seed=1)._permutation(entry.source, entry.draw)
        assert entry.index == alone[number % sizes[entry.source]]
        used[entry.source] += 1
        for source, weight in enumerate(fractions):
            assert abs(used[source] - (position + 1) * weight / total) < len(weights)


def test_any_position_can_be_looked_up_alone():
    walked = Order([50, 20], [Fraction(2), Fraction(1)], seed=9)
    entries = [walked.at(p) for p in range(500)]
    for position in (499, 3, 250, 499, 70):
        assert Order([50, 20], [Fraction(2), Fraction(1)], seed=9).at(position) == entries[position]
    far = Order([50, 20], [Fraction(2), Fraction(1)], seed=9).at(10**15)
    assert 0 <= far.index < 50 and far.draw > 10**12


def test_permutations_are_uniform_and_keyed():
    counts = Counter(tuple(Order([4], [Fraction(1)], seed=s)._permutation(0, 0)) for s in range(2400))
    assert len(counts) == 24
    chi_square = sum((n - 100) ** 2 / 100 for n in counts.values())
    assert chi_square < 50  # 23 degrees of freedom: 49.7 is one in a thousand
    order = Order([1000, 1000], [Fraction(1)] * 2, seed=1)
    assert not np.array_equal(order._permutation(0, 0), order._permutation(1, 0))
    assert not np.array_equal(order._permutation(0, 0), Order([1000] * 2, [Fraction(1)] * 2, 2)._permutation(0, 0))


def splitmix64(state: int, count: int) -> list[int]:
    """Steele et al. 2014, on Python's integers."""
    mask, out = 2**64 - 1, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out


def test_the_order_is_that_of_the_published_generator():
    """A run must have the same order on every machine and under every version of every library."""
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]  # the published test vector
    for source, draw in ((0, 0), (1, 5)):
        digest = hashlib.blake2b(f"7\x1forder\x1f{source}\x1f{draw}".encode(), digest_size=8).digest()
        values = splitmix64(int.from_bytes(digest, "little"), 100)
        expected = sorted(range(100), key=values.__getitem__)
        assert Order([100, 100], [Fraction(2), Fraction(1)], seed=7)._permutation(source, draw).tolist() == expected


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 65_536, 65_537, 100_003])
def test_a_large_permutation_is_the_stable_sort_of_its_values_in_few_bytes(size):
    order = Order([size], [Fraction(1)], seed=11)
    found = order._permutation(0, 3)
    assert found.itemsize == (1 if size <= 256 else 2 if size <= 65_536 else 4)
    state = int.from_bytes(hashlib.blake2b(b"11\x1forder\x1f0\x1f3", digest_size=8).digest(), "little")
    values = np.array(splitmix64(state, size), np.uint64)
    assert np.array_equal(found, np.argsort(values, kind="stable"))
    assert order.at(3 * size + size // 2).index == int(found[size // 2])


def test_repeats_and_weights():
    repeats = [SourceConfig(path="a", repeats=2), SourceConfig(path="b")]
    assert source_weights(repeats, [10, 30]) == [20, 30]
    order = Order([10, 30], source_weights(repeats, [10, 30]), seed=0)
    counts = Counter((e.source, e.index) for e in map(order.at, range(50)))
    assert all(counts[0, i] == 2 for i in range(10)) and all(counts[1, i] == 1 for i in range(30))
    weights = [SourceConfig(path="a", weight=0.1), SourceConfig(path="b", weight=0.2)]
    assert source_weights(weights, [10, 30]) == [Fraction(1, 10), Fraction(1, 5)]
    with pytest.raises(UserError, match="every source a weight"):
        source_weights([SourceConfig(path="a", weight=0.1), SourceConfig(path="b")], [1, 1])
    with pytest.raises(UserError, match="every source a weight"):
        source_weights([SourceConfig(path="a", weight=0.1, repeats=2)], [1])
