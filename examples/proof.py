"""Measures that fine-tuning works with every tiny model and that injected faults show in the results.

    python -m examples.proof runs       the quick start with every trained model, but 600 updates, and full fine-tuning
                                        under ZeRO-2
    python -m examples.proof faults     the same training with injected faults; run it after `runs`

Each row is saved once it is measured. Prints a Markdown table with shares of clips in per cent.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from utils.checkpoint.manager import find_checkpoints

TOKEN = "SKS"
# Updates and learning rate of all LoRA runs. Some faults need more updates to show than the quick start takes.
STEPS, RATE = "600", "2e-3"
COLUMNS = ("colour, shape and direction", "colour and ground", "direction", "first frame is the image")
OUT = Path("outputs/proof")


@dataclass(frozen=True)
class Row:
    """A row of the table, and the function that measures it: it returns the content of a `table.json`."""

    name: str
    measure: Callable[[], dict[str, Any]]


def run(*command: str | Path, **environment: str) -> None:
    subprocess.run([str(part) for part in command], check=True, env=os.environ | environment)


def quick_start(model: str) -> dict[str, Any]:
    variables = {"QUICKSTART_DIR": str(OUT / model), "QUICKSTART_STEPS": STEPS, "QUICKSTART_RATE": RATE}
    run("bash", "examples/quickstart.sh", model, **variables)
    return read_result(OUT / model)


def full_fine_tuning_zero2() -> dict[str, Any]:
    """Trains all weights on the data of the quick start, in two processes."""
    output, options = OUT / "zero2", flags("t2v")
    options |= {"training_type": "sft", "batch_size": "4", "learning_rate": "2e-4", "output_dir": str(output)}
    options = {name: value for name, value in options.items() if name not in ("rank", "lora_alpha", "target_modules")}
    run("bash", "train_zero_t2v.sh", *command_line(options), ZERO="zero2", NUM_PROCESSES="2")
    return measure("t2v", output, "--transformer_path", find_checkpoints(output)[-1] / "transformer")


def with_strength(scale: float) -> dict[str, Any]:
    """Measures the LoRA of the quick start at another scale."""
    lora, output = find_checkpoints(OUT / "t2v" / "lora")[-1], OUT / f"t2v-strength-{scale:g}"
    return measure("t2v", output, "--lora_path", lora, "--lora_scale", str(scale))


def with_fault(model: str, fault: str) -> dict[str, Any]:
    """Repeats the training of the quick start with a fault. Sampling is correct."""
    output = OUT / f"{model}-{fault}"
    options = flags(model) | {"output_dir": str(output)}
    run(sys.executable, "-m", "examples.faults", fault, *command_line(options))
    return measure(model, output, "--lora_path", find_checkpoints(output)[-1])


def with_stale_latents() -> dict[str, Any]:
    """Encodes other clips of the same names first, and replaces them before the training."""
    data, output = OUT / "t2v-stale_data", OUT / "t2v-stale_latents"
    shutil.rmtree(data, ignore_errors=True)
    run(sys.executable, "-m", "examples.world", data, "--known", "56", "--seed", "50000000")
    options = flags("t2v") | {"data_root": str(data), "output_dir": str(output), "do_validation": "false"}
    del options["cache_dir"]
    run(sys.executable, "-m", "examples.faults", "stale_latents", *command_line(options), "--precompute_only", "true")
    shutil.copytree(OUT / "t2v" / "data", data, ignore=shutil.ignore_patterns("latent"), dirs_exist_ok=True)
    run(sys.executable, "-m", "examples.faults", "stale_latents", *command_line(options))
    return measure("t2v", output, "--lora_path", find_checkpoints(output)[-1])


def measure(model: str, output: Path, *options: str | Path) -> dict[str, Any]:
    command = (sys.executable, "-m", "examples.measure", f"examples/tiny/{model}", "--id_token", TOKEN, "--clips", "30")
    run(*command, "--output_dir", output, *options)
    return read_result(output)


def read_result(output: Path) -> dict[str, Any]:
    return json.loads((output / "table.json").read_text())


def flags(model: str) -> dict[str, Any]:
    """Returns the flags of the quick start's run, read from its `args.json`."""
    groups = json.loads((OUT / model / "lora" / "args.json").read_text())
    return {name: value for group in groups.values() for name, value in group.items() if value is not None}


def command_line(options: dict[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        yield f"--{name}"
        for item in value if isinstance(value, list) else [value]:
            yield str(item).lower() if isinstance(item, bool) else str(item)


ROWS = {
    "runs": [
        *(Row(f"{model}, 600 updates", partial(quick_start, model)) for model in ("t2v", "i2v", "t2v-1.5", "i2v-1.5")),
        Row("t2v, all weights, ZeRO-2", full_fine_tuning_zero2),
    ],
    "faults": [
        Row("t2v, LoRA at half strength", partial(with_strength, 0.5)),
        Row("t2v, LoRA at double strength", partial(with_strength, 2.0)),
        Row("t2v, latents scaled twice", partial(with_fault, "t2v", "latents_scaled_twice")),
        Row("t2v, stale latents", with_stale_latents),
        Row("t2v-1.5, frames padded at the end", partial(with_fault, "t2v-1.5", "padding_at_the_end")),
        Row("t2v-1.5, rotary table of 1.0", partial(with_fault, "t2v-1.5", "rotary_of_the_other_kind")),
        Row("i2v-1.5, image latents multiplied", partial(with_fault, "i2v-1.5", "image_latents_multiplied")),
    ],
}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Returns a Markdown table of the values before -> after, with the token and without it."""
    columns = [(kind, name) for kind in (TOKEN, "known") for name in COLUMNS]
    lines = ["| run | " + " | ".join(f"{kind}: {name}" for kind, name in columns) + " |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for run_name, shares in rows.items():
        cells = [change(shares[kind], name) for kind, name in columns]
        lines.append(f"| {run_name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def change(by_model: dict[str, dict[str, float]], name: str) -> str:
    values = [by_model[model][name] for model in ("before", "after") if name in by_model[model]]
    return " -> ".join(f"{100 * value:.0f}" for value in values)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("table", choices=ROWS)
    name = parser.parse_args().table
    file = OUT / f"{name}.json"
    OUT.mkdir(parents=True, exist_ok=True)
    measured = json.loads(file.read_text()) if file.is_file() else {}
    for row in ROWS[name]:
        is_trained = Path("examples/tiny", row.name.partition(",")[0]).is_dir()
        if is_trained and row.name not in measured:
            measured[row.name] = row.measure()
            file.write_text(json.dumps(measured, indent=2) + "\n")
    print(table(measured))
