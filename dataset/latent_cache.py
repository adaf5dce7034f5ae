"""A folder of encoded clips, images and prompts, each under a key of everything that decides its bytes.

A changed clip, resolution or encoder gives another key, so nothing stale is ever read and deleting the folder is always
safe. An entry is one safetensors file with one tensor and its checksum; it is written aside and renamed, so that it is
complete or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dataset.bucketing import ClipSample
from dataset.file_index import FileFacts
from dataset.video import PIXELS_VERSION, SPREAD, FrameSelection
from utils.common.errors import UserError
from utils.common.filesystem import atomic_write, set_mtime_nanoseconds

FORMAT_VERSION = 2
SUFFIX = ".safetensors"
_TENSOR = "data"


class DamagedEntry(Exception):
    """A cache entry that is missing, cut short or altered."""


class LatentCache:
    """The entries of one folder; `name` is what `SampleKeys` holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def has(self, name: str) -> bool:
        """Whether an entry is there, be it whole or not."""
        return os.path.exists(f"{self.folder}{os.sep}{name}{SUFFIX}")  # noqa: PTH110 - Paths of 100,000 cost memory

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Stores a tensor under `name`, atomically; the last writer wins. Raises UserError where it cannot."""
        tensor = tensor.detach().cpu().contiguous()
        try:
            with atomic_write(self.path(name)) as aside:
                save_file({_TENSOR: tensor}, aside, metadata={"crc32": _checksum(name, tensor)})
                set_mtime_nanoseconds(aside, _mtime_marker(name, aside.stat().st_size))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"--cache_dir {self.folder}: {name} cannot be written ({error}); what is encoded is kept.",
                on_every_rank=False,
            ) from error

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

    def is_intact(self, name: str, reads: bool = False) -> bool:
        """Whether the entry is there and whole; what is left of a damaged one is removed.

        Its modification time tells whether anybody has written to it since; only if so, or with `reads`, is it read.
        """
        path = self.path(name)
        try:
            status = path.stat()
            seal = _mtime_marker(name, status.st_size)
            if status.st_mtime_ns % 10**9 == seal and not reads:
                return True
            self.read(name)
        except OSError:
            return False
        except DamagedEntry as damage:
            if not isinstance(damage.__cause__, OSError):  # a disk that does not answer is no damage
                self.remove(name)
            return False
        with suppress(OSError):  # a cache that can only be read
            set_mtime_nanoseconds(path, seal)  # a copy, say; it need not be read again
        return True

    def remove(self, name: str) -> None:
        with suppress(OSError):  # another process may have done so, or the folder may be one that can only be read
            self.path(name).unlink()

    def names(self) -> Iterator[str]:
        """Of all entries that are there; other files are not ours."""
        for path in self.folder.glob(f"*{SUFFIX}"):
            if re.fullmatch("(video|image|prompt)-[0-9a-f]{32}", path.stem):
                yield path.stem


def _mtime_marker(name: str, size: int) -> int:
    """The nanoseconds of an entry's modification time; any other writer leaves others, but for one in 10^9."""
    return zlib.crc32(f"{name} {size}".encode()) % 10**9


def _checksum(name: str, tensor: torch.Tensor) -> str:
    """Of the content under its name, so that an entry copied over another is damage too."""
    return str(zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, zlib.crc32(name.encode())))


@dataclass(frozen=True, slots=True)
class SampleKeys:
    """Names of a sample's cache entries.

    Attributes:
        video: one, and with --flip its mirror image; none for a validation prompt without a clip.
        image: in the same order; none for t2v.
    """

    video: tuple[str, ...]
    image: tuple[str, ...]
    prompt: str


@dataclass(frozen=True)
class Encoding:
    """What, besides the files and what is taken of them, decides the encoded bytes.

    Attributes:
        vae, text_encoder: fingerprint of the weights, with dtype and settings.
        image_noise: i2v: how the condition image is noised before it is encoded; None for t2v.
    """

    vae: str
    text_encoder: str
    image_noise: str | None

    def prompt_key(self, prompt: str) -> str:
        return _name("prompt", prompt=prompt, encoder=self.text_encoder)

    def keys(
        self, clip_samples: list[ClipSample], facts: Mapping[str, FileFacts], flip: bool = False
    ) -> list[SampleKeys]:
        """Names the entries of samples.

        Args:
            facts: of every file that the samples name.
            flip: whether the mirror image of each sample is encoded too.
        """
        return [self._sample_keys(clip_sample, facts, flip) for clip_sample in clip_samples]

    def _sample_keys(self, clip_sample: ClipSample, facts: Mapping[str, FileFacts], flip: bool) -> SampleKeys:
        sample, video, image = clip_sample.sample, [], []
        for selection in clip_sample.selections(flip):
            if sample.video is not None:
                video.append(
                    self._pixels_name("video", facts[sample.video], selection, frames=selection.resolution.frames)
                )
            if self.image_noise is not None and sample.image is not None:
                still = replace(selection, first=0)
                image.append(self._pixels_name("image", facts[sample.image], still, noise=self.image_noise))
            elif self.image_noise is not None and sample.video is not None:
                image.append(self._pixels_name("image", facts[sample.video], selection, noise=self.image_noise))
        return SampleKeys(tuple(video), tuple(image), self.prompt_key(sample.prompt))

    def _pixels_name(self, kind: str, facts: FileFacts, selection: FrameSelection, **more: Any) -> str:
        begins = {"first": selection.first, "rate": selection.rate} if selection.first or kind == "video" else {}
        if selection.rate == SPREAD and kind == "video":
            begins["span"] = selection.span
        return _name(
            kind,
            content=facts.digest.hex(),
            height=selection.resolution.height,
            width=selection.resolution.width,
            mode=selection.mode,
            flipped=selection.flipped,
            encoder=self.vae,
            pixels=PIXELS_VERSION,
            **begins,
            **more,
        )


def _name(kind: str, **facts: Any) -> str:
    text = json.dumps({"format": FORMAT_VERSION, **facts}, sort_keys=True)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
