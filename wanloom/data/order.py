"""The global order of samples: which sample stands at which position, as a function of (seed, position).

In: the sizes of the sources, their weights, the seed. Out: for a position, the source, the index in it and the draw
number. The one decision: nothing is remembered. The sources are interleaved by exact integers in closed form, each
source goes through a permutation of its own per pass, and a step is a slice of positions; so the state of the data is
one integer, and any rank can look up any position. A permutation is the sort order of SplitMix64 values (Steele et al.
2014), integer arithmetic that is the same on every machine and version; it takes less memory than the index it orders.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from wanloom.data.settings import SourceConfig
from wanloom.errors import UserError

RECENT = 2**13  # positions: a step is looked at several times, by those who pack, read and count


@dataclass(frozen=True, slots=True)
class Draw:
    """What stands at a position."""

    source: int
    index: int  # row in the source
    draw: int  # passes over the source before this one: every use of a sample has noise of its own


def source_weights(sources: Sequence[SourceConfig], sizes: Sequence[int]) -> list[Fraction]:
    """The relative weight of each source. Raises UserError when some give `repeats` and others `weight`."""
    if any(s.weight is not None for s in sources):
        if any(s.weight is None or s.repeats is not None for s in sources):
            raise UserError(
                "data.sources: give every source a weight, or none of them (then `repeats` counts, 1 if left out)."
            )
        return [Fraction(str(s.weight)) for s in sources]
    repeats = [s.repeats if s.repeats is not None else 1 for s in sources]
    return [Fraction(r * size) for r, size in zip(repeats, sizes, strict=True)]


class Order:
    """The endless sequence of draws over sources of `sizes` samples, mixed by `weights`."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[Fraction], seed: int) -> None:
        self.sizes = list(sizes)
        self.seed = seed
        scale = math.lcm(*(w.denominator for w in weights))
        whole = [int(w * scale) for w in weights]
        self._sums = [sum(whole[: i + 1]) for i in range(len(whole))]
        self.at = lru_cache(maxsize=RECENT)(self._at)
        # two passes of each source may be in use at a border
        self._permutation = lru_cache(maxsize=2 * len(self.sizes))(self._build_permutation)

    def _at(self, position: int) -> Draw:
        """The draw at `position`, which counts from 0 and never ends; `at` remembers those of the last steps."""
        source, number = self._place(position)
        draw, offset = divmod(number, self.sizes[source])
        return Draw(source, int(self._permutation(source, draw)[offset]), draw)

    def _place(self, position: int) -> tuple[int, int]:
        """The source at a position and how many draws of that source come before.

        Going down from the last source: of the first n positions that are left, n * S[i-1] // S[i] belong to the
        sources before i. That count rises by 0 or 1 with n; where it rises the position is theirs.
        """
        n = position
        for i in range(len(self._sums) - 1, 0, -1):
            below = n * self._sums[i - 1] // self._sums[i]
            if (n + 1) * self._sums[i - 1] // self._sums[i] == below:
                return i, n - below
            n = below
        return 0, n

    def _build_permutation(self, source: int, draw: int) -> np.ndarray:
        digest = hashlib.blake2b(f"{self.seed}\x1forder\x1f{source}\x1f{draw}".encode(), digest_size=8).digest()
        state = np.uint64(int.from_bytes(digest, "little"))
        x = state + np.arange(1, self.sizes[source] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        found = np.argsort(x ^ (x >> np.uint64(31)))  # no two values are equal, so any sort gives one order
        return found.astype(np.min_scalar_type(max(len(x) - 1, 0)))
