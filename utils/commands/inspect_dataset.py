"""Shows the samples that training will use from a data folder, and maintains its latent cache.

    python -m utils.commands.inspect_dataset data --train_resolution 49x480x720 49x720x480
    python -m utils.commands.inspect_dataset clips more_clips
    python -m utils.commands.inspect_dataset data --model_path THUDM/CogVideoX-5b --verify_cache
    python -m utils.commands.inspect_dataset data --model_path THUDM/CogVideoX-5b --prune_cache

The command takes the data and validation flags of `train.py`.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from tqdm import tqdm

from dataset.bucketing import ClipSample
from dataset.images import load_image
from dataset.latent_cache import EncoderSettings, LatentCache
from dataset.precompute import decode_sample
from dataset.scan import ScanResult
from dataset.summary import summarize
from dataset.video import NATIVE_STRIDE, cropped, stretch
from dataset.worker_pool import Failure, run_in_workers
from utils.common.contact_sheet import THUMBNAILS, contact_sheet, evenly_spaced, strip
from utils.common.errors import CheckReport, UserError, exit_on_user_error
from utils.common.filesystem import check_writable, flags_in_errors, remove_stale_temporaries
from utils.config.args import ValidationArgs
from utils.config.data_args import DataArgs
from utils.config.options import Switch, add_options, collect, make_parser, option
from utils.model import loading
from utils.model.spec import ModelSpec, read_spec
from utils.run.cache_size import CacheSizes, cache_sizes
from utils.run.data import find_cache_dirs, read_training_samples, read_validation_samples, scan_data
from utils.run.plan import encoder_settings

COLUMNS = ("line", "video", "resolution", "from_s", "to_s", "left_out", "prompt")
# Rows of the table that are printed, and samples on the contact sheet.
PRINTED_ROWS, SHEET_ROWS = 20, 12


@dataclass(frozen=True)
class InspectArgs:
    model_path: str | None = option(
        None, help="checkpoint that sets the default --fps and limits the resolutions; required for the cache options"
    )
    variant: str | None = option(None, help="as in training; part of the keys of the cache entries")
    learned_positions: Literal["keep", "interpolate", "drop"] | None = option(
        None, help="as in training; decides on the sizes that CogVideoX-5b-I2V takes"
    )
    enable_tiling: Switch = option(
        "auto", help="as in training; part of the keys of the cache entries; auto: as most entries in the cache are"
    )
    inspect_dir: Path = option(Path("inspect"), help="output folder for samples.csv and contact_sheet.png")
    verify_cache: bool = option(False, help="read every cache entry of these samples and remove damaged ones")
    prune_cache: bool = option(False, help="remove cache entries that no sample uses with these flags")


def main() -> None:
    data, validation_args, options = parse(sys.argv[1:])
    spec = model_dir = None
    if options.model_path is not None:
        model_dir = loading.resolve_model_dir(options.model_path)
        spec = read_spec(model_dir, options.variant)
        if options.learned_positions is not None:
            spec = spec.with_learned_positions(options.learned_positions)
    data = replace(data, fps=data.fps or (spec.fps if spec else 8.0))
    check(options, data, spec)

    task = spec.task if spec else ("i2v" if data.image_column else "t2v")
    samples = read_training_samples(data, task)
    validation = read_validation_samples(data, replace(validation_args, do_validation=True), task)
    cache_dirs = find_cache_dirs(data, samples)
    scan = scan_data(data, samples, validation, cache_dirs, save_index=Path.is_dir)
    with flags_in_errors({"--inspect_dir": options.inspect_dir}):
        show_samples(data, scan, options.inspect_dir)
    if spec is None or model_dir is None:
        return
    caches = [LatentCache(cache_dir) for cache_dir in dict.fromkeys(cache_dirs.values())]
    existing = {name for cache in caches for name in cache.names()}  # data folders share entries
    for cache in caches:
        part = [clip_sample for clip_sample in scan.samples if cache_dirs[clip_sample.sample.folder] == cache.folder]
        maintain_cache(options, data, replace(scan, samples=part), cache, model_dir, spec, existing)


def parse(argv: list[str]) -> tuple[DataArgs, ValidationArgs, InspectArgs]:
    """Parses the command line, whose first arguments may be the data folders without their flag."""
    parser = make_parser(
        "Shows the samples that training will use, and maintains their latent cache. The first arguments may be the "
        "data folders, in place of --data_root. All data and validation flags of train.py are accepted, so that those "
        "of a run can be pasted; some have no effect here.",
        prog="python -m utils.commands.inspect_dataset",
    )
    groups = (DataArgs, ValidationArgs, InspectArgs)
    for group in groups:
        add_options(parser, group)
    if argv and not argv[0].startswith("-"):
        argv = ["--data_root", *argv]
    values = vars(parser.parse_args(argv))
    data, validation, options = (collect(values, group) for group in groups)
    return data, validation, options


def check(options: InspectArgs, data: DataArgs, spec: ModelSpec | None) -> None:
    """Raises UserError with all invalid options."""
    report = CheckReport(list(data.errors()))
    if spec is not None:
        for resolution in data.train_resolution:
            report.errors += spec.resolution_errors(resolution, "--train_resolution")
    elif options.verify_cache or options.prune_cache:
        report.errors.append("--verify_cache and --prune_cache need --model_path, whose encoders made the entries.")
    report.run(check_writable, options.inspect_dir, "--inspect_dir")
    if report.errors:
        raise UserError(report.errors)


def show_samples(data: DataArgs, scan: ScanResult, folder: Path) -> None:
    """Prints a summary, and writes the table of samples and the contact sheet to a folder."""
    assert data.fps is not None
    if scan.samples:
        print("\n".join(summarize(scan.samples, scan.facts, data.resize_mode, data.fps)))
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "samples.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(COLUMNS)
            for number, row in enumerate(sample_rows(data, scan)):
                table.writerow(row)
                if number < PRINTED_ROWS:
                    print("  ".join(str(value)[-40:].ljust(10) for value in row))
        print(f"{len(scan.samples)} samples in {folder / 'samples.csv'}")
        sample_sheet(scan.samples, data.clip_timeout).save(folder / "contact_sheet.png")
        print(f"{THUMBNAILS} frames of up to {SHEET_ROWS} samples in {folder / 'contact_sheet.png'}")
    for error in scan.unusable:
        print(f"Unusable: {error}")


def sample_rows(data: DataArgs, scan: ScanResult) -> Iterator[tuple[object, ...]]:
    """Yields one row of `COLUMNS` per sample. `left_out` is the share that is cropped, or the distortion."""
    for clip_sample in scan.samples:
        selection, part = clip_sample.selection, clip_sample.sample.part
        info = scan.facts[clip_sample.sample.clip].info_of(part)
        rate = info.fps if selection.rate == NATIVE_STRIDE else selection.rate
        if data.resize_mode == "crop":
            change = f"{cropped(info, selection.resolution):.0%} cut"
        else:
            change = f"{stretch(info, selection.resolution):.0%} stretched"
        start_s = selection.first / rate
        end_s = min((selection.first + selection.span) / rate, info.seconds)
        start_s, end_s = (seconds + (part.start if part else 0) for seconds in (start_s, end_s))
        yield (
            clip_sample.sample.line,
            clip_sample.sample.clip,
            selection.resolution,
            *(("", "") if clip_sample.is_image else (f"{start_s:.2f}", f"{end_s:.2f}")),
            change,
            clip_sample.sample.prompt,
        )


def sample_sheet(samples: list[ClipSample], timeout: float) -> Image.Image:
    """Draws one row per sample, as training sees it: the condition image, if it has one, and some frames.

    Samples and frames are evenly spaced.

    Args:
        timeout: maximum number of seconds per sample.
    """
    chosen = [samples[number] for number in evenly_spaced(len(samples), SHEET_ROWS)]
    largest = max(
        size.frames * size.height * size.width * 3 for size in {clip_sample.resolution for clip_sample in chosen}
    )
    rows = {}
    for result in run_in_workers(_thumbnails, list(enumerate(chosen)), 2, timeout, largest):
        number, clip_sample = result.job
        caption = f"{clip_sample.resolution}  {clip_sample}  {clip_sample.sample.prompt}"
        rows[number] = caption, result.outcome.reason if isinstance(result.outcome, Failure) else result.outcome
    return contact_sheet([rows[number] for number in sorted(rows)])


def _thumbnails(job: tuple[int, ClipSample], buffer: torch.Tensor) -> Image.Image:
    """Decodes one sample in a worker process and draws its row. The job is (row number, sample)."""
    size = job[1].resolution
    pixels = buffer[: size.frames * size.height * size.width * 3].view(size.frames, size.height, size.width, 3)
    decode_sample(job[1], job[1].selection, pixels)
    pictures = [pixels[frame] for frame in evenly_spaced(size.frames)]
    if job[1].sample.image is not None:
        pictures.insert(0, load_image(Path(job[1].sample.image), size, job[1].selection.mode))
    return strip([picture.numpy() for picture in pictures])


def maintain_cache(
    options: InspectArgs,
    data: DataArgs,
    scan: ScanResult,
    cache: LatentCache,
    model_dir: Path,
    spec: ModelSpec,
    existing: set[str],
) -> None:
    """Prints the size of the cache and how much of it exists; verifies and prunes it on request.

    Args:
        scan: with the samples of the data folders of this cache.
        existing: entries in all latent caches of the run.

    Raises:
        UserError: pruning is requested, but some lines of the data are unusable, so their entries are unknown.
    """
    choices = (True, False) if options.enable_tiling == "auto" else (options.enable_tiling,)
    encodings = [encoder_settings(model_dir, spec, tiling, cache, options.variant)[0] for tiling in choices]
    sizes = max(
        (sizes_of(encoding, data, scan, model_dir, spec, options.variant) for encoding in encodings),
        key=lambda sizes: len(sizes.entries.keys() & existing),
    )
    used = sizes.entries.keys()
    print(f"Latent cache {cache.folder}: {len(used & existing)} of {len(used)} entries exist")
    if scan.samples:
        print(f"  {sizes.describe(used - existing)}")
    if options.verify_cache:
        names = sorted(filter(cache.has, used & existing))
        with ThreadPoolExecutor() as pool:
            results = pool.map(partial(cache.verify, read=True), names)
            results = tqdm(results, "Reading entries", len(names), unit="entry")
            damaged = [cache.path(name) for name, is_intact in zip(names, results, strict=True) if not is_intact]
        kept = [path for path in damaged if path.exists()]
        if removed := len(damaged) - len(kept):
            print(f"{removed} entries were damaged and have been removed; the next run encodes them again")
        if kept:
            print(f"{len(kept)} entries, such as {kept[0]}, cannot be read, or are damaged and cannot be removed")
        if not damaged:
            print("All entries are intact")
    unused = set(cache.names()) - used
    if options.prune_cache and (scan.unusable or not scan.samples):
        raise UserError(
            "--prune_cache: some lines of the data are unusable, and their entries may still be needed; fix or remove "
            "these lines first."
        )
    if options.prune_cache:
        for name in unused:
            cache.remove(name)
        remove_stale_temporaries(cache.folder)
        print(f"Removed {len(unused)} unused entries")
    elif unused:
        print(f"{len(unused)} entries belong to other flags, data or models; --prune_cache removes them")


def sizes_of(
    encoding: EncoderSettings, data: DataArgs, scan: ScanResult, model_dir: Path, spec: ModelSpec, variant: str | None
) -> CacheSizes:
    """Returns the sizes of all cache entries that training would read with these encoders."""
    keys = []
    for folder, part in groupby(scan.samples, lambda clip_sample: clip_sample.sample.folder):
        keys += encoding.keys(list(part), scan.facts, folder.flip, data.additions)
    keys += encoding.keys(scan.validation, scan.facts, additions=data.additions)
    prompts = [encoding.prompt_key(""), *(names.prompt for names in keys)]
    return cache_sizes(spec, model_dir, variant, scan.samples + scan.validation, keys, prompts)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
