"""Random draws of the objective, each keyed by what it is for: (seed, purpose, sample, draw number).

In: the key. Out: a CPU generator, noise or uniforms. The one decision: no draw ever comes from a shared stream, so it
does not depend on the rank, the packing, the order of execution or on what was drawn before, and a resumed run needs no
random state. Noise is drawn on the CPU in the shape of the latents, so every device and layout sees the same values.
"""

import hashlib

import torch
from torch import Tensor


def generator(seed: int, purpose: str, sample: str, draw: int) -> torch.Generator:
    """A CPU generator for this key alone; `draw` counts how often the sample has been used."""
    key = "\x1f".join((str(seed), purpose, sample, str(draw)))  # a separator that no file name holds
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def draw_noise(shape: tuple[int, ...], seed: int, sample: str, draw: int) -> Tensor:
    """Standard normal noise fp32 in the shape of the latents `(C, F, H, W)`."""
    return torch.randn(shape, generator=generator(seed, "noise", sample, draw))


def draw_uniform(seed: int, purpose: str, sample: str, draw: int, n: int = 1) -> tuple[float, ...]:
    """`n` uniforms in [0, 1) for a decision about one sample: its noise level, whether its caption is dropped."""
    values = torch.rand(n, generator=generator(seed, purpose, sample, draw), dtype=torch.float64)
    return tuple(values.tolist())
