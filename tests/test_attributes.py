"""The measuring stick on drawn clips, where what is right is known; and where there is nothing to be measured."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from examples.attributes import Attributes, read_attributes
from examples.world import CONCEPT, KNOWN, SCENES, draw, random_clip


def noisy(clip, seed):
    noise = np.random.default_rng(seed).normal(0, 20, clip.shape)
    return (clip + noise).clip(0, 255).astype(np.uint8)


def blurred(clip, _):
    softened = clip.astype(float)
    for axis in (1, 2, 1, 2):
        softened = (np.roll(softened, 1, axis) + 2 * softened + np.roll(softened, -1, axis)) / 4
    return softened.astype(np.uint8)


def test_every_scene_is_read_as_it_was_drawn():
    for seed, scene in enumerate(SCENES):
        assert asdict(read_attributes(draw(scene, seed, 9, 64))) == asdict(scene)


@pytest.mark.parametrize("frames", [9, 17])
@pytest.mark.parametrize("change", [noisy, blurred])
def test_noise_and_blur_are_no_excuse(change, frames):
    wrong = []
    for seed in range(150):
        scene, clip = random_clip(seed, frames, 64, SCENES)
        found = read_attributes(change(clip, seed))
        wrong += [(name, scene) for name, value in asdict(scene).items() if getattr(found, name) != value]
    assert len(wrong) <= 2  # of 600


def test_a_shape_that_stands_still_has_no_direction():
    clip = draw(KNOWN[0], 0, 9, 64)
    still = np.repeat(clip[:1], 9, axis=0)
    found = read_attributes(still)
    assert found.direction is None and found.colour == KNOWN[0].colour and found.shape == KNOWN[0].shape


@pytest.mark.parametrize("level", [15, 130, 245])
def test_an_empty_clip_has_a_ground_and_nothing_else(level):
    found = read_attributes(np.full((9, 64, 64, 3), level, np.uint8))
    assert found.ground is not None and found == Attributes(ground=found.ground)


def test_noise_shows_nothing():
    assert read_attributes(np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)) == Attributes()


def test_the_base_never_sees_what_is_held_back():
    assert CONCEPT and not set(CONCEPT) & set(KNOWN) and len(KNOWN) + len(CONCEPT) == len(SCENES)
