"""Keyed draws: the whole key counts, the values are those of the distribution, and the bits never change."""

import hashlib
import json
from statistics import NormalDist

import numpy as np
import pytest
import torch

from wanloom import keys
from wanloom.keys import draw_noise, keyed_fractions, keyed_normal, keyed_uniform


@pytest.mark.slow
def test_keys_that_agree_in_32_bits_draw_other_values():
    """Of 300,000 names a dozen agree in any 32 bits of the hash: a generator that keeps 32 bits draws them alike."""
    names = [f"0/clip-{i:06d}" for i in range(300_000)]
    hashes = [hashlib.blake2b(json.dumps((0, "noise", name, 0)).encode(), digest_size=16).digest() for name in names]
    words = np.frombuffer(b"".join(hashes), "<u4").reshape(-1, 4)
    for column in words.T:
        order = np.argsort(column, kind="stable")
        twins = np.flatnonzero(np.diff(column[order]) == 0)
        assert len(twins) > 2
        for i in twins:
            one, other = (keyed_normal((4, 4), 0, "noise", names[order[i + k]], 0) for k in (0, 1))
            assert not torch.isclose(one, other, atol=1e-3).all()


def test_every_part_of_a_key_counts_and_parts_do_not_run_into_each_other():
    some = [(1, "a", "b", 0), (2, "a", "b", 0), (1, "c", "b", 0), (1, "a", "c", 0), (1, "a", "b", 1), (1, "ab", "", 0)]
    some += [(1, "a\x1fb", "", 0), (1, "a", "\x1fb", 0), ("1", "a", "b", 0), (1, "a", "b"), (10, "a", "b", 0)]
    some += [(1, 'a","b', 0), (1 + 2**32, "a", "b", 0), (1 + 2**64, "a", "b", 0), (1, "a", "\udc80", 0)]
    for draw in (keyed_normal, keyed_uniform):
        drawn = [draw((3,), *key) for key in some]
        assert len({tuple(values.tolist()) for values in drawn}) == len(some)
        assert all(torch.equal(values, draw((3,), *key)) for values, key in zip(drawn, some, strict=True))
    assert len({keyed_fractions(1, *key) for key in some}) == len(some)


def test_the_bits_are_the_same_everywhere_and_for_ever():
    """A change here changes every run: it needs another SCHEME, so that old runs are not mixed with it."""
    assert keys.SCHEME == "philox4x64-10, blake2b, 32 bits a value"
    digests = {}
    for draw in (keyed_normal, keyed_uniform):
        values = draw((3, 5, 1001), 7, "noise", "0/clip", 2).numpy()
        digests[draw.__name__] = hashlib.blake2b(values.astype("<f4").tobytes(), digest_size=8).hexdigest()
    assert digests == {"keyed_normal": "e0a1a52374610be6", "keyed_uniform": "77caba3e08cca1be"}
    first, slopes, starts = keys._lines()
    table = hashlib.blake2b(slopes.astype("<f4").tobytes() + starts.astype("<f4").tobytes(), digest_size=8)
    assert (first, table.hexdigest()) == (32256, "55f5025ccd41194a")
    assert keyed_fractions(2, 7, "sigma") == (0.8684769935844789, 0.3637243482529482)


def test_normals_are_the_quantiles_of_their_words():
    edges = [0, 1, 2, 3, 2**24 + 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1]
    words = np.array(edges + list(np.random.default_rng(0).integers(0, 2**32, 20_000)), dtype=np.uint32)
    values = np.empty(len(words), np.float32)
    keys._normal(words, values)
    signed = words.view(np.int32).astype(np.float64) + 0.5
    exact = [-NormalDist().inv_cdf(abs(s) / 2**32) * np.sign(s) for s in signed]
    assert np.abs(values - exact).max() < 1.5e-6
    assert values.max() == -values.min() == pytest.approx(6.34, abs=0.02)


@pytest.mark.parametrize("draw", [keyed_normal, keyed_uniform])
def test_values_go_on_over_chunks(draw):
    long = draw((2, keys.CHUNK + 7), 1, "a").flatten()
    assert torch.equal(long[: keys.CHUNK + 1], draw((keys.CHUNK + 1,), 1, "a"))
    assert not torch.equal(long[:100], long[keys.CHUNK : keys.CHUNK + 100])
    assert draw((), 1, "a").shape == () and draw((0, 3), 1, "a").shape == (0, 3)
    assert draw((2, 3), 1, "a").dtype == torch.float32


def test_the_distributions():
    n = 2_000_000
    z = keyed_normal((n,), 1, "moments").double()
    for power, moment, spread in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs((z**power).mean().item() - moment) < 5 * spread / n**0.5, power
    for point in (-3.5, -2, -1, -0.1, 0.3, 1.5, 3):
        share = NormalDist().cdf(point)
        assert abs((z < point).double().mean().item() - share) < 5 * (share * (1 - share) / n) ** 0.5, point
    u = keyed_uniform((n,), 1, "moments").double()
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean().item() - 0.5) < 5 / (12 * n) ** 0.5 and abs(u.var().item() - 1 / 12) < 5 / (180 * n) ** 0.5
    for values in (z, u - u.mean()):  # neighbours, and halves that one word gave
        values = values / values.std()
        for lag in (1, 2, 3, 8):
            assert abs((values[lag:] * values[:-lag]).mean().item()) < 5 / n**0.5, lag


def test_a_draw_depends_on_every_part_of_its_key_and_on_nothing_else():
    shape = (2, 3, 4, 6)
    base = draw_noise(shape, 1, "0/clip", 2)
    torch.manual_seed(5)
    draw_noise((7,), 1, "0/other", 2)
    assert torch.equal(base, draw_noise(shape, 1, "0/clip", 2))
    for key in ((2, "0/clip", 2), (1, "1/clip", 2), (1, "0/clip", 3)):
        assert not torch.equal(base, draw_noise(shape, *key))
    # parts do not run into each other
    assert keyed_fractions(1, 1, "a", "1", 2) != keyed_fractions(1, 1, "a", "12", 0)
    assert keyed_fractions(1, 1, "a", "b", 0) != keyed_fractions(1, 1, "ab", "", 0)
    assert (
        keyed_fractions(1, 1, "a", "b", 0) != keyed_fractions(1, 1, "a", "b", 1) != keyed_fractions(1, 2, "a", "b", 1)
    )


def test_draws_of_many_keys_have_the_right_distribution():
    noise = torch.stack([draw_noise((16, 2, 4, 4), 3, f"0/{i}", 0) for i in range(400)])
    assert noise.dtype == torch.float32
    assert abs(noise.mean().item()) < 0.01 and abs(noise.std().item() - 1) < 0.01
    # the same element over samples, and pairs of samples, are independent too
    assert (noise.mean(0).abs() < 6 / 20).all()
    flat = noise.flatten(1)
    correlation = torch.corrcoef(flat) - torch.eye(400)
    assert correlation.abs().max() < 6 / flat.shape[1] ** 0.5
    u = torch.tensor([keyed_fractions(2, 3, "sigma", f"0/{i}", 0) for i in range(4000)])
    assert (u >= 0).all() and (u < 1).all()
    assert torch.allclose(u.mean(0), torch.tensor(0.5, dtype=u.dtype), atol=0.02)
    assert abs(torch.corrcoef(u.T)[0, 1].item()) < 0.06
