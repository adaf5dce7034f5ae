"""Shows what training will see of a data folder, and looks after its latent cache.

    python -m utils.commands.inspect_dataset data --train_resolution 49x480x720 49x720x480
    python -m utils.commands.inspect_dataset data --model_path THUDM/CogVideoX-5b --verify_cache
    python -m utils.commands.inspect_dataset data --model_path THUDM/CogVideoX-5b --prune_cache

It takes the data and validation flags of `train.py`. A command of its own: nothing of the training imports it.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from dataset.bucketing import ClipSample
from dataset.latent_cache import LatentCache
from dataset.scan import ScanResult, summarize
from dataset.video import SPREAD, cropped, decode, stretch
from dataset.worker_pool import Failure, run_in_workers
from utils.common.errors import CheckReport, UserError, exit_on_user_error
from utils.common.filesystem import check_writable, remove_stale_temporaries
from utils.config.args import ValidationArgs
from utils.config.data_args import DataArgs
from utils.config.options import add_options, collect, make_parser, option
from utils.model import loading
from utils.model.spec import ModelSpec, read_spec
from utils.run.data import find_cache_dir, read_training_samples, read_validation_samples, scan_data
from utils.run.plan import encoding_of

COLUMNS = ("line", "video", "resolution", "from_s", "to_s", "left_out", "prompt")
SHOWN_ROWS, SHEET_ROWS, SHEET_COLUMNS, THUMBNAIL_HEIGHT, CAPTION_HEIGHT = 20, 12, 6, 120, 16


@dataclass(frozen=True)
class InspectArgs:
    model_path: str | None = option(
        None, help="gives the default --fps and checks the resolutions; needed for what concerns the cache"
    )
    enable_tiling: bool = option(True, help="as in training: it decides what the VAE gives")
    inspect_dir: Path = option(Path("inspect"), help="samples.csv and contact_sheet.png are written here")
    verify_cache: bool = option(False, help="read every entry of the cache; damaged ones are removed")
    prune_cache: bool = option(False, help="remove entries that no sample of this folder uses with these flags")


def main() -> None:
    data, validation, options = parse(sys.argv[1:])
    spec = model_dir = None
    if options.model_path is not None:
        model_dir = loading.resolve_model_dir(options.model_path)
        spec = read_spec(model_dir)
    data = replace(data, fps=data.fps or (spec.fps if spec else 8.0))
    errors = [*data.errors()]
    if spec is not None:
        errors += [
            fault for size in data.train_resolution for fault in spec.resolution_errors(size, "--train_resolution")
        ]
    if (options.verify_cache or options.prune_cache) and spec is None:
        errors.append("--verify_cache and --prune_cache need --model_path: entries belong to an encoder.")
    found = CheckReport(errors)
    found.run(check_writable, options.inspect_dir, "--inspect_dir")
    if found.errors:
        raise UserError(found.errors)
    task = spec.task if spec else ("i2v" if data.image_column else "t2v")
    samples = read_training_samples(data, task)
    held_out = read_validation_samples(data, replace(validation, do_validation=True), task)
    cache_dir = find_cache_dir(data, samples)
    seen = scan_data(data, samples, held_out, cache_dir, saves=cache_dir.is_dir())
    show(data, seen, options.inspect_dir)
    if spec is not None and model_dir is not None and cache_dir.is_dir():
        care_for_cache(options, data, seen, LatentCache(cache_dir), model_dir, spec)


def parse(argv: list[str]) -> tuple[DataArgs, ValidationArgs, InspectArgs]:
    parser = make_parser(
        "Shows what training will see of a data folder: python -m utils.commands.inspect_dataset DATA_ROOT ..."
    )
    groups = (DataArgs, ValidationArgs, InspectArgs)
    for group in groups:
        add_options(parser, group)
    if argv and not argv[0].startswith("-"):
        argv = ["--data_root", *argv]
    values = vars(parser.parse_args(argv))
    data, validation, options = (collect(values, group) for group in groups)
    return data, validation, options


def show(data: DataArgs, found: ScanResult, folder: Path) -> None:
    assert data.fps is not None
    if found.samples:
        print("\n".join(summarize(found.samples, found.facts, data.resize_mode, data.fps)))
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "samples.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(COLUMNS)
            for number, row in enumerate(rows(data, found)):
                table.writerow(row)
                if number < SHOWN_ROWS:
                    print("  ".join(str(value)[-40:].ljust(10) for value in row))
        print(f"{len(found.samples)} samples in {folder / 'samples.csv'}")
        contact_sheet(found.samples, data.clip_timeout).save(folder / "contact_sheet.png")
        print(f"{SHEET_COLUMNS} frames of up to {SHEET_ROWS} samples in {folder / 'contact_sheet.png'}")
    for sentence in found.bad:
        print(f"Cannot be used: {sentence}")


def rows(data: DataArgs, found: ScanResult) -> Iterator[tuple[object, ...]]:
    """One row of `COLUMNS` a sample; left out is the share of the picture that is cut, or its distortion."""
    for clip_sample in found.samples:
        selection, info = clip_sample.selection, found.facts[clip_sample.sample.clip].info
        rate = info.fps if selection.rate == SPREAD else selection.rate
        if data.resize_mode == "crop":
            changed = f"{cropped(info, selection.resolution):.0%} cut"
        else:
            changed = f"{stretch(info, selection.resolution):.0%} stretched"
        span = f"{selection.first / rate:.2f}", f"{min((selection.first + selection.span) / rate, info.seconds):.2f}"
        yield (
            clip_sample.sample.line,
            clip_sample.sample.clip,
            selection.resolution,
            *span,
            changed,
            clip_sample.sample.prompt,
        )


def contact_sheet(samples: list[ClipSample], timeout: float) -> Image.Image:
    """A row of frames a sample, evenly taken from the dataset and from each sample, as training gets them."""
    chosen = [
        samples[number] for number in sorted({*np.linspace(0, len(samples) - 1, SHEET_ROWS).astype(int).tolist()})
    ]
    largest = max(
        size.frames * size.height * size.width * 3 for size in {clip_sample.resolution for clip_sample in chosen}
    )
    strips = {}
    for done in run_in_workers(_thumbnails, list(enumerate(chosen)), 2, timeout, largest):
        number, clip_sample = done.job
        caption = f"{clip_sample.resolution}  {clip_sample}  {clip_sample.sample.prompt}"
        strips[number] = (done.outcome.reason if isinstance(done.outcome, Failure) else done.outcome, caption)
    width = max([strip.width for strip, _ in strips.values() if isinstance(strip, Image.Image)], default=480)
    sheet = Image.new("RGB", (width, len(chosen) * (THUMBNAIL_HEIGHT + CAPTION_HEIGHT)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (strip, caption) in strips.items():
        top = number * (THUMBNAIL_HEIGHT + CAPTION_HEIGHT)
        pen.text((2, top + 2), caption.encode("ascii", "replace").decode(), fill="black")
        if isinstance(strip, Image.Image):
            sheet.paste(strip, (0, top + CAPTION_HEIGHT))
        else:
            pen.text((2, top + CAPTION_HEIGHT + 2), strip, fill="red")
    return sheet


def _thumbnails(job: tuple[int, ClipSample], buffer: torch.Tensor) -> Image.Image:
    size = job[1].resolution
    pixels = buffer[: size.frames * size.height * size.width * 3].view(size.frames, size.height, size.width, 3)
    decode(Path(job[1].sample.clip), job[1].selection, pixels)
    width = round(THUMBNAIL_HEIGHT * size.width / size.height)
    strip = Image.new("RGB", (SHEET_COLUMNS * width, THUMBNAIL_HEIGHT))
    for place, number in enumerate(np.linspace(0, size.frames - 1, SHEET_COLUMNS).round().astype(int)):
        strip.paste(Image.fromarray(pixels[number].numpy()).resize((width, THUMBNAIL_HEIGHT)), (place * width, 0))
    return strip


def care_for_cache(
    options: InspectArgs, data: DataArgs, found: ScanResult, cache: LatentCache, model_dir: Path, spec: ModelSpec
) -> None:
    """Says how much of the cache these samples use; verifies and prunes it where that is wanted."""
    encoding = encoding_of(model_dir, spec, options.enable_tiling)
    all_keys = encoding.keys(found.samples, found.facts, data.flip) + encoding.keys(found.validation, found.facts)
    used = {name for keys in all_keys for name in (*keys.video, *keys.image, keys.prompt)} | {encoding.prompt_key("")}
    there = set(cache.names())
    print(f"Latent cache {cache.folder}: {len(used & there)} of {len(used)} entries are there")
    if options.verify_cache:
        with ThreadPoolExecutor() as pool:
            verdicts = pool.map(partial(cache.is_intact, verify_content=True), sorted(used & there))
            damaged = [*tqdm(verdicts, "Reading entries", len(used & there), unit="entry")].count(False)
        print(
            f"{damaged} entries were damaged and are removed; the next run encodes them anew"
            if damaged
            else "All are whole"
        )
    unused = there - used
    if options.prune_cache and (found.bad or not found.samples):
        raise UserError(
            "--prune_cache removes nothing while lines of the data cannot be used; their entries may be of use."
        )
    if options.prune_cache:
        for name in unused:
            cache.remove(name)
        remove_stale_temporaries(cache.folder)
        print(f"{len(unused)} entries that nothing here uses are removed")
    elif unused:
        print(f"{len(unused)} entries are for other flags, data or models; --prune_cache removes them")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
