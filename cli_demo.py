"""Generates videos with a base CogVideoX model, LoRA checkpoints, or a fine-tuned transformer.

python cli_demo.py --model_path THUDM/CogVideoX-5b --prompt "A kitten" --lora_path outputs/t2v-lora/checkpoint-500
python cli_demo.py --model_path THUDM/CogVideoX-5b --prompt "A kitten" --transformer_path outputs/t2v-sft/checkpoint-500
python cli_demo.py --model_path THUDM/CogVideoX-5b-I2V --prompt "It runs" --image_or_video_path first_frame.png
python cli_demo.py --model_path THUDM/CogVideoX-5b --prompt_file prompts.txt --output_path videos
python cli_demo.py --again output.mp4
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import utils  # noqa: F401  (names missing requirements)

# isort: split
import torch
from PIL import Image

from dataset.containers import ClipError
from dataset.decoders import open_reader
from dataset.video import Resolution
from utils.checkpoint.finetuned import find_transformer
from utils.checkpoint.lora_reader import lora_sources
from utils.common.contact_sheet import contact_sheet, evenly_spaced, strip
from utils.common.errors import CheckReport, UserError, exit_on_user_error
from utils.common.filesystem import flags_in_errors
from utils.generation.args import DemoArgs, parse_demo, relative_paths, settings_of
from utils.generation.checks import check, task_of, with_positions
from utils.generation.comparison import save_picture, side_by_side
from utils.generation.inputs import files_of, notes_of
from utils.generation.pipeline import (
    device_here,
    encode_prompts,
    generate,
    load_pipeline,
    scale_lora,
    working_dtype,
)
from utils.generation.processes import num_processes, own_shard, start_processes
from utils.generation.record import Record, differences, is_made, make_record, read_record, save_record
from utils.generation.videos import Video, located, videos_of
from utils.model import loading
from utils.model.encoders import prompt_notes
from utils.model.spec import ModelSpec, read_spec

# Rows of the contact sheet, and names of videos in an error.
SHEET_ROWS, MAX_NAMES = 40, 10


def main() -> int:
    args = parse_demo()
    model_dir = loading.resolve_model_dir(args.model_path)
    spec = with_positions(args, read_spec(model_dir, args.variant))
    videos = videos_of(args)
    resolutions = check(args, videos, spec)
    shard, processes = own_shard(), num_processes()
    if shard is None:
        print_notes(args, videos, resolutions, model_dir, spec)
    failures: list[str] = []
    jobs = list(zip(videos, resolutions, strict=True))
    if shard is None and processes > 1 and not args.is_single:
        failures = start_processes(sys.argv[1:], processes)
    else:
        make_videos(args, jobs if shard is None else shard.select(jobs), model_dir, spec)
    if shard is None and len(videos) > 1:
        save_contact_sheet(videos)
    if failures:
        names = [str(video.output_path) for video, *_ in missing_videos(jobs, model_dir, spec)]
        listed = ", ".join(names[:MAX_NAMES]) + (" and others" if len(names) > MAX_NAMES else "")
        made = f"{len(names)} of {len(videos)} videos were not made: {listed}. " if names else ""
        raise UserError(f"{' '.join(failures)} {made}Run the same command again; it makes only what is missing.")
    return 0


def print_notes(
    args: DemoArgs, videos: list[Video], resolutions: list[Resolution], model_dir: Path, spec: ModelSpec
) -> None:
    """Prints notes on models, prompts and videos, each once. Raises UserError with every file that cannot be read."""
    notes, report = loading.variant_notes(model_dir, args.variant), CheckReport()
    prompts = [text for video in videos for text in (video.prompt, video.negative_prompt) if text]
    notes += report.run(prompt_notes, model_dir, prompts, spec.max_text_seq_length) or []
    for video, resolution in zip(videos, resolutions, strict=True):
        notes += report.run(notes_of, video, spec, resolution) or []
    if report.errors:
        raise UserError(dict.fromkeys(report.errors))
    if args.again is not None:
        record = record_of(videos[0], resolutions[0], model_dir, spec)
        notes += [f"since {args.again} was made, {change}." for change in differences(read_record(args.again), record)]
    for note in dict.fromkeys(notes):
        print(f"Note: {note}")


def record_of(video: DemoArgs, resolution: Resolution, model_dir: Path, spec: ModelSpec) -> Record:
    device = device_here()
    resolved = {
        "task": task_of(video, spec),
        "resolution": str(resolution),
        "fps": video.fps or spec.fps,
        "dtype": str(working_dtype(video, model_dir)).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    files = {path: [path] for path in files_of(video).values()}
    files |= {path: lora_sources(path, "--lora_path") for path in video.lora_path}
    if video.transformer_path is not None:
        files[video.transformer_path] = [find_transformer(video.transformer_path)]
    settings = settings_of(video)
    is_relative = any(Path(path).exists() for _, path in relative_paths(settings))
    return make_record(settings, resolved, model_dir, video.variant, files, is_relative)


def missing_videos(
    jobs: list[tuple[Video, Resolution]], model_dir: Path, spec: ModelSpec
) -> list[tuple[Video, Resolution, Record]]:
    """Returns the videos that do not exist yet with the same settings, each with its record."""
    defaults = settings_of(DemoArgs())
    found = ((video, resolution, record_of(video, resolution, model_dir, spec)) for video, resolution in jobs)
    return [
        (video, resolution, record)
        for video, resolution, record in found
        if video.output_path is None
        or not (is_made(record, video.output_path, defaults) and all(path.is_file() for path in beside(video)))
    ]


def beside(video: DemoArgs) -> list[Path]:
    """Returns the files beside a video: its record, and the picture of a comparison."""
    assert video.output_path is not None
    return [video.output_path.with_suffix(suffix) for suffix in (".json", *((".png",) if video.compare else ()))]


def make_videos(args: DemoArgs, jobs: list[tuple[Video, Resolution]], model_dir: Path, spec: ModelSpec) -> None:
    """Generates the videos that do not exist yet. Loads the models if there are any."""
    missing = missing_videos(jobs, model_dir, spec)
    missing_paths = {video.output_path for video, *_ in missing}
    for video, _ in jobs:
        if video.output_path not in missing_paths:
            print(f"{video.output_path} exists, made with the same settings")
    if not missing:
        return
    texts = [text for video, *_ in missing for text in (video.prompt, video.negative_prompt) if text is not None]
    embeddings = encode_prompts(args, model_dir, spec, texts)
    pipeline = load_pipeline(args, model_dir, spec)
    for number, (video, resolution, record) in enumerate(missing, 1):
        count = f"{number} of {len(missing)}: " if len(missing) > 1 else ""
        steps = f"{video.num_inference_steps} steps, seed {video.seed}"
        print(f"{count}Generating {task_of(video, spec)}, {resolution}, {steps}", flush=True)
        with located(video):
            make_video(pipeline, video, resolution, record, spec, embeddings)


def make_video(
    pipeline: Any,
    video: DemoArgs,
    resolution: Resolution,
    record: Record,
    spec: ModelSpec,
    embeddings: dict[str, torch.Tensor],
) -> None:
    """Generates one video, or a comparison of several, and writes it with its record."""
    started, output = time.perf_counter(), video.output_path
    assert output is not None
    if video.compare:
        compared = {}
        for factor in dict.fromkeys((0.0, *video.compare)):
            scale_lora(pipeline, video, factor)
            title = f"LoRA {factor:g}" if factor else "base"
            compared[title] = generate(pipeline, video, spec, resolution, embeddings)
        frames = side_by_side(compared)
    else:
        frames = generate(pipeline, video, spec, resolution, embeddings)
    with flags_in_errors({"--output_path": output.parent}):
        output.parent.mkdir(parents=True, exist_ok=True)
        save_record(record, output)
        if video.compare:
            save_picture(compared, output.with_suffix(".png"))
        # last, since a video that exists counts as made
        loading.write_video(frames, output, video.fps or spec.fps, json.dumps(record, ensure_ascii=False))
    print(f"{output}: {len(frames)} frames in {time.perf_counter() - started:.1f} s")


def save_contact_sheet(videos: Sequence[DemoArgs]) -> None:
    """Draws a row of frames of each video that exists; of at most `SHEET_ROWS`, evenly spaced."""
    made = [video for video in videos if video.output_path is not None and video.output_path.is_file()]
    if not made:
        return
    shown = [made[number] for number in evenly_spaced(len(made), SHEET_ROWS)]
    folder = shown[0].output_path.parent  # type: ignore[union-attr]
    sheet = contact_sheet(list(sheet_rows(shown)))
    with flags_in_errors({"--output_path": folder}):
        sheet.save(folder / "contact_sheet.png")
    print(f"{len(shown)} of {len(videos)} videos in {folder / 'contact_sheet.png'}")


def sheet_rows(videos: Sequence[DemoArgs]) -> Iterator[tuple[str, Image.Image | str]]:
    """Yields the caption and the frames of each video, or why it cannot be read."""
    for video in videos:
        assert video.output_path is not None
        try:
            reader = open_reader(video.output_path)
            row: Image.Image | str = strip(list(reader.read(evenly_spaced(len(reader.times) - 1))))
        except ClipError as error:  # the process that wrote the video has failed
            row = str(error)
        yield f"{video.output_path.name}  seed {video.seed}  {video.prompt}", row


if __name__ == "__main__":
    with exit_on_user_error():
        try:
            sys.exit(main())
        except KeyboardInterrupt:  # without a traceback of each process
            sys.exit(130)
