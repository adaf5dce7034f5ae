"""Memory, work and time of updates at real size: predicted on any machine, measured where there is a GPU.

    python -m benchmarks.real_size                      measures on this machine's GPU, with random weights
    python -m benchmarks.real_size --predict            predicts, on fake tensors
    python -m benchmarks.real_size 5b-lora --again      rows whose names have this in them, measured anew

Each row runs in a process of its own, is written to benchmarks/results/ as soon as it is there, and is not done twice
unless with --again. What is predicted not to fit the GPU is left out. Measuring ends after --minutes; the same command
goes on with what is left.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import ROWS, Row
from utils.commands.estimate_memory import make_context
from utils.commands.launch import grow_segments
from utils.config.deepspeed_config import ROOT
from utils.estimate.context import GIB, RunContext
from utils.estimate.prediction import PEAK_TFLOPS, extrapolated_updates, zero_terms
from utils.estimate.simulated_run import autocast_forward, empty_batch, fake_objective
from utils.training.optimizer import clip, make_optimizer
from utils.training.trainable import (
    compute_dtype,
    make_trainable,
    trained_parameters,
    use_attention_kernel,
    weight_dtype,
)

RESULTS = Path(__file__).parent / "results"
UPDATES = 3
# Seconds: with less time left no row is begun.
LEAST = 60
DEVICE = torch.device("cuda")


def context_of(row: Row) -> RunContext:
    zero, num_processes = row.zero or (None, 1)
    return make_context(["--model_path", row.model, *row.flags.split()], zero, num_processes)


def predict_row(row: Row) -> dict[str, Any]:
    """Terms of the peak of one process in GiB, TFLOP per update, and host memory in GiB."""
    context = context_of(row)
    updates = extrapolated_updates(context)
    terms, host = updates.terms, updates.host
    if context.zero is not None:
        terms, host = zero_terms(updates, context.zero, compute_dtype(context.args).itemsize, context.num_processes)
    return {
        "peak_gib": round(sum(terms.values()) / GIB, 2),
        "goal_gib": row.goal,
        "terms_gib": {name: round(num_bytes / GIB, 2) for name, num_bytes in terms.items()},
        "tflop": round(updates.flop / 1e12),
        "host_gib": round(host / GIB, 1),
        "flags": row.flags,
    }


def model_tflop(row: Row) -> dict[str, Any]:
    """TFLOP per update without recomputation."""
    context = context_of(row).with_memory(gradient_checkpointing="none", offload_activations=False)
    return {"model_tflop": round(extrapolated_updates(context).flop / 1e12)}


def measure_row(row: Row) -> dict[str, Any]:
    """Peak of reserved memory over three updates, and the time of one, on the GPU."""
    from diffusers import CogVideoXTransformer3DModel

    context = context_of(row)
    args = context.args
    torch.set_default_dtype(weight_dtype(args, uses_deepspeed=False))
    with DEVICE:
        transformer = CogVideoXTransformer3DModel.from_config(context.spec.transformer)
    torch.set_default_dtype(torch.float32)
    make_trainable(transformer, args, DEVICE)
    use_attention_kernel(args.memory.attention_kernel)
    optimizer = make_optimizer(trained_parameters(transformer), args, uses_deepspeed=False)
    objective, model = fake_objective(context, DEVICE), autocast_forward(transformer, context)
    batch = {name: torch.randn_like(value, device=DEVICE) for name, value in empty_batch(context, 1).items()}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for update in range(UPDATES):
        start = time.perf_counter()
        losses, _ = objective(model, batch, [update])
        losses.mean().backward()
        clip(optimizer, args.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    # the first update creates the optimizer states and chooses kernels
    return {"reserved_gib": torch.cuda.max_memory_reserved() / GIB, "seconds": statistics.median(seconds[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="?", default="", help="part of the names of the rows to do; default: all")
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--again", action="store_true", help="rows too that are in the file already")
    parser.add_argument("--minutes", type=float, default=8, help="that measuring may take")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    rows = [row for row in ROWS if options.rows in row.name and (options.predict or row.zero is None)]
    if options.alone:
        row = next(row for row in rows if row.name == options.rows)
        print(json.dumps(predict_row(row) | model_tflop(row) if options.predict else measure_row(row)))
        return
    predicted = RESULTS / "predicted.json"
    known = read(predicted)
    if options.predict:
        file, free, end = predicted, math.inf, None
    else:
        if not torch.cuda.is_available():
            sys.exit("There is no GPU to measure on; --predict needs none.")
        file = RESULTS / f"{torch.cuda.get_device_name().replace(' ', '-')}.json"
        free, end = torch.cuda.mem_get_info()[0] / GIB, time.monotonic() + 60 * options.minutes
        grow_segments()
    results, done = read(file), 0
    for row in rows:
        if row.name in results and not options.again:
            continue
        if not options.predict and known[row.name]["peak_gib"] > free:
            print(f"{row.name}: left out, {known[row.name]['peak_gib']} GiB of {free:.1f}")
            continue
        left = None if end is None else end - time.monotonic()
        if left is not None and left < LEAST:
            print("The time is up; the same command goes on from here.")
            break
        found = alone(row, options.predict, left)
        if found is None and done:  # it may have had little time
            print(f"{row.name}: not ended in time; the same command begins with it.")
            break
        done += 1
        found = found or {"error": f"not ended in {options.minutes:g} minutes"}
        if "seconds" in found:
            found |= compared(row, found, known)
        results[row.name] = found
        file.parent.mkdir(exist_ok=True)
        in_order = {row.name: results[row.name] for row in ROWS if row.name in results}
        file.write_text(json.dumps(in_order, indent=1) + "\n")
        print(row.name, json.dumps(found), flush=True)


def alone(row: Row, predict: bool, seconds: float | None) -> dict[str, Any] | None:
    """What a process of its own finds of the row, or why it found nothing; None where the time was too short."""
    command = [sys.executable, "-m", "benchmarks.real_size", row.name, "--alone", *(["--predict"] if predict else [])]
    try:
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def compared(row: Row, found: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """With the prediction; utilisation of the model's work counts nothing twice that is computed anew."""
    gpu = torch.cuda.get_device_name()
    peak = next((tflops for name, tflops in PEAK_TFLOPS.items() if name in gpu), None)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True, capture_output=True).stdout
    return {
        "reserved_by_predicted": found["reserved_gib"] / known[row.name]["peak_gib"],
        "utilisation": known[row.name]["tflop"] / found["seconds"] / peak if peak else None,
        "model_utilisation": known[row.name]["model_tflop"] / found["seconds"] / peak if peak else None,
        "commit": commit.strip(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft")} | {"cuda": torch.version.cuda},
    }


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


if __name__ == "__main__":
    main()
