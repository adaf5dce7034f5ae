"""Memory and work of updates at full size, predicted with fake tensors on any machine.

    python -m benchmarks.real_size                      predicts the rows that are not in the results yet
    python -m benchmarks.real_size 5b-lora --again      repeats the rows whose name contains 5b-lora
    python -m benchmarks.real_size --full_depth         simulates all blocks in place of 4 and 5, as a check

Writes results/predicted.json, or results/full_depth.json, after each row.
`bash benchmarks/on_gpu.sh` measures the rows on a GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.rows import ROWS, Row
from utils.commands.estimate_memory import make_context
from utils.common.subprocesses import run_in_subprocess
from utils.common.units import GIB
from utils.estimate.context import RunContext
from utils.estimate.prediction import extrapolated_updates, zero_terms
from utils.estimate.simulated_run import UpdateProfile, simulate_updates
from utils.estimate.start import start_peak
from utils.training.throughput import work_per_update
from utils.training.trainable import compute_dtype

RESULTS = Path(__file__).parent / "results"
PREDICTED, FULL_DEPTH = RESULTS / "predicted.json", RESULTS / "full_depth.json"


def context_of(row: Row) -> RunContext:
    """Returns the run that a row describes."""
    zero, num_processes = row.zero or (None, 1)
    return make_context(["--model_path", row.model, *row.flags.split()], zero, num_processes)


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Returns groups of adjacent rows that differ at most in the DeepSpeed template; one simulation serves a group."""
    return [list(group) for _, group in groupby(rows, lambda row: (row.model, row.flags, row.zero is None))]


def predict_rows(rows: list[Row], simulate: Callable[[RunContext], UpdateProfile]) -> list[dict[str, Any]]:
    """Returns the predictions of the rows of a group, from one simulation."""
    updates = simulate(context_of(rows[0]))
    return [predict_row(row, updates) for row in rows]


def predict_row(row: Row, updates: UpdateProfile) -> dict[str, Any]:
    """Returns the prediction of a row.

    Returns:
        the peak of one process and its terms, the peak before the first update, and host memory, in GiB; TFLOP and
        memory traffic in TB per update. `tflop` includes recomputation; `model_tflop` is the useful work that
        `train.py` reports.
    """
    context = context_of(row)
    terms, host = updates.terms, updates.host
    work = work_per_update(context.args, context.spec, updates.trained, context.num_processes, context.resolution)
    if context.zero is not None:
        terms, host = zero_terms(updates, context.zero, compute_dtype(context.args).itemsize, context.num_processes)
    return {
        "peak_gib": round(sum(terms.values()) / GIB, 2),
        "goal_gib": row.goal,
        "start_gib": round(start_peak(context, updates) / GIB, 2),
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
    parser.add_argument("--full_depth", action="store_true", help="simulate all blocks")
    options = parser.parse_args()
    file, simulate = (FULL_DEPTH, simulate_updates) if options.full_depth else (PREDICTED, extrapolated_updates)
    results = read(file)
    wanted = [row for row in ROWS if options.rows in row.name and (options.again or row.name not in results)]
    for rows in groups(wanted):
        predicted = run_in_subprocess(predict_rows, rows, simulate)  # fake tensors stay in caches
        results |= {row.name: result for row, result in zip(rows, predicted, strict=True)}
        in_order = {row.name: results[row.name] for row in ROWS if row.name in results}
        file.write_text(json.dumps(in_order, indent=1) + "\n")
        for row in rows:
            print(row.name, json.dumps(results[row.name]), flush=True)


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


if __name__ == "__main__":
    from benchmarks import real_size  # the subprocess cannot import functions of __main__

    real_size.main()
