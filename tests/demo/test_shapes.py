"""Pixels say what a clip shows: right on the clips themselves, not fooled by noise, stillness or a wrong colour."""

import numpy as np
import pytest

from wanloom.demo import shapes
from wanloom.demo.measure import Seen, measure


@pytest.mark.slow
def test_every_scene_is_recognised():
    for index in range(2 * len(shapes.SCENES)):
        frames, scene, _ = shapes.build_clip(5, index, shapes.SCENES)
        assert measure(frames).agrees(scene) == (True, True, True), (index, scene, measure(frames))


def test_the_words_mean_what_the_pixels_show():
    """By definitions written out here: drawing and measuring share their tables, so a swap in them would cancel."""
    phrases = {"left": "to the left", "right": "to the right", "up": "upwards", "down": "downwards"}
    for index in range(len(shapes.SCENES)):
        frames, scene, caption = shapes.build_clip(10, index, shapes.SCENES)
        assert scene.color in caption and scene.shape in caption and phrases[scene.direction] in caption
        first, last = (np.argwhere(frame.max(-1) > 128) for frame in (frames[0], frames[-1]))
        red, green, blue = np.median(frames[frames.max(-1) > 180], axis=0) > 128
        names = {
            (True, False, False): "red",
            (False, True, False): "green",
            (False, False, True): "blue",
            (True, True, False): "yellow",
            (True, False, True): "purple",
            (True, True, True): "white",
        }
        assert names[red, green, blue] == scene.color
        down, right = last.mean(0) - first.mean(0)
        assert abs(down) < 1 or abs(right) < 1
        assert {"left": -right, "right": right, "up": -down, "down": down}[scene.direction] > 15
        widths = np.bincount(first[:, 0])[first[:, 0].min() :]
        upper, lower = widths[: len(widths) // 2].sum(), widths[-(len(widths) // 2) :].sum()
        narrow_above = "triangle" if lower > 2 * upper else "neither"
        found = "square" if np.ptp(widths) == 0 else "circle" if upper > 0.8 * lower > 0.64 * upper else narrow_above
        assert found == scene.shape


@pytest.mark.parametrize("size", [(48, 80), (96, 64)])
def test_other_sizes(size):
    for index in range(0, len(shapes.SCENES), 5):
        frames, scene, _ = shapes.build_clip(6, index, shapes.SCENES, 9, *size)
        assert measure(frames).agrees(scene) == (True, True, True)


@pytest.mark.slow
def test_blur_and_noise_are_survived():
    rng = np.random.default_rng(0)
    right = 0
    for index in range(len(shapes.SCENES)):
        frames, scene, _ = shapes.build_clip(7, index, shapes.SCENES)
        soft = frames.astype(float)
        soft = (soft + np.roll(soft, 1, 1) + np.roll(soft, 1, 2) + np.roll(soft, -1, 1) + np.roll(soft, -1, 2)) / 5
        noisy = np.clip(soft + rng.normal(0, 8, soft.shape), 0, 255).astype(np.uint8)
        right += all(measure(noisy).agrees(scene))
    assert right >= 0.95 * len(shapes.SCENES)


def test_what_is_not_there_is_not_seen():
    rng = np.random.default_rng(1)
    assert measure(np.full((5, 64, 64, 3), 30, np.uint8)) == Seen(None, None, None)
    still = shapes.build_clip(8, 0)[0][:1].repeat(9, 0)
    assert measure(still).direction is None
    moving = shapes.build_clip(8, 0, frames=10)[0]
    assert measure(np.concatenate([moving[:1].repeat(9, 0), moving[-1:].repeat(3, 0)])).direction is None  # a jump
    gray = moving.min(-1, keepdims=True).repeat(3, -1) + moving.max(-1, keepdims=True) // 2
    assert measure(gray).color is None and measure(gray).direction == shapes.SEEN[0].direction
    noise = rng.integers(0, 255, (5, 64, 64, 3), dtype=np.uint8)
    assert measure(noise).shape is None


def test_a_wrong_scene_does_not_agree():
    frames, _, _ = shapes.build_clip(9, 0)
    scene = shapes.SEEN[0]
    assert measure(frames[::-1]).agrees(scene) == (True, True, False)
    assert measure(frames[..., ::-1]).agrees(scene)[0] is False


def test_held_out_scenes_are_balanced_and_unseen():
    assert len(shapes.HELD_OUT) == 12 and len(shapes.SEEN) == 60
    assert {s.color for s in shapes.HELD_OUT} == set(shapes.COLORS)
    assert {s.shape for s in shapes.HELD_OUT} == set(shapes.SHAPES)
    assert {s.direction for s in shapes.HELD_OUT} == set(shapes.DIRECTIONS)
    captions = {shapes.build_clip(0, i)[2] for i in range(360)}
    for scene in shapes.HELD_OUT:
        assert not captions & {scene.caption(t) for t in range(len(shapes.TEMPLATES))}
