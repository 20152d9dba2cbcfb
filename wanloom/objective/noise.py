"""Random draws of the objective, each keyed by what it is for: (seed, purpose, sample, draw number).

In: the key. Out: noise or uniforms. The one decision: no draw ever comes from a shared stream, so it does not depend on
the rank, the packing, the order of execution or on what was drawn before, and a resumed run needs no random state.
Noise is drawn on the CPU in the shape of the latents, so every device and layout sees the same values. `draw` counts
how often the sample has been used.
"""

from torch import Tensor

from wanloom.keys import keyed_fractions, keyed_normal


def draw_noise(shape: tuple[int, ...], seed: int, sample: str, draw: int) -> Tensor:
    """Standard normal noise fp32 in the shape of the latents `(C, F, H, W)`."""
    return keyed_normal(shape, seed, "noise", sample, draw)


def draw_uniform(seed: int, purpose: str, sample: str, draw: int, n: int = 1) -> tuple[float, ...]:
    """`n` uniforms in [0, 1) for a decision about one sample: its noise level, whether its caption is dropped."""
    return keyed_fractions(n, seed, purpose, sample, draw)
