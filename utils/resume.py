"""Which checkpoint a run goes on from, and whether it can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import CogVideoXTransformer3DModel
from safetensors import SafetensorError, safe_open

from utils.args import Args
from utils.checkpoint import ADAPTERS_AS_TRAINED, ARGS_FILE, PROGRESS_FILE, TRAINING_STATE, Progress, find_checkpoints
from utils.errors import UserError
from utils.model_form import check_weights, read_config

# Options that decide which weights exist; a checkpoint made with others cannot be continued.
MUST_AGREE = (
    ("model", "model_type"),
    ("model", "training_type"),
    ("lora", "rank"),
    ("lora", "lora_alpha"),
    ("lora", "target_modules"),
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


def read_progress(args: Args, folder: Path, base: str) -> Progress:
    """How far the run of a checkpoint had come.

    Args:
        base: identity of the transformer that is to be fine-tuned now.

    Raises:
        UserError: it is not a checkpoint, is incomplete, or was made with another base or other options; or the output
            folder holds checkpoints that come after it.
    """
    named = f"--resume_from_checkpoint {args.checkpoint.resume_from_checkpoint}"
    existing = find_checkpoints(args.output.output_dir)
    have = f"Checkpoints in --output_dir: {', '.join(path.name for path in existing) or 'none'}."
    needed = [ARGS_FILE, PROGRESS_FILE, f"{TRAINING_STATE}/optimizer.bin"]
    if args.model.training_type == "lora":
        needed.append(f"{TRAINING_STATE}/{ADAPTERS_AS_TRAINED}")
    else:
        needed.append("transformer/config.json")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{named}: {folder} is not a checkpoint of such a run; it lacks {', '.join(missing)}. {have}")
    try:
        saved = json.loads((folder / ARGS_FILE).read_text())
        progress = Progress(**json.loads((folder / PROGRESS_FILE).read_text()))
        trained_with = {(group, name): saved[group][name] for group, name in MUST_AGREE}
        if args.model.training_type == "lora":
            with safe_open(folder / TRAINING_STATE / ADAPTERS_AS_TRAINED, framework="pt"):
                pass
        else:
            kind = CogVideoXTransformer3DModel
            config = read_config(folder / "transformer" / "config.json", kind, named)
            check_weights(folder / "transformer", named, kind, config)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise UserError(f"{named}: {folder} is damaged ({error}); go on from another checkpoint. {have}") from error

    now = args.as_dict()
    faults = [
        f"--{name} is {now[group][name]}, but {folder} was trained with {value}."
        for (group, name), value in trained_with.items()
        if _unordered(value) != _unordered(now[group][name]) and (group != "lora" or args.model.training_type == "lora")
    ]
    if progress.base != base:
        faults.append(f"--model_path {args.model.model_path} is not the base that {folder} was trained on.")
    later = [path.name for path in existing if int(path.name.rpartition("-")[2]) > progress.step]
    if later:
        faults.append(
            f"{named}: --output_dir {args.output.output_dir} holds {', '.join(later)}, which come after it. "
            "Remove them, or give another --output_dir."
        )
    if faults:
        raise UserError(faults)
    return progress
