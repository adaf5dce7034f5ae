"""Writes the transformer of a full fine-tuning checkpoint in the diffusers format.

python -m utils.commands.export --checkpoint outputs/t2v-sft/checkpoint-500 --dtype bf16
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.checkpoint.export import export, open_checkpoint
from utils.common.errors import UserError, exit_on_user_error
from utils.common.filesystem import flags_in_errors
from utils.config.options import make_parser, option, parse_group
from utils.model.loading import DTYPES


@dataclass(frozen=True)
class ExportArgs:
    checkpoint: Path = option(help="folder checkpoint-N of a full fine-tuning run, under DDP or ZeRO")
    dtype: Literal["bf16", "fp16", "fp32"] = option("bf16", help="dtype of the written weights")
    output_path: Path | None = option(None, help="new folder; default: transformer/ in the checkpoint")

    def errors(self) -> Iterator[str]:
        yield from ()


def main() -> None:
    args = parse_group(
        make_parser("Writes a fine-tuned transformer in the diffusers format.", prog="python -m utils.commands.export"),
        ExportArgs,
    )
    weights, config_file = open_checkpoint(args.checkpoint)
    target = args.output_path or args.checkpoint / "transformer"
    if target.exists():
        raise UserError(f"--output_path {target} already exists; give another folder.")
    with flags_in_errors({"--output_path": target}):
        export(weights, config_file, target, DTYPES[args.dtype], "--checkpoint")
    print(f"{target}: {len(weights)} tensors, {args.dtype}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
