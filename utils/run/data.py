"""Reads the training and validation folders and scans their files."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from dataset.bucketing import SamplingPolicy
from dataset.file_index import FileIndex
from dataset.manifest import Sample, Table, find_table, read_manifest, resolve
from dataset.scan import ScanResult, scan_and_sample
from utils.common.errors import UserError
from utils.common.filesystem import flags_in_errors
from utils.config.args import ValidationArgs
from utils.config.data_args import DataArgs


def find_cache_dir(data: DataArgs, samples: list[Sample]) -> Path:
    """Returns `--cache_dir`, by default latent/ in the folder of the clips."""
    return data.cache_dir or common_folder(samples, data.data_root) / "latent"


def common_folder(samples: list[Sample], root: Path) -> Path:
    """Returns the common folder of all clips, or `root` if they are in several folders that are not all below it."""
    folders = {Path(folder).absolute() for folder in {os.path.dirname(sample.clip) for sample in samples}}  # noqa: PTH120
    common = Path(os.path.commonpath(folders))
    return common if len(folders) == 1 or common.is_relative_to(root.absolute()) else root


def scan_data(
    data: DataArgs,
    samples: list[Sample],
    validation: list[Sample],
    cache_dir: Path,
    save_index: bool,
) -> ScanResult:
    """Scans the clips and images, and selects clip samples for training and validation.

    Args:
        data: options with `fps` resolved.
        cache_dir: folder of the file index.
        save_index: whether to write the updated index.
    """
    assert data.fps is not None
    policy = SamplingPolicy(
        data.train_resolution, data.fps, data.resize_mode, data.clips_per_video, data.pad_short_clips
    )
    workers = len(os.sched_getaffinity(0))  # other local ranks are idle during the scan
    index = FileIndex(cache_dir)
    with flags_in_errors({"--cache_dir": cache_dir}):
        return scan_and_sample(samples, validation, index, policy, workers, data.clip_timeout, save_index)


def read_training_samples(data: DataArgs, task: str) -> list[Sample]:
    """Reads the data folder. Raises UserError with all of its errors."""
    table = find_table(data.data_root, data.caption_column, data.metadata)
    if table is not None and data.image_column is not None:
        raise UserError(
            f"--image_column {data.image_column} is for line files; the table {table} has a column 'image'."
        )
    if table is not None:
        optional = ("image",) if task == "i2v" else ()
        return read_manifest(data.data_root, table=Table(table, optional=optional), id_token=data.id_token)
    return read_manifest(data.data_root, data.caption_column, data.video_column, data.image_column, data.id_token)


def read_validation_samples(data: DataArgs, options: ValidationArgs, task: str) -> list[Sample]:
    """Reads the validation folder; returns an empty list without --do_validation.

    Clips are optional. The held-out loss uses those that exist.

    Raises:
        UserError: lists all errors of the folder.
    """
    root = options.validation_dir
    if not options.do_validation or root is None:
        return []
    read = partial(read_manifest, root, id_token=data.id_token, flag="--validation_dir")
    table = find_table(root, options.validation_prompts, None)
    if table is not None:
        optional = ("video", "image", "last_image") if task == "i2v" else ("video",)
        samples = read(table=Table(table, ("prompt",), optional))
    else:
        videos = data.video_column if resolve(root, data.video_column).exists() or not root.is_dir() else None
        samples = read(
            options.validation_prompts, videos, options.validation_images, last_images=options.validation_last_images
        )
    if task == "i2v" and not all(sample.video or sample.image for sample in samples):
        raise UserError(
            f"--validation_dir {root}: image-to-video needs an image for each prompt; give --validation_images, or a "
            f"{data.video_column} with clips, whose first frames are used."
        )
    condition = data.condition_frames[0]
    if condition.has_last and not all(sample.video or sample.last_image for sample in samples):
        raise UserError(
            f"--validation_dir {root}: --condition_frames {condition} needs a last image for each prompt; give "
            f"--validation_last_images, or a {data.video_column} with clips, whose last frames are used."
        )
    if condition.prefix > 1 and not all(sample.video for sample in samples):
        raise UserError(
            f"--validation_dir {root}: --condition_frames {condition} needs a {data.video_column} with a clip for each "
            "prompt, whose first frames are used."
        )
    return samples
