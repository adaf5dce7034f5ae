"""Held-out loss and sample videos during training. Validation changes no weight and no random state.

Ranks divide the lines of the validation folder, work without communication, and meet at the end. Under ZeRO-3 a forward
pass is a collective, since every rank holds a part of each weight, so all ranks run the same number of items: a rank
with fewer lines adds padding items and discards their results.
"""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import CogVideoXTransformer3DModel, DiffusionPipeline
from PIL import Image

from dataset.bucketing import ClipSample
from dataset.condition_frames import LAST, select_frames
from dataset.images import load_image
from dataset.precompute import RankShard, decode_sample
from dataset.video import Resolution
from utils.common.errors import describe_system_error
from utils.common.seeds import HELD_OUT, seed_for
from utils.model import loading
from utils.model.conditioned_pipeline import Condition
from utils.model.encoders import to_model_range
from utils.run.model_card import PROMPTS_FILE
from utils.run.plan import RunPlan
from utils.training.metrics import QUARTERS, Metrics, quarter_means
from utils.training.step import DenoisingObjective
from utils.training.trainable import compute_dtype
from utils.training.weight_average import WeightAverage


def validate(
    accelerator: Accelerator,
    transformer: CogVideoXTransformer3DModel,
    objective: DenoisingObjective,
    plan: RunPlan,
    step: int,
    metrics: Metrics,
    average: WeightAverage | None,
) -> None:
    """Logs the held-out loss and videos after `step` updates. Called by every rank.

    A failure is printed, and training continues.

    Args:
        average: average of the weights, which takes their place under --validate_ema.
    """
    failures: list[str] = []
    losses: list[tuple[float, int]] = []
    videos: list[tuple[Path, str]] = []
    items: list[ValidationItem] = []
    uses_average = average is not None and plan.args.validation.validate_ema
    with eval_mode(transformer), average.applied() if average is not None and uses_average else nullcontext():
        # Run rank-local steps before collectives: after a local failure, no rank enters a collective alone.
        with collect_failures(failures):
            items = read_items(plan, RankShard(accelerator.process_index, accelerator.num_processes))
        if not gather_object(failures):
            with collect_failures(failures):
                losses = held_out_losses(transformer, objective, items)
            with collect_failures(failures):
                pipeline = load_pipeline(accelerator, transformer, plan, step)
            if not gather_object(failures):
                with loading.released(pipeline.vae):
                    for item in items:
                        with collect_failures(failures):
                            videos += generate(pipeline, plan, item, step)
    accelerator.wait_for_everyone()
    failures, losses, videos = gather_object(failures), gather_object(losses), gather_object(videos)
    with collect_failures(failures):
        if videos and accelerator.is_main_process:
            prompts = {path.name: prompt for path, prompt in sorted(videos)}
            prompts_file = video_folder(plan, step) / PROMPTS_FILE
            prompts_file.write_text(json.dumps(prompts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for failure in failures:
        accelerator.print(f"Validation failed at step {step}; training continues.\n{failure}")
    if losses:
        values, timesteps = torch.tensor([loss for loss, _ in losses]), torch.tensor([t for _, t in losses])
        means = quarter_means(values, timesteps, len(objective.alphas_cumprod), "held_out_loss")
        metrics.log(step, held_out_loss=values.mean().item(), **means)
    try:
        metrics.log_videos(step, sorted(videos), plan.gen_fps)
    except Exception:
        accelerator.print(f"The trackers rejected the videos of step {step}.\n{traceback.format_exc()}")


@contextmanager
def collect_failures(failures: list[str]) -> Iterator[None]:
    """Appends any exception in the block to `failures`; nothing may stop the training run.

    Errors of the system become a sentence, all others a traceback.
    """
    try:
        yield
    except OSError as error:
        failures.append(describe_system_error(error) or traceback.format_exc())
    except Exception:
        failures.append(traceback.format_exc())


@contextmanager
def eval_mode(transformer: torch.nn.Module) -> Iterator[None]:
    """Puts the transformer in evaluation mode and disables gradients inside the block."""
    transformer.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        transformer.train()


@dataclass(frozen=True)
class ValidationItem:
    """One line of the validation folder, with everything that is read from disk for it.

    Attributes:
        prompt_embeds, empty_embeds: [1, S, D].
        moments: batch of one for the held-out loss, as the data loader yields it; None for a prompt without a clip.
        image: image of i2v at `resolution`.
        condition: further condition frames of i2v, if `--condition_frames` starts with any.
        is_padding: padding item; the result is discarded.
    """

    number: int
    prompt: str
    prompt_embeds: torch.Tensor
    empty_embeds: torch.Tensor
    moments: dict[str, torch.Tensor] | None
    image: Image.Image | None
    condition: Condition | None
    resolution: Resolution
    is_padding: bool


def read_items(plan: RunPlan, shard: RankShard) -> list[ValidationItem]:
    """Reads the items of this rank; under ZeRO-3, pads them to the same number on every rank."""
    numbers = [(number, False) for number in shard.select(range(len(plan.validation)))]
    if plan.zero is not None and plan.zero["zero_optimization"]["stage"] == 3:
        max_items = math.ceil(len(plan.validation) / shard.world_size)
        numbers += [(len(plan.validation) - 1, True)] * (max_items - len(numbers))
    return [read_item(plan, number, is_padding) for number, is_padding in numbers]


def read_item(plan: RunPlan, number: int, is_padding: bool) -> ValidationItem:
    cache, clip_sample, keys = plan.cache, plan.validation[number], plan.validation_keys[number]
    prompt_embeds, moments = cache.read(keys.prompt)[None], None
    if keys.video:
        moments = {"video": cache.read(keys.video[0])[None], "prompt": prompt_embeds}
        if keys.image:
            moments["image"] = cache.read(keys.image[0])[None]
        moments |= {addition: cache.read(names[0])[None] for addition, names in keys.additions.items()}
    return ValidationItem(
        number=number,
        prompt=clip_sample.sample.prompt,
        prompt_embeds=prompt_embeds,
        empty_embeds=cache.read(plan.empty_prompt)[None],
        moments=moments,
        image=condition_image(clip_sample) if plan.spec.task == "i2v" else None,
        condition=further_condition(plan, clip_sample),
        resolution=clip_sample.resolution,
        is_padding=is_padding,
    )


def held_out_losses(
    transformer: CogVideoXTransformer3DModel, objective: DenoisingObjective, items: list[ValidationItem]
) -> list[tuple[float, int]]:
    """Returns (loss, timestep) of this rank's clips at the middle of each quarter of the timesteps.

    Noise and timesteps are the same at every validation, so two validations differ by the weights alone.
    """
    objective = replace(objective, image_dropout=0.0)
    device, num_timesteps = objective.alphas_cumprod.device, len(objective.alphas_cumprod)
    results = []
    for item in items:
        if item.moments is None:
            continue
        seeds = [seed_for(HELD_OUT, 0, item.number)]
        for quarter in range(QUARTERS):
            timestep = torch.tensor([(2 * quarter + 1) * num_timesteps // (2 * QUARTERS)], device=device)
            losses, _ = objective(transformer, item.moments, seeds, timestep)
            if not item.is_padding:
                results.append((losses.item(), int(timestep)))
    return results


def load_pipeline(
    accelerator: Accelerator, transformer: CogVideoXTransformer3DModel, plan: RunPlan, step: int
) -> DiffusionPipeline:
    """Builds a pipeline around the transformer in training, and creates the folder of its videos.

    Prompts were encoded before training, so the pipeline has no text encoder. The VAE is loaded for this validation.
    """
    video_folder(plan, step).mkdir(parents=True, exist_ok=True)
    system, variant = plan.args.system, plan.args.model.variant
    dtype = compute_dtype(plan.args)  # the pipelines pass latents to the VAE in the dtype of the prompt embeddings
    vae = loading.load_vae(plan.model_dir, accelerator.device, system.enable_slicing, system.uses_tiles, dtype, variant)
    pipeline = loading.PIPELINES[plan.spec.task](
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer,
        scheduler=loading.load_scheduler(plan.model_dir),
    )
    pipeline.set_progress_bar_config(
        desc=f"Validation at step {step}", leave=False, disable=not accelerator.is_main_process
    )
    return pipeline


def generate(pipeline: DiffusionPipeline, plan: RunPlan, item: ValidationItem, step: int) -> list[tuple[Path, str]]:
    """Generates the video of one item; returns its mp4 and prompt, or nothing for a padding item."""
    args, resolution, device = plan.args, item.resolution, pipeline.vae.device
    if item.image is not None:
        pipeline.condition = item.condition
    video = pipeline(
        prompt_embeds=item.prompt_embeds.to(device, compute_dtype(args)),
        negative_prompt_embeds=item.empty_embeds.to(device, compute_dtype(args)),
        height=resolution.height,
        width=resolution.width,
        num_frames=resolution.frames,
        num_inference_steps=args.validation.num_inference_steps,
        guidance_scale=args.validation.guidance_scale,
        generator=torch.Generator().manual_seed(args.training.seed),
        max_sequence_length=plan.spec.max_text_seq_length,
        **({} if item.image is None else {"image": item.image}),
    ).frames[0]
    if item.is_padding:
        return []
    path = video_folder(plan, step) / f"{item.number:03d}.mp4"
    loading.write_video(video, path, plan.gen_fps)
    return [(path, item.prompt)]


def video_folder(plan: RunPlan, step: int) -> Path:
    return plan.args.output.output_dir / "validation" / f"step-{step}"


def condition_image(clip_sample: ClipSample) -> Image.Image:
    """Returns the condition image of a validation line, or else the first frame of its clip, at its resolution."""
    selection = replace(clip_sample.selection, resolution=replace(clip_sample.resolution, frames=1))
    if clip_sample.sample.image is not None:
        pixels = load_image(Path(clip_sample.sample.image), selection.resolution, selection.mode)
    else:
        pixels = decode_sample(clip_sample, selection)[0]
    return Image.fromarray(pixels.numpy())


def further_condition(plan: RunPlan, clip_sample: ClipSample) -> Condition | None:
    """Returns the condition frames besides the image that the first value of `--condition_frames` asks for."""
    addition, selection = plan.args.data.condition_frames[0].addition, clip_sample.selection
    if addition is None or selection.resolution.frames == 1:
        return None
    if addition == LAST and clip_sample.sample.last_image is not None:
        frames = load_image(Path(clip_sample.sample.last_image), selection.resolution, selection.mode)[None]
    else:
        frames = select_frames(decode_sample(clip_sample, selection), addition)
    return Condition(plan.spec, addition, to_model_range(frames)[None])
