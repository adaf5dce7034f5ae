"""Reads the images and clips that a video starts from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from dataset.condition_frames import LAST
from dataset.images import image_size, load_image
from dataset.summary import REPORTED_CHANGE
from dataset.video import ClipInfo, FrameSelection, Resolution, decode, frames_available, probe, stretch
from utils.common.errors import UserError
from utils.generation.args import PATHS, DemoArgs
from utils.generation.checks import as_user_error, task_of
from utils.generation.videos import Video, located
from utils.model.conditioned_pipeline import Condition
from utils.model.encoders import to_model_range
from utils.model.spec import ModelSpec


def files_of(args: DemoArgs) -> dict[str, Path]:
    """Returns flag -> path of the images and clips of a video."""
    return {f"--{name}": path for name in sorted(PATHS) if (path := getattr(args, name)) is not None}


def notes_of(video: Video, spec: ModelSpec, resolution: Resolution) -> list[str]:
    """Returns notes on the length of a video, and on images and clips that are stretched.

    Raises:
        UserError: an image or a clip cannot be read, or a clip to continue does not suit the length.
    """
    with located(video):
        return list(_notes(video, spec, resolution))


def _notes(args: DemoArgs, spec: ModelSpec, resolution: Resolution) -> Iterator[str]:
    task, rate = task_of(args, spec), args.fps or spec.fps
    if task != "v2v":
        yield from spec.frames_notes(resolution.frames)
    for flag, path in files_of(args).items():
        is_image = flag == "--last_image" or (flag == "--image_or_video_path" and task == "i2v")
        info = (
            ClipInfo(1, 1.0, 0.0, *as_user_error(image_size, path, flag=flag))
            if is_image
            else as_user_error(probe, path, flag=flag)
        )
        change = stretch(info, resolution)
        if args.resize_mode == "stretch" and change > REPORTED_CHANGE:
            yield f"{path} is stretched by {change:.0%}; --resize_mode crop keeps its shape."
        requested = args.num_frames or spec.native.frames
        if task == "v2v" and resolution.frames != requested:
            clip = f"{path} has {frames_available(info, rate)} frames at {rate:g} fps"
            yield f"{clip}; the video has {resolution.frames} frames and not {requested}."
    if args.prefix_video is not None:
        count, available = prefix_length(args, spec, resolution, args.prefix_video)
        yield (f"the last {count} of {available} frames at {rate:g} fps of {args.prefix_video} are the first frames.")


def prefix_length(args: DemoArgs, spec: ModelSpec, resolution: Resolution, path: Path) -> tuple[int, int]:
    """Returns the number of frames to take from the end of the clip to continue, and the number that it has.

    Raises:
        UserError: the clip cannot be read, is too short, or leaves nothing to generate.
    """
    flag, fps = f"--prefix_video {path}", args.fps or spec.fps
    available = frames_available(as_user_error(probe, path, flag="--prefix_video"), fps)
    count = args.prefix_frames or (available - 1) // 4 * 4 + 1
    if not 5 <= count <= available:
        raise UserError(f"{flag}: it has {available} frames at {fps:g} fps, but {max(count, 5)} are needed.")
    if count >= resolution.frames:
        raise UserError(
            f"{flag}: its {count} frames at {fps:g} fps leave nothing to generate of {resolution.frames}; "
            f"take fewer, such as --prefix_frames {(resolution.frames - 2) // 4 * 4 + 1}."
        )
    return count, available


def read_condition(args: DemoArgs, spec: ModelSpec, resolution: Resolution) -> Condition | None:
    """Returns the last image or the end of the clip to continue; None if neither is given.

    Raises:
        UserError: a file cannot be read.
    """
    if args.last_image is not None:
        image = as_user_error(load_image, args.last_image, resolution, args.resize_mode, flag="--last_image")
        return Condition(spec, LAST, to_model_range(image[None])[None])
    if args.prefix_video is None:
        return None
    count, available = prefix_length(args, spec, resolution, args.prefix_video)
    size = replace(resolution, frames=count)
    selection = FrameSelection(size, args.fps or spec.fps, args.resize_mode, available - count, count)
    frames = as_user_error(decode, args.prefix_video, selection, flag="--prefix_video")
    return Condition(spec, f"prefix:{count}", to_model_range(frames)[None])


def read_task_inputs(
    args: DemoArgs, spec: ModelSpec, resolution: Resolution, condition: Condition | None
) -> dict[str, Any]:
    """Returns the pipeline inputs that depend on the task: number of frames, condition image, source clip.

    Raises:
        UserError: the image or the clip cannot be read.
    """
    path = args.image_or_video_path
    if args.prefix_video is not None and condition is not None:
        first = ((condition.frames[0, 0] + 1) * 127.5).round().byte()  # the condition takes its place
        return {"num_frames": resolution.frames, "image": Image.fromarray(first.numpy())}
    if path is None:
        return {"num_frames": resolution.frames}
    if task_of(args, spec) == "i2v":
        pixels = as_user_error(load_image, path, resolution, args.resize_mode)
        return {"num_frames": resolution.frames, "image": Image.fromarray(pixels.numpy())}
    selection = FrameSelection(resolution, args.fps or spec.fps, args.resize_mode, 0, resolution.frames)
    clip = as_user_error(decode, path, selection)
    return {"video": [Image.fromarray(frame) for frame in clip.numpy()], "strength": args.strength}
