"""The command line of `train.py`. Every option is declared once, as a dataclass field with its help and its check.

To add an option, add a field. The `errors` methods check values alone. Checks that need a file or a model config are in
`utils.run.preflight`.
"""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dataset.condition_frames import FIRST
from utils.config.data_args import DataArgs
from utils.config.memory_args import MemoryArgs
from utils.config.options import (
    Switch,
    add_options,
    collect,
    make_parser,
    option,
    require_finite,
    require_positive,
    require_seed,
    require_steps,
    require_unit_interval,
)


@dataclass(frozen=True)
class ModelArgs:
    model_path: str = option(help="folder of a CogVideoX checkpoint in the diffusers format, or its model hub id")
    model_type: Literal["t2v", "i2v"] = option(help="t2v: text to video; i2v: image to video")
    variant: str | None = option(
        None,
        help="variant of the weights, such as fp16; components without weights of the variant use their plain ones",
    )
    training_type: Literal["lora", "sft"] = option("lora", help="lora: low-rank adapters; sft: full fine-tuning")
    learned_positions: Literal["keep", "interpolate", "drop"] | None = option(
        None,
        help="CogVideoX-5b-I2V: its table of learned positions at other sizes; keep: only 480x720; interpolate: resize "
        "the table; drop: use rotary positions alone; default: as the checkpoint was trained, otherwise keep",
    )


@dataclass(frozen=True)
class OutputArgs:
    output_dir: Path = option(
        help="output folder for checkpoints, metrics.jsonl, the resolved arguments and validation videos"
    )
    report_to: Literal["tensorboard", "wandb", "all", "none"] = option("tensorboard", help="metric trackers to use")
    dry_run: bool = option(False, help="run all checks, print the plan of the run and stop")
    push_to_hub: str | None = option(
        None,
        help="publish the last checkpoint on the model hub under this name, by default that of --output_dir, with a "
        "model card; needs a token",
        alone="",
    )
    hub_private: bool = option(True, help="whether a new repository of --push_to_hub is private")
    profile: int = option(0, help="number of updates to trace with the torch profiler, after three updates of warm-up")

    def errors(self) -> Iterator[str]:
        if self.profile < 0:
            yield f"--profile is {self.profile}; it must not be negative."


@dataclass(frozen=True)
class TrainingArgs:
    train_epochs: int = option(10, help="number of passes over the dataset; ignored if --train_steps is set")
    train_steps: int | None = option(None, help="number of optimizer updates; overrides --train_epochs")
    seed: int = option(42, help="seed of sample order, noise, timesteps and adapter initialization")
    batch_size: int = option(1, help="samples per process and micro-batch")
    gradient_accumulation_steps: int = option(1, help="micro-batches per optimizer update")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, help="training precision; default: fp16 for CogVideoX-2b on a GPU, bf16 otherwise"
    )
    learning_rate: float = option(1e-4, help="peak learning rate; not scaled by the number of processes")
    optimizer: Literal["adamw", "adam"] = option("adamw", help="adamw: decoupled weight decay; adam: L2 penalty")
    beta1: float = option(0.9, help="Adam: decay rate of the first moment")
    beta2: float = option(0.95, help="Adam: decay rate of the second moment")
    epsilon: float = option(1e-8, help="Adam: constant added to the denominator")
    weight_decay: float = option(1e-4, help="weight decay coefficient")
    ema_decay: float = option(
        0.0,
        help="keep an exponential moving average of the trained weights with this decay, such as 0.999, in float32 in "
        "host memory; each checkpoint holds it in ema/; 0 disables it",
    )
    max_grad_norm: float = option(1.0, help="maximum gradient norm; 0 disables clipping")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = option(
        "constant_with_warmup", help="learning-rate schedule, in optimizer updates"
    )
    lr_warmup_steps: int = option(100, help="optimizer updates until the peak learning rate; ignored by constant")

    def errors(self) -> Iterator[str]:
        yield from require_positive(
            self, "train_epochs", "train_steps", "batch_size", "gradient_accumulation_steps", "learning_rate", "epsilon"
        )
        yield from require_unit_interval(self, "beta1", "beta2", "ema_decay")
        yield from require_seed(self.seed)
        for name in ("weight_decay", "max_grad_norm", "lr_warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                yield f"--{name} is {getattr(self, name)}; it must not be negative."


@dataclass(frozen=True)
class LoraArgs:
    rank: int = option(128, help="adapter rank; use 64 or more for a new concept")
    lora_alpha: float | None = option(
        None, help="adapters are scaled by lora_alpha / rank; default: the rank; half of it works too, 1 works badly"
    )
    target_modules: tuple[str, ...] = option(
        ("to_q", "to_k", "to_v", "to_out.0"), help="names of the linear layers to adapt"
    )
    init_lora: Path | None = option(
        None,
        help="LoRA of any tool to start from, a file or folder; its rank and layers must be those of --rank and "
        "--target_modules",
    )

    @property
    def alpha(self) -> float:
        return self.rank if self.lora_alpha is None else self.lora_alpha

    def errors(self) -> Iterator[str]:
        yield from require_positive(self, "rank", "lora_alpha")


@dataclass(frozen=True)
class SystemArgs:
    num_workers: int = option(4, help="processes per GPU that decode clips while the cache is filled (at least one)")
    pin_memory: bool = option(True, help="use pinned host memory for faster copies to the GPU")
    nccl_timeout: int = option(1800, help="seconds that processes wait for each other")
    enable_slicing: bool = option(True, help="VAE: process one sample of a batch at a time")
    enable_tiling: Switch = option(
        "auto",
        help="VAE: process one tile of the picture at a time; uses far less memory; auto: encode whole pictures where "
        "the GPU has the memory, unless the latent cache holds these clips in tiles",
    )

    @property
    def uses_tiles(self) -> bool:
        """Whether the VAE works in tiles. `auto` does, except for encoding clips where it chooses whole pictures."""
        return self.enable_tiling is not False

    def errors(self) -> Iterator[str]:
        yield from require_positive(self, "nccl_timeout")
        if self.num_workers < 0:
            yield f"--num_workers is {self.num_workers}; it must not be negative."


@dataclass(frozen=True)
class CheckpointArgs:
    checkpointing_steps: int = option(
        500, help="optimizer updates between checkpoints; the last update always writes one"
    )
    checkpointing_limit: int | None = option(
        None, help="maximum number of checkpoints to keep; the oldest is removed after a new one is complete"
    )
    resume_from_checkpoint: str | None = option(None, help="checkpoint folder to resume from, or 'latest'")
    export_dtype: Literal["bf16", "fp16", "fp32"] | None = option(
        None,
        help="sft under DeepSpeed: dtype of transformer/ in the last checkpoint; default: that of --mixed_precision",
    )

    lora_format: Literal["diffusers", "comfyui", "both"] = option(
        "diffusers", help="lora: format of the LoRA in a checkpoint; ComfyUI's has other names of the layers"
    )

    def errors(self) -> Iterator[str]:
        yield from require_positive(self, "checkpointing_steps", "checkpointing_limit")


@dataclass(frozen=True)
class ValidationArgs:
    do_validation: bool = option(False, help="generate videos for the prompts of the validation folder during training")
    validation_dir: Path | None = option(None, help="validation folder, with the same layout as the data folder")
    validation_steps: int = option(500, help="optimizer updates between validations")
    validation_prompts: str = option("prompts.txt", help="file in --validation_dir with one prompt per line")
    validation_images: str | None = option(
        None,
        help="i2v: file in --validation_dir with one image per line; default: the first frame of each clip is used",
    )
    validation_last_images: str | None = option(
        None,
        help="i2v with --condition_frames first_last: file in --validation_dir with one last image per line; default: "
        "the last frame of each clip is used",
    )
    gen_fps: float | None = option(
        None, help="frames per second of the generated videos; default: the rate of the model"
    )
    validate_ema: bool = option(False, help="validate with the average of --ema_decay in place of the weights")
    num_inference_steps: int = option(50, help="denoising steps per validation video")
    guidance_scale: float = option(6.0, help="classifier-free guidance scale of validation videos")

    def errors(self) -> Iterator[str]:
        if self.do_validation and self.validation_dir is None:
            yield "--do_validation true needs --validation_dir, a folder with validation prompts."
        yield from require_positive(self, "validation_steps", "gen_fps", "num_inference_steps")
        yield from require_steps(self.num_inference_steps)
        yield from require_finite(self, "guidance_scale")


@dataclass(frozen=True)
class Args:
    """The resolved command line of one run."""

    model: ModelArgs
    output: OutputArgs
    data: DataArgs
    training: TrainingArgs
    lora: LoraArgs
    memory: MemoryArgs
    system: SystemArgs
    checkpoint: CheckpointArgs
    validation: ValidationArgs

    def errors(self) -> Iterator[str]:
        """Yields an error for each invalid value or combination; preflight reports them with its own errors."""
        for group in (
            self.output,
            self.data,
            self.training,
            self.lora,
            self.memory,
            self.system,
            self.checkpoint,
            self.validation,
        ):
            yield from group.errors()
        if self.model.training_type == "sft":
            if self.lora.init_lora is not None:
                yield "--init_lora is for --training_type lora; full fine-tuning has no adapters."
            if self.checkpoint.lora_format != "diffusers":
                yield (
                    "--lora_format is for --training_type lora; for sft, convert a checkpoint with python -m "
                    "utils.commands.export --format comfyui."
                )
        if self.memory.quantize_base != "none" and self.model.training_type == "sft":
            yield "--quantize_base is for --training_type lora; full fine-tuning trains the base weights."
        if self.validation.validate_ema and not self.training.ema_decay:
            yield "--validate_ema needs --ema_decay, such as 0.999."
        accumulates = self.training.gradient_accumulation_steps != 1
        if self.memory.optimizer_in_backward and (self.training.max_grad_norm or accumulates):
            yield (
                "--optimizer_in_backward: updates happen during the backward pass, so gradients cannot be clipped or "
                "accumulated; use --max_grad_norm 0 and --gradient_accumulation_steps 1."
            )
        if self.memory.offload_optimizer and self.model.training_type == "lora":
            yield "--offload_optimizer is for --training_type sft; the optimizer states of adapters are small."
        images = {
            "image_column": self.data.image_column,
            "image_dropout": self.data.image_dropout,
            "condition_frames": self.data.condition_frames != (FIRST,),
            "validation_images": self.validation.validation_images,
            "validation_last_images": self.validation.validation_last_images,
        }
        for name, value in images.items():
            if value and self.model.model_type == "t2v":
                yield f"--{name} is for --model_type i2v; a text-to-video model has no image input."
        if self.data.clip_timeout >= self.system.nccl_timeout:
            yield f"--clip_timeout {self.data.clip_timeout:g} must be below --nccl_timeout {self.system.nccl_timeout}."

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Returns the values by group as JSON types."""
        return json.loads(
            json.dumps({group.name: vars(getattr(self, group.name)) for group in fields(self)}, default=str)
        )


def parse_args(argv: list[str] | None = None) -> Args:
    """Parses the command line of `train.py`.

    Raises:
        UserError: an unknown flag, or a value that cannot be parsed.
    """
    parser = make_parser("Fine-tunes CogVideoX. Usually started by one of the train_*.sh scripts.")
    group_types = typing.get_type_hints(Args)
    for name, group_type in group_types.items():
        add_options(parser.add_argument_group(name), group_type)
    values = vars(parser.parse_args(argv))
    return Args(**{name: collect(values, group_type) for name, group_type in group_types.items()})
