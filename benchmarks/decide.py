"""Prints the constants and defaults that follow from the results of `on_gpu.sh`.

    python -m benchmarks.decide benchmarks/results/NVIDIA-H100-80GB-HBM3

Each paragraph names the file that holds the constant. A constant whose items are missing is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_rows import LORA_LEVERS, SFT_LEVERS
from benchmarks.on_gpu import RESULTS, RESULTS_FILE, read_lines
from utils.common.gpus import peak_tflops

Measured = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, help="default: all folders with results")
    folders = parser.parse_args().folders or [path.parent for path in RESULTS.glob(f"*/{RESULTS_FILE}")]
    predicted = json.loads((RESULTS / "predicted.json").read_text())
    for folder in folders:
        print("\n".join([f"# {folder.name}", *decide(read_results(folder), predicted)]))


def read_results(folder: Path) -> Measured:
    """Returns the last line of each item that succeeded."""
    lines = {line["item"]: line for line in read_lines(folder / RESULTS_FILE)}
    return {item: line for item, line in lines.items() if "error" not in line}


def decide(measured: Measured, predicted: dict[str, Any]) -> Iterator[str]:
    yield from recipes(measured, predicted)
    yield from margin(measured, predicted)
    yield from utilization(measured, predicted)
    yield from costs(measured)
    yield from levers(measured, "gradient checkpointing, base weights, compilation", LORA_LEVERS)
    yield from levers(measured, "optimizers", SFT_LEVERS)
    yield from encoders_and_kernels(measured)


def recipes(measured: Measured, predicted: dict[str, Any]) -> Iterator[str]:
    """Lists the rows of each recipe from fastest to slowest, and tells which memory goals are met."""
    recipe_of = {name: re.sub(r"-(default|smallest|fastest|selective|zero.*)$", "", name) for name in predicted}
    for recipe in dict.fromkeys(recipe_of.values()):
        rows = {
            name: row
            for name in predicted
            if recipe_of[name] == recipe and "reserved_gib" in (row := measured.get(f"row/{name}", {}))
        }
        if rows:
            yield f"\n{recipe}, from fastest to slowest: seconds, GiB, utilization"
        for name, row in sorted(rows.items(), key=lambda item: item[1]["seconds"]):
            goal = predicted[name]["goal_gib"]
            verdict = "" if goal is None else f"  goal {goal} GiB: {'met' if row['reserved_gib'] <= goal else 'missed'}"
            share = row.get("utilization", math.nan)
            yield f"  {name:22} {row['seconds']:7.3f} {row['reserved_gib']:6.2f} {share:5.0%}{verdict}"


def margin(measured: Measured, predicted: dict[str, Any]) -> Iterator[str]:
    rows = {
        name: measured[f"row/{name}"]
        for name in predicted
        if "reserved_gib" in measured.get(f"row/{name}", {})  # results of a CPU have none
    }
    if not rows:
        return
    yield "\nutils/estimate/prediction.py: reserved GiB, predicted GiB, ratio; goal: 0.9 to 1.1"
    ratios = {name: row["reserved_gib"] / predicted[name]["peak_gib"] for name, row in rows.items()}
    for name, row in rows.items():
        mark = "" if 0.9 <= ratios[name] <= 1.1 else "  <- off by more than 10 %"
        yield f"  {name:22} {row['reserved_gib']:6.2f} {predicted[name]['peak_gib']:6.2f} {ratios[name]:6.3f}{mark}"
    yield f"MARGIN = {max(1.0, math.ceil(100 * max(ratios.values())) / 100)}"
    yield f"CONTEXT_GIB = {math.ceil(10 * max(row['context_gib'] for row in rows.values())) / 10}"


def utilization(measured: Measured, predicted: dict[str, Any]) -> Iterator[str]:
    """The prediction divides all work by the peak, recomputation included."""
    shares = [
        predicted[name]["tflop"] / row["seconds"] / peak
        for name in predicted
        if (row := measured.get(f"row/{name}")) and (peak := peak_tflops(row["gpu"]))
    ]
    if shares:
        yield f"UTILIZATION = ({min(shares):.2f}, {max(shares):.2f})"


def costs(measured: Measured) -> Iterator[str]:
    """The slowdowns that the settings search assumes, each relative to the same settings without the saving."""
    for base, names in (
        ("none", ("selective", "selective-offload", "full", "full-offload", "int8", "fp8", "int4", "autocast")),
        ("compiled", ("none", "compiled-selective-offload")),
        ("adam", ("adam-8bit", "adam-8bit-in-backward", "adam-4bit", "adam-offload")),
    ):
        if reference := measured.get(f"lever/{base}"):
            times = {name: row["seconds"] for name in names if (row := measured.get(f"lever/{name}"))}
            slowdowns = ", ".join(f"{name} {s / reference['seconds'] - 1:+.2f}" for name, s in times.items())
            yield f"\nutils/estimate/settings_search.py, slowdown relative to {base}: {slowdowns}"


def levers(measured: Measured, title: str, names: dict[str, str]) -> Iterator[str]:
    """Lists each setting with what it costs, and names the settings that another one beats in time and memory."""
    rows = {name: row for name in names if "reserved_gib" in (row := measured.get(f"lever/{name}", {}))}
    if rows:
        yield f"\nSettings ({title}): seconds, GiB, seconds of the first update"
    for name, row in rows.items():
        better = [
            other
            for other, its in rows.items()
            if its["seconds"] < 0.99 * row["seconds"] and its["reserved_gib"] <= row["reserved_gib"]
        ]
        verdict = f"  <- useless: {better[0]} is faster and no larger" if better else ""
        yield f"  {name:28} {row['seconds']:6.3f} {row['reserved_gib']:6.2f} {row['first_s']:6.1f}{verdict}"
    if {"none", "compiled"} <= rows.keys():
        none, compiled = rows["none"], rows["compiled"]
        gain = none["seconds"] - compiled["seconds"]
        updates = f"pays off after {(compiled['first_s'] - none['first_s']) / gain:.0f} updates of this size"
        yield f"  --compile_blocks: {updates if gain > 0 else 'does not pay off'}"


def encoders_and_kernels(measured: Measured) -> Iterator[str]:
    """Lists attention kernels and encoders from fastest to slowest."""
    kernels = [(name.split("/")[1:], row) for name, row in measured.items() if name.startswith("attention/")]
    for model in sorted({model for (model, _), _ in kernels}):
        times = {k: row["forward_seconds"] + row["backward_seconds"] for (m, k), row in kernels if m == model}
        ranking = sorted(times, key=lambda kernel: times[kernel])
        yield f"\n--attention_kernel, {model}: " + ", ".join(f"{name} {1000 * times[name]:.1f} ms" for name in ranking)
    for kind, unit in (("vae", "clips_per_minute"), ("t5", "prompts_per_s")):
        found = [(name, row) for name, row in measured.items() if name.startswith(f"{kind}/")]
        for name, row in sorted(found, key=lambda item: -item[1][unit]):
            yield f"  {name:16} {row[unit]:8.2f} {unit}, {row.get('reserved_gib', math.nan):.1f} GiB"


if __name__ == "__main__":
    main()
