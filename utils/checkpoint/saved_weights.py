"""Writes the trained weights of a checkpoint in the formats that users load."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from utils.checkpoint.average_files import EMA, copy_config, save_adapters, save_transformer
from utils.checkpoint.export import TRANSFORMER_CONFIG, TransformerWeights, export
from utils.checkpoint.lora_files import lora_paths, save_lora
from utils.checkpoint.lora_reader import TRAINED_ON, kind_of
from utils.checkpoint.stored_weights import read_zero
from utils.config.args import Args
from utils.model.loading import DTYPES
from utils.training.trainable import lora_config
from utils.training.weight_average import WeightAverage

TRAINING_STATE = "training_state"
ADAPTERS_AS_TRAINED = "adapters.safetensors"


def save_weights(
    transformer: CogVideoXTransformer3DModel, args: Args, uses_deepspeed: bool, folder: Path, name: str
) -> None:
    """Writes the weights. Runs on the main process only.

    Under ZeRO, adapters are read back from the files of all ranks.

    Args:
        folder: the checkpoint.
        name: see `lora_name`.
    """
    if uses_deepspeed:
        transformer.save_config(folder)
        (folder / "config.json").rename(folder / TRANSFORMER_CONFIG)
    if args.model.training_type == "lora":
        if uses_deepspeed:
            state = _zero_adapters(folder)
        else:
            state = {key: tensor.contiguous() for key, tensor in get_peft_model_state_dict(transformer).items()}
            save_file(state, folder / TRAINING_STATE / ADAPTERS_AS_TRAINED)
        _write_lora(state, transformer, args, folder, name)
    elif not uses_deepspeed:
        transformer.save_pretrained(folder / "transformer")


def save_average(
    average: WeightAverage,
    transformer: CogVideoXTransformer3DModel,
    args: Args,
    uses_deepspeed: bool,
    checkpoint: Path,
    name: str,
) -> None:
    """Writes the average of the weights like the weights, in ema/. Runs on the main process only."""
    folder = checkpoint / EMA
    folder.mkdir(exist_ok=True)
    if uses_deepspeed:
        copy_config(checkpoint)
    if args.model.training_type == "lora":
        state = (
            _zero_adapters(folder)
            if uses_deepspeed
            else save_adapters(average, transformer, checkpoint / TRAINING_STATE)
        )
        _write_lora(state, transformer, args, folder, f"{name}-{EMA}")
    elif not uses_deepspeed:
        save_transformer(average, transformer, checkpoint)


def _write_lora(
    state: dict[str, torch.Tensor], transformer: CogVideoXTransformer3DModel, args: Args, folder: Path, name: str
) -> None:
    stated = {TRAINED_ON: kind_of(transformer.config)}
    if args.model.learned_positions is not None:
        stated["learned_positions"] = args.model.learned_positions
    save_lora(state, lora_config(args), lora_paths(folder, args.checkpoint.lora_format, name), stated)


def _zero_adapters(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the float32 adapters of a ZeRO checkpoint under peft's names."""
    named = {name.replace(".default.", "."): stored for name, stored in read_zero(folder).items()}
    return {name: stored.read() for name, stored in named.items() if ".lora_" in name}


def lora_name(checkpoint: Path) -> str:
    """Returns the names of the run and the checkpoint, which name its ComfyUI file: t2v-lora-checkpoint-100."""
    checkpoint = checkpoint.resolve()
    return f"{checkpoint.parent.name}-{checkpoint.name}"


def export_last_checkpoint(checkpoint: Path, args: Args) -> None:
    """Exports transformer/ into the last checkpoint of a run, and into its ema/, if only DeepSpeed's files hold it."""
    for folder in (checkpoint, checkpoint / EMA) if args.model.training_type == "sft" else ():
        if folder.is_dir() and not (folder / "transformer").exists():
            dtype = DTYPES[args.checkpoint.export_dtype or "bf16"]
            weights = TransformerWeights(read_zero(folder), folder / TRANSFORMER_CONFIG, "--output_dir")
            export(weights, folder / "transformer", dtype)
