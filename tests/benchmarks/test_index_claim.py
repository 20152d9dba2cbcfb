"""C20 at a size for tests: the columns are mapped and shared, and every line is measured."""

import pytest

from benchmarks import c20_index

pytestmark = pytest.mark.slow


def test_the_rows_say_what_was_measured() -> None:
    rows = c20_index.measure(toy=True)
    assert [row.claim for row in rows] == ["C20"] * 8
    assert [row.target for row in rows] == [5, None, 2**29, None, None, 0.005, 0.005, None]
    assert all(value > 0 for row in rows for value in row.ours)
    assert [len(row.ours) for row in rows] == [2, 1, 2, 1, 2, 1, 1, 1]


def test_private_memory_is_that_of_this_process_alone() -> None:
    before = c20_index.private_bytes()
    taken = b"x" * 50_000_000
    assert 45e6 < c20_index.private_bytes() - before < 60e6
    del taken
