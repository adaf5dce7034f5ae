"""The files of a prepared data folder: the table, the list of what was dropped, and contact sheets."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dataset.manifest import TABLES
from dataset.parts import Crop, FrameRange
from dataset.prepare import Clip, Dropped
from dataset.tables import read_jsonl
from dataset.video import NATIVE_STRIDE, FrameSelection, Resolution, decode
from dataset.worker_pool import Failure, run_in_workers
from utils.common.contact_sheet import THUMBNAIL_HEIGHT, THUMBNAILS, contact_sheet, evenly_spaced, strip
from utils.common.errors import UserError
from utils.common.filesystem import atomic_write

TABLE, DROPPED = TABLES[0], "dropped.csv"
_MARKER, _ANALYSES = "prepare.json", "analysis"
# Columns that name the source of a clip in a file of its own.
_SOURCE_COLUMNS = ("source", "source_start", "source_end")
_PART_COLUMNS = ("video", "start", "end")
# Source, start and end of a clip, as the table states them.
ClipKey = tuple[Any, ...]
# Rows of a contact sheet.
_SHEET_ROWS = 48


def claim_folder(out: Path, raw: Path) -> Path:
    """Creates the output folder, or goes on in one that this command made from the same raw folder.

    Returns:
        The folder of the analyses.

    Raises:
        UserError: the folder holds something else.
    """
    marker = out / _MARKER
    if marker.is_file():
        try:
            known = json.loads(marker.read_text())["raw"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{marker} is damaged; give a new folder, or remove {out}.") from error
        if known != str(raw.resolve()):
            raise UserError(f"{out} was prepared from {known}; give another folder for {raw}.")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        names = sorted(path.name for path in out.iterdir()) if out.is_dir() else ["a file"]
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise UserError(f"{out} exists and was not made by this command: it holds {listed}. Give a new folder.")
    else:
        with atomic_write(marker) as tmp_path:
            tmp_path.write_text(json.dumps({"raw": str(raw.resolve())}) + "\n")
    return out / _ANALYSES


def clip_key(clip: Clip) -> ClipKey:
    return clip.source, clip.start, clip.end


def read_prompts(out: Path) -> dict[ClipKey, str]:
    """Returns the prompts of the table that the folder has already, without empty ones.

    Raises:
        UserError: the table cannot be read; it may hold captions that a user has typed.
    """
    path, errors = out / TABLE, list[str]()
    rows = read_jsonl(path, errors) if path.is_file() else []
    if errors:
        raise UserError(errors)
    prompts = {}
    for _, row in rows:
        key = tuple(row.get(own, row.get(name)) for own, name in zip(_SOURCE_COLUMNS, _PART_COLUMNS, strict=True))
        prompt = row.get("prompt")
        # a user may have put anything into other rows; they match no clip
        if isinstance(prompt, str) and prompt.strip() and all(isinstance(value, str | int | float) for value in key):
            prompts[key] = prompt
    return prompts


def write_table(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the table atomically."""
    with atomic_write(out / TABLE) as tmp_path:
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        tmp_path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def table_row(clip: Clip, prompt: str, file: Path | None) -> dict[str, Any]:
    """Returns the row of a clip. A clip with a file of its own names its source in columns that training ignores."""
    if file is not None:
        return {"video": str(file), "prompt": prompt} | dict(zip(_SOURCE_COLUMNS, clip_key(clip), strict=True))
    row = {"video": clip.source, "start": clip.start, "end": clip.end, "crop": str(clip.crop), "prompt": prompt}
    if clip.crop is None:
        del row["crop"]
    return row


def write_dropped(out: Path, dropped: Sequence[Dropped]) -> None:
    """Writes the list of what was dropped, atomically."""
    with (
        atomic_write(out / DROPPED) as tmp_path,
        tmp_path.open("w", newline="", encoding="utf-8", errors="replace") as file,
    ):
        table = csv.writer(file)
        table.writerow(("video", "start", "end", "reason"))
        for item in dropped:
            table.writerow((item.source, *(item.span or ("", "")), item.reason))


def write_sheets(
    out: Path, clips: Sequence[Clip], dropped: Sequence[Dropped], num_workers: int, timeout: float
) -> None:
    """Draws contact sheets of clips and of what was dropped, evenly spaced if there are many."""
    kept = [_SheetRow(str(clip), clip.source, clip.frames, clip.crop, clip.aspect) for clip in clips]
    others = []
    for item in dropped:
        when = "" if item.span is None else " from {:.2f} s to {:.2f} s".format(*item.span)
        aspect = item.analysis.width * item.analysis.pixel_aspect / item.analysis.height if item.analysis else 1.0
        others.append(_SheetRow(f"{item.source}{when} {item.reason}", item.source, item.frames, None, aspect))
    for name, rows in (("kept.png", kept), ("dropped.png", others)):
        if not rows:
            (out / name).unlink(missing_ok=True)  # of an earlier run
            continue
        chosen = [rows[number] for number in evenly_spaced(len(rows), _SHEET_ROWS)]
        with_pictures = [row for row in chosen if row.frames is not None]
        pictures = {}
        for result in run_in_workers(_draw, with_pictures, num_workers, timeout):
            failed = isinstance(result.outcome, Failure)
            pictures[result.job] = result.outcome.reason if failed else result.outcome
        sheet = contact_sheet([(row.caption, pictures.get(row, "no pictures")) for row in chosen])
        with atomic_write(out / name) as tmp_path:
            sheet.save(tmp_path)


@dataclass(frozen=True, eq=False)
class _SheetRow:
    """A row of a contact sheet."""

    caption: str
    source: str
    frames: FrameRange | None
    crop: Crop | None
    aspect: float


def _draw(row: _SheetRow, buffer: Any) -> Image.Image:
    """Draws the pictures of a row in a worker process."""
    assert row.frames is not None
    count = row.frames.stop - row.frames.first
    size = Resolution(min(THUMBNAILS, count), THUMBNAIL_HEIGHT, max(round(THUMBNAIL_HEIGHT * row.aspect), 1))
    selection = FrameSelection(size, NATIVE_STRIDE, "stretch", 0, count, frames=row.frames, crop=row.crop)
    return strip(list(decode(Path(row.source), selection).numpy()))
