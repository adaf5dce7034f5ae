"""Saves and loads checkpoints atomically.

checkpoint-N/                            state after N optimizer updates
    pytorch_lora_weights.safetensors     LoRA: the adapters, for `load_lora_weights` of diffusers
    OUTPUT-checkpoint-N-comfyui.safetensors  LoRA with --lora_format comfyui or both: the same for ComfyUI
    transformer/                         SFT: the transformer, for `from_pretrained`; under ZeRO only in the last one
    args.json                            resolved arguments
    progress.json                        updates done, position in the sample stream, fingerprint of the base
    ema/                                 with --ema_decay: the average of the weights, see average_files.py
    training_state/                      for resuming only: adapters as trained, optimizer, random states

Under ZeRO, instead of training_state/:
    pytorch_model/, latest               DeepSpeed's files, several per process: weights, optimizer, loss scale
    zero_to_fp32.py                      DeepSpeed's merge script: python zero_to_fp32.py . merged
    transformer_config.json              config of the transformer
    random_states_N.pkl                  random states of process N
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import SCALER_NAME, DistributedType
from diffusers import CogVideoXTransformer3DModel
from peft import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils import serialization

from utils.checkpoint.average_files import load_average, save_partition
from utils.checkpoint.saved_weights import (
    ADAPTERS_AS_TRAINED,
    TRAINING_STATE,
    export_last_checkpoint,
    lora_name,
    save_average,
    save_weights,
)
from utils.checkpoint.stored_weights import LATEST, rank_files, zero_folder
from utils.common.errors import UserError
from utils.common.filesystem import apply_umask, disk_is_full
from utils.config.args import Args
from utils.model.loading import DTYPES
from utils.training.trainable import weight_dtype
from utils.training.weight_average import WeightAverage

ARGS_FILE = "args.json"
PROGRESS_FILE = "progress.json"
# Entry of progress.json beside the mean of checkpoints: their steps. Such a folder has no training state.
AVERAGE_OF = "average_of"


@dataclass
class Progress:
    """Progress of a run.

    Attributes:
        base: fingerprint of the transformer that is fine-tuned.
        base_by_meaning: the same, by meaning; empty in checkpoints of earlier versions.
        step: number of optimizer updates done.
        samples_seen: position in the sample stream, over all ranks.
        zero_stage: ZeRO stage of the training state; 0 for DDP.
        num_processes: number of processes that share the training state.
        num_samples: number of samples, without repeats; 0 in checkpoints of earlier versions.
        objective: what `read_objective` returns for the base; empty in checkpoints of earlier versions.
        data: digest of the samples. With the same data, a resumed run continues in the same order.
    """

    base: str
    step: int = 0
    samples_seen: int = 0
    zero_stage: int = 0
    num_processes: int = 1
    data: str = ""
    base_by_meaning: str = ""
    num_samples: int = 0
    objective: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """Saves and loads the checkpoints in the output folder of a run."""

    def __init__(self, accelerator: Accelerator, transformer: CogVideoXTransformer3DModel, args: Args) -> None:
        self.accelerator, self.transformer, self.args = accelerator, transformer, args
        self.is_lora = args.model.training_type == "lora"
        self.uses_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        # `_save_weights` writes the weights in the formats that users load. accelerate would add a copy of the whole
        # model, including the frozen base.
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

    def save(self, progress: Progress, is_last: bool, average: WeightAverage | None = None) -> None:
        """Saves a checkpoint and removes the oldest ones beyond --checkpointing_limit. Every rank must call this.

        The files are written to a temporary folder, which is renamed when all ranks are done.

        Raises:
            UserError: the disk is full, or files of other machines are not visible on this one.
        """
        try:
            self._save(progress, is_last, average)
        except (OSError, RuntimeError, SafetensorError) as error:
            output_dir = self.args.output.output_dir
            is_named = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            # torch and safetensors hide the number of the error; 122 is a used-up quota
            is_hidden = re.search(r"os error (28|122)\b|PytorchStreamWriter|inline_container", str(error))
            if not (is_named or is_hidden or disk_is_full(output_dir)):
                raise
            if self.accelerator.is_main_process:
                shutil.rmtree(output_dir / f".checkpoint-{progress.step}.tmp", ignore_errors=True)
            last = [path.name for path in find_checkpoints(output_dir)][-1:] or ["none"]
            raise UserError(
                f"--output_dir {output_dir}: no space is left to save step {progress.step}. The last complete "
                f"checkpoint is {last[0]}. Free some space and resume; --checkpointing_limit keeps fewer.",
                on_every_rank=False,
            ) from error

    def _save(self, progress: Progress, is_last: bool, average: WeightAverage | None) -> None:
        output_dir = self.args.output.output_dir
        final = output_dir / f"checkpoint-{progress.step}"
        tmp_dir = output_dir / f".{final.name}.tmp"
        if self.accelerator.is_main_process:
            for stale in output_dir.glob(".checkpoint-*"):  # from killed runs
                shutil.rmtree(stale)
            tmp_dir.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        if self.uses_deepspeed:  # at the top level, where DeepSpeed's merge script expects its files
            self.accelerator.save_state(str(tmp_dir), exclude_frozen_parameters=True)
        else:
            self.accelerator.save_state(str(tmp_dir / TRAINING_STATE))
        self.accelerator.wait_for_everyone()
        if average is not None and self.uses_deepspeed:
            save_partition(average, tmp_dir, self.accelerator.process_index)
            self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            if self.uses_deepspeed and (missing := damaged_zero_files(tmp_dir, self.accelerator.num_processes)):
                raise UserError(
                    f"--output_dir {output_dir}: {tmp_dir.name} lacks files of other machines: {', '.join(missing)}. "
                    "The folder must be on a disk that all machines share.",
                    on_every_rank=False,
                )
            save_weights(self.transformer, self.args, self.uses_deepspeed, tmp_dir, lora_name(final))
            if average is not None:
                save_average(average, self.transformer, self.args, self.uses_deepspeed, tmp_dir, lora_name(final))
            write_args(self.args, tmp_dir)
            (tmp_dir / PROGRESS_FILE).write_text(json.dumps(asdict(progress)) + "\n")
            apply_umask(*tmp_dir.rglob("*.safetensors"))
            tmp_dir.rename(final)
            if is_last:
                export_last_checkpoint(final, self.args)
            limit = self.args.checkpoint.checkpointing_limit
            for old in find_checkpoints(output_dir)[: -limit if limit else 0]:
                # renamed first, so that an interrupted deletion does not leave an incomplete checkpoint
                shutil.rmtree(old.rename(output_dir / f".{old.name}.old"))
        self.accelerator.wait_for_everyone()

    def load(self, folder: Path) -> None:
        """Restores the trained weights, the optimizer and the random states of this rank.

        Under DDP, full fine-tuning restores no weights here: the transformer was loaded from the checkpoint already.

        Raises:
            UserError: a file is damaged.
        """
        # files are memory-mapped, so that states go to their place without a copy of the file in host memory
        with _damage_reported(folder), serialization.config.patch("load.mmap", True):  # type: ignore[attr-defined]
            self._load(folder)
        # accelerate restores its micro-batch count, but only on ranks that saved one. Checkpoints follow complete
        # updates, so the count restarts on all ranks, even if their number or the accumulation has changed.
        self.accelerator.step = 0

    def load_average(self, average: WeightAverage, folder: Path) -> None:
        """Restores the average of the weights; without one in the checkpoint, it starts at the weights.

        Raises:
            UserError: a file is damaged.
        """
        with _damage_reported(folder):
            found = load_average(average, folder, folder / TRAINING_STATE, self.accelerator.process_index)
        if not found:
            self.accelerator.print(f"Note: {folder} holds no average of the weights; --ema_decay starts a new one.")

    def _load(self, folder: Path) -> None:
        if self.uses_deepspeed:
            # not strict for LoRA, whose files lack the frozen base
            self.accelerator.load_state(str(folder), load_module_strict=not self.is_lora)
            return
        if self.is_lora:
            set_peft_model_state_dict(self.transformer, load_file(folder / TRAINING_STATE / ADAPTERS_AS_TRAINED))
        scaler = self.accelerator.scaler
        if not (folder / TRAINING_STATE / SCALER_NAME).is_file():  # saved in another precision
            self.accelerator.scaler = None
        # by default, several GPUs load the whole file to the GPU and copy the states from there
        self.accelerator.load_state(str(folder / TRAINING_STATE), map_location="cpu")
        self.accelerator.scaler = scaler


@contextmanager
def _damage_reported(folder: Path) -> Iterator[None]:
    """Turns an error of reading a checkpoint, whatever its readers raise, into a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"--resume_from_checkpoint: {folder} is damaged ({_first_line(error)}); use another checkpoint.",
            on_every_rank=False,
        ) from error


def checkpoint_bytes(args: Args, num_trained: int, uses_deepspeed: bool) -> int:
    """Returns the size of one checkpoint.

    Args:
        num_trained: number of trained weights.
    """
    is_lora, is_float32 = args.model.training_type == "lora", args.training.mixed_precision == "no"
    averages = 1 if args.training.ema_decay else 0
    lora_files = 2 if args.checkpoint.lora_format == "both" else 1
    if uses_deepspeed:  # float32 weights and moments on all ranks, and the export of the last checkpoint
        export_bytes = 4 * lora_files if is_lora else 4 if args.checkpoint.export_dtype == "fp32" else 2
        per_weight = 12.0 + export_bytes + averages * (4 + export_bytes)
    else:
        states = {"none": 8.0, "8bit": 2.0, "4bit": 1.5}[args.memory.quantize_optimizer]
        weights = DTYPES["fp32"] if is_lora else weight_dtype(args, uses_deepspeed)
        copies = 1 + lora_files if is_lora else 1  # adapters as trained and as users load them
        average_bytes = averages * 4 * (copies if is_lora else 1)
        per_weight = (
            average_bytes + states + copies * weights.itemsize + 4 * (args.memory.offload_optimizer and not is_float32)
        )
    return int(num_trained * per_weight)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def write_args(args: Args, folder: Path) -> None:
    """Writes the resolved arguments to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ARGS_FILE).write_text(json.dumps(args.as_dict(), indent=2) + "\n")


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, oldest first."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def damaged_zero_files(folder: Path, num_processes: int) -> list[str]:
    """Returns the names of DeepSpeed files that are missing or truncated in a checkpoint."""
    zero_files = zero_folder(folder)
    if zero_files is None or not (folder / LATEST).is_file():
        return [f"{LATEST}, pytorch_model/"]
    files = [*rank_files(zero_files, "optim"), *rank_files(zero_files, "model")]
    states = [folder / f"random_states_{rank}.pkl" for rank in range(num_processes)]
    damaged = [
        path.name for path in files + states if not zipfile.is_zipfile(path)
    ]  # a zip file ends with its directory
    ranks = {int(number) for path in files for number in re.findall(r"zero_pp_rank_(\d+)", path.name)}
    return damaged + [f"*_zero_pp_rank_{rank}_*" for rank in range(num_processes) if rank not in ranks]
