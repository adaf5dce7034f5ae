"""Checkpoints that are complete or absent.

checkpoint-N/                            N optimizer updates
    pytorch_lora_weights.safetensors     LoRA: the adapters, for `load_lora_weights` of diffusers
    transformer/                         SFT: the whole transformer, for `from_pretrained`; under ZeRO only at the end
    args.json                            the resolved arguments
    progress.json                        steps done, place in the sample stream, which base it was
    training_state/                      what only resuming needs: adapters as trained, optimizer, random states

Under ZeRO, in place of training_state/:
    pytorch_model/, latest               DeepSpeed's files, some a process: weights, optimizer, loss scale
    zero_to_fp32.py                      DeepSpeed's own: python zero_to_fp32.py . merged
    transformer_config.json              of the transformer whose weights these are
    random_states_N.pkl                  of process N
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import SCALER_NAME, DistributedType
from diffusers import CogVideoXTransformer3DModel
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from utils.checkpoint.export import TRANSFORMER_CONFIG, export
from utils.checkpoint.lora_files import save_lora
from utils.checkpoint.stored_weights import LATEST, rank_files, read_zero, zero_folder
from utils.common.errors import UserError
from utils.config.args import Args
from utils.model.loading import DTYPES
from utils.training.trainable import lora_config

ARGS_FILE = "args.json"
PROGRESS_FILE = "progress.json"
TRAINING_STATE = "training_state"
ADAPTERS_AS_TRAINED = "adapters.safetensors"


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        base: fingerprint of the transformer that is fine-tuned.
        step: optimizer updates done.
        samples_seen: place in the sample stream, over all ranks.
        zero_stage, num_processes: how the training state is divided; 0 for DDP.
        data: digest of the samples, in whose order the run goes on exactly.
    """

    base: str
    step: int = 0
    samples_seen: int = 0
    zero_stage: int = 0
    num_processes: int = 1
    data: str = ""


class Checkpoints:
    """Saves to and loads from the output folder of one run."""

    def __init__(self, accelerator: Accelerator, transformer: CogVideoXTransformer3DModel, args: Args) -> None:
        self.accelerator, self.transformer, self.args = accelerator, transformer, args
        self.is_lora = args.model.training_type == "lora"
        self.uses_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        # The weights are written below in the formats that users load; accelerate would add a copy, frozen base and all
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

    def save(self, progress: Progress, is_last: bool) -> None:
        """Called by every rank. Writes aside, renames when all are done, then drops the oldest beyond the limit."""
        output_dir = self.args.output.output_dir
        final = output_dir / f"checkpoint-{progress.step}"
        aside = output_dir / f".{final.name}.tmp"
        if self.accelerator.is_main_process:
            for left_by_a_killed_run in output_dir.glob(".checkpoint-*"):
                shutil.rmtree(left_by_a_killed_run)
            aside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        if self.uses_deepspeed:  # DeepSpeed's merge script stands beside the weights it merges
            self.accelerator.save_state(str(aside), exclude_frozen_parameters=True)
        else:
            self.accelerator.save_state(str(aside / TRAINING_STATE))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            if self.uses_deepspeed and (lacking := damaged_zero_files(aside, self.accelerator.num_processes)):
                raise UserError(
                    f"{aside} lacks {', '.join(lacking)} of other machines; --output_dir must be on a disk that all "
                    "machines share.",
                    on_every_rank=False,
                )
            self._save_weights(aside)
            write_args(self.args, aside)
            (aside / PROGRESS_FILE).write_text(json.dumps(asdict(progress)) + "\n")
            aside.rename(final)
            if is_last:
                complete_last(final, self.args)
            limit = self.args.checkpoint.checkpointing_limit
            for old in find_checkpoints(output_dir)[: -limit if limit else 0]:
                # out of sight before it is incomplete
                shutil.rmtree(old.rename(output_dir / f".{old.name}.old"))
        self.accelerator.wait_for_everyone()

    def load(self, folder: Path) -> None:
        """Restores trained weights, optimizer and this rank's random states.

        The weights of a full fine-tuning under DDP are not restored; the transformer was read from the checkpoint.

        Raises:
            UserError: a file is damaged.
        """
        try:
            if self.uses_deepspeed:
                self.accelerator.load_state(str(folder), load_module_strict=not self.is_lora)  # without a frozen base
            else:
                if self.is_lora:
                    state = load_file(folder / TRAINING_STATE / ADAPTERS_AS_TRAINED)
                    set_peft_model_state_dict(self.transformer, state)
                scaler = self.accelerator.scaler
                if not (folder / TRAINING_STATE / SCALER_NAME).is_file():  # trained in another precision so far
                    self.accelerator.scaler = None
                self.accelerator.load_state(str(folder / TRAINING_STATE))
                self.accelerator.scaler = scaler
        except Exception as error:
            raise UserError(
                f"--resume_from_checkpoint: {folder} is damaged ({_first_line(error)}); go on from another checkpoint.",
                on_every_rank=False,
            ) from error
        # accelerate restores its count of micro-batches on the ranks that saved one; a checkpoint is made after a whole
        # update, so it begins anew, whatever the number of ranks and of micro-batches is now
        self.accelerator.step = 0

    def _save_weights(self, folder: Path) -> None:
        """On the main process, and from the files of all where ZeRO has divided the adapters."""
        if self.uses_deepspeed:
            self.transformer.save_config(folder)
            (folder / "config.json").rename(folder / TRANSFORMER_CONFIG)
        if self.is_lora:
            state = self._adapters(folder)
            if not self.uses_deepspeed:
                save_file(state, folder / TRAINING_STATE / ADAPTERS_AS_TRAINED)
            save_lora(state, lora_config(self.args), folder)
        elif not self.uses_deepspeed:
            self.transformer.save_pretrained(folder / "transformer")

    def _adapters(self, folder: Path) -> dict[str, torch.Tensor]:
        """The adapters under peft's names, float32."""
        if self.uses_deepspeed:
            named = {name.replace(".default.", "."): stored for name, stored in read_zero(folder).items()}
            return {name: stored.read() for name, stored in named.items() if ".lora_" in name}
        return {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(self.transformer).items()}


def complete_last(checkpoint: Path, args: Args) -> None:
    """Writes the transformer/ of a run's last checkpoint where its weights are in DeepSpeed's files alone."""
    if args.model.training_type == "sft" and not (checkpoint / "transformer").exists():
        dtype = DTYPES[args.checkpoint.export_dtype or "bf16"]
        export(
            read_zero(checkpoint), checkpoint / TRANSFORMER_CONFIG, checkpoint / "transformer", dtype, "--output_dir"
        )


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


def damaged_zero_files(folder: Path, num_processes: int) -> list[str]:
    """Names of the files of DeepSpeed's that are missing or cut short in a checkpoint."""
    found = zero_folder(folder)
    if found is None or not (folder / LATEST).is_file():
        return [f"{LATEST}, pytorch_model/"]
    files = [*rank_files(found, "optim"), *rank_files(found, "model")]
    states = [folder / f"random_states_{rank}.pkl" for rank in range(num_processes)]
    damaged = [path.name for path in files + states if not zipfile.is_zipfile(path)]  # its directory is at its end
    ranks = {int(number) for path in files for number in re.findall(r"zero_pp_rank_(\d+)", path.name)}
    return damaged + [f"*_zero_pp_rank_{rank}_*" for rank in range(num_processes) if rank not in ranks]
