"""An index of the clips and images of a data folder, so that a run scans only new and changed files.

The index stores the digest, length, rate and size of each file. It is saved next to the cached latents.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import reduce
from operator import xor
from pathlib import Path
from typing import Any

from dataset.parts import Crop, FrameRange, Part
from dataset.video import ClipInfo, ClipPart
from utils.common.filesystem import atomic_write

# Increase it whenever a scan of the same file could give another result than before. An index of an earlier version
# still provides digests; `probe` decides whether it provides length, rate and size too.
INDEX_VERSION = 3
INDEX_FILE = "files.jsonl"


@dataclass(frozen=True, slots=True)
class FileFacts:
    """The result of scanning a clip or an image.

    Attributes:
        digest: SHA-256 of the content.
        info: length, rate and size; an image counts as a clip of one frame.
        signature: stat signature of the file, taken before it was read.
        parts: parts of the clip that the data folder names, or an error for each that is not in the clip.
    """

    digest: bytes
    info: ClipInfo
    signature: int
    parts: Mapping[Part, ClipPart | str] | None = None

    def info_of(self, part: Part | None) -> ClipInfo:
        """Returns length, rate and size of a part that was found, or of the whole clip."""
        if part is None or self.parts is None:
            return self.info
        found = self.parts[part]
        assert isinstance(found, ClipPart)
        return found.info


def stat_signature(path: str) -> int:
    """Returns a 64-bit hash of a file's size, modification time and change time.

    The change time cannot be set by users, so a file with an old modification time is noticed too.
    """
    status = Path(path).stat()
    text = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def combine_signatures(signatures: Iterable[int]) -> int:
    """Combines the stat signatures of the files of one sample."""
    return reduce(xor, signatures)


def digest_file(path: Path) -> bytes:
    """Returns the SHA-256 digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


class FileIndex:
    """Facts by file path.

    Paths below the parent of the cache folder are stored relative to it, so that the data folder can be moved.
    """

    def __init__(self, cache_dir: Path) -> None:
        self.path = cache_dir / INDEX_FILE
        self._root = f"{cache_dir.absolute().parent}{os.sep}"
        self._facts: dict[str, FileFacts] = {}
        self._outdated: set[str] = set()
        self._changed = False
        infos: dict[tuple, ClipInfo] = {}  # clips of one camera share one object, which saves memory
        with suppress(OSError, UnicodeDecodeError), self.path.open() as file:
            version = next(file, "").strip()
            for line in file if version in map(str, range(1, INDEX_VERSION + 1)) else []:
                with suppress(ValueError, TypeError):  # a damaged line: the file is scanned again
                    name, signature, digest, info, *parts = json.loads(line)
                    shared_info = infos.setdefault(tuple(info), ClipInfo(*info))
                    self._facts[name] = FileFacts(bytes.fromhex(digest), shared_info, signature, _read_parts(*parts))
            if version != str(INDEX_VERSION):
                self._outdated = set(self._facts)

    def get(self, path: str) -> tuple[FileFacts | None, bool]:
        """Returns the facts of an unchanged file, or None, and whether this version of the scan found them."""
        name = self._name(path)
        facts = self._facts.get(name)
        try:
            is_unchanged = facts is not None and facts.signature == stat_signature(path)
        except OSError:  # the file is missing; the scan reports it
            is_unchanged = False
        return (facts, name not in self._outdated) if is_unchanged else (None, False)

    def add(self, path: str, facts: FileFacts) -> None:
        name = self._name(path)
        self._facts[name] = facts
        self._outdated.discard(name)
        self._changed = True

    def save(self) -> None:
        """Writes the index atomically if it has changed. Does nothing if the folder is read-only.

        If two runs save at the same time, the facts added by one of them may be lost and are scanned again.
        """
        if not self._changed:
            return
        rows = (
            json.dumps([name, facts.signature, facts.digest.hex(), astuple(facts.info), *_written_parts(facts)])
            for name, facts in sorted(self._facts.items())
            if name not in self._outdated
        )
        with suppress(OSError), atomic_write(self.path) as tmp_path:
            tmp_path.write_text("\n".join([str(INDEX_VERSION), *rows]))
            self._changed = False

    def _name(self, path: str) -> str:
        return str(Path(path).absolute()).removeprefix(self._root)


def _written_parts(facts: FileFacts) -> list[list]:
    """Returns the last field of a file's row, in a list that is empty if no part of the file is known."""
    parts = [
        [part, found.frames, astuple(found.info)]
        for part, found in (facts.parts or {}).items()
        if isinstance(found, ClipPart)
    ]
    return [parts] if parts else []


def _read_parts(rows: Iterable[Any] = ()) -> dict[Part, ClipPart] | None:
    parts = {}
    for (start, end, crop), (first, stop, pts), info in rows:
        part = Part(start, end, Crop(*crop) if crop else None)
        parts[part] = ClipPart(FrameRange(first, stop, (pts[0], pts[1]) if pts else None), ClipInfo(*info), part.crop)
    return parts or None
