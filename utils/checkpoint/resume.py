"""Which checkpoint a run goes on from, and whether it can."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from diffusers import CogVideoXTransformer3DModel
from safetensors import SafetensorError, safe_open

from utils.checkpoint.manager import (
    ADAPTERS_AS_TRAINED,
    ARGS_FILE,
    PROGRESS_FILE,
    TRAINING_STATE,
    Progress,
    damaged_zero_files,
    find_checkpoints,
)
from utils.common.errors import UserError
from utils.config.args import Args
from utils.model.weight_files import check_weights, read_config

# Options that decide which weights and states exist; a checkpoint made with others cannot be continued.
MUST_AGREE = (
    ("model", "model_type"),
    ("model", "training_type"),
    ("lora", "rank"),
    ("lora", "lora_alpha"),
    ("lora", "target_modules"),
    ("memory", "quantize_optimizer"),
    ("memory", "offload_optimizer"),
)


def _unordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def choose_checkpoint(args: Args) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means; None for a run from the start.

    Raises:
        UserError: a new run would mix with the checkpoints of an old one.
    """
    wanted, output_dir = args.checkpoint.resume_from_checkpoint, args.output.output_dir
    existing = find_checkpoints(output_dir)
    if wanted is None and existing:
        raise UserError(
            f"--output_dir {output_dir} already holds {existing[-1].name}. Give --resume_from_checkpoint latest to "
            "go on from it, or another --output_dir for a new run."
        )
    if wanted is None or (wanted == "latest" and not existing):
        return None
    return existing[-1] if wanted == "latest" else Path(wanted)


def dictated_memory(folder: Path | None) -> dict[str, Any]:
    """The memory options that a run from a checkpoint has to have; none where it cannot be read, as is told later."""
    try:
        saved = json.loads((folder / ARGS_FILE).read_text())["memory"] if folder is not None else {}
        return {name: saved[name] for group, name in MUST_AGREE if group == "memory" and name in saved}
    except (ValueError, KeyError, TypeError, OSError):
        return {}


def read_progress(args: Args, folder: Path, now: Progress) -> Progress:
    """How far the run of a checkpoint had come.

    Args:
        now: what the run that goes on would start from: its base, ZeRO stage and number of processes.

    Raises:
        UserError: it is not a checkpoint, is incomplete, or was made with another base or other options; or the output
            folder holds checkpoints that come after it.
    """
    named = f"--resume_from_checkpoint {args.checkpoint.resume_from_checkpoint}"
    existing = find_checkpoints(args.output.output_dir)
    have = f"Checkpoints in --output_dir: {', '.join(path.name for path in existing) or 'none'}."
    needed = [ARGS_FILE, PROGRESS_FILE]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{named}: {folder} is not a checkpoint of such a run; it lacks {', '.join(missing)}. {have}")
    try:
        saved = json.loads((folder / ARGS_FILE).read_text())
        progress = Progress(**json.loads((folder / PROGRESS_FILE).read_text()))
        trained_with = {(group, name): saved[group][name] for group, name in MUST_AGREE}
        precision = saved["training"]["mixed_precision"]
        if not all(isinstance(count, int) for name, count in asdict(progress).items() if name not in ("base", "data")):
            raise ValueError(f"{PROGRESS_FILE} does not hold whole numbers")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{named}: {folder} is damaged ({error}); go on from another checkpoint. {have}") from error
    is_lora = args.model.training_type == "lora"
    options = args.as_dict()
    errors = [
        f"--{name} is {options[group][name]}, but {folder} was trained with {value}."
        for (group, name), value in trained_with.items()
        if _unordered(value) != _unordered(options[group][name]) and (group != "lora" or is_lora)
    ]
    if progress.base != now.base:
        errors.append(f"--model_path {args.model.model_path} is not the base that {folder} was trained on.")
    if progress.zero_stage != now.zero_stage:
        errors.append(
            f"{named}: {folder} was saved under {_strategy(progress)}, and this run is under {_strategy(now)}; "
            "go on with the script and template that it was made with."
        )
    elif progress.zero_stage:
        if progress.num_processes != now.num_processes:
            errors.append(
                f"{named}: {folder} is divided among {progress.num_processes} processes, and this run has "
                f"{now.num_processes}; DeepSpeed needs the same number, NUM_PROCESSES={progress.num_processes}."
            )
        if precision != args.training.mixed_precision:
            errors.append(
                f"--mixed_precision is {args.training.mixed_precision}, but {folder} was trained with {precision}; "
                "DeepSpeed's files are for that."
            )
    later = [path.name for path in existing if int(path.name.rpartition("-")[2]) > progress.step]
    if later:
        errors.append(
            f"{named}: --output_dir {args.output.output_dir} holds {', '.join(later)}, which come after it. "
            "Remove them, or give another --output_dir."
        )
    if not errors and (damaged := _damaged_files(args, folder, progress)):
        errors.append(f"{named}: {folder} is damaged ({damaged}); go on from another checkpoint. {have}")
    if errors:
        raise UserError(errors)
    return replace(progress, num_processes=now.num_processes)


def _strategy(progress: Progress) -> str:
    return f"ZeRO-{progress.zero_stage}" if progress.zero_stage else "DDP"


def _damaged_files(args: Args, folder: Path, progress: Progress) -> str:
    """What of a checkpoint's weights and training state is missing or cut short; empty where nothing is."""
    if progress.zero_stage:
        return ", ".join(damaged_zero_files(folder, progress.num_processes))
    state = folder / TRAINING_STATE
    if not (state / "optimizer.bin").is_file():
        return f"{TRAINING_STATE}/optimizer.bin is missing"
    try:
        if args.model.training_type == "lora":
            with safe_open(state / ADAPTERS_AS_TRAINED, framework="pt"):
                return ""
        kind = CogVideoXTransformer3DModel
        config = read_config(folder / "transformer" / "config.json", kind, "transformer/")
        check_weights(folder / "transformer", "transformer/", kind, config)
    except (OSError, SafetensorError, UserError) as error:
        return str(error)
    return ""
