"""The command line of `train.py`: every option is written once, as a field of a dataclass, with its help and its check.

A part that needs an option adds a field here and nothing else. What can be judged from the values alone is checked
here; what needs a file or a model's config is in `preflight`.
"""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dataset.video import SPREAD, Rate, Resolution
from utils.config.options import (
    Budget,
    add_options,
    collect,
    finite,
    make_parser,
    option,
    positive,
    seed_errors,
    unit_interval,
)


@dataclass(frozen=True)
class ModelArgs:
    model_path: str = option(
        help="folder of a CogVideoX checkpoint in the diffusers format, or its id on the model hub"
    )
    model_type: Literal["t2v", "i2v"] = option(help="t2v: text to video; i2v: image and text to video")
    training_type: Literal["lora", "sft"] = option("lora", help="lora: low-rank adapters; sft: all weights")


@dataclass(frozen=True)
class OutputArgs:
    output_dir: Path = option(help="checkpoints, metrics.jsonl, the resolved arguments and validation videos go here")
    report_to: Literal["tensorboard", "wandb", "all", "none"] = option("tensorboard", help="metric trackers")
    dry_run: bool = option(False, help="do every check, print the plan of the run, and stop")


@dataclass(frozen=True)
class DataArgs:
    data_root: Path = option(help="data folder: line files with one sample a line, and the clips")
    caption_column: str = option("prompts.txt", help="file below --data_root with one caption a line")
    video_column: str = option("videos.txt", help="file below --data_root with one clip a line, relative to it")
    image_column: str | None = option(
        None, help="i2v: file below --data_root with one image a line; without it the clip's first frame is used"
    )
    id_token: str = option("", help="put before every prompt, in training and in validation")
    metadata: str | None = option(
        None,
        help="a .jsonl or .csv file below --data_root with the columns video, prompt[, image], in place of the line "
        "files; default: metadata.jsonl or metadata.csv where there is no file of captions",
    )
    train_resolution: tuple[Resolution, ...] = option(
        (Resolution(49, 480, 720),),
        help="FxHxW: frames (8N+1), height, width; each clip goes to that of several which keeps most of it",
    )
    resize_mode: Literal["stretch", "crop"] = option(
        "stretch", help="stretch: to the exact size; crop: keep the aspect ratio, cut the centre"
    )
    fps: Rate | None = option(
        None,
        help="frames a second at which clips are sampled; default: the model's own; native_stride: spread over the "
        "whole clip",
    )
    clips_per_video: int = option(1, help="the most samples cut from a clip; they do not overlap")
    pad_short_clips: bool = option(False, help="repeat the last frame of clips that are too short")
    flip: bool = option(False, help="train on mirror images too: twice the cache; not where left and right matter")
    skip_bad_samples: bool = option(False, help="go on without clips that cannot be used, in place of stopping")
    clip_timeout: float = option(120.0, help="seconds that decoding a clip may take")
    cache_dir: Path | None = option(None, help="latent cache; default: latent/ in the folder that holds the clips")
    precompute_only: bool = option(False, help="fill the latent cache and stop")
    caption_dropout: float = option(0.0, help="share of samples trained with the empty prompt")
    image_dropout: float = option(0.0, help="i2v: share of samples trained with an empty image condition")

    def errors(self) -> Iterator[str]:
        for resolution in self.train_resolution:
            if resolution.frames % 8 != 1:
                below = max(resolution.frames // 8 * 8 + 1, 9)
                yield (
                    f"--train_resolution {resolution}: {resolution.frames} frames; "
                    f"the number must be 8N+1, such as {below} or {below + 8}."
                )
        if len(set(self.train_resolution)) < len(self.train_resolution):
            yield f"--train_resolution {' '.join(map(str, self.train_resolution))}: one is given twice."
        if self.fps != SPREAD:
            yield from positive(self, "fps")
        yield from positive(self, "clips_per_video", "clip_timeout")
        yield from unit_interval(self, "caption_dropout", "image_dropout")


@dataclass(frozen=True)
class TrainingArgs:
    train_epochs: int = option(10, help="passes over the dataset; --train_steps overrides it")
    train_steps: int | None = option(None, help="optimizer updates")
    seed: int = option(42, help="of sample order, noise, timesteps and adapter initialisation")
    batch_size: int = option(1, help="samples a process and micro-batch")
    gradient_accumulation_steps: int = option(1, help="micro-batches an optimizer update")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, help="default: bf16; fp16 for CogVideoX-2b on a GPU"
    )
    learning_rate: float = option(1e-4, help="peak learning rate; the same on any number of processes")
    optimizer: Literal["adamw", "adam"] = option("adamw", help="adamw: decoupled weight decay")
    beta1: float = option(0.9, help="Adam: decay of the mean of gradients")
    beta2: float = option(0.95, help="Adam: decay of the mean of squared gradients")
    epsilon: float = option(1e-8, help="Adam: added to the denominator")
    weight_decay: float = option(1e-4, help="weight decay")
    max_grad_norm: float = option(1.0, help="gradients are clipped to this norm; 0 switches clipping off")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = option(
        "constant_with_warmup", help="counted in optimizer updates"
    )
    lr_warmup_steps: int = option(100, help="optimizer updates until the peak learning rate; none with constant")

    def errors(self) -> Iterator[str]:
        yield from positive(
            self, "train_epochs", "train_steps", "batch_size", "gradient_accumulation_steps", "learning_rate", "epsilon"
        )
        yield from unit_interval(self, "beta1", "beta2")
        yield from seed_errors(self.seed)
        for name in ("weight_decay", "max_grad_norm", "lr_warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                yield f"--{name} is {getattr(self, name)}; it must not be negative."


@dataclass(frozen=True)
class LoraArgs:
    rank: int = option(128, help="rank of the adapters; 64 or more for a new concept")
    lora_alpha: float | None = option(
        None, help="strength is lora_alpha / rank; default: rank; rank/2 also works, 1 badly"
    )
    target_modules: tuple[str, ...] = option(
        ("to_q", "to_k", "to_v", "to_out.0"), help="names of the linear layers that get an adapter"
    )

    @property
    def alpha(self) -> float:
        return self.rank if self.lora_alpha is None else self.lora_alpha

    def errors(self) -> Iterator[str]:
        yield from positive(self, "rank", "lora_alpha")


@dataclass(frozen=True)
class MemoryArgs:
    gradient_checkpointing: Literal["full", "selective", "none"] = option(
        "full",
        help="full: recompute each block in the backward pass, for far less memory; selective: all but its attention, "
        "for less work and more memory; true and false mean full and none",
        aliases={"true": "full", "false": "none"},
    )
    offload_activations: bool = option(
        False, help="with --gradient_checkpointing: what is kept waits in host memory; little slower, far less memory"
    )
    offload_optimizer: bool = option(
        False, help="sft on one GPU: gradients, float32 weights and Adam's states in host memory, 16 bytes a weight"
    )
    quantize_optimizer: Literal["none", "8bit", "4bit"] = option(
        "none",
        help="hold Adam's states in 8 bits, or of them the mean in 4; sft: weights in half precision too, rounded at "
        "random, in place of float32",
    )
    optimizer_in_backward: bool = option(
        False, help="with --quantize_optimizer on one GPU: update in the backward pass; no clipping, no accumulation"
    )
    quantize_base: Literal["none", "int8", "fp8", "int4"] = option(
        "none", help="lora: hold the frozen weights of the blocks in 8 or 4 bits"
    )
    offload_text_encoder: bool = option(
        False, help="prompts are encoded with T5 in host memory, each layer copied to the GPU in its turn"
    )
    autocast: bool = option(
        True,
        help="false: half precision throughout, norms too, as in sampling; less memory and copying; not for DeepSpeed",
    )
    compile_blocks: bool = option(False, help="compile each transformer block: minutes at the start, then faster")
    attention_kernel: Literal["auto", "flash", "cudnn", "efficient", "math"] = option(
        "auto", help="which of torch's attention kernels to use; auto: torch chooses, cuDNN's on Hopper"
    )
    vram_budget_gib: Budget | None = option(
        None,
        help="choose what of the above to use: the fastest that is predicted to fit; auto: what is free on the GPU",
    )

    def errors(self) -> Iterator[str]:
        if self.vram_budget_gib != "auto":
            yield from positive(self, "vram_budget_gib")
        if self.offload_activations and self.gradient_checkpointing == "none":
            yield (
                "--offload_activations true needs --gradient_checkpointing full or selective; with none, all "
                "activations stay on the GPU."
            )
        if self.quantize_optimizer != "none" and self.offload_optimizer:
            yield "--quantize_optimizer and --offload_optimizer exclude each other: on the host the states are float32."
        if self.optimizer_in_backward and self.quantize_optimizer == "none":
            yield "--optimizer_in_backward true needs --quantize_optimizer 8bit or 4bit."


@dataclass(frozen=True)
class SystemArgs:
    num_workers: int = option(4, help="processes that decode clips, at least one, and that read the cache")
    pin_memory: bool = option(True, help="page-locked host memory for faster copies to the GPU")
    nccl_timeout: int = option(1800, help="seconds that processes wait for one another")
    enable_slicing: bool = option(True, help="VAE: one sample of a batch at a time")
    enable_tiling: bool = option(True, help="VAE: one tile of the picture at a time; far less memory")

    def errors(self) -> Iterator[str]:
        yield from positive(self, "nccl_timeout")
        if self.num_workers < 0:
            yield f"--num_workers is {self.num_workers}; it must not be negative."


@dataclass(frozen=True)
class CheckpointArgs:
    checkpointing_steps: int = option(500, help="optimizer updates between checkpoints; one is always made at the end")
    checkpointing_limit: int | None = option(None, help="checkpoints kept; the oldest goes once a new one stands")
    resume_from_checkpoint: str | None = option(None, help="folder of a checkpoint, or 'latest'")
    export_dtype: Literal["bf16", "fp16", "fp32"] | None = option(
        None, help="sft under DeepSpeed: of the transformer/ in the last checkpoint; default: that of --mixed_precision"
    )

    def errors(self) -> Iterator[str]:
        yield from positive(self, "checkpointing_steps", "checkpointing_limit")


@dataclass(frozen=True)
class ValidationArgs:
    do_validation: bool = option(False, help="generate the validation folder's prompts as training goes on")
    validation_dir: Path | None = option(None, help="validation folder, of the same form as the data folder")
    validation_steps: int = option(500, help="optimizer updates between validations")
    validation_prompts: str = option("prompts.txt", help="file below --validation_dir with one prompt a line")
    validation_images: str | None = option(
        None, help="i2v: file below --validation_dir with one image a line; without it the clips' first frames are used"
    )
    gen_fps: float | None = option(None, help="frames a second of the generated videos; default: the model's own")
    num_inference_steps: int = option(50, help="denoising steps of a validation video")
    guidance_scale: float = option(6.0, help="classifier-free guidance of a validation video")

    def errors(self) -> Iterator[str]:
        if self.do_validation and self.validation_dir is None:
            yield "--do_validation true needs --validation_dir, a folder with prompts."
        yield from positive(self, "validation_steps", "gen_fps", "num_inference_steps")
        yield from finite(self, "guidance_scale")


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
        """Sentences on values that cannot be meant; `preflight` tells them together with what it finds itself."""
        for group in (self.data, self.training, self.lora, self.memory, self.system, self.checkpoint, self.validation):
            yield from group.errors()
        if self.memory.quantize_base != "none" and self.model.training_type == "sft":
            yield "--quantize_base is for --training_type lora; full fine-tuning trains the weights themselves."
        one_pass = self.training.gradient_accumulation_steps == 1
        if self.memory.optimizer_in_backward and (self.training.max_grad_norm or not one_pass):
            yield (
                "--optimizer_in_backward: updates happen during the backward pass, so gradients cannot be clipped or "
                "accumulated; use --max_grad_norm 0 and --gradient_accumulation_steps 1."
            )
        if self.memory.offload_optimizer and self.model.training_type == "lora":
            yield "--offload_optimizer is for --training_type sft; adapters have little that could be offloaded."
        images = {
            "image_column": self.data.image_column,
            "image_dropout": self.data.image_dropout,
            "validation_images": self.validation.validation_images,
        }
        for name, value in images.items():
            if value and self.model.model_type == "t2v":
                yield f"--{name} is for --model_type i2v; a text-to-video model takes no image."
        if self.data.clip_timeout >= self.system.nccl_timeout:
            yield f"--clip_timeout {self.data.clip_timeout:g} must be below --nccl_timeout {self.system.nccl_timeout}."

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Groups of plain values, ready for JSON."""
        return json.loads(
            json.dumps({group.name: vars(getattr(self, group.name)) for group in fields(self)}, default=str)
        )


def parse_args(argv: list[str] | None = None) -> Args:
    """Parses the command line of `train.py`.

    Raises:
        UserError: for an unknown flag or a value of the wrong form.
    """
    parser = make_parser("Fine-tunes CogVideoX; usually started by one of the train_*.sh scripts.")
    group_types = typing.get_type_hints(Args)
    for name, group_type in group_types.items():
        add_options(parser.add_argument_group(name), group_type)
    values = vars(parser.parse_args(argv))
    return Args(**{name: collect(values, group_type) for name, group_type in group_types.items()})
