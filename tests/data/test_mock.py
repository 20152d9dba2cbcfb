"""Made-up data: the shapes asked for, the same values every time."""

from dataclasses import replace

import pytest
import torch

from wanloom.data.mock import MockDataset, parse_shapes
from wanloom.errors import UserError
from wanloom.geometry import WAN_21, WAN_22


def test_shapes_are_those_of_the_vae():
    assert parse_shapes("81x480x832,1x480x832*2", WAN_21) == [(16, 21, 60, 104), *[(16, 1, 60, 104)] * 2]
    assert parse_shapes("121x704x1280", WAN_22) == [(48, 31, 44, 80)]


@pytest.mark.parametrize("wrong", ["80x480x832", "81x480x830", "81x480", "0x64x64", "1x64x64*0", "", "81x480x832,"])
def test_shapes_that_cannot_be_are_named(wrong):
    with pytest.raises(UserError, match="is no shape"):
        parse_shapes(wrong, WAN_21)


def test_every_shape_comes_as_often_as_asked_for():
    # a mix longer than the set, and one that does not divide it
    for mix, size, rows in (("1x64x64*30,9x32x64", 20, 31), ("17x64x64,1x64x64*2", 20, 21)):
        shapes = MockDataset(mix, 8, WAN_21, size=size).rows("train").columns["frames"].tolist()
        assert len(shapes) == rows
        one = len(parse_shapes(mix, WAN_21))
        assert sorted(shapes) == sorted([s[1] for s in parse_shapes(mix, WAN_21)] * (rows // one))


def test_captions_have_all_lengths_of_the_range():
    lens = MockDataset("1x64x64", 8, WAN_21, size=1500).rows("train").columns["text_len"]
    assert sorted(set(lens.tolist())) == list(range(8, 129))


def test_samples_are_repeatable_and_different():
    narrow = replace(WAN_21, channels=4)
    data = MockDataset("17x64x64,1x32x64", 8, narrow, size=6, val_size=2)
    train, val = data.rows("train"), data.rows("val")
    assert (len(train), len(val)) == (6, 2)
    assert set(train.texts["key"].to_pylist()).isdisjoint(val.texts["key"].to_pylist())
    for i in range(6):
        sample = data.read(train[i])
        row = train[i]
        planned = (row.channels, row.frames, row.height, row.width)
        assert tuple(sample.tensors["latents"].shape) == planned == ((4, 5, 8, 8), (4, 1, 4, 8))[i % 2]
        assert sample.tensors["text"].shape == (train.columns["text_len"][i], 8)
        assert sample.tensors["latents"][0].numel() // 4 == train.tokens[i]
        again = MockDataset("17x64x64,1x32x64", 8, narrow).read(train[i])
        assert torch.equal(sample.tensors["latents"], again.tensors["latents"])
    assert not torch.equal(data.read(train[0]).tensors["latents"], data.read(train[2]).tensors["latents"])
