"""Converts a checkpoint to the diffusers format or to ComfyUI's, or merges LoRAs into a transformer.

python -m utils.commands.export --checkpoint outputs/t2v-sft/checkpoint-500 --dtype bf16
python -m utils.commands.export --checkpoint outputs/t2v-lora/checkpoint-500 --format comfyui
python -m utils.commands.export --merge_lora outputs/t2v-lora/checkpoint-500 --model_path THUDM/CogVideoX-5b \\
    --output_path merged/transformer
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from utils.checkpoint.adapters import merge_loras, scales_for
from utils.checkpoint.export import POSITIONS, TransformerWeights, export, export_comfyui, open_checkpoint
from utils.checkpoint.lora_files import convert_lora, lora_paths
from utils.checkpoint.lora_reader import COMFYUI_SUFFIX, Lora, lora_in, read_lora
from utils.checkpoint.manager import ARGS_FILE
from utils.checkpoint.saved_weights import lora_name
from utils.checkpoint.stored_weights import read_safetensors
from utils.common.errors import UserError, exit_on_user_error
from utils.common.filesystem import atomic_write, check_writable, flags_in_errors
from utils.config.options import make_parser, option, parse_group, require_finite
from utils.model import loading
from utils.model.spec import LEARNED, LEARNED_POSITIONS
from utils.model.weight_files import check_weights, has_variant, read_config, weight_files


@dataclass(frozen=True)
class ExportArgs:
    checkpoint: Path | None = option(
        None,
        help="folder checkpoint-N of a run, LoRA or full fine-tuning, under DDP or ZeRO; any folder with transformer/; "
        "or any LoRA file",
    )
    format: Literal["diffusers", "comfyui"] = option("diffusers", help="format of the written weights")
    merge_lora: tuple[Path, ...] = option((), help="in place of --checkpoint: LoRAs to merge into --model_path")
    lora_scale: tuple[float, ...] = option((1.0,), help="strength of the merged LoRAs, one for all or one per LoRA")
    model_path: str | None = option(None, help="with --merge_lora: folder of the base checkpoint, or its model hub id")
    variant: str | None = option(None, help="with --merge_lora: variant of the base's weights, such as fp16")
    dtype: Literal["bf16", "fp16", "fp32"] | None = option(
        None, help="dtype of a written transformer; default: bf16, or with --merge_lora that of the base"
    )
    output_path: Path | None = option(
        None,
        help="new folder of a transformer in the diffusers format, or new .safetensors file for ComfyUI or a LoRA; "
        "default: in the checkpoint",
    )

    def errors(self) -> Iterator[str]:
        if (self.checkpoint is None) != bool(self.merge_lora):
            yield "Give either --checkpoint, to convert it, or --merge_lora, to merge a LoRA into --model_path."
        if self.merge_lora and (self.model_path is None or self.output_path is None):
            yield "--merge_lora needs --model_path, the base, and --output_path, such as merged/transformer."
        if not self.merge_lora:
            for name in ("model_path", "variant"):
                if getattr(self, name) is not None:
                    yield f"--{name} is for --merge_lora."
            if self.lora_scale != (1.0,):
                yield "--lora_scale is for --merge_lora."
        yield from require_finite(self, "lora_scale")


def main() -> None:
    args = parse_group(
        make_parser("Converts a checkpoint, or merges LoRAs.", prog="python -m utils.commands.export"), ExportArgs
    )
    if args.checkpoint is None:
        write_transformer(args, Path(), *merged_weights(args))
    elif is_lora(args.checkpoint):
        write_lora(args, args.checkpoint)
    else:
        write_transformer(args, args.checkpoint, open_checkpoint(args.checkpoint), torch.bfloat16)


def is_lora(checkpoint: Path) -> bool:
    """Whether `--checkpoint` is a LoRA: a file, a folder with one, or a checkpoint of a LoRA run."""
    try:
        return json.loads((checkpoint / ARGS_FILE).read_text())["model"]["training_type"] == "lora"
    except (OSError, ValueError, LookupError, TypeError):
        has_lora = not (checkpoint / "transformer").is_dir() and lora_in(checkpoint) is not None
        return checkpoint.is_file() or has_lora


def write_lora(args: ExportArgs, path: Path) -> None:
    """Converts a LoRA file, or that of a folder, at its stored strength."""
    if args.dtype is not None:
        raise UserError("--dtype is for transformers; adapters are always float32.")
    lora = read_lora(path, "--checkpoint")
    folder, name = (path.parent, path.stem) if path.is_file() else (path, lora_name(path))
    target = new_path(args, lora_paths(folder, args.format, name)[args.format], is_file=True)
    with flags_in_errors({"--output_path": target.parent}), atomic_write(target) as tmp:
        convert_lora(lora, {args.format: tmp})
    for note in lora.notes:
        print(f"Note: {note}")
    print(f"{target}: {len(lora.adapters)} adapters, float32")


def write_transformer(args: ExportArgs, folder: Path, weights: TransformerWeights, default_dtype: torch.dtype) -> None:
    """Writes a transformer in the requested format and dtype, by default to `folder`."""
    dtype = loading.DTYPES[args.dtype] if args.dtype else default_dtype
    is_comfyui = args.format == "comfyui"
    default = folder / (f"{lora_name(folder)}{COMFYUI_SUFFIX}" if is_comfyui else "transformer")
    target = new_path(args, default, is_file=is_comfyui)
    with flags_in_errors({"--output_path": target.parent}):
        if is_comfyui:
            for note in export_comfyui(weights, target, dtype):
                print(f"Note: {note}")
        else:
            export(weights, target, dtype)
    print(f"{target}: a transformer in {str(dtype).removeprefix('torch.')}")


def merged_weights(args: ExportArgs) -> tuple[TransformerWeights, torch.dtype]:
    """Returns the weights of `--model_path` with the LoRAs merged into them in float32, and the dtype of the base."""
    assert args.model_path is not None  # checked by `ExportArgs.errors`
    folder = loading.resolve_model_dir(args.model_path) / "transformer"
    config = read_config(folder / "config.json", loading.CogVideoXTransformer3DModel)
    if args.variant is not None and not has_variant(folder, args.variant):
        raise UserError(f"--variant {args.variant}: {folder} has no weights of this variant.")
    check_weights(folder, "--model_path", loading.CogVideoXTransformer3DModel, config, args.variant)
    scales = scales_for(args.merge_lora, args.lora_scale, "--merge_lora")
    loras = [read_lora(path, "--merge_lora", config) for path in args.merge_lora]
    for lora, scale in zip(loras, scales, strict=True):
        lora.check_finite()
        print(f"LoRA: {len(lora.adapters)} layers, scale {scale:g}, {lora.file}")
        for note in lora.notes:
            print(f"Note: {note}")
    merged = merge_loras(read_safetensors(weight_files(folder, args.variant)), loras, scales)
    changes = changed_positions(loras) if config[LEARNED] else {}
    if changes.get(LEARNED) is False:
        del merged[POSITIONS]
    weights = TransformerWeights(merged, folder / "config.json", "--merge_lora", changes)
    return weights, loading.stored_dtype(folder, args.variant)


def changed_positions(loras: list[Lora]) -> dict[str, Any]:
    """Returns the entries of the config for learned positions as the LoRAs were trained with them.

    Raises:
        UserError: they were trained differently.
    """
    stated = {lora.metadata["learned_positions"]: lora.file for lora in loras if "learned_positions" in lora.metadata}
    if len(stated) > 1:
        ways = ", ".join(f"{file} with {choice}" for choice, file in stated.items())
        raise UserError(f"--merge_lora: the LoRAs treat learned positions differently: {ways}.")
    if "drop" in stated:
        return {LEARNED: False}
    return {LEARNED_POSITIONS: "interpolate"} if "interpolate" in stated else {}


def new_path(args: ExportArgs, default: Path, is_file: bool) -> Path:
    """Returns the path to write to. Raises UserError if it exists, or has the wrong suffix, or cannot be written."""
    target = args.output_path or default
    if target.exists():
        raise UserError(f"--output_path {target} already exists; give another path.")
    if is_file != (target.suffix == ".safetensors"):
        expected = "the name of a .safetensors file" if is_file else "a folder"
        raise UserError(f"--output_path {target}: {expected} is expected.")
    check_writable(target.parent, "--output_path")
    return target


if __name__ == "__main__":
    with exit_on_user_error():
        main()
