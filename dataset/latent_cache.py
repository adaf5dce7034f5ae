"""A folder of encoded clips, images and prompts. The key of an entry covers everything that determines its bytes.

A changed clip, resolution or encoder gives a new key, so stale entries are never read and deleting the folder is always
safe. An entry is a safetensors file with one tensor and its checksum. It is written to a temporary name and renamed, so
that it is complete or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dataset.bucketing import ClipSample
from dataset.file_index import FileFacts
from dataset.video import NATIVE_STRIDE, FrameSelection
from utils.common.errors import UserError
from utils.common.filesystem import atomic_write, set_mtime_nanoseconds

FORMAT_VERSION = 2
SUFFIX = ".safetensors"
ENCODERS_FILE = "encoders.json"
_TENSOR = "data"


class DamagedEntry(Exception):
    """Raised for a cache entry that is missing, truncated or altered; the message is its name."""


class LatentCache:
    """The entries of one folder, addressed by the names in `SampleKeys`.

    Args:
        elsewhere: folder of each entry that is in another folder, for runs on several data folders.
    """

    def __init__(self, folder: Path, elsewhere: Mapping[str, Path] | None = None) -> None:
        self.folder, self.elsewhere = folder, elsewhere or {}

    def folder_of(self, name: str) -> Path:
        return self.elsewhere.get(name, self.folder)

    def path(self, name: str) -> Path:
        return self.folder_of(name) / f"{name}{SUFFIX}"

    def has(self, name: str) -> bool:
        """Returns whether an entry exists, intact or not."""
        return os.path.exists(f"{self.folder_of(name)}{os.sep}{name}{SUFFIX}")  # noqa: PTH110 - 100,000 Path objects cost memory

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a tensor atomically; the last writer wins.

        Raises:
            UserError: the file cannot be written.
        """
        tensor = tensor.detach().cpu().contiguous()
        try:
            with atomic_write(self.path(name)) as tmp_path:
                save_file({_TENSOR: tensor}, tmp_path, metadata={"crc32": _checksum(name, tensor)})
                set_mtime_nanoseconds(tmp_path, _mtime_marker(name, tmp_path.stat().st_size))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"--cache_dir {self.folder_of(name)}: {name} cannot be written ({error}). Entries already encoded are "
                "kept.",
                on_every_rank=False,
            ) from error

    def read(self, name: str) -> torch.Tensor:
        """Reads a tensor and verifies its checksum.

        Raises:
            DamagedEntry: the entry is missing, truncated or altered.
        """
        try:
            with safe_open(self.path(name), framework="pt") as entry:
                tensor, expected = entry.get_tensor(_TENSOR), entry.metadata()["crc32"]
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise DamagedEntry(name) from error
        if _checksum(name, tensor) != expected:
            raise DamagedEntry(name)
        return tensor

    def verify(self, name: str, read: bool = False) -> bool:
        """Returns whether an entry exists and is undamaged. Removes a damaged entry.

        An entry with a valid mtime marker has not been modified since it was written. Any other entry is read and its
        checksum verified.

        Args:
            read: whether to read the entry even if its marker is valid.
        """
        path = self.path(name)
        try:
            status = path.stat()
            marker = _mtime_marker(name, status.st_size)
            if status.st_mtime_ns % 10**9 == marker and not read and os.access(path, os.R_OK, effective_ids=True):
                return True
            self.read(name)
        except OSError:
            return False
        except DamagedEntry as error:
            if not isinstance(error.__cause__, OSError):  # a read error of the disk does not mean damage
                self.remove(name)
            return False
        with suppress(OSError):  # a read-only cache
            set_mtime_nanoseconds(path, marker)  # such as a copied entry; it is not read again
        return True

    def remove(self, name: str) -> None:
        """Removes an entry if it exists and the folder is writable."""
        with suppress(OSError):  # another process may have removed it, or the folder is read-only
            self.path(name).unlink()

    def encoders(self) -> dict[str, str]:
        """Returns what the cache knows about encoders: fingerprint by meaning -> the one that is in the cache keys."""
        try:
            return dict(json.loads((self.folder / ENCODERS_FILE).read_text()))
        except (OSError, ValueError, TypeError):  # a new cache, or one of an earlier version
            return {}

    def add_encoders(self, encoders: dict[str, str]) -> None:
        """Adds to `encoders`. Does nothing if the folder is read-only."""
        known = self.encoders()
        if not encoders.items() <= known.items():
            with suppress(OSError), atomic_write(self.folder / ENCODERS_FILE) as tmp_path:
                tmp_path.write_text(json.dumps(known | encoders))

    def names(self) -> Iterator[str]:
        """Yields the names of all entries; ignores other files in the folder."""
        for path in self.folder.glob(f"*{SUFFIX}"):
            if re.fullmatch("(video|image|prompt)-[0-9a-f]{32}", path.stem):
                yield path.stem


def _mtime_marker(name: str, size: int) -> int:
    """Returns the nanoseconds that mark the modification time of an unmodified entry.

    A later write leaves different nanoseconds, except with a probability of 10^-9.
    """
    return zlib.crc32(f"{name} {size}".encode()) % 10**9


def _checksum(name: str, tensor: torch.Tensor) -> str:
    """Returns the CRC-32 of name and content, so that an entry copied over another one counts as damaged."""
    return str(zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, zlib.crc32(name.encode())))


@dataclass(frozen=True, slots=True)
class SampleKeys:
    """Names of the cache entries of a sample.

    Attributes:
        video: the clip and, with --flip, its mirror image; empty for a validation prompt without a clip.
        image: the condition images in the same order; empty for t2v.
        additions: further condition frames by name, in the same order.
    """

    video: tuple[str, ...]
    image: tuple[str, ...]
    prompt: str
    # not in the representation, of which the digest of the data is made: the samples and their order stay the same
    additions: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)

    @property
    def pixels(self) -> Iterator[str]:
        """Names of all entries that the VAE encodes."""
        return chain(self.video, self.image, *self.additions.values())

    @property
    def all(self) -> tuple[str, ...]:
        return *self.pixels, self.prompt


@dataclass(frozen=True)
class EncoderSettings:
    """The encoder settings that determine the bytes of an entry, together with the files and the frame selections.

    Attributes:
        vae, text_encoder: fingerprints of weights, dtype and settings.
        image_noise: i2v: settings of the noise added to the condition image before encoding; None for t2v.
    """

    vae: str
    text_encoder: str
    image_noise: str | None

    def prompt_key(self, prompt: str) -> str:
        """Returns the name of a prompt's entry."""
        return _name("prompt", prompt=prompt, encoder=self.text_encoder)

    def keys(
        self,
        clip_samples: list[ClipSample],
        facts: Mapping[str, FileFacts],
        flip: bool = False,
        additions: tuple[str, ...] = (),
    ) -> list[SampleKeys]:
        """Returns the entry names of each sample.

        Args:
            facts: path -> facts, for every file of the samples.
            flip: whether the mirror image of each sample is encoded too.
            additions: names of condition frames besides the image.
        """
        return [self._sample_keys(clip_sample, facts, flip, additions) for clip_sample in clip_samples]

    def _sample_keys(
        self, clip_sample: ClipSample, facts: Mapping[str, FileFacts], flip: bool, additions: tuple[str, ...]
    ) -> SampleKeys:
        sample, video, image = clip_sample.sample, [], []
        added: dict[str, list[str]] = {}
        for selection in clip_sample.selections(flip):
            if sample.video is not None:
                video.append(
                    self._pixels_name("video", facts[sample.video], selection, frames=selection.resolution.frames)
                )
            if self.image_noise is not None and sample.image is not None:
                image_selection = replace(selection, first=0, frames=None, crop=None)
                image.append(self._pixels_name("image", facts[sample.image], image_selection, noise=self.image_noise))
            elif self.image_noise is not None and sample.video is not None:
                image.append(self._pixels_name("image", facts[sample.video], selection, noise=self.image_noise))
            if sample.video is not None and selection.resolution.frames > 1:  # one frame has no further ones
                settings = {"noise": self.image_noise, "frames": selection.resolution.frames}
                for addition in additions:
                    name = self._pixels_name("image", facts[sample.video], selection, condition=addition, **settings)
                    added.setdefault(addition, []).append(name)
        additional = {addition: tuple(names) for addition, names in added.items()}
        return SampleKeys(tuple(video), tuple(image), self.prompt_key(sample.prompt), additional)

    def _pixels_name(self, kind: str, facts: FileFacts, selection: FrameSelection, **extra: Any) -> str:
        # the first frame of a clip does not depend on the rate, so changing --fps keeps its image entry
        has_frames = kind == "video" or "condition" in extra
        window: dict[str, Any] = (
            {"first": selection.first, "rate": selection.rate} if selection.first or has_frames else {}
        )
        if selection.rate == NATIVE_STRIDE and has_frames:
            window["span"] = selection.span
        if selection.frames is not None:
            window["part"] = [selection.frames.first, selection.frames.stop]
        if selection.crop is not None:
            window["rectangle"] = list(selection.crop)
        if facts.info.pixel_aspect != 1 and selection.mode == "crop":  # stretching does not depend on it
            extra["pixel_aspect"] = facts.info.pixel_aspect
        return _name(
            kind,
            content=facts.digest.hex(),
            height=selection.resolution.height,
            width=selection.resolution.width,
            mode=selection.mode,
            flipped=selection.flipped,
            encoder=self.vae,
            pixels=facts.info.pixels_version,
            **window,
            **extra,
        )


def _name(kind: str, **fields: Any) -> str:
    # the names and values of the fields are part of every cache key: changing one invalidates existing caches
    text = json.dumps({"format": FORMAT_VERSION, **fields}, sort_keys=True)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
