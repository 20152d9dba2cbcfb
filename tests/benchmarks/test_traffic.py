"""How many elementwise kernels a block has, and what they move."""

import pytest

from benchmarks.c05_activations import norm_in_one
from benchmarks.c06_traffic import compile_block, count_peer
from benchmarks.pair import WIDTHS

pytestmark = pytest.mark.slow

NARROW = {"dim": 640, "ffn_dim": 1728, "num_heads": 5}  # an eighth of the 14B, of which the bounds are


@pytest.mark.filterwarnings("default")
def test_a_compiled_block_has_at_most_forty_kernels():
    tokens = 2048
    kernels, nbytes = compile_block(NARROW, (tokens,), half_attention=True)
    rotation = 12 * 128 * 4  # bytes per token that do not grow with the width
    assert 20 < kernels <= 40 and 0.5 * 1.2e6 < 8 * (nbytes / tokens - rotation) <= 1.2e6


def test_the_eager_peer_moves_this_much():
    """With RMS norm as one operator, as on a GPU, and as several, as on a CPU."""
    with norm_in_one():
        assert count_peer(WIDTHS["14B"]) == (139, 3_508_296)
    assert count_peer(WIDTHS["14B"]) == (231, 5_628_132)
