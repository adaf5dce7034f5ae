"""The project folder, atomic writes, locks, cleanup after killed runs, and path checks."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from utils.common.errors import DISK_FULL, UserError, describe_system_error, details_of

# Folder of the project.
ROOT = Path(__file__).resolve().parents[2]
_TMP_PREFIX = ".writing-"
# A temporary folder of another machine counts as stale after this time, because its process cannot be checked.
_STALE_AFTER_S = 24 * 3600
_LOCK_FILE = ".lock"
# The beginning of a file that was cloned without Git LFS.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Open as long as the process lives: closing a file releases its lock.
_lock_files: list[IO[str]] = []


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path and renames it to `path` on success, so that `path` is complete or absent.

    Several processes may write the same path at once; the last one wins. Each process has its own temporary folder.
    """
    tmp_dir = path.parent / f"{_TMP_PREFIX}{_host_id()}@{os.getpid()}"
    tmp_dir.mkdir(parents=True, exist_ok=True)
    try:
        yield tmp_dir / path.name
        apply_umask(tmp_dir / path.name)
        (tmp_dir / path.name).replace(path)
    finally:
        shutil.rmtree(tmp_dir)


def apply_umask(*files: Path) -> None:
    """Gives files the permissions of new files. safetensors writes files that only their owner may read."""
    umask = os.umask(0o077)
    os.umask(umask)
    for file in files:
        with suppress(OSError):  # a file system without modes
            file.chmod(0o666 & ~umask)


def unreadable(path: Path) -> str | None:
    """Returns what keeps this user from reading an existing file or folder, or None if nothing does.

    Some libraries report a missing permission, or a file that was cloned without Git LFS, as a missing or damaged file.
    """
    with suppress(OSError, ValueError):  # not a path, such as a caption: too long, or contains a null byte
        for folder in reversed(path.absolute().parents):
            if not os.access(folder, os.X_OK, effective_ids=True):
                return f"this user may not enter the folder {folder}" if folder.is_dir() else None
        mode = os.R_OK | (os.X_OK if path.is_dir() else 0)
        if path.exists() and not os.access(path, mode, effective_ids=True):
            return f"this user has no permission to read {path}"
        if path.is_file() and is_lfs_pointer(path):
            return f"{path} is a Git LFS pointer, not the file; run `git lfs pull` in its folder"
    return None


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is a placeholder that names its content in Git LFS storage."""
    with file.open("rb") as content:
        return content.read(len(_LFS_POINTER)) == _LFS_POINTER


def unreadable_in(folder: Path) -> str | None:
    """Returns what keeps this user from reading the first unreadable file or folder in `folder`, or None."""
    return next((reason for path in sorted(folder.rglob("*")) if (reason := unreadable(path))), None)


def lock_folder(folder: Path, flag: str) -> None:
    """Creates a folder if needed and locks it until this process ends, however it ends. The file system keeps the lock.

    Args:
        flag: the option that names the folder, for the message.

    Raises:
        UserError: another process, on this machine or on another, has locked it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / _LOCK_FILE).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            file.seek(0)
            owner = file.read().strip() or "another run"
        raise UserError(
            f"{flag} {folder} is in use by {owner}. Wait until that run ends, stop it, or give another folder."
        ) from None
    except OSError as error:  # a file system without locks
        file.close()
        print(f"Note: {folder} cannot be locked ({error.strerror}); start no second run with it.", flush=True)
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    _lock_files.append(file)


@contextmanager
def flags_in_errors(folders: Mapping[str, Path | tuple[Path, ...]]) -> Iterator[None]:
    """Adds the flag of a folder to system errors that concern the folder, such as a full disk.

    Args:
        folders: flag -> folder, or all of its folders.

    Raises:
        UserError: an error in `SYSTEM_ERRORS` was raised in the block.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if (message := describe_system_error(error)) is None:
            raise
        number, path = details_of(error)

        pairs = [
            (flag, folder)
            for flag, value in folders.items()
            for folder in (value if isinstance(value, tuple) else (value,))
        ]

        def concerns(folder: Path) -> bool:
            if path is not None:
                return Path(path).is_relative_to(folder)
            return number in DISK_FULL and (len(pairs) == 1 or disk_is_full(folder))

        for flag, folder in sorted(pairs, key=lambda item: -len(item[1].parts)):  # the innermost first
            if concerns(folder):
                message = f"{flag} {folder}: {message[0].lower()}{message[1:]}"
                break
        raise UserError(message, on_every_rank=False) from error


def disk_is_full(folder: Path) -> bool:
    """Whether less than 1 MiB is free. torch, safetensors and ffmpeg hide the error of the system."""
    return folder.exists() and shutil.disk_usage(folder).free < 2**20


def remove_stale_temporaries(folder: Path) -> None:
    """Removes temporary folders that killed runs left in `folder`, but none that a running process still writes to."""
    for tmp_dir in folder.glob(f"{_TMP_PREFIX}*"):
        host, _, pid = tmp_dir.name.removeprefix(_TMP_PREFIX).rpartition("@")
        with suppress(OSError):  # removed in the meantime, or a read-only folder
            dead = host == _host_id() and not Path(f"/proc/{pid}").exists()
            if dead or time.time() - tmp_dir.stat().st_mtime > _STALE_AFTER_S:
                shutil.rmtree(tmp_dir)


def set_mtime_nanoseconds(path: Path, nanoseconds: int) -> None:
    """Replaces the nanoseconds of a file's modification time and keeps its whole seconds."""
    second = path.stat().st_mtime_ns // 10**9 * 10**9
    os.utime(path, ns=(second + nanoseconds, second + nanoseconds))


def expand_user(text: str) -> Path:
    """Returns a path with ~ expanded; unchanged if there is no such user."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - the method of Path raises an error for an unknown user


def nearest_existing(path: Path) -> Path:
    """Returns `path` if it exists, otherwise its closest existing parent."""
    while not path.exists():
        path = path.parent
    return path


def check_writable(folder: Path, flag: str) -> None:
    """Checks that files can be created in a folder, which need not exist yet. Leaves no file behind.

    Args:
        flag: the option that names the folder, for the message.

    Raises:
        UserError: the folder is not writable.
    """
    try:
        existing = nearest_existing(folder)
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is a file")
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written to ({error}).") from error


@cache
def _host_id() -> str:
    """Identifies the scope of a process id: this machine since its last boot, and this container."""
    names = [socket.gethostname()]
    with suppress(OSError):
        names += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return hashlib.blake2b(" ".join(names).encode(), digest_size=8).hexdigest()
