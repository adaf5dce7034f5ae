"""Trains with an injected fault, to find out whether `measure.py` detects it.

    python -m examples.faults padding_at_the_end --model_path examples/tiny/t2v-1.5 ...    flags of train.py

Each fault passes every shape check and is plausible in a CogVideoX trainer.
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
from dataset.latent_cache import EncoderSettings, SampleKeys
from utils.common.errors import exit_on_user_error
from utils.model import conditioning
from utils.model.spec import ModelSpec
from utils.training import loss

to_image_latents, to_video_latents = conditioning.to_image_latents, conditioning.to_video_latents
rotary_table, keys = conditioning.rotary_table, EncoderSettings.keys


def multiply_image_latents(sample: torch.Tensor, spec: ModelSpec, latent_frames: int) -> torch.Tensor:
    """Multiplies the image latents of 1.5-I2V by the scaling factor, as 1.0 does. Correct: divide by it."""
    return to_image_latents(sample, spec, latent_frames) * spec.scaling_factor**2


def scale_latents_twice(sample: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """Applies the scaling factor twice. Correct: once."""
    return to_video_latents(sample, spec) * spec.scaling_factor


def pad_at_the_end(sample: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """Pads the latent frames of 1.5 at the end with copies of the last. Correct: in front, with copies of the first."""
    return to_video_latents(sample.flip(2), spec).flip(1)


def rotary_table_of_other_version(
    head_dim: int, grid: tuple[int, int, int], base: tuple[int, int], slices: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Swaps the rotary tables of the versions. Correct: 1.0 scales the grid into the base's, 1.5 slices it."""
    return rotary_table(head_dim, grid, base, not slices, device)


def keys_from_paths(
    self: EncoderSettings, clip_samples: list[ClipSample], facts: Mapping[str, FileFacts], flip: bool = False
) -> list[SampleKeys]:
    """Derives cache keys from paths, so that a replaced clip keeps its old latents. Correct: from the content."""
    by_path = {path: replace(known, digest=hashlib.sha256(path.encode()).digest()) for path, known in facts.items()}
    return keys(self, clip_samples, by_path, flip)


FAULTS: dict[str, AbstractContextManager] = {
    "image_latents_multiplied": patch.object(loss, "to_image_latents", multiply_image_latents),
    "latents_scaled_twice": patch.object(loss, "to_video_latents", scale_latents_twice),
    "padding_at_the_end": patch.object(loss, "to_video_latents", pad_at_the_end),
    "rotary_of_the_other_kind": patch.object(conditioning, "rotary_table", rotary_table_of_other_version),
    "stale_latents": patch.object(EncoderSettings, "keys", keys_from_paths),
}

if __name__ == "__main__":
    fault = sys.argv.pop(1)
    with FAULTS[fault], exit_on_user_error():
        train.main()
