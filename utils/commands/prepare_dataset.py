"""Turns a folder of raw footage into a data folder: finds scenes, drops what is not worth training on, writes a table.

    python -m utils.commands.prepare_dataset raw data
    python -m utils.commands.prepare_dataset raw data --model_path THUDM/CogVideoX1.5-5B --train_resolution 81x768x1360

The table names parts of the raw files, which stay as they are. Run the command again to go on after a stop, or to take
new files in.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dataset.caption_model import CaptionSettings, check_caption_model
from dataset.captions import LOG, CaptionLog, choose_prompts, generate_prompts, read_captions
from dataset.clip_writer import write_clips
from dataset.prepare import Clip, analyse_sources, find_sources, select_clips
from dataset.prepared_folder import (
    DROPPED,
    TABLE,
    claim_folder,
    clip_key,
    read_prompts,
    table_row,
    write_dropped,
    write_sheets,
    write_table,
)
from dataset.video import Resolution
from utils.common.errors import UserError, exit_on_user_error
from utils.common.filesystem import check_writable, flags_in_errors, remove_stale_temporaries, unreadable
from utils.common.requirements import check_requirements
from utils.config.data_args import DataArgs
from utils.config.options import make_parser, option, parse_group, require_positive, require_text
from utils.model import loading
from utils.model.spec import read_spec

PACKAGES = ("scenedetect-headless", "ImageHash")
# Notes that are printed.
_LISTED = 5


@dataclass(frozen=True)
class PrepareArgs:
    raw: Path = option(positional=True, help="folder of raw footage: files of any container, at any depth")
    out: Path = option(positional=True, help="data folder to write: metadata.jsonl, dropped.csv and contact sheets")
    train_resolution: tuple[Resolution, ...] = option(
        (Resolution(49, 480, 720),), help="FxHxW as in training; the numbers of frames set the lengths of the clips"
    )
    fps: float | None = option(None, help="sampling rate of training; default: the rate of the model, 8 without one")
    model_path: str | None = option(None, help="checkpoint that sets the default --fps")
    write_clips: bool = option(
        False, help="encode each clip to a file in OUT/clips; by default the table names parts of the raw files"
    )
    captions: Path | None = option(
        None,
        help=".csv or .jsonl with the columns video, relative to RAW, and prompt; NAME.txt beside NAME.mp4 is read too",
    )
    caption_model: str | None = option(
        None, help="image-text-to-text model of transformers that describes the clips without a caption"
    )
    caption_frames: int = option(8, help="frames that the model gets per clip")
    caption_instruction: str | None = option(None, help="what the model is told; default: describe the video in detail")
    caption_max_tokens: int = option(256, help="maximum length of a generated caption in tokens")
    caption_batch_size: int = option(8, help="clips that are described at once; halved if memory does not suffice")
    caption_prefix: str = option("", help="text to put before each caption that this command takes over or generates")
    num_workers: int | None = option(None, help="processes that decode; default: one per CPU core")
    clip_timeout: float = option(3600.0, help="maximum number of seconds for one raw file")

    @property
    def caption_settings(self) -> CaptionSettings | None:
        if self.caption_model is None:
            return None
        return CaptionSettings(
            self.caption_model,
            self.caption_frames,
            self.caption_instruction,
            self.caption_max_tokens,
            self.caption_batch_size,
        )

    def errors(self) -> Iterator[str]:
        yield from DataArgs((self.raw,), train_resolution=self.train_resolution).errors()
        yield from require_positive(
            self, "fps", "num_workers", "clip_timeout", "caption_frames", "caption_max_tokens", "caption_batch_size"
        )
        yield from require_text(self, "caption_prefix")


def main() -> None:
    parser = make_parser(
        "Turns a folder of raw footage into a data folder for training: finds scenes, crops letterbox bars, drops what "
        "is black, static, too short or a near-duplicate, takes over or generates captions, and writes a table.",
        prog="python -m utils.commands.prepare_dataset",
    )
    args = parse_group(parser, PrepareArgs)
    if args.fps is None:
        fps = read_spec(loading.resolve_model_dir(args.model_path)).fps if args.model_path else 8.0
        args = replace(args, fps=fps)
    with flags_in_errors({"OUT": args.out}):
        prepare(args)


def prepare(args: PrepareArgs) -> None:
    """Runs all steps; what an earlier run has done is not done again.

    Raises:
        UserError: an argument is wrong, or there is nothing to train on.
    """
    assert args.fps is not None
    if reason := unreadable(args.raw):
        raise UserError(f"{reason}.")
    if not args.raw.is_dir():
        raise UserError(f"{args.raw}: there is no such folder.")
    if args.out.resolve() == args.raw.resolve():
        raise UserError(f"{args.out} is the raw folder; give another folder for the result.")
    check_writable(args.out, "OUT")
    if args.caption_model is not None:
        check_caption_model(args.caption_model)
    sources = find_sources(args.raw, args.out)
    captions, notes = read_captions(sources, args.raw, args.captions)
    analyses_folder = claim_folder(args.out, args.raw)
    earlier = read_prompts(args.out)
    remove_stale_temporaries(args.out)
    workers = args.num_workers or len(os.sched_getaffinity(0))

    analyses, unusable = analyse_sources(sources, analyses_folder, workers, args.clip_timeout)
    clips, dropped = select_clips(analyses, [size.frames for size in args.train_resolution], args.fps)
    dropped = unusable + dropped
    write_dropped(args.out, dropped)
    write_sheets(args.out, clips, dropped, workers, args.clip_timeout)
    reasons = Counter(item.kind for item in dropped)
    print(
        f"{len(sources)} files: {len(clips)} clips kept; dropped: "
        + (", ".join(f"{n} {kind}" for kind, n in reasons.items()) or "nothing")
    )
    if not clips:
        raise UserError(f"none of the {len(sources)} files in {args.raw} gives a clip; {args.out / DROPPED} says why.")
    files: dict[int, Path] = {}
    if args.write_clips:
        files, errors = write_clips(args.out, clips, workers, args.clip_timeout)
        clips, files = [clips[number] for number in files], dict(enumerate(files.values()))
        notes += errors
        if not clips:
            raise UserError(f"no clip can be written, such as {errors[0]}.")
    prompts = caption(args, clips, earlier, captions, notes, workers)
    write_table(
        args.out,
        [table_row(clip, prompt, files.get(n)) for n, (clip, prompt) in enumerate(zip(clips, prompts, strict=True))],
    )
    report(args, prompts, notes)


def caption(
    args: PrepareArgs,
    clips: Sequence[Clip],
    earlier: dict,
    captions: dict[str, str],
    notes: list[str],
    workers: int,
) -> list[str]:
    """Returns the prompt of each clip; adds an error to the notes for each that could not be described."""
    settings = args.caption_settings
    log = CaptionLog(args.out / LOG)
    origin = None
    if settings is not None:
        fields = (settings.model, settings.frames, settings.instruction, settings.max_tokens, args.caption_prefix)
        origin = f"{settings.model} {hashlib.sha256(repr(fields).encode()).hexdigest()[:12]}"
    prompts = choose_prompts(clips, earlier, captions, args.caption_prefix, log, origin)
    missing = [clip for clip, prompt in zip(clips, prompts, strict=True) if not prompt]
    if settings is not None and origin is not None and missing:
        found, errors = generate_prompts(
            missing, settings, args.caption_prefix, log, origin, workers, args.clip_timeout
        )
        notes += errors
        prompts = [prompt or found.get(clip_key(clip), "") for clip, prompt in zip(clips, prompts, strict=True)]
    return prompts


def report(args: PrepareArgs, prompts: list[str], notes: list[str]) -> None:
    """Prints what there is, what is missing, and what to do next."""
    for note in notes[:_LISTED]:
        print(note if note.startswith("Note") else f"Note: {note}.")
    if len(notes) > _LISTED:
        print(f"Note: and {len(notes) - _LISTED} more.")
    empty = [line for line, prompt in enumerate(prompts, 1) if not prompt]
    print(f"{args.out / TABLE}: {len(prompts)} clips, {len(prompts) - len(empty)} with a caption")
    print(f"{args.out / DROPPED} lists what was dropped; kept.png and dropped.png beside it show both.")
    if empty:
        print(
            f"{len(empty)} clips have no caption, the first in line {empty[0]}. Fill in 'prompt' in {TABLE}, "
            "or run this command again with --captions or --caption_model. Training refuses empty prompts."
        )
    else:
        print(f"Next: python -m utils.commands.inspect_dataset {args.out}")


if __name__ == "__main__":
    with exit_on_user_error():
        check_requirements(*PACKAGES)
        main()
