"""Fine-tunes CogVideoX. The scripts train_*.sh start it through accelerate.

arguments -> preflight -> latent cache -> model -> optimizer -> loop -> checkpoints
"""

from __future__ import annotations

import gc
import json
import os
import signal
import warnings
from contextlib import suppress
from datetime import timedelta
from functools import partial

import utils  # noqa: F401  (names missing requirements)

gc.disable()  # imports create a million objects and hardly any garbage

import torch
from accelerate import PartialState
from accelerate.utils import set_seed

from dataset.cached_dataset import CachedDataset, batches
from dataset.sampler import SampleStream
from utils.checkpoint.adapters import start_from
from utils.checkpoint.lora_reader import read_lora
from utils.checkpoint.manager import ARGS_FILE, Checkpoints, find_checkpoints, write_args
from utils.checkpoint.resume import choose_checkpoint
from utils.checkpoint.saved_weights import export_last_checkpoint
from utils.common.distributed import on_main_process
from utils.common.errors import UserError, exit_on_user_error
from utils.common.filesystem import flags_in_errors, lock_folder
from utils.common.heartbeat import HeartbeatBarrier
from utils.common.processes import end_with_parent, exit_without_teardown
from utils.common.seeds import DRAWS, seed_for
from utils.common.subprocesses import run_in_subprocess
from utils.config.args import Args, parse_args
from utils.estimate.prediction import describe_prediction, predict
from utils.model import loading
from utils.model.positions import set_learned_positions
from utils.run.describe import describe
from utils.run.fill_cache import fill_cache
from utils.run.hub import push
from utils.run.plan import RunPlan
from utils.run.preflight import preflight
from utils.run.validation import validate
from utils.training.divergence import OverflowGuard, check_gradients, check_losses
from utils.training.loss import weighted_mean
from utils.training.metrics import Metrics, peak_memory, quarter_means, reset_peak_memory
from utils.training.optimizer import make_lr_scheduler, make_optimizer
from utils.training.profiling import UpdateProfiler
from utils.training.schedule import is_due
from utils.training.step import DenoisingObjective
from utils.training.strategy import make_strategy
from utils.training.throughput import DATA, MODEL, OPTIMIZER, StepTimer, work_per_update
from utils.training.trainable import compute_dtype, make_trainable, trained_parameters, use_attention_kernel
from utils.training.weight_average import make_average

gc.freeze()  # imported objects stay; forked processes share their memory
gc.enable()


def main() -> None:
    command_line = parse_args()
    with suppress(UserError):  # preflight reports it
        loading.resolve_model_dir(command_line.model.model_path)  # download before processes wait for each other
    timeout = command_line.system.nccl_timeout
    processes = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=timeout))
    heartbeat = HeartbeatBarrier(processes, timeout)

    plan = on_main_process(processes, heartbeat, preflight, command_line, processes.num_processes)
    processes.print(describe(plan))
    if plan.args.output.dry_run:
        if processes.is_main_process:
            print("\n".join(describe_prediction(run_in_subprocess(predict, plan.context), plan.context)))
            print(json.dumps(plan.args.as_dict(), indent=2))
        return
    with flags_in_errors({"--output_dir": plan.args.output.output_dir, "--cache_dir": tuple(plan.encoders)}):
        run(processes, heartbeat, plan)


def run(processes: PartialState, heartbeat: HeartbeatBarrier, plan: RunPlan) -> None:
    """Fills the latent cache, then trains, or finishes a run that has made all its updates."""
    on_main_process(processes, heartbeat, claim_output, plan)
    if plan.args.data.precompute_only or not plan.is_finished:
        create_output(processes, plan)
        plan = fill_cache(processes, heartbeat, plan)
    if plan.args.data.precompute_only:
        return
    if plan.is_finished:  # also once unusable samples are left out, which makes an epoch shorter
        finish(processes, plan)
    else:
        train(plan)


def claim_output(plan: RunPlan) -> None:
    """Locks the output folder. Raises UserError if another run uses it, or has used it since the checks."""
    lock_folder(plan.args.output.output_dir, "--output_dir")
    if choose_checkpoint(plan.args) != plan.resume_from:
        raise UserError(f"--output_dir {plan.args.output.output_dir}: another run has saved a checkpoint; start again.")


def create_output(processes: PartialState, plan: RunPlan) -> None:
    """Writes the resolved arguments to the output folder. Raises UserError on machines that do not share it."""
    output_dir = plan.args.output.output_dir
    if processes.is_main_process:
        write_args(plan.args, output_dir)
    processes.wait_for_everyone()
    if not (output_dir / ARGS_FILE).is_file():
        raise UserError(f"--output_dir {output_dir} is not on a disk that all machines share.")


def finish(processes: PartialState, plan: RunPlan) -> None:
    """Completes the last checkpoint of a run that was killed after its last step."""
    assert plan.resume_from is not None
    if processes.is_main_process:
        export_last_checkpoint(plan.resume_from, plan.args)
    if processes.is_main_process:
        publish(plan.args)
    processes.print(f"{plan.resume_from} has all of the {plan.total_steps} steps; nothing is left to do.")


def publish(args: Args) -> None:
    """Publishes the last checkpoint if --push_to_hub asks for it."""
    if args.output.push_to_hub is not None:
        checkpoint = find_checkpoints(args.output.output_dir)[-1]
        print(f"Published {push(checkpoint, args.output.push_to_hub, args.output.hub_private)}")


def train(plan: RunPlan) -> None:
    args, progress = plan.args, plan.progress
    training, seed = args.training, args.training.seed
    set_seed(seed)
    reset_peak_memory()
    strategy = make_strategy(args, plan.zero)
    accelerator = strategy.accelerator

    # ---- model
    transformer = strategy.load_transformer(plan.model_dir, plan.resume_from)
    set_learned_positions(transformer, plan.spec)
    make_trainable(transformer, args, accelerator.device)
    if args.lora.init_lora is not None and plan.resume_from is None:
        start_from(transformer, read_lora(args.lora.init_lora, "--init_lora"), args)
    use_attention_kernel(args.memory.attention_kernel)
    if args.memory.compile_blocks:
        accelerator.print(
            "The first update compiles the blocks and takes minutes longer (--compile_blocks false: none)."
        )
    parameters = trained_parameters(transformer)
    num_trained = sum(parameter.numel() for parameter in parameters)
    accelerator.print(f"Trained parameters: {num_trained:,}")

    # ---- optimizer, checkpoint to resume from, learning-rate schedule
    optimizer = make_optimizer(parameters, args, strategy.uses_deepspeed)
    model, optimizer = strategy.prepare(transformer, optimizer)
    checkpoints = Checkpoints(accelerator, transformer, args)
    if plan.resume_from is not None:
        checkpoints.load(plan.resume_from)
    average = make_average(args, accelerator, transformer, model)
    if average is not None and plan.resume_from is not None:
        checkpoints.load_average(average, plan.resume_from)
    lr_scheduler = make_lr_scheduler(optimizer, training, plan.total_steps, progress.step)

    # ---- data: one endless stream of samples, entered at the position of the checkpoint
    if progress.data not in ("", plan.data_digest):
        accelerator.print(
            "Note: the samples, their repeats, the seed or the samples per update have changed, so the sample order "
            "is new."
        )
    progress.data, progress.num_samples = plan.data_digest, len(plan.samples)
    dataset = CachedDataset(plan.cache, plan.keys, plan.empty_prompt, plan.folders, seed)
    stream = SampleStream(
        [clip_sample.resolution for clip_sample in plan.samples],
        training.batch_size,
        plan.samples_per_step,
        accelerator.process_index,
        accelerator.num_processes,
        seed,
        progress.samples_seen,
        [folder.repeats for folder in plan.folders],
    )
    loader = batches(dataset, stream, args.system.pin_memory)

    # ---- objective and metrics
    alphas_cumprod = loading.load_scheduler(plan.model_dir).alphas_cumprod.to(accelerator.device)
    objective = DenoisingObjective(
        plan.spec, alphas_cumprod, compute_dtype(args), args.data.image_dropout, args.data.condition_frames
    )
    metrics = Metrics(accelerator, args.output.output_dir, args.as_dict(), progress.step, plan.total_steps)
    if plan.validation and progress.step == 0:
        validate(accelerator, transformer, objective, plan, 0, metrics, average)  # the base model, as a baseline

    # ---- the loop: one micro-batch per iteration
    overflow = OverflowGuard(training.mixed_precision)
    update_losses, update_timesteps = [], []
    timer = StepTimer(accelerator.device)
    work_of = partial(work_per_update, args, plan.spec, num_trained, accelerator.num_processes)
    num_profiled = args.output.profile if accelerator.is_main_process else 0
    profiler = UpdateProfiler(num_profiled, args.output.output_dir / "profile")
    while progress.step < plan.total_steps:
        batch = next(loader)
        timer.mark(DATA)
        with accelerator.accumulate(model):
            losses, timesteps = objective(model, batch, [seed_for(DRAWS, seed, number) for number in batch["number"]])
            check_losses(losses, timesteps, [plan.samples[index] for index in batch["index"]], progress.step)
            strategy.backward(weighted_mean(losses, batch["loss_weight"]), progress.step)
            timer.mark(MODEL)
            if accelerator.sync_gradients:
                grad_norm = strategy.clip_gradients()
                check_gradients(grad_norm, training.mixed_precision, progress.step)
            optimizer.step()
            optimizer.zero_grad()
        timer.mark(OPTIMIZER)
        update_losses.append(losses.detach())
        update_timesteps.append(timesteps)
        progress.samples_seen += training.batch_size * accelerator.num_processes
        if not accelerator.sync_gradients:
            continue

        if overflow.skips(accelerator.optimizer_step_was_skipped, progress.step):  # the loss scale has been halved
            update_losses, update_timesteps = [], []
            timer.start()
            continue

        # ---- the update is done
        progress.step += 1
        if average is not None:
            average.update(progress.step)
        learning_rate = float(lr_scheduler.get_last_lr()[0])
        lr_scheduler.step()
        all_losses, all_timesteps = accelerator.gather((torch.cat(update_losses), torch.cat(update_timesteps)))
        update_losses, update_timesteps = [], []
        mean_loss = all_losses.mean().item()
        metrics.log(
            progress.step,
            loss=mean_loss,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            **timer.lap(work_of(plan.samples[batch["index"][0]].resolution)),
            **quarter_means(all_losses, all_timesteps, len(alphas_cumprod), "loss"),
        )
        metrics.advance(loss=mean_loss, lr=learning_rate)
        profiler.step()
        if plan.validation and is_due(progress.step, args.validation.validation_steps, plan.total_steps):
            validate(accelerator, transformer, objective, plan, progress.step, metrics, average)
        if is_due(progress.step, args.checkpoint.checkpointing_steps, plan.total_steps):
            checkpoints.save(progress, progress.step == plan.total_steps, average)
        timer.start()
    profiler.stop()
    metrics.close()
    accelerator.print(f"Done: step {progress.step}, {timer.summary()}, {peak_memory()}.")
    if accelerator.is_main_process:
        publish(args)


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a launcher that is killed outright would leave its processes training
        end_with_parent(os.getppid(), signal.SIGTERM)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # called by DeepSpeed
    warnings.filterwarnings("ignore", "Seems like `optimizer.step")  # accelerate under a loss scale
    # only this skips the initial buffer broadcast, which fails for fp8
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
    with exit_without_teardown(), exit_on_user_error():
        main()
