"""Checkpoints that are complete or absent.

checkpoint-N/                            N optimizer updates
    pytorch_lora_weights.safetensors     LoRA: the adapters, for `load_lora_weights` of diffusers
    transformer/                         SFT: the whole transformer, for `from_pretrained`
    args.json                            the resolved arguments
    progress.json                        steps done, place in the sample stream, which base it was
    training_state/                      what only resuming needs: adapters as trained, optimizer, random states
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator
from diffusers import CogVideoXTransformer3DModel
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from utils.args import Args
from utils.errors import UserError
from utils.lora import save_lora
from utils.trainable import lora_config

ARGS_FILE = "args.json"
PROGRESS_FILE = "progress.json"
TRAINING_STATE = "training_state"
ADAPTERS_AS_TRAINED = "adapters.safetensors"


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        base: identity of the transformer that is fine-tuned.
        step: optimizer updates done.
        samples_seen: place in the sample stream, over all ranks.
    """

    base: str
    step: int = 0
    samples_seen: int = 0


class Checkpoints:
    """Saves to and loads from the output folder of one run."""

    def __init__(self, accelerator: Accelerator, transformer: CogVideoXTransformer3DModel, args: Args) -> None:
        self.accelerator, self.transformer, self.args = accelerator, transformer, args
        # The weights are written below in the formats that users load; accelerate would add a copy, frozen base and all
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

    def save(self, progress: Progress) -> None:
        """Called by every rank. Writes aside, renames when all are done, then drops the oldest beyond the limit."""
        output_dir = self.args.output.output_dir
        final = output_dir / f"checkpoint-{progress.step}"
        aside = output_dir / f".{final.name}.tmp"
        if self.accelerator.is_main_process:
            for left_by_a_killed_run in output_dir.glob(".checkpoint-*"):
                shutil.rmtree(left_by_a_killed_run)
            (aside / TRAINING_STATE).mkdir(parents=True)
            self._save_weights(aside)
            write_args(self.args, aside)
            (aside / PROGRESS_FILE).write_text(json.dumps(asdict(progress)) + "\n")
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(aside / TRAINING_STATE))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            aside.rename(final)
            limit = self.args.checkpoint.checkpointing_limit
            for old in find_checkpoints(output_dir)[: -limit if limit else 0]:
                # out of sight before it is incomplete
                shutil.rmtree(old.rename(output_dir / f".{old.name}.old"))
        self.accelerator.wait_for_everyone()

    def load(self, folder: Path) -> None:
        """Restores adapters, optimizer and this rank's random states. Raises UserError where a file is damaged."""
        try:
            if self.args.model.training_type == "lora":
                set_peft_model_state_dict(self.transformer, load_file(folder / TRAINING_STATE / ADAPTERS_AS_TRAINED))
            self.accelerator.load_state(str(folder / TRAINING_STATE))
        except Exception as error:
            raise UserError(
                f"--resume_from_checkpoint: {folder} is damaged ({_first_line(error)}); go on from another checkpoint.",
                on_every_rank=False,
            ) from error
        # accelerate restores its count of micro-batches on the ranks that saved one; a checkpoint is made after a whole
        # update, so it begins anew, whatever the number of ranks and of micro-batches is now
        self.accelerator.step = 0

    def _save_weights(self, folder: Path) -> None:
        if self.args.model.training_type == "lora":
            state = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(self.transformer).items()}
            save_file(state, folder / TRAINING_STATE / ADAPTERS_AS_TRAINED)
            save_lora(state, lora_config(self.args), folder)
        else:
            self.transformer.save_pretrained(folder / "transformer")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


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
