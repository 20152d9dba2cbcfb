"""Sizes and crops: legal, inside the picture, and never squashed by more than the rounding."""

import math
import random

import pytest

from wanloom.config import build_config
from wanloom.errors import UserError
from wanloom.geometry import WAN_21
from wanloom.media.decoding import MediaError
from wanloom.media.framing import FramingConfig, aspect_change, choose_crop


def draw_sizes(count: int) -> list[tuple[int, int]]:
    draws = random.Random(5)
    return [(draws.randint(40, 4000), draws.randint(40, 4000)) for _ in range(count)]


@pytest.mark.parametrize("crop", ["center", "random"])
def test_one_size_for_all_covers_and_cuts(crop: str) -> None:
    config = FramingConfig(height=480, width=832, crop=crop, max_aspect=100)
    for width, height in draw_sizes(300):
        frame = choose_crop(width, height, config, WAN_21.grid, 0, f"{width}x{height}")
        assert frame.size == (832, 480)
        assert all(c >= 0 and c + s <= r for c, s, r in zip(frame.corner, frame.size, frame.resized, strict=True))
        assert 832 in frame.resized[:1] or 480 in frame.resized[1:]  # nothing is cut that need not be
        assert abs(aspect_change(width, height, frame)) <= 0.5 / min(frame.resized) + 1e-9  # half a pixel
        if crop == "center":
            assert all(abs(r - s - 2 * c) <= 1 for c, s, r in zip(frame.corner, frame.size, frame.resized, strict=True))


def test_random_crops_differ_by_key_and_stay_by_seed() -> None:
    config = FramingConfig(height=64, width=64, crop="random")
    corners = [choose_crop(1000, 64, config, WAN_21.grid, 0, f"k{i}").corner[0] for i in range(200)]
    assert corners == [choose_crop(1000, 64, config, WAN_21.grid, 0, f"k{i}").corner[0] for i in range(200)]
    assert min(corners) < 60 and max(corners) > 870 and len(set(corners)) > 150
    assert choose_crop(1000, 64, config, WAN_21.grid, 1, "k0").corner[0] != corners[0]


def test_none_fits_the_whole_picture_inside() -> None:
    config = FramingConfig(height=480, width=832, crop="none", max_aspect=100)
    for width, height in draw_sizes(300):
        if min(832 / width, 480 / height) * min(width, height) < 16:
            continue
        frame = choose_crop(width, height, config, WAN_21.grid, 0, "k")
        scale = min(832 / width, 480 / height)
        assert frame.resized == frame.size and frame.corner == (0, 0)
        assert all(side % 16 == 0 for side in frame.size)
        assert frame.size[0] <= 832 and frame.size[1] <= 480
        assert abs(frame.size[0] - width * scale) <= 8 and abs(frame.size[1] - height * scale) <= 8
    assert choose_crop(640, 272, config, WAN_21.grid, 0, "k").size == (832, 352)
    with pytest.raises(MediaError, match=r"^10000x100 would become 832x8, less than 16 pixels$"):
        choose_crop(10000, 100, config, WAN_21.grid, 0, "k")


@pytest.mark.parametrize("crop", ["center", "none"])
def test_by_area_every_file_keeps_its_aspect(crop: str) -> None:
    config = FramingConfig(max_area=480 * 832, crop=crop, max_aspect=100)
    for width, height in draw_sizes(300):
        frame = choose_crop(width, height, config, WAN_21.grid, 0, "k")
        assert all(side % 16 == 0 and side >= 16 for side in frame.size)
        assert frame.size[0] * frame.size[1] <= 480 * 832
        assert frame.size[0] <= max(16, width) and frame.size[1] <= max(16, height)  # never enlarged
        if crop == "none":
            worst = 16 / min(frame.size)
            assert abs(math.log(frame.size[0] / frame.size[1] * height / width)) < worst
        else:
            assert abs(aspect_change(width, height, frame)) <= 0.5 / min(frame.resized) + 1e-9
    assert choose_crop(832, 480, config, WAN_21.grid, 0, "k").size == (832, 480)
    assert choose_crop(1920, 1080, config, WAN_21.grid, 0, "k").size == (832, 464)
    assert choose_crop(100, 50, config, WAN_21.grid, 0, "k").size == (96, 48)


@pytest.mark.parametrize("crop", ["center", "random", "none"])
def test_a_sliver_is_refused_before_it_is_resized(crop: str) -> None:
    """1x1000 would cover 832x480 with 692 million pixels."""
    for values in ({"height": 480, "width": 832}, {"height": 480, "width": 832, "keep_aspect": True}, {}):
        config = FramingConfig(crop=crop, **values)
        for width, height in ((1, 1000), (65535, 1), (100, 2001)):
            with pytest.raises(MediaError, match=r"^\d+x\d+, one side [\d.]+ times .* `max_aspect=20`"):
                choose_crop(width, height, config, WAN_21.grid, 0, "k")
        frame = choose_crop(100, 2000, config, WAN_21.grid, 0, "k")
        assert frame.resized[0] * frame.resized[1] <= 20 * 832 * 832


@pytest.mark.parametrize("crop", ["center", "none"])
@pytest.mark.parametrize("area", [256, 300, 1000, 4096, 480 * 832])
def test_no_shape_passes_the_area(crop: str, area: int) -> None:
    """Slivers too, whose short side would grow to one token."""
    config = FramingConfig(max_area=area, crop=crop, max_aspect=1000)
    fitted = 0
    for width, height in [(1, 400_000), (1, 1000), (10, 200), (15, 10_000), (10, 10), (3000, 20), *draw_sizes(200)]:
        try:
            frame = choose_crop(width, height, config, WAN_21.grid, 0, "k")
        except MediaError as error:
            assert error.kind == "too narrow"
            continue
        fitted += 1
        assert frame.size[0] * frame.size[1] <= area, (width, height)
    assert fitted > (0 if area == 256 else 5)


def test_keep_aspect_uses_the_area_of_height_and_width() -> None:
    config = FramingConfig(height=64, width=64, keep_aspect=True)
    frame = choose_crop(1000, 250, config, WAN_21.grid, 0, "k")
    assert frame.size == (128, 32)
    assert FramingConfig().area == 480 * 832


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"height": 480}, "belong together"),
        ({"keep_aspect": True}, "without `height` and `width` every file keeps its aspect: leave `keep_aspect` out"),
        (
            {"keep_aspect": True, "max_area": 1000},
            "without `height` and `width` every file keeps its aspect: leave `keep_aspect` out",
        ),
        ({"height": 480, "width": 832, "max_area": 1000}, "no effect"),
        ({"height": 480, "width": 832, "max_area": 1000, "keep_aspect": True}, "not both"),
        ({"max_aspect": 0.5}, "`max_aspect=0.5` is not between 1 and 1000"),
        ({"max_aspect": float("nan")}, "'max_aspect' is nan: it must be a finite number"),
    ],
)
def test_sizes_that_cannot_be(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_config(FramingConfig, values)
