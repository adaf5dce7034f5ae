"""Sample videos and held-out loss while training goes on. Nothing here changes a weight or a random state.

The validation folder's lines are dealt out to the processes; each generates its own without talking to the others, and
they meet when all are done.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import CogVideoXTransformer3DModel
from PIL import Image

from dataset.cached_dataset import HELD_OUT, seed_for
from dataset.latent_cache import LatentCache
from dataset.manifest import Sample
from dataset.precompute import Share
from dataset.video import Resolution, decode, load_image
from utils import components
from utils.conditioning import predict_velocity
from utils.loss import draw, velocity_loss
from utils.metrics import QUARTERS, Metrics, quarter_means
from utils.plan import RunPlan
from utils.trainable import compute_dtype


def validate(
    accelerator: Accelerator,
    transformer: CogVideoXTransformer3DModel,
    alphas_cumprod: torch.Tensor,
    plan: RunPlan,
    step: int,
    metrics: Metrics,
) -> None:
    """Held-out loss and videos after `step` updates. Called by every rank; a failure is told, and training goes on."""
    cache = LatentCache(plan.cache_dir)
    share = Share(accelerator.process_index, accelerator.num_processes)
    failures: list[str] = []
    losses: list[tuple[float, int]] = []
    videos: list[tuple[Path, str]] = []
    try:
        with frozen(transformer):
            losses = held_out_losses(transformer, alphas_cumprod, plan, cache, share)
            for video in generate(accelerator.device, transformer, plan, cache, share, step):
                videos.append(video)  # one by one: those made before a failure are logged
    except Exception:  # whatever fails here must not cost the training run
        failures.append(traceback.format_exc())
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
def frozen(transformer: torch.nn.Module) -> Iterator[None]:
    """No gradients and evaluation mode inside the block."""
    transformer.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        transformer.train()


def held_out_losses(
    transformer: CogVideoXTransformer3DModel,
    alphas_cumprod: torch.Tensor,
    plan: RunPlan,
    cache: LatentCache,
    share: Share,
) -> list[tuple[float, int]]:
    """(loss, timestep) of this rank's validation clips, at the middle of each quarter of the timesteps.

    Noise and timesteps are the same at every validation, so that two of them differ by the weights alone.
    """
    numbered = [(number, keys) for number, keys in enumerate(plan.validation_keys) if keys.video is not None]
    device, num_timesteps = alphas_cumprod.device, len(alphas_cumprod)
    results = []
    for number, keys in share.of(numbered):
        video, prompt = (cache.read(name)[None].to(device) for name in (keys.video, keys.prompt))
        image = cache.read(keys.image)[None].to(device) if keys.image is not None else None
        for quarter in range(QUARTERS):
            timestep = torch.tensor([(2 * quarter + 1) * num_timesteps // (2 * QUARTERS)], device=device)
            drawn = draw(plan.form, video, image, [seed_for(HELD_OUT, 0, number)], num_timesteps, timesteps=timestep)

            def predict(
                noisy: torch.Tensor,
                timesteps: torch.Tensor,
                prompt: torch.Tensor = prompt,
                image_latents: torch.Tensor | None = drawn.image_latents,
            ) -> torch.Tensor:
                return predict_velocity(
                    transformer, plan.form, noisy, timesteps, prompt, image_latents, compute_dtype(plan.args)
                )

            loss = velocity_loss(predict, alphas_cumprod, drawn.latents, timestep, drawn.noise)
            results.append((loss.item(), int(timestep)))
    return results


def generate(
    device: torch.device,
    transformer: CogVideoXTransformer3DModel,
    plan: RunPlan,
    cache: LatentCache,
    share: Share,
    step: int,
) -> Iterator[tuple[Path, str]]:
    """Generates this rank's share of the validation folder; yields each mp4 and its prompt.

    The prompts were encoded before training, so the text encoder is not needed; the VAE is read for the while.
    """
    args, resolution = plan.args, plan.args.data.train_resolution
    folder = args.output.output_dir / "validation" / f"step-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    mine = share.of(enumerate(zip(plan.validation, plan.validation_keys, strict=True)))
    if not mine:
        return
    # the pipelines hand the VAE tensors of the prompt embeddings' dtype
    vae = components.load_vae(
        plan.model_dir, device, args.system.enable_slicing, args.system.enable_tiling, compute_dtype(plan.args)
    )
    scheduler = components.load_scheduler(plan.model_dir)
    with components.released(vae):
        pipeline = components.PIPELINES[plan.form.task](
            tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler
        )
        pipeline.set_progress_bar_config(desc=f"Validation at step {step}", leave=False, disable=share.rank != 0)
        for number, (sample, keys) in mine:
            image = {}
            if plan.form.task == "i2v":
                image = {"image": condition_image(sample, resolution, args.data.resize_mode)}
            video = pipeline(
                prompt_embeds=cache.read(keys.prompt)[None].to(device, compute_dtype(plan.args)),
                negative_prompt_embeds=cache.read(plan.empty_prompt)[None].to(device, compute_dtype(plan.args)),
                height=resolution.height,
                width=resolution.width,
                num_frames=resolution.frames,
                num_inference_steps=args.validation.num_inference_steps,
                guidance_scale=args.validation.guidance_scale,
                generator=torch.Generator().manual_seed(args.training.seed),
                max_sequence_length=plan.form.max_text_seq_length,
                **image,
            ).frames[0]
            path = folder / f"{number:03d}.mp4"
            components.write_video(video, path, plan.gen_fps)
            yield path, sample.prompt


def condition_image(sample: Sample, resolution: Resolution, mode: str) -> Image.Image:
    """The image of a validation line, or its clip's first frame, at the training resolution."""
    if sample.image is not None:
        pixels = load_image(sample.image, resolution, mode)
    else:
        pixels = decode(sample.clip, Resolution(1, resolution.height, resolution.width), 1.0, mode)[0]
    return Image.fromarray(pixels.movedim(0, -1).numpy())
