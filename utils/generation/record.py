"""The record of a video: everything that made it, as JSON beside the file and in its metadata.

{"settings":   the flags and their values
 "folder":     where the command ran, if paths in the settings are relative to it
 "resolved":   task, size and length, frames per second, dtype and device
 "base":       fingerprint of the base checkpoint
 "files":      path, as in the settings -> digest of the LoRA, transformer, image or clip
 "versions":   of the libraries that compute or encode}

On a CPU, the same record gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import av

from dataset.file_index import stat_signature
from utils.common.errors import UserError
from utils.common.filesystem import unreadable
from utils.model import loading

Record = dict[str, Any]
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "imageio-ffmpeg")


def make_record(
    settings: Record,
    resolved: Record,
    model_dir: Path,
    variant: str | None,
    files: Mapping[Path, list[Path]],
    is_relative: bool,
) -> Record:
    """Returns the record of a video.

    Args:
        settings: the flags as JSON values.
        files: path in the settings -> files or folders that are read, without the base.
        is_relative: whether paths in the settings are relative.
    """
    return {
        "settings": settings,
        **({"folder": str(Path.cwd())} if is_relative else {}),
        "resolved": resolved,
        "base": base_fingerprint(model_dir, variant),
        "files": {str(path): " ".join(map(fingerprint, sources)) for path, sources in files.items()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }


@cache  # of one base for all videos
def base_fingerprint(model_dir: Path, variant: str | None) -> str:
    """Returns a digest of the weights, tokenizer and scheduler settings of a checkpoint."""
    components = [
        loading.fingerprint(model_dir / name, by_meaning=True, variant=variant)
        for name in ("transformer", "vae", "text_encoder")
    ]
    others = [fingerprint(model_dir / name) for name in ("tokenizer", "scheduler")]
    return hashlib.sha256(" ".join(components + others).encode()).hexdigest()[:32]


def fingerprint(path: Path) -> str:
    """Returns a digest of a file, or of the files of a folder; see `loading.fingerprint` for large files."""
    if path.is_dir():
        folders = sorted(folder for folder in path.rglob("*") if folder.is_dir())
        digests = " ".join(loading.fingerprint(folder) for folder in [path, *folders])
        return hashlib.sha256(digests.encode()).hexdigest()[:32]
    return _digest(path, stat_signature(str(path)))


@cache
def _digest(file: Path, _: int) -> str:
    """Returns the digest of a file; cached for as long as its signature stays the same."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:32]


def save_record(record: Record, video: Path) -> None:
    """Writes the record beside a video."""
    video.with_suffix(".json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(video: Path) -> Record:
    """Reads the record in the metadata of a video, or else in the .json file beside it.

    Raises:
        UserError: there is no such file, or neither holds a record.
    """
    if not video.is_file() or unreadable(video):
        raise UserError(f"{unreadable(video) or 'there is no such file'}.")
    record, beside = record_in(video), video.with_suffix(".json")
    if record is None and beside.is_file():
        record = parse_record(beside.read_text(encoding="utf-8", errors="replace"))
    if record is None:
        raise UserError("it holds no settings; it was not made by cli_demo.py, or it was encoded again.")
    return record


def record_in(video: Path) -> Record | None:
    """Returns the record in the metadata of a video; None if it has none, or is not complete."""
    try:
        with av.open(str(video)) as container:
            return parse_record(container.metadata.get("comment", ""))
    except (OSError, av.FFmpegError):
        return None


def parse_record(text: str) -> Record | None:
    """Returns a record; None if the text has another form. Only the settings are required."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    groups = ("settings", "resolved", "files", "versions")
    is_record = isinstance(value, dict) and all(isinstance(value.get(group, {}), dict) for group in groups)
    return value if is_record and "settings" in value and isinstance(value.get("folder", ""), str) else None


def differences(recorded: Record, current: Record) -> list[str]:
    """Returns sentences about what made a video and has changed since. Settings may differ on purpose."""
    changed = []
    if recorded.get("base") != current["base"]:
        changed.append("the base checkpoint is another one")
    digests = set(recorded.get("files", {}).values())
    changed += [f"{path} is another file" for path, digest in current["files"].items() if digest not in digests]
    for group in ("versions", "resolved"):
        for name, value in current[group].items():
            if (old := recorded.get(group, {}).get(name)) != value:
                changed.append(f"{name} was {old} and is {value}")
    return changed


def is_made(record: Record, video: Path, defaults: Record) -> bool:
    """Whether a complete video exists and has the same settings, base and files.

    Args:
        defaults: settings that a record of an earlier version may lack.
    """
    # mp4 metadata is written last, so a file that has it is complete
    made = record_in(video)
    return (
        made is not None
        and defaults | made["settings"] == record["settings"]
        and made.get("base") == record["base"]
        and made.get("files") == record["files"]
    )
