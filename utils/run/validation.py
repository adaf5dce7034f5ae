"""Sample videos and held-out loss while training goes on. Nothing here changes a weight or a random state.

The validation folder's lines are dealt out to the processes; each generates its own without talking to the others, and
they meet when all are done. Under ZeRO-3 a forward pass is a collective call, since every process holds a part of each
weight: all have the same number of turns, and one that is short of lines repeats the last of them for nothing.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import CogVideoXTransformer3DModel, DiffusionPipeline
from PIL import Image

from dataset.bucketing import ClipSample
from dataset.latent_cache import LatentCache
from dataset.precompute import RankShard
from dataset.video import Resolution, decode, load_image
from utils.common.seeds import HELD_OUT, seed_for
from utils.model import loading
from utils.model.conditioning import predict_velocity
from utils.run.plan import RunPlan
from utils.training.loss import sample_inputs, velocity_loss
from utils.training.metrics import QUARTERS, Metrics, quarter_means
from utils.training.trainable import compute_dtype


def validate(
    accelerator: Accelerator,
    transformer: CogVideoXTransformer3DModel,
    alphas_cumprod: torch.Tensor,
    plan: RunPlan,
    step: int,
    metrics: Metrics,
) -> None:
    """Held-out loss and videos after `step` updates. Called by every rank; a failure is told, and training goes on."""
    failures: list[str] = []
    losses: list[tuple[float, int]] = []
    videos: list[tuple[Path, str]] = []
    items: list[ValidationItem] = []
    with eval_mode(transformer):
        # What one process alone can fail at comes first: after such a failure none begins what all must take part in.
        with collect_failures(failures):
            items = read_items(plan, RankShard(accelerator.process_index, accelerator.num_processes))
        if not gather_object(failures):
            with collect_failures(failures):
                losses = held_out_losses(transformer, alphas_cumprod, plan, items)
            with collect_failures(failures):
                pipeline = load_pipeline(accelerator, transformer, plan, step)
            if not gather_object(failures):
                with loading.released(pipeline.vae):
                    for item in items:
                        with collect_failures(failures):
                            videos += generate(pipeline, plan, item, step)
    accelerator.wait_for_everyone()
    failures, losses, videos = gather_object(failures), gather_object(losses), gather_object(videos)
    for failure in failures:
        accelerator.print(f"Validation failed at step {step}; training goes on.\n{failure}")
    if losses:
        values, timesteps = torch.tensor([loss for loss, _ in losses]), torch.tensor([t for _, t in losses])
        means = quarter_means(values, timesteps, len(alphas_cumprod), "held_out_loss")
        metrics.log(step, held_out_loss=values.mean().item(), **means)
    try:
        metrics.log_videos(step, sorted(videos), plan.gen_fps)
    except Exception:
        accelerator.print(f"The trackers did not take the videos of step {step}.\n{traceback.format_exc()}")


@contextmanager
def collect_failures(failures: list[str]) -> Iterator[None]:
    """Whatever fails inside the block must not cost the training run."""
    try:
        yield
    except Exception:
        failures.append(traceback.format_exc())


@contextmanager
def eval_mode(transformer: torch.nn.Module) -> Iterator[None]:
    """No gradients and evaluation mode inside the block."""
    transformer.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        transformer.train()


@dataclass(frozen=True)
class ValidationItem:
    """One line of the validation folder, with all that is read from the disk for it.

    Attributes:
        prompt_embeds, empty_embeds: [1, S, D].
        video, image: moments of clip and condition image, [1, ...] as in the cache, for the held-out loss.
        condition: image of i2v at `resolution`.
        counts: False where the line is another process's, and this one only keeps it company.
    """

    number: int
    prompt: str
    prompt_embeds: torch.Tensor
    empty_embeds: torch.Tensor
    video: torch.Tensor | None
    image: torch.Tensor | None
    condition: Image.Image | None
    resolution: Resolution
    is_padding: bool


def read_items(plan: RunPlan, shard: RankShard) -> list[ValidationItem]:
    """This process's lines; under ZeRO-3 as many turns as every other process has."""
    cache = LatentCache(plan.cache_dir)
    numbers = [(number, True) for number in shard.select(range(len(plan.validation)))]
    if plan.zero is not None and plan.zero["zero_optimization"]["stage"] == 3:
        most = math.ceil(len(plan.validation) / shard.world_size)
        numbers += [(len(plan.validation) - 1, False)] * (most - len(numbers))
    items = []
    for number, is_padding in numbers:
        clip_sample, keys = plan.validation[number], plan.validation_keys[number]
        items.append(
            ValidationItem(
                number,
                clip_sample.sample.prompt,
                cache.read(keys.prompt)[None],
                cache.read(plan.empty_prompt)[None],
                cache.read(keys.video[0])[None] if keys.video else None,
                cache.read(keys.image[0])[None] if keys.image else None,
                condition_image(clip_sample) if plan.spec.task == "i2v" else None,
                clip_sample.resolution,
                is_padding,
            )
        )
    return items


def held_out_losses(
    transformer: CogVideoXTransformer3DModel, alphas_cumprod: torch.Tensor, plan: RunPlan, items: list[ValidationItem]
) -> list[tuple[float, int]]:
    """(loss, timestep) of this rank's validation clips, at the middle of each quarter of the timesteps.

    Noise and timesteps are the same at every validation, so that two of them differ by the weights alone.
    """
    device, num_timesteps = alphas_cumprod.device, len(alphas_cumprod)
    results = []
    for item in items:
        if item.video is None:
            continue
        video = item.video.to(device)
        image = item.image.to(device) if item.image is not None else None
        for quarter in range(QUARTERS):
            timestep = torch.tensor([(2 * quarter + 1) * num_timesteps // (2 * QUARTERS)], device=device)
            seeds = [seed_for(HELD_OUT, 0, item.number)]
            inputs = sample_inputs(plan.spec, video, image, seeds, num_timesteps, timesteps=timestep)
            predict = partial(
                predict_velocity,
                transformer,
                plan.spec,
                prompt_embeds=item.prompt_embeds.to(device),
                image_latents=inputs.image_latents,
                dtype=compute_dtype(plan.args),
            )
            loss = velocity_loss(predict, alphas_cumprod, inputs.latents, timestep, inputs.noise)
            if item.is_padding:
                results.append((loss.item(), int(timestep)))
    return results


def load_pipeline(
    accelerator: Accelerator, transformer: CogVideoXTransformer3DModel, plan: RunPlan, step: int
) -> DiffusionPipeline:
    """A pipeline around the transformer in training, and the folder for its videos.

    The prompts were encoded before training, so the text encoder is not needed; the VAE is read for the while.
    """
    folder_for(plan, step).mkdir(parents=True, exist_ok=True)
    system = plan.args.system
    # the pipelines hand the VAE tensors of the prompt embeddings' dtype
    dtype = compute_dtype(plan.args)
    pipeline = loading.PIPELINES[plan.spec.task](
        tokenizer=None,
        text_encoder=None,
        vae=loading.load_vae(plan.model_dir, accelerator.device, system.enable_slicing, system.enable_tiling, dtype),
        transformer=transformer,
        scheduler=loading.load_scheduler(plan.model_dir),
    )
    pipeline.set_progress_bar_config(
        desc=f"Validation at step {step}", leave=False, disable=not accelerator.is_main_process
    )
    return pipeline


def generate(pipeline: DiffusionPipeline, plan: RunPlan, item: ValidationItem, step: int) -> list[tuple[Path, str]]:
    """Generates one line of the validation folder; gives the mp4 and its prompt."""
    args, resolution, device = plan.args, item.resolution, pipeline.vae.device
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
        **({} if item.condition is None else {"image": item.condition}),
    ).frames[0]
    if not item.is_padding:
        return []
    path = folder_for(plan, step) / f"{item.number:03d}.mp4"
    loading.write_video(video, path, plan.gen_fps)
    return [(path, item.prompt)]


def folder_for(plan: RunPlan, step: int) -> Path:
    return plan.args.output.output_dir / "validation" / f"step-{step}"


def condition_image(clip_sample: ClipSample) -> Image.Image:
    """The image of a validation line, or its clip's first frame, at the resolution of the line."""
    selection = replace(clip_sample.selection, resolution=replace(clip_sample.resolution, frames=1))
    if clip_sample.sample.image is not None:
        pixels = load_image(Path(clip_sample.sample.image), selection.resolution, selection.mode)
    else:
        pixels = decode(Path(clip_sample.sample.clip), selection)[0]
    return Image.fromarray(pixels.numpy())
