"""A data folder and the settings of its samples, which an optional folder.toml sets."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.common.errors import UserError
from utils.common.filesystem import unreadable

FOLDER_FILE = "folder.toml"
MAX_REPEATS = 10_000


@dataclass(frozen=True, slots=True)
class DataFolder:
    """A data folder and how its samples are trained.

    Attributes:
        label: how messages name the folder beside a line number; empty if it is the only one.
        repeats: number of times that each sample occurs in an epoch.
        loss_weight: factor of the loss of each sample.
        id_token: identifier to put before every prompt.
        caption_dropout: share of samples trained with the empty prompt.
        flip: whether mirrored clips are trained too.
    """

    root: Path = Path()
    label: str = ""
    repeats: int = 1
    loss_weight: float = 1.0
    id_token: str = ""
    caption_dropout: float = 0.0
    flip: bool = False


NO_SETTINGS = DataFolder()
# Setting -> accepted types, check of the value, and what the value must be.
_SETTINGS: dict[str, tuple[tuple[type, ...], Callable[[Any], bool], str]] = {
    "repeats": ((int,), lambda value: 1 <= value <= MAX_REPEATS, f"a whole number from 1 to {MAX_REPEATS}"),
    "loss_weight": ((int, float), lambda value: 0 < value < math.inf, "a number above 0"),
    "id_token": ((str,), lambda value: "\0" not in value, 'a text, or "" for none'),
    "caption_dropout": ((int, float), lambda value: 0 <= value < 1, "a number that is at least 0 and below 1"),
    "flip": ((bool,), lambda value: True, "true or false"),
}


def read_folder(defaults: DataFolder) -> DataFolder:
    """Returns a data folder with the settings of its folder.toml in place of the defaults.

    Raises:
        UserError: the file cannot be read or is not TOML, or lists all of its invalid settings.
    """
    path = defaults.root / FOLDER_FILE
    if not path.is_symlink() and not path.exists():
        return defaults
    if reason := unreadable(path):
        raise UserError(f"{reason}.")
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors may write a byte-order mark, which TOML does not allow
        settings = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid TOML: {error}.") from error
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}).") from error
    errors = [_setting_error(path, text, name, value) for name, value in settings.items()]
    if found := [message for message in errors if message is not None]:
        raise UserError(found)
    return replace(defaults, **settings)


def _setting_error(path: Path, text: str, name: str, value: Any) -> str | None:
    """Returns what is wrong with a setting, or None."""
    start = re.search(rf"""^[\s\[]*["']?{re.escape(name)}["']?\s*[=.\]]""", text, re.MULTILINE)
    line = f", line {text.count(chr(10), 0, start.end()) + 1}" if start else ""
    if name not in _SETTINGS:
        return f"{path}{line}: there is no setting '{name}'; a folder has {', '.join(_SETTINGS)}."
    types, is_valid, requirement = _SETTINGS[name]
    if type(value) not in types or not is_valid(value):  # a bool is an int for isinstance
        return f"{path}{line}: {name} is {repr(value)[:100]}; it must be {requirement}."
    return None


def folder_set_errors(roots: tuple[Path, ...]) -> list[str]:
    """Returns an error for each data folder that is given twice, and for each that is inside another one."""
    resolved = [root.resolve() for root in roots]
    errors = []
    for number, (root, path) in enumerate(zip(roots, resolved, strict=True)):
        for other, other_path in zip(roots[:number], resolved[:number], strict=True):
            if path == other_path:
                errors.append(f"--data_root {other} {root}: this is the same folder twice; {FOLDER_FILE} has repeats.")
            elif path.is_relative_to(other_path) or other_path.is_relative_to(path):
                inner, outer = (root, other) if path.is_relative_to(other_path) else (other, root)
                errors.append(f"--data_root {other} {root}: {inner} is inside {outer}; put the folders side by side.")
    return errors
