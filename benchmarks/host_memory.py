"""Host memory of a run over a transformer of real size with random weights, sampled while it goes.

    python -m benchmarks.host_memory --zero zero3 --processes 2 --layers 30 -- --training_type lora --rank 128
    python -m benchmarks.host_memory --load_only --processes 8

Everything but the transformer is tiny, and so are the clips, so that what is measured are weights and optimizer.
PSS counts a page that several processes share once in all; private is what a process has for itself alone.
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
from utils.model import loading

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30


def build(folder: Path, layers: int, dtype: torch.dtype) -> None:
    """A 2b checkpoint with a transformer of 1.7 billion parameters (at 30 layers) and tiny encoders."""
    tiny_models.build("2b", folder, text_width=4096)
    torch.set_default_dtype(dtype)
    transformer = CogVideoXTransformer3DModel(num_attention_heads=30, num_layers=layers)
    torch.set_default_dtype(torch.float32)
    transformer.save_pretrained(folder / "transformer")
    size = sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))
    print(
        f"transformer: {sum(p.numel() for p in transformer.parameters()) / 1e9:.2f} G parameters, {size / GIB:.2f} GiB"
    )


def load_and_read(folder: Path, ready: Any, done: Any) -> None:
    """Loads a transformer as a rank under ZeRO does and reads each weight once, as the copy to a GPU would."""
    transformer = loading.load_transformer(folder)
    for parameter in transformer.parameters():
        parameter.sum()
    ready.release()
    done.wait()


def measure_loads(folder: Path, processes: int) -> int:
    """PSS of all processes that have loaded the transformer and still hold it, in bytes."""
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
    parser.add_argument("--zero", help="template; default: DDP")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--model", type=Path, help="folder of the checkpoint, made if it is not there")
    parser.add_argument("--load_only", action="store_true", help="every process loads the transformer, and no more")
    parser.add_argument("more", nargs="*", help="flags for train.py")
    args = parser.parse_args()
    model = args.model or Path(tempfile.mkdtemp()) / "model"
    if not model.exists():
        build(model, args.layers, torch.bfloat16)
    if args.load_only:
        total = measure_loads(model / "transformer", args.processes)
        print(f"{args.processes} processes that hold the transformer: {total / GIB:.2f} GiB in all (PSS)")
        return
    script = f"train_{'zero' if args.zero else 'ddp'}_t2v.sh"
    options = ["--model_path", model, "--data_root", ROOT / "examples/dataset", "--output_dir", tempfile.mkdtemp()]
    options += ["--train_resolution", "9x64x64", "--mixed_precision", "bf16", "--report_to", "none"]
    options += ["--train_steps", 2, "--num_workers", 0, *args.more]
    environment = {**os.environ, "NUM_PROCESSES": str(args.processes), **({"ZERO": args.zero} if args.zero else {})}
    command = ["bash", str(ROOT / script), *map(str, options)]
    with subprocess.Popen(command, env=environment, stdout=sys.stderr) as process:
        total, private = watch(process)
    print(
        f"{args.zero or 'ddp'}, {args.processes} processes, {' '.join(args.more)}: exit code {process.returncode}, "
        f"peak of all processes {total / GIB:.2f} GiB (PSS), of one {private / GIB:.2f} GiB (private)"
    )


def watch(process: subprocess.Popen) -> tuple[int, int]:
    """The highest sum of PSS over the training processes, and the highest private memory of one."""
    total = private = 0
    while process.poll() is None:
        sizes = []
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                if any(part.endswith("train.py") for part in child.cmdline()[:3]):
                    sizes.append(child.memory_full_info())
            except psutil.Error:  # ended meanwhile
                continue
        total = max(total, sum(size.pss for size in sizes))
        private = max([private, *(size.uss for size in sizes)])
        time.sleep(0.25)
    return total, private


if __name__ == "__main__":
    main()
