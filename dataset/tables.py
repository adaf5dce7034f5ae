"""Reads text files and tables (.jsonl, .csv) line by line. The errors name the file and the line."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from utils.common.filesystem import expand_user


def resolve(root: Path, name: str) -> Path:
    """Returns the path of a file that is named relative to the data folder, absolutely, or with ~."""
    return root / expand_user(name)


def read_lines(path: Path) -> list[str]:
    """Returns the stripped lines of a UTF-8 file, without a byte-order mark and without empty lines at the end."""
    text = path.read_text(encoding="utf-8-sig").rstrip()
    # splitlines() would also split a caption at a Unicode line separator
    return [line.strip() for line in text.split("\n")] if text else []


def read_jsonl(path: Path, errors: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """Returns (line number, row) for each line that is not empty."""
    rows = []
    for number, text in enumerate(read_lines(path), 1):
        try:
            row = json.loads(text or "{}", object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            errors.append(f"{path}, line {number}: not valid JSON ({error}).")
            continue
        if not isinstance(row, dict):
            errors.append(f'{path}, line {number}: not a JSON object such as {{"video": "a.mp4", "prompt": "a cat"}}.')
        elif text:
            rows.append((number, row))
    return rows


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object. Raises ValueError if a name occurs twice, of which json would drop the first value."""
    counts = Counter(name for name, _ in pairs)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"it has {twice[0]!r} twice")
    return dict(pairs)


def read_csv(path: Path, errors: list[str], root: Path) -> list[tuple[int, dict[str, Any]]]:
    """Returns (number of the row's last line, row) for each row. The first row of the file names the columns.

    A quote that is not closed would swallow the rows after it. Strict parsing refuses it, unless a later quote closes
    it by chance. A text of several lines that names files of the data folder is therefore an error.
    """
    rows = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True, skipinitialspace=True)
        try:
            counts = Counter(name.strip() for name in reader.fieldnames or ())
            errors += [f"{path} has several columns '{name}'." for name, count in counts.items() if count > 1 and name]
            for row in reader:
                if any(row.get(None, ())):  # more fields than columns; spreadsheets add empty ones
                    errors.append(
                        f"{path}, line {reader.line_num}: the row has more fields than the header; put prompts with a "
                        "comma in quotes."
                    )
                for text in row.values():
                    if isinstance(text, str) and re.match(r'\s+"', text):  # csv skips spaces only
                        errors.append(
                            f"{path}, line {reader.line_num}: a tab or the like before a quote makes the quote "
                            f"part of the text: {text[:100]!r}; remove it."
                        )
                    elif isinstance(text, str) and (line := _swallowed_row(text, root)):
                        errors.append(
                            f"{path}, line {reader.line_num}: a quoted text that ends here contains what looks like a "
                            f"row: {line[:100]!r}. Is a quote before it not closed?"
                        )
                rows.append((reader.line_num, {key.strip(): value for key, value in row.items() if key}))
        except csv.Error as error:
            errors.append(
                f"{path}, line {reader.line_num + 1}: not valid CSV from here to line {reader.reader.line_num} "
                f"({error}). Is a quote not closed? A quote inside a quoted field is written twice."
            )
    return rows


def _swallowed_row(text: str, root: Path) -> str | None:
    """Returns the first line of a multi-line text with a comma-separated part that is a file of the data folder."""
    lines = text.splitlines() if "\n" in text else []
    names = ((line, part.strip(' "')) for line in lines if "," in line for part in line.split(","))
    return next((line for line, name in names if name and is_file(resolve(root, name))), None)


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # not a path, such as a caption: too long, or contains a null byte
        return False
