"""Keyed draws: random numbers that are a function of a key and of nothing else.

In: a key, any number of words and whole numbers such as (seed, "noise", sample, draw). Out: fp32 normals or uniforms of
any shape, or a few fp64 uniforms for decisions. The one decision: the whole key counts, and all bits are the same on
every machine and version. A key is hashed to the 128 bits that Philox takes (Salmon et al. 2011), so no two keys share
a stream, where torch's CPU generator keeps 32 bits of a seed. Of numpy only the bits are used, which it promises to
keep; what becomes of them is done here in single additions and products, which IEEE 754 fixes, and a table. The order
of samples, random crops and the val split are not drawn here: each is a hash of a key of its own.
"""

import hashlib
import json
import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

SCHEME = "philox4x64-10, blake2b, 32 bits a value"  # a run goes on with the draws that it was started with only
CHUNK = 2**16  # values at once: a cache holds them
CUT = 15  # bits of a float's mantissa that do not choose the line: 256 lines for every power of two


def keyed_normal(shape: tuple[int, ...], *key: str | int) -> Tensor:
    """Standard normal values, fp32: to 6.34 on both sides, within 1e-6 of the exact quantile of their 32 bits."""
    return _draw(shape, key, _normal)


def draw_noise(shape: tuple[int, ...], seed: int, sample: str, draw: int) -> Tensor:
    """Noise fp32 in the shape of the latents of a sample, for its use number `draw`."""
    return keyed_normal(shape, seed, "noise", sample, draw)


def keyed_uniform(shape: tuple[int, ...], *key: str | int) -> Tensor:
    """Uniforms in [0, 1), fp32: multiples of 2^-24."""
    return _draw(shape, key, _uniform)


def keyed_fractions(n: int, *key: str | int) -> tuple[float, ...]:
    """`n` uniforms in [0, 1) as Python's floats: multiples of 2^-53."""
    return tuple(((_bits(key).random_raw(n) >> np.uint64(11)) * 2.0**-53).tolist())


def _bits(key: tuple[str | int, ...]) -> np.random.Philox:
    text = json.dumps(key)  # tells every key from every other, also a word from a number and two words from one
    return np.random.Philox(key=int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little"))


def _draw(
    shape: tuple[int, ...], key: tuple[str | int, ...], transform: Callable[[np.ndarray, np.ndarray], None]
) -> Tensor:
    """fp32 values, each from 32 bits of the key's stream in turn."""
    bits, out = _bits(key), np.empty(math.prod(shape), np.float32)
    for start in range(0, out.size, CHUNK):
        part = out[start : start + CHUNK]
        words = bits.random_raw(-(-part.size // 2)).astype("<u8", copy=False)
        transform(words.view("<u4")[: part.size], part)
    return torch.from_numpy(out).view(shape)


def _uniform(words: np.ndarray, out: np.ndarray) -> None:
    np.multiply(words >> np.uint32(8), np.float32(2**-24), out=out, casting="unsafe")


def _normal(words: np.ndarray, out: np.ndarray) -> None:
    """The distance from 0 of the signed word is the probability beyond the value, in units of 2^-32."""
    signed = words.view(np.int32).astype(np.float32) + np.float32(0.5)
    beyond = np.abs(signed)
    first, slopes, starts = _lines()
    line = (beyond.view(np.int32) >> CUT) - first  # the exponent and the first bits of the mantissa
    value = slopes.take(line)
    value *= beyond
    value += starts.take(line)
    np.copysign(value, signed, out=out)


@lru_cache(maxsize=1)
def _lines() -> tuple[int, np.ndarray, np.ndarray]:
    """The normal's quantile in straight lines: the number of the first, their slopes and their values at 0."""
    first, last = (int(np.float32(value).view(np.int32)) >> CUT for value in (0.5, 2.0**31))
    ends = (np.arange(first, last + 2, dtype=np.int32) << CUT).view(np.float32).astype(np.float64)
    values = np.array([-NormalDist().inv_cdf(end * 2.0**-32) for end in ends])
    slopes = np.diff(values) / np.diff(ends)
    return first, slopes.astype(np.float32), (values[:-1] - slopes * ends[:-1]).astype(np.float32)
