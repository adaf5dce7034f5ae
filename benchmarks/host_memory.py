"""Samples the host memory of a run with a full-size transformer of random weights.

    python -m benchmarks.host_memory --zero zero3 --processes 2 --layers 30 -- --training_type lora --rank 128
    python -m benchmarks.host_memory --load_only --processes 8

The encoders and the clips are tiny, so that the measured memory is that of weights and optimizer. PSS counts a page
that several processes share once in the total. Private memory belongs to one process alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import CogVideoXTransformer3DModel

from tests import tiny_models
from utils.common.filesystem import ROOT
from utils.common.units import GIB
from utils.model import loading


def build(folder: Path, layers: int, dtype: torch.dtype) -> None:
    """Writes a 2b checkpoint with a full-width transformer (1.7 billion parameters at 30 layers) and tiny encoders."""
    tiny_models.build("2b", folder, text_width=4096)
    torch.set_default_dtype(dtype)
    transformer = CogVideoXTransformer3DModel(num_attention_heads=30, num_layers=layers)
    torch.set_default_dtype(torch.float32)
    transformer.save_pretrained(folder / "transformer")
    size = sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    print(f"transformer: {parameters / 1e9:.2f} G parameters, {size / GIB:.2f} GiB")


def load_and_read(folder: Path, ready: Any, done: Any) -> None:
    """Loads a transformer like a rank under ZeRO, and reads each weight once, like a copy to a GPU."""
    transformer = loading.load_transformer(folder)
    for parameter in transformer.parameters():
        parameter.sum()
    ready.release()
    done.wait()


def measure_loads(folder: Path, processes: int) -> int:
    """Returns the PSS in bytes of all processes together while they hold the transformer."""
    context = multiprocessing.get_context("spawn")
    ready, done = context.Semaphore(0), context.Event()
    workers = [context.Process(target=load_and_read, args=(folder, ready, done)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    for _ in workers:
        ready.acquire()
    total = sum(psutil.Process(worker.pid).memory_full_info().pss for worker in workers)
    done.set()
    for worker in workers:
        worker.join()
    return total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--zero", help="DeepSpeed template; default: DDP")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--model", type=Path, help="folder of the checkpoint; created if it does not exist")
    parser.add_argument("--load_only", action="store_true", help="measure processes that only load the transformer")
    parser.add_argument("flags", nargs="*", help="flags of train.py")
    args = parser.parse_args()
    model = args.model or Path(tempfile.mkdtemp()) / "model"
    if not model.exists():
        build(model, args.layers, torch.bfloat16)
    if args.load_only:
        total = measure_loads(model / "transformer", args.processes)
        print(f"{args.processes} processes that hold the transformer: {total / GIB:.2f} GiB in total (PSS)")
        return
    script = f"train_{'zero' if args.zero else 'ddp'}_t2v.sh"
    options = ["--model_path", model, "--data_root", ROOT / "examples/dataset", "--output_dir", tempfile.mkdtemp()]
    options += ["--train_resolution", "9x64x64", "--mixed_precision", "bf16", "--report_to", "none"]
    options += ["--train_steps", 2, "--num_workers", 1, *args.flags]
    environment = {**os.environ, "NUM_PROCESSES": str(args.processes), **({"ZERO": args.zero} if args.zero else {})}
    command = ["bash", str(ROOT / script), *map(str, options)]
    with subprocess.Popen(command, env=environment, stdout=sys.stderr) as process:
        total, private = watch_memory(process)
    print(
        f"{args.zero or 'ddp'}, {args.processes} processes, {' '.join(args.flags)}: exit code {process.returncode}, "
        f"peak of all processes {total / GIB:.2f} GiB (PSS), of one process {private / GIB:.2f} GiB (private)"
    )


def watch_memory(process: subprocess.Popen) -> tuple[int, int]:
    """Returns the peaks in bytes of the total PSS of the training processes, and of the private memory of one."""
    total = private = 0
    while process.poll() is None:
        sizes = []
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                if any(part.endswith("train.py") for part in child.cmdline()[:3]):
                    sizes.append(child.memory_full_info())
            except psutil.Error:  # the process has ended
                continue
        total = max(total, sum(size.pss for size in sizes))
        private = max([private, *(size.uss for size in sizes)])
        time.sleep(0.25)
    return total, private


if __name__ == "__main__":
    main()
