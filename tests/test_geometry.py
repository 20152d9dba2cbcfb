"""Sizes against those that Wan's own code names for its two autoencoders."""

import pytest

from wanloom.errors import UserError
from wanloom.geometry import WAN_21, WAN_22


def test_sizes_are_those_of_wan() -> None:
    """81 frames of 480p are 32,760 tokens, 720p 75,600; of TI2V-5B 121 frames of 704x1280 are 27,280."""
    assert WAN_21.latents_shape(81, 480, 832) == (16, 21, 60, 104) and WAN_21.count_tokens(81, 480, 832) == 32_760
    assert WAN_21.count_tokens(81, 720, 1280) == 75_600
    assert WAN_22.latents_shape(121, 704, 1280) == (48, 31, 44, 80) and WAN_22.count_tokens(121, 704, 1280) == 27_280


@pytest.mark.parametrize("geometry", [WAN_21, WAN_22])
def test_latents_stand_for_the_video_that_they_were_made_of(geometry) -> None:
    for size in ((1, 32, 64), (5, 96, 32), (81, 704, 1280)):
        assert geometry.video_shape(*geometry.latents_shape(*size)[1:]) == size


@pytest.mark.parametrize(
    ("geometry", "size", "message"),
    [
        (WAN_21, (80, 64, 64), r"The number of frames is 80, it must be 4n\+1: try 77 or 81\."),
        (WAN_21, (0, 64, 64), r"it must be 4n\+1: try 1\."),
        (WAN_21, (1, 481, 64), r"The height is 481, it must be a multiple of 16: try 480 or 496\."),
        (WAN_21, (1, 64, 8), r"The width is 8, it must be a multiple of 16: try 16\."),
        (WAN_22, (1, 720, 1280), r"The height is 720, it must be a multiple of 32: try 704 or 736\."),
        (WAN_22, (1, 64, 48), r"The width is 48, it must be a multiple of 32: try 32 or 64\."),
    ],
)
def test_a_size_that_cannot_be_is_told_with_its_neighbours(geometry, size, message) -> None:
    with pytest.raises(UserError, match=message):
        geometry.latents_shape(*size)


def test_the_longest_clip_of_some_frames() -> None:
    assert [WAN_21.most_frames(count) for count in (1, 4, 5, 8, 80, 81)] == [1, 1, 5, 5, 77, 81]
