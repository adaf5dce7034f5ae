"""Loads the models once, and generates videos with them.

Prompts are encoded first, as in training, so that the text encoder is never in memory together with the transformer.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from dataset.video import Resolution
from utils.checkpoint.adapters import add_loras, scales_for
from utils.checkpoint.finetuned import find_transformer, load_without_config
from utils.generation.args import DemoArgs
from utils.generation.checks import read_loras, task_of
from utils.generation.inputs import read_condition, read_task_inputs
from utils.memory.quantized_linear import quantize_blocks
from utils.model import encoders, loading
from utils.model.positions import set_learned_positions
from utils.model.spec import ModelSpec
from utils.model.weight_files import weight_files


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def working_dtype(args: DemoArgs, model_dir: Path) -> torch.dtype:
    """Returns --dtype, by default that of the base's transformer; on a CPU float32 in place of float16."""
    if args.dtype is not None:
        return loading.DTYPES[args.dtype]
    return loading.working_dtype(model_dir / "transformer", device_here(), args.variant)


def encode_prompts(args: DemoArgs, model_dir: Path, spec: ModelSpec, texts: Iterable[str]) -> dict[str, torch.Tensor]:
    """Returns text -> embedding [1, S, D] on the CPU, each text encoded once."""
    unique = list(dict.fromkeys(texts))
    offload = args.offload_text_encoder or args.offload == "sequential"
    encoder = encoders.prompt_encoder(model_dir, device_here(), spec.max_text_seq_length, offload, args.variant)
    with encoder as encode, tqdm(total=len(unique), desc="Encoding prompts", unit="prompt", delay=5) as bar:
        embeddings = {}
        for text, embedding in zip(unique, encode(unique, lambda: None), strict=True):
            embeddings[text] = embedding[None]
            bar.update()
    return embeddings


def load_pipeline(args: DemoArgs, model_dir: Path, spec: ModelSpec) -> Any:
    """Loads the pipeline of a task with its adapters or fine-tuned transformer, on the GPU if there is one.

    It has no text encoder; see `encode_prompts`.
    """
    base, variant, dtype = model_dir / "transformer", args.variant, working_dtype(args, model_dir)
    weights = find_transformer(args.transformer_path) if args.transformer_path else base
    if (weights / "config.json").is_file():
        transformer = loading.load_transformer(weights, dtype, variant=None if args.transformer_path else variant)
    else:
        transformer = load_without_config(weights, spec.transformer, dtype, weight_files(base, variant))
    set_learned_positions(transformer, spec)
    if args.lora_path:
        loras, scales = zip(*read_loras(args, spec), strict=True)
        add_loras(transformer, loras, scales)
        for lora, scale in zip(loras, scales, strict=True):
            for note in lora.notes:
                print(f"Note: {note}")
            print(f"LoRA: {len(lora.adapters)} adapter modules matched, scale {scale:g}, {lora.file}")
    if args.quantize != "none":
        for name, parameter in transformer.named_parameters():
            parameter.requires_grad_(".lora_" in name)  # adapters are not quantized
        quantize_blocks(transformer, args.quantize, device_here() if args.offload == "none" else None)
    if args.compile:
        for block in transformer.transformer_blocks:  # all blocks share one graph
            block.compile(fullgraph=True)
    pipeline = loading.PIPELINES[task_of(args, spec)](
        tokenizer=None,
        text_encoder=None,
        vae=loading.load_vae(model_dir, torch.device("cpu"), args.enable_slicing, args.enable_tiling, dtype, variant),
        transformer=transformer,
        scheduler=loading.load_scheduler(model_dir),
    )
    if not torch.cuda.is_available():
        return pipeline
    if args.offload == "none":
        return pipeline.to("cuda")
    if args.offload == "model":
        pipeline.enable_model_cpu_offload()
    else:
        pipeline.enable_sequential_cpu_offload()
    return pipeline


def scale_lora(pipeline: Any, args: DemoArgs, factor: float) -> None:
    """Sets the strengths of the LoRAs to `factor` times --lora_scale; 0 gives the base."""
    scales = scales_for(args.lora_path, args.lora_scale, "--lora_path")
    names = list(pipeline.transformer.peft_config)
    pipeline.transformer.set_adapters(names, [scale * factor for scale in scales])


def generate(
    pipeline: Any, args: DemoArgs, spec: ModelSpec, resolution: Resolution, embeddings: dict[str, torch.Tensor]
) -> list[Image.Image]:
    """Generates one video. Returns its frames.

    Args:
        embeddings: text -> embedding [1, S, D] of the prompt and the negative prompt.

    Raises:
        UserError: the image or the clip cannot be read.
    """
    assert args.prompt is not None
    condition = read_condition(args, spec, resolution)
    task_inputs = read_task_inputs(args, spec, resolution, condition)
    if task_of(args, spec) == "i2v":
        pipeline.condition = condition
    prompt, negative_prompt = (
        embeddings[text].to(device_here(), pipeline.vae.dtype) for text in (args.prompt, args.negative_prompt)
    )
    return pipeline(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative_prompt,
        height=resolution.height,
        width=resolution.width,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator().manual_seed(args.seed),
        max_sequence_length=spec.max_text_seq_length,
        **task_inputs,
    ).frames[0]
