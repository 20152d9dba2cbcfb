"""Layouts: what is left is found, and one that cannot be is one sentence."""

import itertools

import pytest

from wanloom.errors import UserError
from wanloom.parallel.mesh import AXES, Layout, resolve_layout
from wanloom.parallel.settings import ParallelConfig
from wanloom.variants import VARIANTS

SMALL, LARGE = VARIANTS["wan2.1-t2v-1.3b"].shape, VARIANTS["wan2.1-t2v-14b"].shape  # 12 and 40 heads


@pytest.mark.parametrize(
    ("config", "world", "model", "sizes"),
    [
        ({}, 1, SMALL, (1, 1, 1, 1, 1, 1)),
        ({}, 8, SMALL, (1, 1, 8, 1, 1, 1)),
        ({"dp_replicate": -1, "dp_shard": 2}, 8, SMALL, (1, 4, 2, 1, 1, 1)),
        ({"cp": 4}, 64, LARGE, (1, 1, 16, 1, 4, 1)),
        ({"cp": 8}, 8, SMALL, (1, 1, 1, 2, 4, 1)),  # 12 heads: Ulysses 4 in a ring of 2
        ({"cp": 8, "context": "ring"}, 8, SMALL, (1, 1, 1, 8, 1, 1)),
        ({"cp": 6, "context": "ulysses"}, 6, SMALL, (1, 1, 1, 1, 6, 1)),
        ({"cp": 4, "cp_ulysses": 2}, 4, SMALL, (1, 1, 1, 2, 2, 1)),
        ({"cp": 4, "tp": 4}, 16, LARGE, (1, 1, 1, 2, 2, 4)),  # 10 heads on a rank
        ({"pp": 2, "tp": 2, "cp": 2, "dp_replicate": 2}, 32, LARGE, (2, 2, 2, 1, 2, 2)),
    ],
)
def test_what_is_left_and_how_cp_splits(config, world, model, sizes):
    layout = resolve_layout(ParallelConfig(**config), world, model)
    assert layout.sizes == sizes and layout.world == world


@pytest.mark.parametrize(
    ("config", "world", "message"),
    [
        ({"cp": 3}, 8, r"takes a multiple of 3 processes, but there are 8: start as many with `nproc`"),
        ({"dp_shard": 2}, 1, r"takes 2 processes, but there is 1"),
        ({"dp_shard": -1, "dp_replicate": -1}, 8, "only one of them may be -1"),
        ({"dp_shard": 0}, 8, "at least 1"),
        ({"tp": 5}, 5, "parallel.tp=5 does not divide the 12 heads"),
        ({"pp": 31}, 31, "31 stages are more than the 30 blocks"),
        ({"cp": 8, "context": "ulysses"}, 8, "divide the 12 heads: use parallel.context=auto, which takes 4 x ring 2"),
        ({"cp": 4, "tp": 2, "context": "ulysses"}, 8, "6 heads that parallel.tp=2 leaves"),
        ({"cp": 4, "cp_ulysses": 3}, 4, "cp_ulysses=3 does not divide parallel.cp=4"),
        ({"cp": 4, "cp_ulysses": 2, "context": "ring"}, 4, "leave one out"),
        ({"dp_replicate": 4}, 16, "4 samples cannot be spread over 16 data ranks"),
    ],
)
def test_a_layout_that_cannot_be_is_one_sentence(config, world, message):
    with pytest.raises(UserError, match=message):
        resolve_layout(ParallelConfig(**config), world, SMALL, num_samples=4)


def test_every_rank_has_a_place_of_its_own_and_tp_is_innermost():
    layout = Layout(2, 2, 3, 2, 2, 2)
    places = [layout.coordinates(rank) for rank in range(layout.world)]
    assert [tuple(p[a] for a in AXES) for p in places] == list(itertools.product(*map(range, layout.sizes)))
