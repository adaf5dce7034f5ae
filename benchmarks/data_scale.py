"""Measures the start of a run on a large dataset: manifest, checks, cache lookup, first batch of an epoch.

    python -m benchmarks.data_scale MODEL_PATH FOLDER --samples 100000

Creates a data folder of hard links to the eight example clips, each with its own caption, and a complete cache. The
measured process is the one that a user starts, including its imports.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from utils.common.filesystem import ROOT


def make_data(folder: Path, samples: int) -> None:
    """Creates a data folder of hard links. Does nothing if it exists."""
    if (folder / "prompts.txt").exists():
        return
    (folder / "videos").mkdir(parents=True)
    (folder / "clips").mkdir()
    clips = [shutil.copy(clip, folder / "clips") for clip in sorted((ROOT / "examples/dataset/videos").glob("*.mp4"))]
    names = [f"videos/{number:06d}.mp4" for number in range(samples)]
    for name, clip in zip(names, itertools.cycle(clips), strict=False):
        os.link(clip, folder / name)
    (folder / "videos.txt").write_text("\n".join(names) + "\n")
    (folder / "prompts.txt").write_text("".join(f"number {number} of the shapes moves\n" for number in range(samples)))


def arguments(model: Path, folder: Path) -> list[str]:
    options = {
        "model_path": model,
        "model_type": "t2v",
        "data_root": folder,
        "output_dir": folder / "out",
        "train_resolution": "9x64x64",
        "mixed_precision": "no",
    }
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def start(model: Path, folder: Path, fill: bool) -> None:
    """Performs and times the start of a run. With `fill`, writes a cache of zeros instead."""
    started = time.perf_counter()
    from dataset.cached_dataset import CachedDataset, batches
    from dataset.latent_cache import LatentCache
    from dataset.precompute import RankShard, missing_jobs
    from dataset.sampler import SampleStream
    from utils.config.args import parse_args
    from utils.run.preflight import preflight

    import_s, import_mib = time.perf_counter() - started, peak_mib()
    started = time.perf_counter()
    plan = preflight(parse_args(arguments(model, folder)), 1)
    check_s = time.perf_counter() - started
    cache, prompts = LatentCache(plan.cache_dir), plan.prompts
    if fill:
        for name in {name for keys in plan.keys for name in keys.video}:
            cache.write(name, torch.zeros(32, 3, 8, 8))
        for name in prompts:
            cache.write(name, torch.zeros(26, 32))
        return
    started = time.perf_counter()
    missing = len(missing_jobs(cache, plan.samples, plan.keys, RankShard(0, 1), lambda: None))
    missing += sum(not cache.verify(name) for name in prompts)
    lookup_s = time.perf_counter() - started
    assert missing == 0
    print(f"imports {import_s:.1f} s, {import_mib:.0f} MiB")
    print(f"manifest and checks {check_s:.1f} s, cache lookup {lookup_s:.1f} s for {len(plan.samples)} samples")
    print(f"peak memory {peak_mib():.0f} MiB")
    started = time.perf_counter()
    dataset = CachedDataset(cache, plan.keys, plan.empty_prompt, plan.folders, 42)
    stream = SampleStream([clip_sample.resolution for clip_sample in plan.samples], 1, 1, 0, 1, 42, 0)
    next(batches(dataset, stream, False))
    first_batch_s = time.perf_counter() - started
    print(f"first batch {first_batch_s:.2f} s; peak memory {peak_mib():.0f} MiB")


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument(
        "--stage",
        choices=["fill", "start"],
        help="run only this stage, in this process; default: both, each in its own process",
    )
    options = parser.parse_args()
    if options.stage:
        start(options.model, options.folder, options.stage == "fill")
    else:
        make_data(options.folder, options.samples)
        for stage in ("fill", "start"):
            command = [sys.executable, "-m", "benchmarks.data_scale", *map(str, (options.model, options.folder))]
            started = time.perf_counter()
            subprocess.run([*command, "--stage", stage], check=True, cwd=ROOT)
            print(f"{stage}: {time.perf_counter() - started:.1f} s in total", flush=True)
