"""Trains with a fault put in on purpose, to see whether `measure.py` sees it:

    python -m examples.faults padding_at_the_end --model_path examples/tiny/t2v-1.5 ...    flags of train.py

Each fault is one that passes every test of shapes, and that a toolkit for CogVideoX had or could have.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from unittest.mock import patch

import torch

import train
from dataset.bucketing import ClipSample
from dataset.file_index import FileFacts
from dataset.latent_cache import Encoding, SampleKeys
from utils.common.errors import exit_on_user_error
from utils.model import conditioning
from utils.model.spec import ModelSpec
from utils.training import loss

to_image_latents, to_video_latents = conditioning.to_image_latents, conditioning.to_video_latents
rotary_table, keys = conditioning.rotary_table, Encoding.keys


def multiplied_image_latents(sample: torch.Tensor, spec: ModelSpec, latent_frames: int) -> torch.Tensor:
    """1.5-I2V divides its image latents by the scaling factor; here they are multiplied, as those of 1.0."""
    return to_image_latents(sample, spec, latent_frames) * spec.scaling_factor**2


def twice_scaled(sample: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    return to_video_latents(sample, spec) * spec.scaling_factor


def padded_at_the_end(sample: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """1.5 pads in front, with copies of the first frame; here at the end, with copies of the last."""
    return to_video_latents(sample.flip(2), spec).flip(1)


def rotary_of_the_other_kind(
    head_dim: int, grid: tuple[int, int, int], base: tuple[int, int], slices: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """1.0 scales the grid into the base's, 1.5 cuts it out; here the other way round."""
    return rotary_table(head_dim, grid, base, not slices, device)


def keys_of_the_paths(
    self: Encoding, clip_samples: list[ClipSample], facts: Mapping[str, FileFacts], flip: bool = False
) -> list[SampleKeys]:
    """Latents of a clip that has been replaced are taken for those of the new one."""
    by_path = {path: replace(known, digest=hashlib.sha256(path.encode()).digest()) for path, known in facts.items()}
    return keys(self, clip_samples, by_path, flip)


FAULTS: dict[str, AbstractContextManager] = {
    "image_latents_multiplied": patch.object(loss, "to_image_latents", multiplied_image_latents),
    "latents_scaled_twice": patch.object(loss, "to_video_latents", twice_scaled),
    "padding_at_the_end": patch.object(loss, "to_video_latents", padded_at_the_end),
    "rotary_of_the_other_kind": patch.object(conditioning, "rotary_table", rotary_of_the_other_kind),
    "stale_latents": patch.object(Encoding, "keys", keys_of_the_paths),
}

if __name__ == "__main__":
    fault = sys.argv.pop(1)
    with FAULTS[fault], exit_on_user_error():
        train.main()
