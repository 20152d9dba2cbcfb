"""The settings of prepare beside the geometry of the model that is prepared for."""

from typing import Any

import pytest

from wanloom.errors import UserError
from wanloom.geometry import WAN_21, WAN_22
from wanloom.media.framing import FramingConfig
from wanloom.media.video import TimingConfig
from wanloom.prepare.settings import PrepareConfig, fit_config


def config(framing: dict[str, Any] | None = None, timing: dict[str, Any] | None = None) -> PrepareConfig:
    return PrepareConfig(framing=FramingConfig(**framing or {}), timing=TimingConfig(**timing or {}))


def test_the_frame_rate_is_the_models_unless_another_is_asked_for() -> None:
    assert [fit_config(config(), geometry).timing.fps for geometry in (WAN_21, WAN_22)] == [16.0, 24.0]
    assert fit_config(config(timing={"fps": 12.0}), WAN_22).timing.fps == 12.0
    assert fit_config(config(), WAN_21) == config()


@pytest.mark.parametrize(
    ("framing", "timing", "message"),
    [
        ({"height": 481, "width": 832}, {}, "The height is 481, it must be a multiple of 16: try 480 or 496"),
        ({"height": 480, "width": 8}, {}, "The width is 8, it must be a multiple of 16: try 16"),
        ({"max_area": 100}, {}, "less than one token of 16x16 pixels"),
        ({}, {"frames": 80}, r"The number of frames is 80, it must be 4n\+1: try 77 or 81"),
        ({}, {"frames": 0}, "try 1"),
    ],
)
def test_sizes_that_latents_cannot_have(framing: dict[str, Any], timing: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit_config(config(framing, timing), WAN_21)


def test_a_size_may_be_one_of_one_model_alone() -> None:
    half = config({"height": 720, "width": 1280})
    assert fit_config(half, WAN_21) == half
    with pytest.raises(UserError, match="The height is 720, it must be a multiple of 32: try 704 or 736"):
        fit_config(half, WAN_22)
    fit_config(config({"max_area": 256}), WAN_21)
    with pytest.raises(UserError, match="less than one token of 32x32 pixels"):
        fit_config(config({"max_area": 256}), WAN_22)
