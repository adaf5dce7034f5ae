"""Measures the time of a run outside the model: from launch to the first update, and in each update.

    python -m benchmarks.overhead

The run trains a LoRA of a tiny model of the examples. The start goes through the launch script and includes preflight,
cache and weights. The time outside the model covers reading the cache, drawing noise, the loss and logging; it excludes
forward and backward passes, clipping and the optimizer. Writes results/overhead.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from subprocess import DEVNULL
from typing import Any
from unittest.mock import patch

import torch
from accelerate.optimizer import AcceleratedOptimizer

import train
from utils.common.filesystem import ROOT
from utils.training import step as step_module
from utils.training.strategy import DDP

RESULT = Path(__file__).parent / "results" / "overhead.json"
CLIPS, UPDATES = 32, 60


def flags(folder: Path, output: str, steps: int) -> list[str]:
    return [
        *("--model_path", "examples/tiny/t2v", "--model_type", "t2v", "--data_root", str(folder / "data")),
        *("--output_dir", str(folder / output), "--train_resolution", "9x64x64", "--fps", "8"),
        *("--train_steps", str(steps), "--mixed_precision", "no", "--num_workers", "1", "--report_to", "none"),
    ]


def launch(folder: Path, output: str) -> float:
    """Returns the seconds from launch until a run has logged an update."""
    metrics = folder / output / "metrics.jsonl"
    command = ["bash", "train_ddp_t2v.sh", *flags(folder, output, 2)]
    environment = os.environ | {"NUM_PROCESSES": "1"}
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=DEVNULL, stderr=DEVNULL) as run:
        while not metrics.is_file() and run.poll() is None:
            time.sleep(0.05)
        return time.perf_counter() - start


def time_updates(folder: Path) -> tuple[float, float]:
    """Returns medians in seconds: of an update, and of its part outside the model and the optimizer."""
    model_s = [0.0]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                model_s[-1] += time.perf_counter() - start

        return call

    def timed_step(optimizer: Any, *args: Any) -> None:
        timed(original_step)(optimizer, *args)
        model_s.append(0.0)

    original_step = AcceleratedOptimizer.step
    with ExitStack() as patches:
        for owner, name in ((step_module, "predict_velocity"), (DDP, "backward"), (DDP, "clip_gradients")):
            patches.enter_context(patch.object(owner, name, timed(getattr(owner, name))))
        patches.enter_context(patch.object(AcceleratedOptimizer, "step", timed_step))
        patches.enter_context(patch.object(sys, "argv", ["train.py", *flags(folder, "updates", UPDATES)]))
        train.main()
    lines = [json.loads(line) for line in (folder / "updates" / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["step_s"] for line in lines]
    # the first update includes one-time setup
    outside = [total - model for total, model in zip(seconds, model_s, strict=False)][1:]
    return statistics.median(seconds[1:]), statistics.median(outside)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = ["python", "-m", "examples.world", str(folder / "data"), "--known", str(CLIPS)]
        subprocess.run(world, cwd=ROOT, check=True)
        first, again = launch(folder, "first"), launch(folder, "again")
        total, outside = time_updates(folder)
    result = {
        f"s_to_first_update_{CLIPS}_clips_to_encode": round(first, 1),
        "s_to_first_update_all_cached": round(again, 1),
        "s_per_update": round(total, 4),
        "s_per_update_outside_the_model": round(outside, 4),
        "machine": f"{len(os.sched_getaffinity(0))} CPU cores, torch {torch.__version__}",
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    main()
