"""Fine-tunes CogVideoX: `train_ddp_t2v.sh` and its siblings start this through accelerate.

arguments -> preflight -> latent cache -> model -> optimizer -> loop -> checkpoints
"""

from __future__ import annotations

import json
import math
import os
import signal
import warnings
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    set_seed,
)

from dataset.cached_dataset import CachedDataset, batches
from dataset.latent_cache import LatentCache
from dataset.sampler import SampleStream
from utils.checkpoint.manager import ARGS_FILE, Checkpoints, complete_last, write_args
from utils.common.distributed import on_main_process
from utils.common.errors import UserError, exit_on_user_error
from utils.common.heartbeat import HeartbeatBarrier
from utils.common.processes import end_with_parent, exit_without_teardown
from utils.common.seeds import DRAWS, seed_for
from utils.config.args import parse_args
from utils.estimate.prediction import describe_prediction, predict
from utils.model import loading
from utils.model.conditioning import predict_velocity
from utils.model.spec import text_encoder_config
from utils.run.describe import describe
from utils.run.fill_cache import fill_cache
from utils.run.plan import RunPlan
from utils.run.preflight import preflight
from utils.run.validation import validate
from utils.training.loss import sample_inputs, velocity_loss
from utils.training.metrics import TRACKERS, Metrics, quarter_means
from utils.training.optimizer import clip_gradients, make_loss_scale, make_lr_scheduler, make_optimizer
from utils.training.schedule import is_due
from utils.training.trainable import (
    compute_dtype,
    make_trainable,
    trained_parameters,
    use_attention_kernel,
    weight_dtype,
)

# A loss scale of 2^16 is down to 1 after as many halvings.
MOST_SKIPPED_UPDATES = 16
OVERFLOW = "The gradients of step {} overflow in fp16 at every loss scale; use --mixed_precision bf16."
WHAT_TO_DO = (
    "The last checkpoint is sound; go on from it with a lower --learning_rate, --max_grad_norm 1 or --mixed_precision "
    "bf16, or look at the sample."
)


def main() -> None:
    args = parse_args()
    with suppress(UserError):  # told by preflight
        loading.resolve_model_dir(args.model.model_path)  # a download, before processes wait for each other
    processes = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=args.system.nccl_timeout))
    heartbeat = HeartbeatBarrier(processes, args.system.nccl_timeout)
    plan = on_main_process(processes, heartbeat, preflight, args, processes.num_processes)
    processes.print(describe(plan))
    if args.output.dry_run:
        if processes.is_main_process:
            prediction = predict(
                plan.args, plan.spec, text_encoder_config(plan.model_dir), plan.zero, plan.num_processes
            )
            print("\n".join(describe_prediction(prediction, plan.args, plan.spec)))
        processes.print(json.dumps(plan.args.as_dict(), indent=2))
        return
    if not args.data.precompute_only and nothing_is_left(processes, plan):
        return
    if processes.is_main_process:
        write_args(plan.args, plan.args.output.output_dir)
    processes.wait_for_everyone()
    if not (plan.args.output.output_dir / ARGS_FILE).is_file():
        raise UserError(f"--output_dir {plan.args.output.output_dir} is not on a disk that all machines share.")
    plan = fill_cache(processes, heartbeat, plan)
    if not args.data.precompute_only and not nothing_is_left(processes, plan):  # there may be fewer samples now
        train(plan)


def nothing_is_left(processes: PartialState, plan: RunPlan) -> bool:
    """Whether the checkpoint to go on from has all steps; it is completed then, if its run was killed just before."""
    if plan.resume_from is None or plan.progress.step < plan.total_steps:
        return False
    if processes.is_main_process:
        complete_last(plan.resume_from, plan.args)
    processes.print(f"{plan.resume_from} has all of the {plan.total_steps} steps; nothing is left to do.")
    return True


def train(plan: RunPlan) -> None:
    args, spec = plan.args, plan.spec
    output_dir = args.output.output_dir
    set_seed(args.training.seed)
    accelerator = Accelerator(
        mixed_precision=args.training.mixed_precision if plan.zero or args.memory.autocast else "no",
        gradient_accumulation_steps=args.training.gradient_accumulation_steps,
        log_with=TRACKERS[args.output.report_to] or None,
        deepspeed_plugin=DeepSpeedPlugin(plan.zero, zero3_init_flag=False) if plan.zero else None,
        # without a second copy of the gradients, and without sending buffers, which are the same on all processes, each
        # time: positions, and the codes of a quantized base
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / "logs")),
    )

    # ---- model: from the checkpoint where full fine-tuning goes on; DeepSpeed loads its own further below
    uses_deepspeed, weights = plan.zero is not None, plan.model_dir
    if plan.resume_from is not None and args.model.training_type == "sft" and not uses_deepspeed:
        weights = plan.resume_from
    loaded_to = "cpu" if args.memory.quantize_base != "none" else accelerator.device.type
    transformer = loading.load_transformer(weights / "transformer", weight_dtype(args, uses_deepspeed), loaded_to)
    make_trainable(transformer, args, accelerator.device)
    use_attention_kernel(args.memory.attention_kernel)
    if args.memory.compile_blocks:
        accelerator.print("Blocks are compiled in the first update, which takes minutes.")
    parameters = trained_parameters(transformer)
    accelerator.print(f"Trained parameters: {sum(p.numel() for p in parameters):,}")
    alphas_cumprod = loading.load_scheduler(plan.model_dir).alphas_cumprod.to(accelerator.device)

    # ---- optimizer and schedule, from where the run stands
    progress = plan.progress
    if progress.data not in ("", plan.data_digest):
        accelerator.print("Note: samples, seed or samples an update are not those before; their order is another one.")
    progress.data = plan.data_digest
    optimizer = make_optimizer(parameters, args, uses_deepspeed)
    if args.training.mixed_precision == "fp16" and not uses_deepspeed:
        accelerator.scaler = make_loss_scale(args, accelerator.device)
    placement = [True, False] if args.memory.offload_optimizer else None  # None: what DeepSpeed insists on
    model, optimizer = accelerator.prepare(transformer, optimizer, device_placement=placement)
    checkpoints = Checkpoints(accelerator, transformer, args)
    if plan.resume_from is not None:
        checkpoints.load(plan.resume_from)
    lr_scheduler = make_lr_scheduler(optimizer, args.training, plan.total_steps, progress.step)
    metrics = Metrics(accelerator, output_dir, args.as_dict(), progress.step, plan.total_steps)

    # ---- data: one endless stream, entered where the run stands
    seed, batch_size = args.training.seed, args.training.batch_size
    dataset = CachedDataset(LatentCache(plan.cache_dir), plan.keys, plan.empty_prompt, args.data.caption_dropout, seed)
    stream = SampleStream(
        [clip_sample.resolution for clip_sample in plan.samples],
        batch_size,
        plan.samples_per_step,
        accelerator.process_index,
        accelerator.num_processes,
        seed,
        progress.samples_seen,
    )
    loader = batches(dataset, stream, args.system.num_workers, args.system.pin_memory)

    # ---- the loop: one micro-batch a turn
    if plan.validation and progress.step == 0:
        validate(accelerator, transformer, alphas_cumprod, plan, 0, metrics)  # what the base does, to compare with
    losses, timesteps, skipped = [], [], 0
    metrics.start_lap()
    while progress.step < plan.total_steps:
        batch = next(loader)
        with accelerator.accumulate(model):
            inputs = sample_inputs(
                spec,
                batch["video"].to(accelerator.device, non_blocking=True),
                batch["image"].to(accelerator.device, non_blocking=True) if "image" in batch else None,
                [seed_for(DRAWS, seed, number) for number in batch["number"]],
                len(alphas_cumprod),
                args.data.image_dropout,
            )
            predict = partial(
                predict_velocity,
                model,
                spec,
                prompt_embeds=batch["prompt"].to(accelerator.device, non_blocking=True),
                image_latents=inputs.image_latents,
                dtype=compute_dtype(args),
            )
            loss = velocity_loss(predict, alphas_cumprod, inputs.latents, inputs.timesteps, inputs.noise)
            stop_if_not_finite(loss, inputs.timesteps, [plan.samples[index] for index in batch["index"]], progress.step)
            backward(accelerator, loss.mean(), progress.step)
            if accelerator.sync_gradients:
                grad_norm = clip_gradients(accelerator, optimizer, args.training.max_grad_norm)
                overflow = accelerator.optimizer_step_was_skipped or not math.isfinite(grad_norm)
                if overflow and args.training.mixed_precision != "fp16":  # fp16 skips such an update
                    raise UserError(f"The gradients are not finite at step {progress.step + 1}. {WHAT_TO_DO}")
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        timesteps.append(inputs.timesteps)
        progress.samples_seen += batch_size * accelerator.num_processes
        if not accelerator.sync_gradients:
            continue
        if accelerator.optimizer_step_was_skipped:  # fp16: the loss scale is halved, and the update does not count
            losses, timesteps, skipped = [], [], skipped + 1
            if skipped > MOST_SKIPPED_UPDATES:
                raise UserError(OVERFLOW.format(progress.step + 1))
            metrics.start_lap()
            continue
        skipped = 0

        # ---- an update is done
        learning_rate = float(lr_scheduler.get_last_lr()[0])
        lr_scheduler.step()
        progress.step += 1
        all_losses, all_timesteps = accelerator.gather((torch.cat(losses), torch.cat(timesteps)))
        losses, timesteps = [], []
        mean_loss = all_losses.mean().item()
        metrics.log(
            progress.step,
            loss=mean_loss,
            learning_rate=learning_rate,
            grad_norm=float(grad_norm),
            step_s=metrics.lap(),
            **quarter_means(all_losses, all_timesteps, len(alphas_cumprod), "loss"),
        )
        metrics.advance(loss=mean_loss, lr=learning_rate)
        if plan.validation and is_due(progress.step, args.validation.validation_steps, plan.total_steps):
            validate(accelerator, transformer, alphas_cumprod, plan, progress.step, metrics)
        if is_due(progress.step, args.checkpoint.checkpointing_steps, plan.total_steps):
            checkpoints.save(progress, is_last=progress.step == plan.total_steps)
        metrics.start_lap()
    accelerator.print(metrics.close(progress.step))


def stop_if_not_finite(loss: torch.Tensor, timesteps: torch.Tensor, samples: list[Any], step: int) -> None:
    """Raises UserError before a loss that is not finite can reach a weight."""
    for value, timestep, sample in zip(loss.tolist(), timesteps.tolist(), samples, strict=True):
        if not math.isfinite(value):
            raise UserError(
                f"The loss is {value} at step {step + 1}, sample {sample}, timestep {timestep}. {WHAT_TO_DO}",
                on_every_rank=False,
            )


def backward(accelerator: Accelerator, loss: torch.Tensor, step: int) -> None:
    """The backward pass; under DeepSpeed the update as well, which it may give up before `MOST_SKIPPED_UPDATES`."""
    try:
        accelerator.backward(loss)
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        raise UserError(OVERFLOW.format(step + 1)) from error


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a launcher that is killed outright would leave its processes training
        end_with_parent(os.getppid(), signal.SIGTERM)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # of what DeepSpeed calls
    warnings.filterwarnings("ignore", "Seems like `optimizer.step")  # of accelerate, under a loss scale
    # nothing else leaves buffers alone at the start too, where fp8 could not be sent
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
    with exit_without_teardown(), exit_on_user_error():
        main()
