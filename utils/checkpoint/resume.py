"""Chooses the checkpoint to resume from and checks that the run can continue from it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from diffusers import CogVideoXTransformer3DModel
from safetensors import SafetensorError, safe_open

from utils.checkpoint.manager import (
    ARGS_FILE,
    AVERAGE_OF,
    PROGRESS_FILE,
    Progress,
    damaged_zero_files,
    find_checkpoints,
)
from utils.checkpoint.saved_weights import ADAPTERS_AS_TRAINED, TRAINING_STATE
from utils.common.errors import UserError
from utils.common.filesystem import expand_user, unreadable, unreadable_in
from utils.config.args import Args
from utils.model.weight_files import check_weights, read_config

# Options that determine which weights and states exist. A resumed run must keep their values.
FIXED_OPTIONS = (
    ("model", "model_type"),
    ("model", "training_type"),
    ("model", "learned_positions"),
    ("lora", "rank"),
    ("lora", "lora_alpha"),
    ("lora", "target_modules"),
    ("memory", "quantize_optimizer"),
    ("memory", "offload_optimizer"),
)
# Fields of `Progress` that are not counts.
NOT_COUNTS = ("base", "base_by_meaning", "data", "objective")


def _unordered(value: Any) -> Any:
    """Sorts lists, whose order does not matter (--target_modules)."""
    return sorted(value) if isinstance(value, list) else value


def choose_checkpoint(args: Args) -> Path | None:
    """Returns the checkpoint that --resume_from_checkpoint selects, or None for a new run.

    Raises:
        UserError: a new run would write to a folder that already holds checkpoints.
    """
    requested, output_dir = args.checkpoint.resume_from_checkpoint, args.output.output_dir
    existing = find_checkpoints(output_dir)
    if requested is None and existing:
        raise UserError(
            f"--output_dir {output_dir} already holds {existing[-1].name}. Give --resume_from_checkpoint latest to "
            "resume from it, or another --output_dir for a new run."
        )
    if requested is None or (requested == "latest" and not existing):
        return None
    return existing[-1] if requested == "latest" else expand_user(requested)


def fixed_memory_options(folder: Path | None) -> dict[str, Any]:
    """Returns the memory options that a checkpoint fixes. Empty if it cannot be read; `read_progress` reports that."""
    try:
        saved = json.loads((folder / ARGS_FILE).read_text())["memory"] if folder is not None else {}
        return {name: saved[name] for group, name in FIXED_OPTIONS if group == "memory" and name in saved}
    except (ValueError, KeyError, TypeError, OSError):
        return {}


def read_progress(args: Args, folder: Path, current: Progress) -> Progress:
    """Returns the progress stored in a checkpoint, after checking that this run can continue from it.

    Args:
        current: base, ZeRO stage and number of processes of this run.

    Raises:
        UserError: the folder is not a complete checkpoint, its base or fixed options differ from those of this run, or
            the output folder holds later checkpoints.
    """
    flag = f"--resume_from_checkpoint {args.checkpoint.resume_from_checkpoint}"
    existing = find_checkpoints(args.output.output_dir)
    available = f"Checkpoints in --output_dir: {', '.join(path.name for path in existing) or 'none'}."
    needed = [ARGS_FILE, PROGRESS_FILE]
    if reason := unreadable(folder):
        raise UserError(f"{flag}: {reason}.")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{flag}: {folder} is not a checkpoint of a training run; it lacks {', '.join(missing)}. {available}"
        )
    try:
        saved = json.loads((folder / ARGS_FILE).read_text())
        stored = json.loads((folder / PROGRESS_FILE).read_text())
        if AVERAGE_OF in stored:
            raise UserError(f"{flag}: {folder} is a mean, which has no optimizer states; use a checkpoint. {available}")
        progress = Progress(**stored)
        # earlier versions kept the learned positions, in models that have them
        saved["model"].setdefault("learned_positions", args.model.learned_positions and "keep")
        trained_with = {(group, name): saved[group][name] for group, name in FIXED_OPTIONS}
        precision = saved["training"]["mixed_precision"]
        if not all(isinstance(count, int) for name, count in asdict(progress).items() if name not in NOT_COUNTS):
            raise ValueError(f"{PROGRESS_FILE} has counts that are not integers")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, OSError) as error:
        if reason := unreadable_in(folder):
            raise UserError(f"{flag}: {reason}.") from error
        raise UserError(f"{flag}: {folder} is damaged ({error}); use another checkpoint. {available}") from error
    is_lora = args.model.training_type == "lora"
    options = args.as_dict()
    errors = [
        f"--{name} is {options[group][name]}, but {folder} was trained with {value}."
        for (group, name), value in trained_with.items()
        if _unordered(value) != _unordered(options[group][name]) and (group != "lora" or is_lora)
    ]
    if progress.base != current.base and progress.base_by_meaning != current.base_by_meaning:
        saved_variant, variant = saved["model"].get("variant"), args.model.variant
        flags = f"--model_path {args.model.model_path}" + (f" --variant {variant}" if variant else "")
        hint = f" It was trained with --variant {saved_variant}." if saved_variant not in (None, variant) else ""
        errors.append(f"{flags} is not the base that {folder} was trained on.{hint}")
    errors += [
        f"--model_path {args.model.model_path}: {name} is {current.objective.get(name)}, but {folder} was trained with "
        f"{value}."
        for name, value in progress.objective.items()
        if value != current.objective.get(name)
    ]
    if progress.zero_stage != current.zero_stage:
        errors.append(
            f"{flag}: {folder} was saved under {_strategy(progress)}, and this run is under {_strategy(current)}; "
            "resume with the script and template of the saved run."
        )
    elif progress.zero_stage:
        if progress.num_processes != current.num_processes:
            errors.append(
                f"{flag}: {folder} is divided among {progress.num_processes} processes, and this run has "
                f"{current.num_processes}; DeepSpeed needs the same number: set NUM_PROCESSES={progress.num_processes}."
            )
        if precision != args.training.mixed_precision:
            errors.append(
                f"--mixed_precision is {args.training.mixed_precision}, but {folder} was trained with {precision}; "
                "DeepSpeed's files need the same precision."
            )
    later = [path.name for path in existing if int(path.name.rpartition("-")[2]) > progress.step]
    if later:
        errors.append(
            f"{flag}: --output_dir {args.output.output_dir} holds later checkpoints: {', '.join(later)}. "
            "Remove them, or give another --output_dir."
        )
    if not errors and (reason := unreadable_in(folder)):
        errors.append(f"{flag}: {reason}.")
    if not errors and (damaged := _damaged_files(args, folder, progress)):
        errors.append(f"{flag}: {folder} is damaged ({damaged}); use another checkpoint. {available}")
    if errors:
        raise UserError(errors)
    return replace(
        progress,
        num_processes=current.num_processes,
        base=current.base,
        base_by_meaning=current.base_by_meaning,
        objective=current.objective,
    )


def _strategy(progress: Progress) -> str:
    return f"ZeRO-{progress.zero_stage}" if progress.zero_stage else "DDP"


def _damaged_files(args: Args, folder: Path, progress: Progress) -> str:
    """Returns which weights or states of a checkpoint are missing or truncated; empty if it is intact."""
    if progress.zero_stage:
        return ", ".join(damaged_zero_files(folder, progress.num_processes))
    state = folder / TRAINING_STATE
    if not (state / "optimizer.bin").is_file():
        return f"{TRAINING_STATE}/optimizer.bin is missing"
    # accelerate ignores random states that it cannot read
    if empty := [path.name for path in sorted(state.iterdir()) if path.is_file() and path.stat().st_size == 0]:
        return f"{TRAINING_STATE}/{empty[0]} is empty"
    try:
        if args.model.training_type == "lora":
            with safe_open(state / ADAPTERS_AS_TRAINED, framework="pt"):
                return ""
        model_class = CogVideoXTransformer3DModel
        config = read_config(folder / "transformer" / "config.json", model_class, "transformer/")
        check_weights(folder / "transformer", "transformer/", model_class, config)
    except (OSError, SafetensorError, UserError) as error:
        return str(error)
    return ""
