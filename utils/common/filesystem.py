"""Atomic writes, cleanup after killed runs, and checks of paths."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from utils.common.errors import UserError

_WRITING = ".writing-"


# Seconds after which what was being written on another machine is taken to be left by a killed run.
_LEFT_BEHIND = 24 * 3600


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


def nearest_existing(path: Path) -> Path:
    """The path, or the closest folder above it that is there."""
    while not path.exists():
        path = path.parent
    return path


def check_writable(wanted: Path, flag: str) -> None:
    """Raises UserError where nothing can be written to a folder that need not exist yet. Leaves no trace."""
    try:
        folder = nearest_existing(wanted)
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file")
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{flag} {wanted} cannot be written to ({error}).") from error
