"""What a LoRA file states about its training, in the metadata of safetensors, which loaders of LoRAs ignore."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from utils.checkpoint.lora_files import WEIGHTS_FILE


def add_metadata(file: Path, entries: dict[str, str]) -> None:
    """Adds entries to the metadata of a safetensors file. Tensors and other entries stay as they are."""
    metadata = read_metadata(file)
    save_file(load_file(file), file, metadata | entries)


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the metadata of a LoRA file, or of the one in a checkpoint folder; empty if it cannot be read."""
    try:
        with safe_open(path / WEIGHTS_FILE if path.is_dir() else path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}
