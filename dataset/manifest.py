"""Line files to samples. Finds every fault of a data folder before it reports any."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError


@dataclass(frozen=True)
class Sample:
    """One line of a data folder.

    Attributes:
        line: counted from 1, for messages.
        prompt: with the identifier token.
        video: the clip; None in a validation folder that has none.
        image: i2v with an image file; None where the clip's first frame serves.
    """

    line: int
    prompt: str
    video: Path | None
    image: Path | None

    @property
    def clip(self) -> Path:
        """The clip of a sample that has one."""
        assert self.video is not None
        return self.video

    def __str__(self) -> str:
        return f"{self.video or self.image or repr(self.prompt)} (line {self.line})"


def with_id_token(prompt: str, id_token: str) -> str:
    return f"{id_token} {prompt}".strip()


def read_manifest(
    root: Path,
    captions: str,
    videos: str | None,
    images: str | None,
    id_token: str = "",
    flag: str = "--data_root",
) -> list[Sample]:
    """Reads a data folder.

    Args:
        root: the folder; every other path is relative to it.
        captions, videos, images: names of the line files; None where there is none.
        id_token: put before every prompt.
        flag: the option that named the folder, for messages.

    Raises:
        UserError: with all faults found: missing folder or files, counts that differ, empty lines.
    """
    if not root.is_dir():
        raise UserError(f"{flag} {root}: there is no such folder.")
    faults: list[str] = []
    columns: dict[str, list[str]] = {}
    for name in filter(None, (captions, videos, images)):
        try:
            columns[name] = read_lines(root / name)
        except FileNotFoundError:
            faults.append(f"{root / name}: there is no such file.")
        except (UnicodeDecodeError, OSError) as error:
            faults.append(f"{root / name}: cannot be read as UTF-8 text ({error}).")
    if len({len(lines) for lines in columns.values()}) > 1:
        counts = ", ".join(f"{name} has {len(lines)}" for name, lines in columns.items())
        faults.append(f"{root}: the line files must have the same number of lines, one sample a line; {counts}.")
    elif columns and not any(columns.values()):
        faults.append(f"{root}: the line files are empty.")
    for name, lines in columns.items():
        for number, text in enumerate(lines, 1):
            if not text:
                faults.append(f"{root / name}, line {number}: the line is empty.")
            elif name != captions and not _is_file(root / text):
                faults.append(f"{root / name}, line {number}: there is no file {str(root / text)[:200]}.")
    if faults:
        raise UserError(faults)

    def paths(name: str | None) -> list[Path | None]:
        return [None] * len(columns[captions]) if name is None else [root / text for text in columns[name]]

    rows = zip(columns[captions], paths(videos), paths(images), strict=True)
    return [
        Sample(number, with_id_token(prompt, id_token), video, image)
        for number, (prompt, video, image) in enumerate(rows, 1)
    ]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a caption where a path should be: too long, or with a zero byte
        return False


def read_lines(path: Path) -> list[str]:
    """Lines without surrounding space; a byte-order mark and empty lines at the end are no lines."""
    text = path.read_text(encoding="utf-8-sig").rstrip()
    # not splitlines(), which would also break a caption at a Unicode line separator
    return [line.strip() for line in text.split("\n")] if text else []
