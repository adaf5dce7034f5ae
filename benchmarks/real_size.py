"""Memory and work of updates at full size, predicted with fake tensors on any machine.

    python -m benchmarks.real_size                      predicts the rows that are not in the results yet
    python -m benchmarks.real_size 5b-lora --again      repeats the rows whose name contains 5b-lora

Writes results/predicted.json after each row. `bash benchmarks/on_gpu.sh` measures the rows on a GPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.rows import ROWS, Row
from utils.commands.estimate_memory import make_context
from utils.common.subprocesses import run_in_subprocess
from utils.common.units import GIB
from utils.estimate.context import RunContext
from utils.estimate.prediction import extrapolated_updates, zero_terms
from utils.training.throughput import work_per_update
from utils.training.trainable import compute_dtype

RESULTS = Path(__file__).parent / "results"
PREDICTED = RESULTS / "predicted.json"


def context_of(row: Row) -> RunContext:
    """Returns the run that a row describes."""
    zero, num_processes = row.zero or (None, 1)
    return make_context(["--model_path", row.model, *row.flags.split()], zero, num_processes)


def predict_row(row: Row) -> dict[str, Any]:
    """Returns the terms of the peak of one process in GiB, TFLOP and memory traffic per update, and host memory.

    `tflop` includes recomputation; `model_tflop` is the useful work that `train.py` reports.
    """
    context = context_of(row)
    updates = extrapolated_updates(context)
    terms, host = updates.terms, updates.host
    work = work_per_update(context.args, context.spec, updates.trained, context.num_processes, context.resolution)
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
        "model_tflop": round(work.flop / 1e12),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="?", default="", help="part of the names of the rows; default: all rows")
    parser.add_argument("--again", action="store_true", help="repeat rows that are in the results already")
    options = parser.parse_args()
    results = read(PREDICTED)
    for row in ROWS:
        if options.rows not in row.name or (row.name in results and not options.again):
            continue
        results[row.name] = run_in_subprocess(predict_row, row)  # fake tensors stay in caches
        in_order = {row.name: results[row.name] for row in ROWS if row.name in results}
        PREDICTED.write_text(json.dumps(in_order, indent=1) + "\n")
        print(row.name, json.dumps(results[row.name]), flush=True)


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


if __name__ == "__main__":
    from benchmarks import real_size  # the subprocess cannot import functions of __main__

    real_size.main()
