"""Helpers of the tests of LoRAs. The fixture `trained` is in conftest.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from utils.checkpoint.adapters import add_loras
from utils.checkpoint.lora_reader import read_lora
from utils.commands import export
from utils.model import loading
from utils.model.conditioning import predict_velocity


def predict(transformer, spec) -> torch.Tensor:
    """Returns the prediction for a fixed latent, timestep and prompt."""
    generator = torch.Generator().manual_seed(0)
    frames = 3 + spec.frames_to_pad(3)
    noisy, image = torch.randn(2, 1, frames, 16, 8, 8, generator=generator)
    prompt = torch.randn(1, spec.max_text_seq_length, 32, generator=generator)
    with torch.no_grad():
        image = image if spec.task == "i2v" else None
        return predict_velocity(transformer, spec, noisy, torch.tensor([500]), prompt, image, torch.float32)


def load_lora(transformer, path, *scales: float) -> list[str]:
    """Adds one LoRA, or the same several times; returns the notes."""
    scales = scales or (1.0,)
    loras = [read_lora(path, "--lora_path", dict(transformer.config)) for _ in scales]
    add_loras(transformer, loras, scales)
    return loras[0].notes


def load_base(model_dir):
    return loading.load_transformer(model_dir / "transformer", torch.float32)


def convert(checkpoint: Path | None, *options: object) -> None:
    """Runs the export command in this process."""
    flags = [] if checkpoint is None else ["--checkpoint", str(checkpoint)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["export", *flags, *map(str, options)])
        export.main()
