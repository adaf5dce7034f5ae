"""Chooses the prompt of each clip: one that the user has typed, a caption beside the source, or a generated one."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from dataset.caption_model import CaptionModel, CaptionSettings, describe_all
from dataset.parts import Crop, FrameRange
from dataset.prepare import Clip
from dataset.prepared_folder import ClipKey, clip_key
from dataset.tables import read_csv, read_jsonl, read_lines
from dataset.video import NATIVE_STRIDE, FrameSelection, Resolution, decode
from dataset.worker_pool import Failure, run_in_workers
from utils.common.errors import UserError

LOG = "captions.jsonl"
# Longer side in pixels of the pictures that a model gets; its processor scales them further.
_MAX_SIDE = 768
# Number of a clip, its source, its frames, its picture, and the shape to decode to.
_Job = tuple[int, str, FrameRange, Crop | None, tuple[int, int, int]]


@dataclass
class CaptionLog:
    """The prompts that this command has written, so that it tells them from those that a user has typed.

    Each is a line that is appended at once, so a stopped run loses none, and two runs may append to the same file.
    """

    path: Path
    written: defaultdict[ClipKey, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))

    def __post_init__(self) -> None:
        if self.path.is_file():
            rows = read_jsonl(self.path, errors=[])  # a run that was killed leaves half a line
            for _, row in rows:
                if isinstance(row.get("clip"), list) and isinstance(row.get("prompt"), str):
                    self.written[tuple(row["clip"])][row["prompt"]] = row.get("origin", "")

    def add(self, key: ClipKey, prompt: str, origin: str) -> None:
        if self.written[key].get(prompt) != origin:
            self.written[key][prompt] = origin
            line = json.dumps({"clip": key, "prompt": prompt, "origin": origin}, ensure_ascii=False)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    def prompt_of(self, key: ClipKey, origin: str) -> str | None:
        """Returns the last prompt of a clip that has an origin."""
        return next((text for text, known in reversed(self.written[key].items()) if known == origin), None)


def read_captions(sources: Sequence[str], raw: Path, table: Path | None) -> tuple[dict[str, str], list[str]]:
    """Returns source -> caption from a table or from NAME.txt beside the source, and notes for the user.

    The table wins. A caption of several lines becomes one line.

    Raises:
        UserError: the table cannot be read, or lacks a column.
    """
    captions: dict[str, str] = {}
    for source in sources:
        path = Path(source).with_suffix(".txt")
        if path.is_file():
            try:
                captions[source] = " ".join(" ".join(read_lines(path)).split())
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path} cannot be read as UTF-8 text ({error}).") from error
    notes = []
    if table is not None:
        listed = _read_caption_table(table, raw)
        known = listed.keys() & {*sources}
        unknown = [name for name in listed if name not in known]
        captions |= {name: text for name, text in listed.items() if name in known}
        if unknown:
            notes.append(
                f"Note: {len(unknown)} of {len(listed)} rows of {table} name no video of {raw}, such as {unknown[0]}."
            )
    return {source: caption for source, caption in captions.items() if caption}, notes


def _read_caption_table(table: Path, raw: Path) -> dict[str, str]:
    """Returns path -> caption of a table. Paths are relative to the raw folder or absolute."""
    if not table.is_file():
        raise UserError(f"--captions {table}: there is no such file.")
    errors: list[str] = []
    is_csv = table.suffix.lower() == ".csv"
    try:
        rows = read_csv(table, errors, raw) if is_csv else read_jsonl(table, errors)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--captions {table}: cannot be read as UTF-8 text ({error}).") from error
    for line, row in rows:
        for name in ("video", "prompt"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                errors.append(f"--captions {table}, line {line}: '{name}' is missing or not a text.")
    if not rows and not errors:
        errors.append(f"--captions {table} is empty; it needs the columns video and prompt.")
    if errors:
        raise UserError(errors)
    return {str((raw / row["video"].strip()).absolute()): " ".join(row["prompt"].split()) for _, row in rows}


def choose_prompts(
    clips: Sequence[Clip],
    earlier: dict[ClipKey, str],
    captions: dict[str, str],
    prefix: str,
    log: CaptionLog,
    origin: str | None,
) -> list[str]:
    """Returns the prompt of each clip, an empty one if it is still to be written.

    Args:
        earlier: prompts of the table that exists. Those that are not in the log were typed by the user, and stay.
        captions: source -> caption.
        prefix: put before each caption.
        origin: the generated captions to take, those of one model with one instruction; None for those of the table.
    """
    prompts = []
    for clip in clips:
        key = clip_key(clip)
        known = earlier.get(key, "")
        if known and known not in log.written[key]:
            prompts.append(known)
        elif clip.source in captions:
            prompts.append(with_prefix(prefix, captions[clip.source]))
            log.add(key, prompts[-1], "file")
        else:
            prompts.append(known if origin is None else log.prompt_of(key, origin) or "")
    return prompts


def with_prefix(prefix: str, caption: str) -> str:
    return f"{prefix} {caption}" if prefix else caption


def generate_prompts(
    clips: Sequence[Clip],
    settings: CaptionSettings,
    prefix: str,
    log: CaptionLog,
    origin: str,
    num_workers: int,
    timeout: float,
) -> tuple[dict[ClipKey, str], list[str]]:
    """Describes clips with a model, and logs each prompt at once.

    Returns:
        Key -> prompt, and an error for each clip that could not be described.
    """
    prompts: dict[ClipKey, str] = {}
    errors: list[str] = []
    shapes = [_shape(clip, settings.frames) for clip in clips]
    largest = max(frames * height * width * 3 for frames, height, width in shapes)

    def decoded() -> Iterator[tuple[Clip, list[Image.Image]]]:
        jobs = [
            (n, clip.source, clip.frames, clip.crop, shape)
            for n, (clip, shape) in enumerate(zip(clips, shapes, strict=True))
        ]
        for result in run_in_workers(_decode, jobs, num_workers, timeout, largest):
            clip, (frames, height, width) = clips[result.job[0]], result.job[-1]
            if isinstance(result.outcome, Failure):
                errors.append(f"{clip} {result.outcome.reason}")
                bar.update()
                continue
            pixels = result.buffer[: frames * height * width * 3].view(frames, height, width, 3)
            yield clip, [Image.fromarray(frame.numpy().copy()) for frame in pixels]

    model = CaptionModel(settings)
    with tqdm(total=len(clips), desc="Describing clips", unit="clip") as bar:
        for clip, caption in describe_all(decoded(), model.describe, settings):
            if isinstance(caption, Exception):
                errors.append(f"{clip} could not be described ({caption})")
            else:
                prompts[clip_key(clip)] = with_prefix(prefix, caption)
                log.add(clip_key(clip), prompts[clip_key(clip)], origin)
            bar.update()
    return prompts, errors


def _shape(clip: Clip, count: int) -> tuple[int, int, int]:
    """Returns frames, height and width of the pictures that a model gets."""
    height, width = clip.size[0], clip.size[0] * clip.aspect
    scale = min(_MAX_SIDE / max(height, width), 1.0)
    frames = min(count, clip.frames.stop - clip.frames.first)
    return frames, max(round(height * scale), 1), max(round(width * scale), 1)


def _decode(job: _Job, buffer: torch.Tensor) -> bool:
    """Decodes evenly spaced frames of a clip in a worker process."""
    _, source, frames, crop, (count, height, width) = job
    size, span = Resolution(count, height, width), frames.stop - frames.first
    selection = FrameSelection(size, NATIVE_STRIDE, "stretch", 0, span, frames=frames, crop=crop)
    decode(Path(source), selection, buffer[: count * height * width * 3].view(count, height, width, 3))
    return True
