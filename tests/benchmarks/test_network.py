"""The benchmarks of the network run, and find the outputs equal, at toy sizes."""

from functools import partial

import pytest
import torch

from benchmarks import c01_dit, c03_text, c08_unpacked, c17_compile, c17_lengths
from benchmarks.pair import at_depth, build_pair, draw_samples, run_ours, run_theirs, without_blocks
from wanloom.parallel import compile as module

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # the compiler warns of what it does itself
]


@pytest.fixture(autouse=True)
def graphs_as_they_are(monkeypatch):
    """The graphs as they are, run one operator after the other."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    with module.symbols.patch(use_duck_shape=True):  # put back afterwards
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("benchmark", "claims"), [(c01_dit, {"C1", "C2"}), (c03_text, {"C3", "C4"}), (c08_unpacked, {"C8"})]
)
def test_rows(benchmark, claims):
    rows = benchmark.measure(True)
    assert {row.claim for row in rows} == claims
    for row in rows:
        assert row.checked and row.limit and len(row.ours) == len(row.theirs) >= 7


def test_seconds_at_another_depth():
    assert at_depth([5.0, 9.0], [1.0, 3.0], 2, 30) == [61.0, 93.0]


def test_what_is_outside_of_the_blocks_leaves_the_models_whole():
    ours, theirs = build_pair("toy", 2)
    samples = draw_samples(ours.config, [(2, 4, 6), (1, 4, 4)], [5, 7], torch.float32)
    before = run_ours(ours, samples)()
    ours_rest, theirs_rest = without_blocks(ours, theirs)
    rest = run_ours(ours_rest, samples)()
    torch.testing.assert_close(rest, run_theirs(theirs_rest, samples)(), rtol=1e-4, atol=1e-4)
    assert (rest - before).norm() > 0.1 * before.norm()
    torch.testing.assert_close(run_theirs(theirs, samples)(), before, rtol=1e-4, atol=1e-4)


def test_compile_seconds_by_depth(monkeypatch):
    monkeypatch.setattr(c17_compile, "in_a_fresh_process", lambda side, n: 3.0 + n * (side == "model"))
    *each, growth = c17_compile.measure(False)
    assert [row.ratio() for row in each] == [5 / 3, 11 / 3, 1, 1]
    assert growth.ours == [1.0] and growth.is_met() and "2.20-fold" in growth.note and "1.00-fold" in growth.note
    assert all(c17_compile.compile_seconds(side, 1) > 0 for side in ("wanloom", "repeated"))


def test_any_length_is_one_graph_where_one_length_is_five():
    row, *timed = c17_lengths.measure(True)
    assert row.is_met() and row.theirs == [5]
    assert len(timed) == 2 and all(each.checked and len(each.ours) == len(each.theirs) >= 7 for each in timed)
