"""A folder of encoded clips, images and prompts, each under a key of everything that decides its bytes.

A changed clip, resolution or encoder gives another key, so nothing stale is ever read and deleting the folder is always
safe. An entry is one safetensors file with one tensor and its checksum; it is written aside and renamed, so that it is
complete or absent.
"""

from __future__ import annotations

import hashlib
import json
import uuid
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from dataset.manifest import Sample
from dataset.video import PIXELS_VERSION, Resolution

FORMAT_VERSION = 1
_TENSOR = "data"


class DamagedEntry(Exception):
    """A cache entry that is missing, cut short or altered."""


class LatentCache:
    """The entries of one folder; `name` is what `SampleKeys` holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Stores a tensor under `name`, atomically; the last writer wins."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensor = tensor.detach().cpu().contiguous()
        aside = self.folder / f".{name}.{uuid.uuid4().hex}.tmp"
        save_file({_TENSOR: tensor}, aside, metadata={"crc32": _checksum(name, tensor)})
        aside.replace(self.path(name))

    def read(self, name: str) -> torch.Tensor:
        """Returns the tensor stored under `name`. Raises DamagedEntry."""
        try:
            with safe_open(self.path(name), framework="pt") as entry:
                tensor, expected = entry.get_tensor(_TENSOR), entry.metadata()["crc32"]
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise DamagedEntry(name) from error
        if _checksum(name, tensor) != expected:
            raise DamagedEntry(name)
        return tensor

    def is_intact(self, name: str) -> bool:
        """Whether the entry is there and whole. Reads all of it."""
        try:
            self.read(name)
        except DamagedEntry:
            return False
        return True


def _checksum(name: str, tensor: torch.Tensor) -> str:
    """Of the content under its name, so that an entry copied over another is damage too."""
    return str(zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, zlib.crc32(name.encode())))


@dataclass(frozen=True)
class SampleKeys:
    """Names of a sample's cache entries; `image` is None for t2v, `video` for a validation prompt without a clip."""

    video: str | None
    image: str | None
    prompt: str


@dataclass(frozen=True)
class Encoding:
    """What, besides the files themselves, decides the encoded bytes.

    Attributes:
        vae, text_encoder: identity of the weights, with dtype and settings.
        image_noise: i2v: how the condition image is noised before it is encoded; None for t2v.
    """

    resolution: Resolution
    fps: float
    resize_mode: str
    vae: str
    text_encoder: str
    image_noise: str | None

    def prompt_key(self, prompt: str) -> str:
        return _name("prompt", prompt=prompt, encoder=self.text_encoder)

    def sample_keys(self, samples: list[Sample]) -> list[SampleKeys]:
        """Reads every file once, for its digest."""
        files = {path for sample in samples for path in (sample.video, sample.image) if path is not None}
        digests = digest_files(files)
        size = {
            "height": self.resolution.height,
            "width": self.resolution.width,
            "mode": self.resize_mode,
            "encoder": self.vae,
            "pixels": PIXELS_VERSION,
        }

        def keys(sample: Sample) -> SampleKeys:
            video = image = None
            if sample.video is not None:
                clip = {"content": digests[sample.video], "frames": self.resolution.frames, "fps": self.fps}
                video = _name("video", **clip, **size)
            source = sample.image or sample.video
            if self.image_noise is not None and source is not None:
                image = _name("image", content=digests[source], noise=self.image_noise, **size)
            return SampleKeys(video, image, self.prompt_key(sample.prompt))

        return [keys(sample) for sample in samples]


def _name(kind: str, **facts: Any) -> str:
    text = json.dumps({"format": FORMAT_VERSION, **facts}, sort_keys=True)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def digest_files(files: Iterable[Path]) -> dict[Path, str]:
    """SHA-256 of each file's content, computed in threads."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    files = sorted(files)
    with ThreadPoolExecutor() as pool:
        digests = tqdm(pool.map(digest, files), "Reading files", len(files), unit="file", delay=3, leave=False)
        return dict(zip(files, digests, strict=True))
