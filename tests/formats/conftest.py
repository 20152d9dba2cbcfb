"""A small transformer, and its folder as diffusers writes it."""

from pathlib import Path

import pytest
from dit_reference import SMALL, build_model

from wanloom.formats.transformer import (
    save_weights,
)
from wanloom.model.dit import WanDiT


@pytest.fixture(scope="module")
def model() -> WanDiT:
    return build_model(SMALL)


@pytest.fixture
def folder(model: WanDiT, tmp_path: Path) -> Path:
    save_weights(model.state_dict(), model.config, tmp_path / "model")
    return tmp_path / "model"
