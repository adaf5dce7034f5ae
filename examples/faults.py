"""Trains with a fault put in on purpose, to see whether `measure.py` sees it:

    python -m examples.faults latents_scaled_twice --model_path examples/tiny/t2v ...    flags of train.py

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
from dataset.excerpts import Excerpt
from dataset.files import FileFacts
from dataset.latent_cache import Encoding, SampleKeys
from utils import loss
from utils.errors import told_to_the_user
from utils.model_form import ModelForm

to_video_latents, keys = loss.to_video_latents, Encoding.keys


def twice_scaled(sample: torch.Tensor, form: ModelForm) -> torch.Tensor:
    return to_video_latents(sample, form) * form.scaling_factor


def keys_of_the_paths(
    self: Encoding, excerpts: list[Excerpt], facts: Mapping[str, FileFacts], flip: bool = False
) -> list[SampleKeys]:
    """Latents of a clip that has been replaced are taken for those of the new one."""
    by_path = {path: replace(known, digest=hashlib.sha256(path.encode()).digest()) for path, known in facts.items()}
    return keys(self, excerpts, by_path, flip)


FAULTS: dict[str, AbstractContextManager] = {
    "latents_scaled_twice": patch.object(loss, "to_video_latents", twice_scaled),
    "stale_latents": patch.object(Encoding, "keys", keys_of_the_paths),
}

if __name__ == "__main__":
    fault = sys.argv.pop(1)
    with FAULTS[fault], told_to_the_user():
        train.main()
