"""Memory, work and time of updates at full size: predicted on any machine, measured on a GPU.

    python -m benchmarks.real_size                      measures on this machine's GPU, with random weights
    python -m benchmarks.real_size --predict            predicts with fake tensors
    python -m benchmarks.real_size 5b-lora --again      repeats the rows whose name contains 5b-lora

Each row runs in its own process. Results are written to benchmarks/results/ after each row. Rows that are finished or
are predicted not to fit the GPU are skipped; --again repeats finished rows. Measuring stops after --minutes; the same
command continues with the remaining rows.
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
from utils.common.filesystem import ROOT
from utils.common.units import GIB
from utils.estimate.context import RunContext
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
# No row is started with less time left.
MIN_SECONDS = 60
DEVICE = torch.device("cuda")


def context_of(row: Row) -> RunContext:
    """Returns the run that a row describes."""
    zero, num_processes = row.zero or (None, 1)
    return make_context(["--model_path", row.model, *row.flags.split()], zero, num_processes)


def predict_row(row: Row) -> dict[str, Any]:
    """Returns the terms of the peak of one process in GiB, TFLOP and memory traffic per update, and host memory."""
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
        "traffic_tb": {kind: round(num_bytes / 1e12, 3) for kind, num_bytes in updates.traffic.items()},
        "host_gib": round(host / GIB, 1),
        "flags": row.flags,
    }


def model_tflop(row: Row) -> dict[str, Any]:
    """Returns the TFLOP per update without recomputation."""
    context = context_of(row).with_memory(gradient_checkpointing="none", offload_activations=False)
    return {"model_tflop": round(extrapolated_updates(context).flop / 1e12)}


def measure_row(row: Row) -> dict[str, Any]:
    """Returns the peak of reserved GPU memory over three updates, and the seconds per update."""
    from diffusers import CogVideoXTransformer3DModel

    context = context_of(row)
    if context.args.memory.compile_blocks is None:  # as preflight chooses
        context = context.with_memory(compile_blocks=DEVICE.type == "cuda")
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
    parser.add_argument("rows", nargs="?", default="", help="part of the names of the rows; default: all rows")
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--again", action="store_true", help="repeat rows that are in the results already")
    parser.add_argument("--minutes", type=float, default=8, help="time limit of the measurement")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    rows = [row for row in ROWS if options.rows in row.name and (options.predict or row.zero is None)]
    if options.alone:
        row = next(row for row in rows if row.name == options.rows)
        print(json.dumps(predict_row(row) | model_tflop(row) if options.predict else measure_row(row)))
        return
    predicted = RESULTS / "predicted.json"
    predictions = read(predicted)
    if options.predict:
        file, free_gib, deadline = predicted, math.inf, None
    else:
        if not torch.cuda.is_available():
            sys.exit("Measuring needs a GPU; --predict does not.")
        file = RESULTS / f"{torch.cuda.get_device_name().replace(' ', '-')}.json"
        free_gib, deadline = torch.cuda.mem_get_info()[0] / GIB, time.monotonic() + 60 * options.minutes
        grow_segments()
    results, num_finished = read(file), 0
    for row in rows:
        if row.name in results and not options.again:
            continue
        if not options.predict and predictions[row.name]["peak_gib"] > free_gib:
            print(f"{row.name}: skipped, needs {predictions[row.name]['peak_gib']} of {free_gib:.1f} GiB")
            continue
        time_left = None if deadline is None else deadline - time.monotonic()
        if time_left is not None and time_left < MIN_SECONDS:
            print("The time limit is reached. The same command continues from here.")
            break
        result = run_in_own_process(row, options.predict, time_left)
        if result is None and num_finished:  # earlier rows may have left too little time
            print(f"{row.name}: not finished in time. The same command continues with it.")
            break
        num_finished += 1
        result = result or {"error": f"not finished in {options.minutes:g} minutes"}
        if "seconds" in result:
            result |= compare(row, result, predictions)
        results[row.name] = result
        file.parent.mkdir(exist_ok=True)
        in_order = {row.name: results[row.name] for row in ROWS if row.name in results}
        file.write_text(json.dumps(in_order, indent=1) + "\n")
        print(row.name, json.dumps(result), flush=True)


def run_in_own_process(row: Row, predict: bool, seconds: float | None) -> dict[str, Any] | None:
    """Returns the result of a row, or its error. Returns None if the time limit is exceeded."""
    command = [sys.executable, "-m", "benchmarks.real_size", row.name, "--alone", *(["--predict"] if predict else [])]
    try:
        process = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    if process.returncode:
        return {"error": process.stderr.strip().splitlines()[-1]}
    return json.loads(process.stdout.splitlines()[-1])


def compare(row: Row, measured: dict[str, Any], predictions: dict[str, Any]) -> dict[str, Any]:
    """Returns the measurement relative to the prediction. Model utilization does not count recomputation."""
    gpu, predicted = torch.cuda.get_device_name(), predictions[row.name]
    peak = next((tflops for name, tflops in PEAK_TFLOPS.items() if name in gpu), None)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True, capture_output=True).stdout
    return {
        "reserved_by_predicted": measured["reserved_gib"] / predicted["peak_gib"],
        "utilization": predicted["tflop"] / measured["seconds"] / peak if peak else None,
        "model_utilization": predicted["model_tflop"] / measured["seconds"] / peak if peak else None,
        "commit": commit.strip(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft")} | {"cuda": torch.version.cuda},
    }


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


if __name__ == "__main__":
    main()
