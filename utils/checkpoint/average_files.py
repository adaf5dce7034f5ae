"""Saves and loads the moving average of the weights in a checkpoint.

checkpoint-N/ema/                        loads like a checkpoint: --lora_path, --transformer_path
    pytorch_lora_weights.safetensors     LoRA
    transformer/                         SFT, float32; under ZeRO only in the last checkpoint, in --export_dtype
    pytorch_model/, latest               ZeRO: the average of each process, which the export merges
checkpoint-N/training_state/
    ema.safetensors                      LoRA under DDP: for resuming only

The average of other checkpoints (`utils.commands.average`) is in `average.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from utils.checkpoint.export import TRANSFORMER_CONFIG, TransformerWeights, export
from utils.checkpoint.stored_weights import LATEST, StoredTensor, rank_files, read_safetensors, zero_folder
from utils.training.weight_average import WeightAverage

EMA = "ema"
ADAPTERS = "ema.safetensors"  # in the training state
# Entries of DeepSpeed's files that describe the partitions.
_LAYOUT = ("zero_stage", "partition_count", "param_alignment_paddings")


def save_partition(average: WeightAverage, checkpoint: Path, rank: int) -> None:
    """Writes the average of the partitions of a process under ZeRO, in the layout of its file in the checkpoint."""
    source = _zero_files(checkpoint)
    target = checkpoint / EMA / source.name
    target.mkdir(parents=True, exist_ok=True)
    file = rank_files(source, "optim")[rank]
    saved = _load(file)["optimizer_state_dict"]
    kept = {name: saved[name] for name in _LAYOUT if name in saved}
    # DeepSpeed saves some partitions without their padding
    kept[_groups(saved)] = [
        average.averages[str(number)][: len(group)].clone() for number, group in enumerate(saved[_groups(saved)])
    ]
    torch.save({"optimizer_state_dict": kept}, target / file.name)
    if rank != 0:
        return
    file = rank_files(source, "model")[0]
    model = _load(file)
    buffers = {name: model["module"][name] for name in model["buffer_names"] if name in model["module"]}
    layout = {"param_shapes": model["param_shapes"], "buffer_names": model["buffer_names"], "module": buffers}
    torch.save(layout, target / file.name)
    (checkpoint / EMA / LATEST).write_text(source.name)


def save_adapters(
    average: WeightAverage, transformer: CogVideoXTransformer3DModel, state: Path
) -> dict[str, torch.Tensor]:
    """Writes the average of adapters under DDP to a training state. Returns it under peft's names."""
    save_file(average.averages, state / ADAPTERS)
    return get_peft_model_state_dict(transformer, state_dict=average.averages)


def save_transformer(average: WeightAverage, transformer: CogVideoXTransformer3DModel, checkpoint: Path) -> None:
    """Writes the average of all weights under DDP as a float32 transformer."""
    folder = checkpoint / EMA
    transformer.save_config(folder)
    tensors = {
        name: StoredTensor(tuple(tensor.shape), average.averages.get(name, tensor.detach()).cpu)
        for name, tensor in transformer.state_dict().items()
    }
    config_file = (folder / "config.json").rename(folder / TRANSFORMER_CONFIG)
    export(TransformerWeights(tensors, config_file, "--output_dir"), folder / "transformer", torch.float32)


def copy_config(checkpoint: Path) -> None:
    """Copies the transformer's config of a ZeRO checkpoint to the average, which is exported from there."""
    shutil.copyfile(checkpoint / TRANSFORMER_CONFIG, checkpoint / EMA / TRANSFORMER_CONFIG)


def load_average(average: WeightAverage, checkpoint: Path, training_state: Path, rank: int) -> bool:
    """Restores an average. Returns whether the checkpoint has one."""
    if not (checkpoint / EMA).is_dir():
        return False
    if zero_folder(checkpoint) is not None:
        saved = _load(rank_files(_zero_files(checkpoint / EMA), "optim")[rank])["optimizer_state_dict"]
        average.load({str(number): group for number, group in enumerate(saved[_groups(saved)])})
    elif (training_state / ADAPTERS).is_file():
        average.load(load_file(training_state / ADAPTERS))
    else:
        files = sorted((checkpoint / EMA / "transformer").glob("*.safetensors"))
        average.load(
            {name: tensor.read() for name, tensor in read_safetensors(files).items() if name in average.averages}
        )
    return True


def _zero_files(checkpoint: Path) -> Path:
    folder = zero_folder(checkpoint)
    assert folder is not None
    return folder


def _load(file: Path) -> dict:
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)  # contains DeepSpeed classes


def _groups(saved: dict) -> str:
    """Returns the entry that holds the partitions in a file of DeepSpeed."""
    return "fp32_flat_groups" if saved["zero_stage"] == 3 else "single_partition_of_fp32_groups"
