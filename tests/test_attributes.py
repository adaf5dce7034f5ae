"""`read_attributes` on drawn clips, whose attributes are known, and on clips without attributes."""

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


def test_every_scene_is_recognised():
    for seed, scene in enumerate(SCENES):
        assert asdict(read_attributes(draw(scene, seed, 9, 64))) == asdict(scene)


@pytest.mark.slow
@pytest.mark.parametrize("frames", [9, 17])
@pytest.mark.parametrize("change", [noisy, blurred])
def test_attributes_survive_noise_and_blur(change, frames):
    wrong = []
    for seed in range(150):
        scene, clip = random_clip(seed, frames, 64, SCENES)
        measured = read_attributes(change(clip, seed))
        wrong += [(name, scene) for name, value in asdict(scene).items() if getattr(measured, name) != value]
    assert len(wrong) <= 2  # of 600


def test_still_shape_has_no_direction():
    clip = draw(KNOWN[0], 0, 9, 64)
    still = np.repeat(clip[:1], 9, axis=0)
    measured = read_attributes(still)
    assert measured.direction is None
    assert (measured.colour, measured.shape) == (KNOWN[0].colour, KNOWN[0].shape)


@pytest.mark.parametrize("level", [15, 130, 245])
def test_empty_clip_has_only_a_background(level):
    measured = read_attributes(np.full((9, 64, 64, 3), level, np.uint8))
    assert measured.ground is not None and measured == Attributes(ground=measured.ground)


def test_pure_noise_has_no_attributes():
    assert read_attributes(np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)) == Attributes()


def test_concept_is_held_back_from_the_base_models():
    assert CONCEPT and not set(CONCEPT) & set(KNOWN) and len(KNOWN) + len(CONCEPT) == len(SCENES)
