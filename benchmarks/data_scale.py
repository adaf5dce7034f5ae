"""How long a run over a large dataset takes to start: manifest, checks, cache lookup, first batch of an epoch.

    python -m benchmarks.data_scale MODEL_PATH FOLDER --samples 100000

Makes a data folder of hard links to the eight example clips, each with a caption of its own, and a full cache. The
figures are those of the process that a user starts, with everything it imports.
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

ROOT = Path(__file__).resolve().parents[1]


def make(folder: Path, samples: int) -> None:
    """A data folder of hard links; left as it is where it is there."""
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
    """What a run does before its first step; `fill` writes the cache that is missing, with zeros."""
    began = time.perf_counter()
    from dataset.cached_dataset import CachedDataset, batches
    from dataset.latent_cache import LatentCache
    from dataset.precompute import RankShard, missing_jobs
    from dataset.sampler import SampleStream
    from utils.config.args import parse_args
    from utils.run.preflight import preflight

    imported, memory = time.perf_counter() - began, _peak_mb()
    began = time.perf_counter()
    plan = preflight(parse_args(arguments(model, folder)), 1)
    checked = time.perf_counter() - began
    cache, prompts = LatentCache(plan.cache_dir), plan.prompts
    if fill:
        for name in {name for keys in plan.keys for name in keys.video}:
            cache.write(name, torch.zeros(32, 3, 8, 8))
        for name in prompts:
            cache.write(name, torch.zeros(26, 32))
        return
    began = time.perf_counter()
    missing = len(missing_jobs(cache, plan.samples, plan.keys, RankShard(0, 1), lambda: None))
    missing += sum(not cache.is_intact(name) for name in prompts)
    looked = time.perf_counter() - began
    assert missing == 0
    print(f"imports {imported:.1f} s, {memory:.0f} MB")
    print(f"manifest and checks {checked:.1f} s, cache lookup {looked:.1f} s for {len(plan.samples)} samples")
    print(f"peak memory {_peak_mb():.0f} MB")
    began = time.perf_counter()
    dataset = CachedDataset(cache, plan.keys, plan.empty_prompt, 0.0, 42)
    stream = SampleStream([clip_sample.resolution for clip_sample in plan.samples], 1, 1, 0, 1, 42, 0)
    next(batches(dataset, stream, 2, False))
    first_batch = time.perf_counter() - began
    print(f"first batch {first_batch:.2f} s; peak memory {_peak_mb():.0f} MB")


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--stage", choices=["fill", "start"], help="in a process of its own; by default both, in turn")
    options = parser.parse_args()
    if options.stage:
        start(options.model, options.folder, options.stage == "fill")
    else:
        make(options.folder, options.samples)
        for stage in ("fill", "start"):
            command = [sys.executable, "-m", "benchmarks.data_scale", *map(str, (options.model, options.folder))]
            began = time.perf_counter()
            subprocess.run([*command, "--stage", stage], check=True, cwd=ROOT)
            print(f"{stage}: {time.perf_counter() - began:.1f} s in all", flush=True)
