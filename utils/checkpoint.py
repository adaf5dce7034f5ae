"""Checkpoints that are complete or absent, and resuming from them.

checkpoint-N/                            N optimizer updates
    pytorch_lora_weights.safetensors     LoRA: the adapters, for `load_lora_weights` of diffusers
    transformer/                         SFT: the whole transformer, for `from_pretrained`
    args.json                            the resolved arguments
    training_state/                      what only resuming needs: adapters as trained, optimizer, schedule, RNG
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import CogVideoXTransformer3DModel
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from utils.args import Args
from utils.errors import UserError
from utils.lora import save_lora
from utils.trainable import lora_config

ARGS_FILE = "args.json"
TRAINING_STATE = "training_state"
ADAPTERS_AS_TRAINED = "adapters.safetensors"
# Options that decide which weights exist; a checkpoint made with others cannot be continued.
MUST_AGREE = (
    ("model", "model_type"),
    ("model", "training_type"),
    ("lora", "rank"),
    ("lora", "lora_alpha"),
    ("lora", "target_modules"),
)


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer updates done.
        samples_seen: place in the sample stream, over all ranks.
    """

    step: int = 0
    samples_seen: int = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step, "samples_seen": self.samples_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step, self.samples_seen = state["step"], state["samples_seen"]


class Checkpoints:
    """Saves to and loads from one output folder.

    Args:
        objects: whatever else has `state_dict` and is to be resumed: schedule, progress.
    """

    def __init__(
        self, accelerator: Accelerator, transformer: CogVideoXTransformer3DModel, args: Args, *objects: Any
    ) -> None:
        self.accelerator, self.transformer, self.args = accelerator, transformer, args
        accelerator.register_for_checkpointing(*objects)
        # The weights are written below in the formats that users load; accelerate would add a copy, frozen base and all
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

    def save(self, step: int) -> Path:
        """Called by every rank. Writes aside, renames when all are done, then drops the oldest beyond the limit."""
        output_dir = self.args.output.output_dir
        final, aside = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.tmp"
        if self.accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            self._save_weights(aside)
            write_args(self.args, aside)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(aside / TRAINING_STATE))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            limit = self.args.checkpoint.checkpointing_limit
            for old in find_checkpoints(output_dir)[: -limit if limit else 0]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        return final

    def load(self, folder: Path) -> None:
        """Restores adapters, optimizer, schedule, progress and this rank's RNG."""
        if self.args.model.training_type == "lora":
            state = load_file(folder / TRAINING_STATE / ADAPTERS_AS_TRAINED)
            set_peft_model_state_dict(self.transformer, state)
        self.accelerator.load_state(str(folder / TRAINING_STATE))

    def _save_weights(self, folder: Path) -> None:
        if self.args.model.training_type == "lora":
            state = get_peft_model_state_dict(self.transformer)
            (folder / TRAINING_STATE).mkdir()
            save_file(
                {name: tensor.contiguous() for name, tensor in state.items()},
                folder / TRAINING_STATE / ADAPTERS_AS_TRAINED,
            )
            save_lora(state, lora_config(self.args), folder)
        else:
            self.transformer.save_pretrained(folder / "transformer")


def write_args(args: Args, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ARGS_FILE).write_text(json.dumps(args.as_dict(), indent=2) + "\n")


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def choose_checkpoint(args: Args) -> Path | None:
    """The checkpoint to go on from; None for a run from the start.

    Raises:
        UserError: the folder is not there, is no checkpoint, or was made with options that do not fit; or a new run
            would overwrite the checkpoints of an old one.
    """
    wanted, output_dir = args.checkpoint.resume_from_checkpoint, args.output.output_dir
    existing = find_checkpoints(output_dir)
    if wanted is None:
        if existing:
            raise UserError(
                f"--output_dir {output_dir} already holds {existing[-1].name}. Give --resume_from_checkpoint latest to "
                "go on from it, or another --output_dir for a new run."
            )
        return None
    if wanted == "latest":
        if not existing:
            return None
        folder = existing[-1]
    else:
        folder = Path(wanted)
    if not (folder / TRAINING_STATE).is_dir() or not (folder / ARGS_FILE).is_file():
        have = ", ".join(path.name for path in existing) or "none"
        raise UserError(
            f"--resume_from_checkpoint {wanted}: {folder} is not a checkpoint of this toolkit, which holds {ARGS_FILE} "
            f"and {TRAINING_STATE}/. Checkpoints in --output_dir: {have}."
        )
    saved, now = json.loads((folder / ARGS_FILE).read_text()), args.as_dict()
    faults = [
        f"--{name} is {now[group][name]}, but {folder} was trained with {saved[group][name]}."
        for group, name in MUST_AGREE
        if saved[group][name] != now[group][name] and (group != "lora" or args.model.training_type == "lora")
    ]
    if faults:
        raise UserError(faults)
    return folder
