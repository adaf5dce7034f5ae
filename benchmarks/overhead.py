"""Seconds from launch to the first update done: the start, preflight, cache and model of a run.

    python -m benchmarks.overhead

LoRA on the tiny model of the examples through the launch script, with clips to encode and with all in the cache.
Measured on 2 CPU cores without a GPU, torch 2.13.0, nothing else running: 12.2 s and 5.6 s.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

from utils.zero_config import ROOT

CLIPS = 32


def launch(folder: Path, output: str) -> float:
    """Seconds until a run has logged an update."""
    metrics = folder / output / "metrics.jsonl"
    command = [
        *("bash", "train_ddp_t2v.sh", "--model_path", "examples/tiny/t2v", "--data_root", str(folder / "data")),
        *("--output_dir", str(folder / output), "--train_resolution", "9x64x64", "--fps", "8", "--train_steps", "2"),
        *("--mixed_precision", "no", "--num_workers", "1", "--report_to", "none"),
    ]
    start = time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"NUM_PROCESSES": "1"}, **quiet) as run:
        while not metrics.is_file() and run.poll() is None:
            time.sleep(0.05)
        return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = ["python", "-m", "examples.world", str(folder / "data"), "--known", str(CLIPS)]
        subprocess.run(world, cwd=ROOT, check=True)
        first, again = launch(folder, "first"), launch(folder, "again")
        print(f"{CLIPS} clips to encode: {first:.1f} s, all in the cache: {again:.1f} s")


if __name__ == "__main__":
    main()
