"""Pixels say what a clip shows: right on the clips themselves, not fooled by noise, stillness or a wrong colour."""

import numpy as np
import pytest

from wanloom.data import shapes
from wanloom.evaluate.shapes import Seen, measure


def test_every_scene_is_recognised():
    for index in range(2 * len(shapes.SCENES)):
        frames, scene, _ = shapes.build_clip(5, index, shapes.SCENES)
        assert measure(frames).agrees(scene) == (True, True, True), (index, scene, measure(frames))


@pytest.mark.parametrize("size", [(48, 80), (96, 64)])
def test_other_sizes(size):
    for index in range(0, len(shapes.SCENES), 5):
        frames, scene, _ = shapes.build_clip(6, index, shapes.SCENES, 9, *size)
        assert measure(frames).agrees(scene) == (True, True, True)


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
