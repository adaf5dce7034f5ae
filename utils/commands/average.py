"""Writes the mean of checkpoints of one run, and lists their held-out losses.

python -m utils.commands.average outputs/t2v-lora/checkpoint-300 outputs/t2v-lora/checkpoint-400
python -m utils.commands.average outputs/t2v-lora        # the table of all checkpoints alone
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.checkpoint.average import check_same_run, read_record, write_average
from utils.checkpoint.manager import PROGRESS_FILE, find_checkpoints
from utils.common.errors import UserError, exit_on_user_error
from utils.common.filesystem import check_writable, flags_in_errors
from utils.config.options import make_parser, option, parse_group
from utils.model.loading import DTYPES
from utils.training.metrics import read_metrics


@dataclass(frozen=True)
class AverageArgs:
    checkpoints: tuple[Path, ...] = option(
        help="folders checkpoint-N of one run, LoRA or full fine-tuning; an output folder alone: only list its losses",
        positional=True,
    )
    output_path: Path | None = option(None, help="new folder; default: average-N-M beside the first checkpoint")
    dtype: Literal["fp32", "bf16", "fp16"] = option(
        "bf16", help="full fine-tuning: dtype of the written weights; the mean of adapters is float32"
    )

    def errors(self) -> Iterator[str]:
        yield from ()


def main() -> None:
    args = parse_group(
        make_parser("Averages the weights of checkpoints of one run.", prog="python -m utils.commands.average"),
        AverageArgs,
    )
    checkpoints = list(args.checkpoints)
    if len(checkpoints) == 1 and not (checkpoints[0] / PROGRESS_FILE).is_file():
        if not (checkpoints := find_checkpoints(checkpoints[0])):
            raise UserError(f"{args.checkpoints[0]} holds no checkpoint-N and is not one.")
        print_losses(checkpoints)
        return
    if len(checkpoints) == 1:
        raise UserError("A mean needs at least two checkpoints.")
    records = check_same_run(checkpoints)
    name = "-".join(["average", *map(str, sorted(record.step for record in records))])
    target = args.output_path or checkpoints[0].parent / name
    if target.exists():
        raise UserError(f"--output_path {target} already exists; give another folder.")
    if re.fullmatch(r"checkpoint-\d+", target.name):
        raise UserError(f"--output_path {target}: this is the name of a checkpoint, which the run would resume from.")
    check_writable(target.parent, "--output_path")
    print_losses(checkpoints)
    with flags_in_errors({"--output_path": target.parent}):
        count = write_average(checkpoints, records, target, DTYPES[args.dtype])
    print(f"{target}: mean of {len(checkpoints)} checkpoints, {count} tensors")


def print_losses(checkpoints: list[Path]) -> None:
    """Prints the held-out loss at the step of each checkpoint, the lowest one marked.

    Each loss is from the metrics.jsonl beside its checkpoint; a step without validation has none.
    """
    rows = []
    for checkpoint in checkpoints:
        step = read_record(checkpoint).step
        losses = [
            line["held_out_loss"]
            for line in read_metrics(checkpoint.parent)
            if line["step"] == step and "held_out_loss" in line
        ]
        rows.append((checkpoint, step, losses[-1] if losses else None))
    best = min((loss for *_, loss in rows if loss is not None), default=None)
    width = max(len(str(checkpoint)) for checkpoint in checkpoints)
    print(f"{'checkpoint':{width}}    step  held-out loss")
    for checkpoint, step, loss in rows:
        text = "no validation" if loss is None else f"{loss:13.5f}" + ("  best" if loss == best else "")
        print(f"{checkpoint!s:{width}}  {step:6}  {text}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
