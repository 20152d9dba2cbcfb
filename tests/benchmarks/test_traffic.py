"""How many elementwise kernels a block has, and what they move."""

import pytest

from benchmarks.c06_traffic import compile_block, count_peer
from benchmarks.pair import WIDTHS

NARROW = {"dim": 640, "ffn_dim": 1728, "num_heads": 5}  # an eighth of the 14B, of which the bounds are


@pytest.mark.filterwarnings("default")
def test_a_compiled_block_has_at_most_forty_kernels():
    tokens = 2048
    kernels, nbytes = compile_block(NARROW, (tokens,), half_attention=True)
    rotation = 12 * 128 * 4  # bytes per token that do not grow with the width
    assert 20 < kernels <= 40 and 0.5 * 1.2e6 < 8 * (nbytes / tokens - rotation) <= 1.2e6


def test_the_peer_moves_five_times_as_much():
    kernels, nbytes = count_peer(WIDTHS["14B"])
    assert kernels == pytest.approx(229, abs=15) and nbytes == pytest.approx(5.8e6, rel=0.03)
