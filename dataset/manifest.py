"""Reads the samples of a data folder from line files or a table, and reports all of its errors together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from dataset.folder import NO_SETTINGS, DataFolder
from dataset.parts import PART_COLUMNS, Part
from dataset.tables import is_file, read_csv, read_jsonl, read_lines, resolve
from utils.common.errors import UserError
from utils.common.filesystem import unreadable

Content = TypeVar("Content")


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of a data folder.

    Attributes:
        line: line number, starting at 1, for messages.
        prompt: the caption, with the identifier token.
        video: path of the clip or of an image in its place; None for a validation prompt without a clip.
        image: path of the condition image for i2v; None if the first frame of the clip is used.
        last_image: path of the last frame to give in validation; None if that of the clip is used.
        part: part of the clip; None for the whole clip.
        folder: the data folder and its settings.
    """

    line: int
    prompt: str
    video: str | None  # a Path takes ten times the memory, which matters for 100,000 samples
    image: str | None
    last_image: str | None = None
    part: Part | None = None
    folder: DataFolder = NO_SETTINGS

    @property
    def clip(self) -> str:
        """Path of the clip, for samples that have one."""
        assert self.video is not None
        return self.video

    @property
    def files(self) -> list[str]:
        return [path for path in (self.video, self.image, self.last_image) if path is not None]

    @property
    def place(self) -> str:
        """The line for messages, with the data folder if there are several."""
        return f"line {self.line}" + (f" of {self.folder.label}" if self.folder.label else "")

    def __str__(self) -> str:
        return f"{self.video or self.image or repr(self.prompt)} ({self.place})"


def with_id_token(prompt: str, id_token: str) -> str:
    """Puts the identifier token, if any, before a prompt."""
    return f"{id_token} {prompt}" if id_token else prompt


# The first of these that exists is read if a data folder has no caption file.
TABLES = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Table:
    """A .jsonl or .csv file in place of the line files, with columns named prompt, video and image.

    If there are clips, the columns in `PART_COLUMNS` are read too; their values may be missing.
    """

    name: str
    required: tuple[str, ...] = ("prompt", "video")
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Column:
    """The values of one column, with their file and line numbers for messages."""

    source: Path
    texts: list[str]
    lines: Sequence[int]


def find_table(root: Path, captions: str, metadata: str | None) -> str | None:
    """Returns the name of a data folder's table, or None if it has line files.

    Args:
        captions: name of the caption file.
        metadata: table named on the command line.
    """
    if metadata is not None:
        return metadata
    tables = [name for name in TABLES if (root / name).is_file()]
    return tables[0] if tables and not resolve(root, captions).exists() else None


def read_manifest(
    root: Path,
    captions: str = "",
    videos: str | None = None,
    images: str | None = None,
    id_token: str = "",
    flag: str = "--data_root",
    table: Table | None = None,
    last_images: str | None = None,
    folder: DataFolder = NO_SETTINGS,
) -> list[Sample]:
    """Reads the samples of a data folder.

    Args:
        root: the data folder; all other paths are relative to it.
        captions, videos, images, last_images: names of the line files; None for a file that is not used.
        id_token: identifier to put before every prompt.
        flag: the option that names the folder, for messages.
        table: read in place of the line files.
        folder: settings of the samples, for later parts of the run.

    Raises:
        UserError: lists all errors: a missing folder, missing files, different numbers of lines, empty lines.
    """
    if reason := unreadable(root):
        raise UserError(f"{flag}: {reason}.")
    if not root.is_dir():
        raise UserError(f"{flag} {root}: there is no such folder.")
    errors: list[str] = []
    if table is not None:
        columns, parts = _read_table(root, table, errors)
    else:
        parts = None
        files = {"prompt": captions, "video": videos, "image": images, "last_image": last_images}
        columns = _read_line_files(root, {name: file for name, file in files.items() if file}, errors)
    for name, column in columns.items():
        for line, text in zip(column.lines, column.texts, strict=True):
            if not text:
                subject = "the line" if table is None else f"the {name}"
                errors.append(f"{column.source}, line {line}: {subject} is empty.")
            elif error := _text_error(text):
                errors.append(f"{column.source}, line {line}: the {name} holds {error}: {text[:100]!a}.")
            elif name != "prompt" and (error := _file_error(resolve(root, text))):
                errors.append(f"{column.source}, line {line}: {error}.")
    if errors:
        raise UserError(errors)

    prompts = columns["prompt"]

    def paths(name: str) -> Iterable[str | None]:
        if name not in columns:
            return [None] * len(prompts.texts)
        return (str(resolve(root, text)) for text in columns[name].texts)

    rows = zip(
        prompts.lines,
        prompts.texts,
        paths("video"),
        paths("image"),
        paths("last_image"),
        parts or [None] * len(prompts.texts),
        strict=True,
    )
    return [
        Sample(line, with_id_token(prompt, id_token), video, image, last_image, part, folder)
        for line, prompt, video, image, last_image, part in rows
    ]


def _read_line_files(root: Path, files: dict[str, str], errors: list[str]) -> dict[str, _Column]:
    columns = {}
    for name, file in files.items():
        path = resolve(root, file)
        texts = _read(path, read_lines, errors)
        if texts is not None:
            columns[name] = _Column(path, texts, range(1, len(texts) + 1))
    if len({len(column.texts) for column in columns.values()}) > 1:
        counts = ", ".join(f"{files[name]} has {len(column.texts)}" for name, column in columns.items())
        errors.append(f"{root}: the line files must have the same number of lines, one per sample; {counts}.")
    elif columns and not any(column.texts for column in columns.values()):
        errors.append(f"{root}: the line files are empty.")
    return columns


def _read_table(root: Path, table: Table, errors: list[str]) -> tuple[dict[str, _Column], list[Part | None] | None]:
    """Returns the columns, and the part of each row; None in place of the parts if the table has no such columns."""
    path = resolve(root, table.name)
    reader = partial(read_csv, root=root) if path.suffix.lower() == ".csv" else read_jsonl
    num_errors = len(errors)
    rows = _read(path, partial(reader, errors=errors), errors)
    if rows is None or (not rows and len(errors) > num_errors):  # the errors say why there are no rows
        return {}, None
    if not rows:
        errors.append(f"{path}: the table is empty; it needs one row per sample, and a .csv file needs a header row.")
    present = dict.fromkeys(str(key) for _, row in rows for key in row)
    columns = {}
    for name in (*table.required, *table.optional):
        if name not in present:
            if name in table.required and rows:
                hint = " Separate the columns by commas." if re.search("[;\t]", "".join(present)) else ""
                errors.append(f"{path} has no column '{name}'; it has {', '.join(present)}.{hint}")
            continue
        values = [(line, row.get(name)) for line, row in rows]
        errors += [
            f"{path}, line {line}: '{name}' is missing or not a text."
            for line, value in values
            if not isinstance(value, str)
        ]
        texts = [(line, value.strip()) for line, value in values if isinstance(value, str)]
        columns[name] = _Column(path, [text for _, text in texts], [line for line, _ in texts])
    if "video" not in columns or not present.keys() & {*PART_COLUMNS}:
        return columns, None
    parts: list[Part | None] = []
    for line, row in rows:
        try:
            parts.append(Part.from_row(row))
        except ValueError as error:
            errors.append(f"{path}, line {line}: {error}.")
    return columns, parts


def _read(path: Path, reader: Callable[[Path], Content], errors: list[str]) -> Content | None:
    try:
        if reason := unreadable(path):
            errors.append(f"{reason}.")
            return None
        return reader(path)
    except FileNotFoundError:
        errors.append(f"{path}: there is no such file.")
    except (UnicodeDecodeError, OSError) as error:
        errors.append(f"{path}: cannot be read as UTF-8 text ({error}).")
    return None


def _file_error(path: Path) -> str | None:
    """Returns why a clip or an image cannot be read, or None.

    Larger files are not opened: this would take long for many files, and Git LFS pointers have less than 1024 bytes.
    """
    if not is_file(path):
        return unreadable(path) or f"there is no file {str(path)[:200]}"
    return unreadable(path) if path.stat().st_size < 1024 else None


def _text_error(text: str) -> str | None:
    """Returns what a text must not hold but does, or None."""
    if "\0" in text:  # such as the end of a file after a power failure
        return "a null character"
    try:
        text.encode()
    except UnicodeEncodeError:  # such as the JSON text "\\ud83d"
        return "half of a surrogate pair"
    return None
