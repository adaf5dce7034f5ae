"""Files of a data folder and its cache: what is known of them, and how they are written.

What is known of each clip and image, the digest of its content, its length, rate and size, is kept in a file beside the
latents, so that a run looks only at files that are new or changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import reduce
from operator import xor
from pathlib import Path

from dataset.video import ClipInfo
from utils.common.filesystem import atomic_write

# Raise it whenever the same file could be seen differently than before.
INDEX_VERSION = 1
INDEX_FILE = "files.jsonl"


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a clip or image was found to be.

    Attributes:
        digest: SHA-256 of the content.
        info: length, rate and size; an image is a clip of one frame.
        signature: of the file as it was before it was read.
    """

    digest: bytes
    info: ClipInfo
    signature: int


def stat_signature(path: str) -> int:
    """Changes when the file does: of its size, modification time, and change time, which nobody can set back."""
    status = Path(path).stat()
    text = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def combine_signatures(signatures: Iterable[int]) -> int:
    return reduce(xor, signatures)


def digest_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


class FileIndex:
    """Facts by the path of each file; relative where it lies below the folder around the cache, which may move."""

    def __init__(self, cache_dir: Path) -> None:
        self.path = cache_dir / INDEX_FILE
        self._root = f"{cache_dir.absolute().parent}{os.sep}"
        self._known: dict[str, FileFacts] = {}
        self._changed = False
        equal: dict[tuple, ClipInfo] = {}  # clips of one camera have the same
        with suppress(OSError, UnicodeDecodeError), self.path.open() as file:
            for line in file if next(file, "").strip() == str(INDEX_VERSION) else []:
                with suppress(ValueError, TypeError):  # damaged: that file is looked at again
                    name, signature, digest, info = json.loads(line)
                    seen = equal.setdefault(tuple(info), ClipInfo(*info))
                    self._known[name] = FileFacts(bytes.fromhex(digest), seen, signature)

    def get(self, path: str) -> FileFacts | None:
        """What is known of a file as it is now."""
        known = self._known.get(self._name(path))
        try:
            return known if known is not None and known.signature == stat_signature(path) else None
        except OSError:  # gone; whoever looks at it will say so
            return None

    def add(self, path: str, facts: FileFacts) -> None:
        self._known[self._name(path)] = facts
        self._changed = True

    def save(self) -> None:
        """Writes what was added, whole, where that can be done. What one of two runs at a time adds may be lost."""
        if not self._changed:
            return
        rows = (
            json.dumps([name, facts.signature, facts.digest.hex(), astuple(facts.info)])
            for name, facts in sorted(self._known.items())
        )
        with suppress(OSError), atomic_write(self.path) as aside:
            aside.write_text("\n".join([str(INDEX_VERSION), *rows]))
            self._changed = False

    def _name(self, path: str) -> str:
        return str(Path(path).absolute()).removeprefix(self._root)
