"""The benchmark of reading prepared samples at sizes for tests, and the bytes of a real sample."""

import pytest

from benchmarks import c12_loader
from wanloom.data.tar import tar_pair

pytestmark = pytest.mark.slow


# WebDataset leaves its file to the garbage collector
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_rows_say_what_was_compared() -> None:
    rows = c12_loader.measure(toy=True)
    assert [(row.claim, row.target) for row in rows] == [
        ("C12", 20.0),
        ("C12", 3.0),
        ("C12", None),
        ("C12", None),
        ("C13", 1.80e6),
    ]


def test_a_cached_sample_is_at_most_1_8_megabytes() -> None:
    latents, text = c12_loader.draw(0, (16, 21, 30, 52), (80, 4096))
    tensors = {"latents": latents, "text": text}
    pair = tar_pair("0" * 60, tensors, {"caption": "word " * 300, "source": "folder/" * 20, "notes": ["x" * 80] * 9})
    assert latents.nbytes + text.nbytes < len(pair) <= 1.80e6
