"""What a run will take, before it is begun: memory of a GPU and of the host, work, time, and which cards it fits.

    python -m utils.commands.estimate_memory --model_path THUDM/CogVideoX-5b --training_type lora
    python -m utils.commands.estimate_memory --model_path THUDM/CogVideoX-2b --training_type sft \\
        --zero zero2_offload --num_processes 1
    python -m utils.commands.estimate_memory --model_path THUDM/CogVideoX-5b --vram_budget_gib 16

Takes the flags of train.py, of which --data_root, --output_dir and --model_type may be left out; the names of the
published checkpoints are enough. Needs no GPU and no weights, and half a minute.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.common.errors import UserError, exit_on_user_error
from utils.config.args import parse_args
from utils.config.deepspeed_config import ROOT, resolve_template
from utils.estimate.prediction import describe_prediction, predict
from utils.estimate.settings_search import fit_to_budget
from utils.model.published_configs import PUBLISHED, TEXT_ENCODER, published_spec
from utils.model.spec import ModelSpec, read_spec, text_encoder_config
from utils.run.checks import model_errors
from utils.run.preflight import resolve


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="All other flags are those of train.py: python train.py --help"
    )
    parser.add_argument("--zero", help="a template in configs/, such as zero2_offload, or a path; default: DDP")
    parser.add_argument("--num_processes", type=int, default=1, help="GPUs, on one machine")
    own, others = parser.parse_known_args()
    args = parse_args(["--model_type", "t2v", "--data_root", ".", "--output_dir", ".", *others])
    spec, text_encoder = load_spec(args.model.model_path)
    args = resolve(replace(args, model=replace(args.model, model_type=spec.task)), spec, own.zero is not None)
    if errors := [*args.errors(), *model_errors(args, spec, own.zero is not None, own.num_processes)]:
        raise UserError(errors)
    zero = None
    if own.zero is not None:
        template = Path(own.zero) if own.zero.endswith(".json") else ROOT / "configs" / f"{own.zero}.json"
        zero = resolve_template(template, args, spec.width, own.num_processes)
    if args.memory.vram_budget_gib is not None:
        args, note = fit_to_budget(args, spec, text_encoder, zero, own.num_processes, {})
        print(note)
    prediction = predict(args, spec, text_encoder, zero, own.num_processes)
    print("\n".join(describe_prediction(prediction, args, spec)))


def load_spec(model_path: str) -> tuple[ModelSpec, dict[str, Any]]:
    """The form and the text encoder's config of a folder, or of a published checkpoint."""
    spec = None if Path(model_path).is_dir() else published_spec(model_path)
    if spec is not None:
        return spec, TEXT_ENCODER
    folder = Path(model_path).expanduser()
    if not folder.is_dir():
        names = ", ".join(PUBLISHED)
        raise UserError(f"--model_path {model_path}: there is no such folder, and it is none of {names}.")
    return read_spec(folder), text_encoder_config(folder)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
