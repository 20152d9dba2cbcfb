"""The planner's numbers beside those of the real thing: a built model, a loader's packs, a layout's coordinates."""

import math

import pytest
import torch

from wanloom.data.loader import open_sources
from wanloom.geometry import WAN_21
from wanloom.model.dit import WanDiT
from wanloom.model.flops import train_flops
from wanloom.parallel.mesh import AXES, resolve_layout
from wanloom.runs.build import build_loader, build_plan
from wanloom.runs.planner import plan_axes, plan_memory, plan_size, plan_steps
from wanloom.runs.recipe import build_run, model_config

SETTINGS = ["batch.samples=8", "batch.tokens_per_pack=256", "train.steps=3"]


def test_the_size_is_that_of_a_built_model():
    run = build_run("tiny", ["ema.decay=0.9"])
    config = model_config(run.model)
    held = sum(p.numel() * p.element_size() for p in WanDiT(config).parameters())
    assert plan_size(run, config) == (held // 4, 5 * held)
    assert plan_size(build_run("tiny", ["ema.decay=null"]), config).bytes == 4 * held


def test_the_steps_are_those_that_the_loader_gives():
    run = build_run("tiny", SETTINGS, None, "17x64x64,1x64x64")
    config = model_config(run.model)
    sources = open_sources(run.data, WAN_21, config.out_channels, config.text_dim, config.text_slots)
    packs, lens = 0, []
    plan, empty = build_plan(run, config, sources, 1), torch.zeros(1, config.text_dim)
    with build_loader(run, config, sources, plan, 0, empty, 0) as batches:
        for batch, _ in zip(batches, range(run.train.steps), strict=False):
            packs += len(batch.inputs)
            lens += [length for made in batch.inputs for length in made.pack.video_lens]
    found = plan_steps(run, config, None)
    assert (found.steps, found.data_ranks, found.padding) == (3, 1, 0)
    assert found.packs == packs / 3 and found.tokens == sum(lens) / 3
    assert found.fill == pytest.approx(sum(lens) / (256 * packs))
    assert found.flops == pytest.approx(sum(train_flops(config, length) for length in lens) / 3)
    assert list(found.shares) == [1.0] and found.balance == 1


def test_a_layout_s_padding_and_parts_are_counted_pack_by_pack():
    run = build_run("tiny", [*SETTINGS, "parallel.cp=2", "parallel.dp_replicate=2"], None, "17x48x48,1x64x64")
    config = model_config(run.model)
    layout = resolve_layout(run.parallel, 4, config, 8)
    found = plan_steps(run, config, layout)
    assert found.data_ranks == 2 and found.balance >= 1
    memory = plan_memory(run, config, layout)
    assert memory.tokens == 128 and memory.states.total == sum(memory.states)
    assert memory.activations["full"] < memory.activations["cheap"] < memory.activations["none"]
    assert math.isclose(memory.states.parameters, 4 * memory.parameters)


def test_the_ranks_of_an_axis_share_every_other_coordinate():
    run = build_run("tiny", ["parallel.cp=2", "parallel.tp=2", "parallel.dp_replicate=2"])
    layout = resolve_layout(run.parallel, 16, model_config(run.model), run.batch.samples)
    axes = plan_axes(layout, 4)
    assert [len(found.ranks) for found in axes] == [size for size in layout.sizes if size > 1]
    for found in axes:
        places = [layout.coordinates(rank) for rank in found.ranks]
        assert [place[found.axis] for place in places] == list(range(len(places)))
        assert all(place[axis] == 0 for place in places for axis in AXES if axis != found.axis)
        assert found.is_inside == (found.ranks[-1] < 4)
