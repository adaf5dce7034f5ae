"""Reads the training and validation folders and scans their files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dataset.bucketing import SamplingPolicy
from dataset.file_index import FileIndex
from dataset.folder import DataFolder, folder_set_errors, read_folder
from dataset.images import is_image_file
from dataset.manifest import Sample, Table, find_table, read_manifest, resolve
from dataset.scan import ScanResult, scan_and_sample
from utils.common.errors import CheckReport, UserError
from utils.common.filesystem import flags_in_errors
from utils.config.args import ValidationArgs
from utils.config.data_args import DataArgs


def find_cache_dirs(data: DataArgs, samples: list[Sample]) -> dict[DataFolder, Path]:
    """Returns the latent cache of each data folder: `--cache_dir`, by default latent/ in the folder of its clips.

    The default does not depend on the other data folders, so entries of earlier runs on one of them are found.
    """
    by_folder: dict[DataFolder, list[Sample]] = {}
    for sample in samples:
        by_folder.setdefault(sample.folder, []).append(sample)
    return {folder: data.cache_dir or common_folder(part, folder.root) / "latent" for folder, part in by_folder.items()}


def common_folder(samples: list[Sample], root: Path) -> Path:
    """Returns the common folder of all clips, or `root` if they are in several folders that are not all below it.

    Images count only if there is no clip, so the cache stays where it is when images are added to clips.
    """
    paths = [sample.clip for sample in samples]
    paths = [path for path in paths if not is_image_file(path)] or paths
    folders = {Path(folder).absolute() for folder in {os.path.dirname(path) for path in paths}}  # noqa: PTH120
    common = Path(os.path.commonpath(folders))
    return common if len(folders) == 1 or common.is_relative_to(root.absolute()) else root


def scan_data(
    data: DataArgs,
    samples: list[Sample],
    validation: list[Sample],
    cache_dirs: Mapping[DataFolder, Path],
    save_index: Callable[[Path], bool],
) -> ScanResult:
    """Scans the clips and images, and selects clip samples for training and validation.

    Args:
        data: options with `fps` resolved.
        cache_dirs: latent cache of each data folder, which holds the index of its files. The first one also holds the
            files of the validation folder.
        save_index: whether to write the updated index of a latent cache.
    """
    assert data.fps is not None
    policy = SamplingPolicy(
        data.train_resolution, data.fps, data.resize_mode, data.clips_per_video, data.pad_short_clips
    )
    workers = len(os.sched_getaffinity(0))  # other local ranks are idle during the scan
    by_cache: dict[Path, list[Sample]] = {}
    for sample in samples:
        by_cache.setdefault(cache_dirs[sample.folder], []).append(sample)
    next(iter(by_cache.values())).extend(validation)
    indexes = [(FileIndex(cache_dir), part, save_index(cache_dir)) for cache_dir, part in by_cache.items()]
    with flags_in_errors({"--cache_dir": tuple(by_cache)}):
        return scan_and_sample(samples, validation, indexes, policy, workers, data.clip_timeout)


def read_training_samples(data: DataArgs, task: str) -> list[Sample]:
    """Reads all data folders, in their order. The flags set what a folder.toml does not.

    Raises:
        UserError: lists all errors of the folders.
    """
    if errors := folder_set_errors(data.data_root):
        raise UserError(errors)
    tables = [find_table(root, data.caption_column, data.metadata) for root in data.data_root]
    if data.image_column is not None and None not in tables:
        raise UserError(
            f"--image_column {data.image_column} is for line files; the table {tables[0]} has a column 'image'."
        )
    report, samples = CheckReport(), []
    for root, table in zip(data.data_root, tables, strict=True):
        label = str(root) if len(data.data_root) > 1 else ""
        defaults = DataFolder(root, label, id_token=data.id_token, caption_dropout=data.caption_dropout, flip=data.flip)
        folder = report.run(read_folder, defaults) or defaults
        if table is not None:
            content: dict[str, Any] = {"table": Table(table, optional=("image",) if task == "i2v" else ())}
        else:
            content = {"captions": data.caption_column, "videos": data.video_column, "images": data.image_column}
        samples += report.run(partial(read_manifest, root, id_token=folder.id_token, folder=folder, **content)) or []
    if report.errors:
        raise UserError(report.errors)
    return samples


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
