"""Estimates memory, work and time of a run and of a generation, and lists the cards that the run fits.

    python -m utils.commands.estimate_memory --model_path THUDM/CogVideoX-5b --training_type lora
    python -m utils.commands.estimate_memory --model_path THUDM/CogVideoX-2b --training_type sft \\
        --zero zero2_offload --num_processes 1
    python -m utils.commands.estimate_memory --model_path THUDM/CogVideoX-5b --vram_budget_gib 16

The command takes the flags of train.py; --data_root, --output_dir and --model_type are optional. The names of the
published checkpoints work without their weights. An estimate needs no GPU and takes about half a minute.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.commands.launch import template_path
from utils.common.errors import UserError, exit_on_user_error
from utils.common.filesystem import expand_user
from utils.config.args import parse_args
from utils.config.deepspeed_config import resolve_template
from utils.config.options import add_options, collect, make_parser, option, require_positive
from utils.estimate.context import RunContext, this_machine
from utils.estimate.prediction import describe_encoding, describe_generation, describe_prediction, predict
from utils.estimate.settings_search import fit_to_budget
from utils.model.loading import text_encoder_config
from utils.model.published_configs import PUBLISHED, published_spec, published_text_encoder
from utils.model.spec import ModelSpec, read_spec
from utils.run.checks import model_errors
from utils.run.preflight import fill_in_defaults, with_positions


@dataclass(frozen=True)
class EstimateArgs:
    zero: str | None = option(
        None, help="template in configs/, such as zero2_offload, or the path of a .json file; default: DDP"
    )
    num_processes: int = option(1, help="number of GPUs, on one machine")

    def errors(self) -> Iterator[str]:
        yield from require_positive(self, "num_processes")


def main() -> None:
    parser = make_parser(
        "Estimates memory, work and time of a run. All other flags are those of train.py: python train.py --help",
        prog="python -m utils.commands.estimate_memory",
    )
    add_options(parser, EstimateArgs)
    values, train_flags = parser.parse_known_args()
    own = collect(vars(values), EstimateArgs)
    if errors := list(own.errors()):
        raise UserError(errors)
    context = make_context(train_flags, own.zero, own.num_processes)
    if context.args.memory.vram_budget_gib is not None:
        args, note = fit_to_budget(context, this_machine(), {})
        context = replace(context, args=args)
        print(note)
    described = describe_prediction(predict(context), context)
    print("\n".join([*described, *describe_encoding(context), *describe_generation(context)]))


def make_context(train_flags: list[str], zero: str | None, num_processes: int) -> RunContext:
    """Resolves a command line of train.py whose data and output folders may be missing.

    Args:
        zero: DeepSpeed template by name or path; None for DDP.

    Raises:
        UserError: the flags are wrong, or the model is unknown.
    """
    args = parse_args(["--model_type", "t2v", "--data_root", ".", "--output_dir", ".", *train_flags])
    spec, text_encoder = load_spec(args.model.model_path, args.model.variant)
    spec = with_positions(spec, args)
    args = fill_in_defaults(replace(args, model=replace(args.model, model_type=spec.task)), spec, zero is not None)
    if errors := [*args.errors(), *model_errors(args, spec, zero is not None, num_processes)]:
        raise UserError(errors)
    config = None
    if zero is not None:
        config = resolve_template(template_path(zero, flag="--zero "), args, spec.width, num_processes)
    return RunContext(args, spec, text_encoder, config, num_processes)


def load_spec(model_path: str, variant: str | None = None) -> tuple[ModelSpec, dict[str, Any]]:
    """Returns the spec and the text encoder's config of a folder or of a published checkpoint."""
    spec = None if Path(model_path).is_dir() else published_spec(model_path)
    if spec is not None:
        return spec, published_text_encoder(model_path)
    folder = expand_user(model_path)
    if not folder.is_dir():
        names = ", ".join(PUBLISHED)
        raise UserError(f"--model_path {model_path}: there is no such folder, and it is none of {names}.")
    return read_spec(folder, variant), text_encoder_config(folder, variant)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
