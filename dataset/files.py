"""Files of a data folder and its cache: what is known of them, and how they are written.

What is known of each clip and image, the digest of its content, its length, rate and size, is kept in a file beside the
latents, so that a run looks only at files that are new or changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from functools import cache, reduce
from operator import xor
from pathlib import Path

from dataset.video import ClipInfo

# Raise it whenever the same file could be seen differently than before.
INDEX_VERSION = 1
INDEX_FILE = "files.jsonl"
_WRITING = ".writing-"
# Seconds after which what was being written on another machine is taken to be left by a killed run.
_LEFT_BEHIND = 24 * 3600


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a clip or image was found to be.

    Attributes:
        digest: SHA-256 of the content.
        info: length, rate and size; an image is a clip of one frame.
        stamp: of the file as it was before it was read.
    """

    digest: bytes
    info: ClipInfo
    stamp: int


def stamp_of(path: str) -> int:
    """Changes when the file does: of its size, modification time, and change time, which nobody can set back."""
    status = Path(path).stat()
    text = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def combined(stamps: Iterable[int]) -> int:
    return reduce(xor, stamps)


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
                    name, stamp, digest, info = json.loads(line)
                    seen = equal.setdefault(tuple(info), ClipInfo(*info))
                    self._known[name] = FileFacts(bytes.fromhex(digest), seen, stamp)

    def get(self, path: str) -> FileFacts | None:
        """What is known of a file as it is now."""
        known = self._known.get(self._name(path))
        try:
            return known if known is not None and known.stamp == stamp_of(path) else None
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
            json.dumps([name, facts.stamp, facts.digest.hex(), astuple(facts.info)])
            for name, facts in sorted(self._known.items())
        )
        with suppress(OSError), written_whole(self.path) as aside:
            aside.write_text("\n".join([str(INDEX_VERSION), *rows]))
            self._changed = False

    def _name(self, path: str) -> str:
        return str(Path(path).absolute()).removeprefix(self._root)


@cache
def _here() -> str:
    """Where a process number means something: this machine since its start, and this container."""
    names = [socket.gethostname()]
    with suppress(OSError):
        names += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return hashlib.blake2b(" ".join(names).encode(), digest_size=8).hexdigest()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a path to write to and renames that, so that `path` is complete or absent.

    Several processes may do so at once; the last one's stays. Each has a folder of its own for what it is writing.
    """
    aside = path.parent / f"{_WRITING}{_here()}@{os.getpid()}"
    aside.mkdir(parents=True, exist_ok=True)
    try:
        yield aside / path.name
        (aside / path.name).replace(path)
    finally:
        shutil.rmtree(aside)


def set_nanoseconds(path: Path, nanoseconds: int) -> None:
    """Puts them in place of those of the modification time."""
    second = path.stat().st_mtime_ns // 10**9 * 10**9
    os.utime(path, ns=(second + nanoseconds, second + nanoseconds))


def remove_leftovers(folder: Path) -> None:
    """Removes what killed runs were writing to a folder, and nothing that a process is writing now."""
    for aside in folder.glob(f"{_WRITING}*"):
        here, _, process = aside.name.removeprefix(_WRITING).rpartition("@")
        with suppress(OSError):  # gone meanwhile, or a folder that can only be read
            dead = here == _here() and not Path(f"/proc/{process}").exists()
            if dead or time.time() - aside.stat().st_mtime > _LEFT_BEHIND:
                shutil.rmtree(aside)
