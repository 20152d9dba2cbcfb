"""One device per process, and a sentence when it cannot be had."""

import pytest
import torch

from wanloom.config import UserError
from wanloom.dist import pick_device


def test_the_device_is_what_there_is(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device() == torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "no GPU that torch can use"),
        ("cuda:1", "no GPU"),
        ("tpu9", "'tpu9' cannot be used"),
        ("meta", "'meta'"),
    ],
)
def test_a_device_that_cannot_be_had(name, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        pick_device(name)
