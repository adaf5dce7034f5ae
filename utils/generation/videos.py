"""The videos that a command line of `cli_demo.py` asks for.

`--prompt_file` and `--num_videos` ask for several videos. Each is described by flags of its own, so a line of the file
may hold any flag of `PER_VIDEO`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataset.tables import read_lines, unique
from utils.common.errors import UserError
from utils.common.filesystem import expand_user, unreadable
from utils.config.options import add_options, collect, make_parser, require_seed
from utils.generation.args import PATHS, DemoArgs

# The flags of one video, which a line of the prompt file may hold; all others are the same for every video.
PER_VIDEO = (
    *("prompt", "negative_prompt", "image_or_video_path", "last_image", "prefix_video", "prefix_frames"),
    *("resize_mode", "num_frames", "height", "width", "fps", "num_inference_steps", "guidance_scale", "strength"),
    "seed",
)
ALIASES = {"image": "image_or_video_path", "video": "image_or_video_path"}
ONE_VIDEO: dict[str, Any] = {"prompt_file": None, "num_videos": 1, "output_path": None}


@dataclass(frozen=True)
class Video(DemoArgs):
    """The flags of one video.

    Attributes:
        source: the line of the prompt file that describes it, for messages; empty without such a file.
    """

    source: str = ""


@contextmanager
def located(video: Video) -> Iterator[None]:
    """Adds the line of the prompt file that describes a video to the errors of the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{video.source}: {text}" if video.source else text for text in error.errors) from error


def videos_of(args: DemoArgs) -> list[Video]:
    """Returns the videos, each with its prompt, seed and output file.

    Raises:
        UserError: lists all errors of the prompt file, or --num_videos leads to a seed that is too large.
    """
    if args.is_single:
        return [Video(**vars(args) | {"output_path": args.output_path or Path("output.mp4")})]
    folder = args.output_path or Path("videos")
    prompts = [Video(**vars(args))] if args.prompt_file is None else read_prompt_file(args, args.prompt_file)
    largest = max(video.seed for video in prompts) + args.num_videos - 1
    if errors := list(require_seed(largest)):
        raise UserError([f"--num_videos {args.num_videos}: {error}" for error in errors])
    names = [f"{number:03d}" for number in range(len(prompts))]
    return [
        replace(
            video,
            **ONE_VIDEO
            | {
                "seed": video.seed + number,
                "output_path": folder / (f"{name}-{video.seed + number}.mp4" if args.num_videos > 1 else f"{name}.mp4"),
            },
        )
        for name, video in zip(names, prompts, strict=True)
        for number in range(args.num_videos)
    ]


def read_prompt_file(args: DemoArgs, file: Path) -> list[Video]:
    """Reads the lines of a prompt file as flags that replace those of the command line. Skips blank lines.

    Relative paths start at the folder of the file.

    Raises:
        UserError: the file cannot be read, or lists every wrong line.
    """
    try:
        lines = read_lines(file)
    except (OSError, UnicodeDecodeError) as error:
        missing = None if file.is_file() else "there is no such file"
        raise UserError(f"--prompt_file {file}: {unreadable(file) or missing or 'it is not UTF-8 text'}.") from error
    parser = make_parser("")
    add_options(parser, DemoArgs)
    parser.set_defaults(**vars(args))
    is_json = file.suffix.lower() in (".jsonl", ".json")
    videos, errors = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        source = f"--prompt_file {file}, line {number}"
        try:
            values: dict[str, Any] = parse_object(line) if is_json else {"prompt": line.strip()}
            for name in PATHS & values.keys():
                values[name] = file.parent / expand_user(str(values[name]))
            flags = [f"--{name}={value}" for name, value in values.items()]
            values = vars(collect(vars(parser.parse_args(flags)), DemoArgs))
            video = Video(**values | ONE_VIDEO, source=source)
            errors += [f"{source}: {error}" for error in video.errors()]
            videos.append(video)
        except UserError as error:
            errors += [f"{source}: {message}" for message in error.errors]
    if not videos and not errors:
        errors = [f"--prompt_file {file} holds no prompt."]
    if errors:
        raise UserError(errors)
    return videos


def parse_object(line: str) -> dict[str, Any]:
    """Parses a line of a .jsonl file. Raises UserError if it is no object, has no prompt or an unknown key."""
    try:
        values = json.loads(line, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"it is not JSON ({error}).") from error
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise UserError('it must be an object with a text "prompt".')
    values = {ALIASES.get(name, name): value for name, value in values.items() if value is not None}
    if unknown := [name for name in values if name not in PER_VIDEO]:
        raise UserError(f"{', '.join(unknown)} cannot be set for one video; a line takes {', '.join(PER_VIDEO)}.")
    return values
