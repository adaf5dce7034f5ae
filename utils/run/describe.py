"""The plan of a run as text, for the log and for `--dry_run`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from dataset.video import NATIVE_STRIDE
from utils.config.deepspeed_config import get_key
from utils.run.plan import RunPlan

# Number of unusable lines of the data that are shown at the start of the log. The end lists all of them.
MAX_SHOWN_LINES = 5


def describe(plan: RunPlan) -> str:
    """Returns a summary of the plan."""
    args, training, spec = plan.args, plan.args.training, plan.spec
    num_epochs = plan.total_steps * plan.samples_per_step / len(plan.samples)
    num_prompts = len({clip_sample.sample.prompt for clip_sample in plan.samples})
    by_time = f"{num_prompts} distinct prompts, frames by time at {args.data.fps} fps"
    lines = [
        f"Model: {spec.task}, CogVideoX{'1.5' if spec.is_v1_5 else ' 1.0'}, {spec.positions} positions, "
        f"{plan.model_dir}",
        f"Training: {args.model.training_type}, {training.mixed_precision}, {plan.total_steps} steps of "
        f"{plan.samples_per_step} samples ({training.batch_size} x {training.gradient_accumulation_steps} accumulation "
        f"x {plan.num_processes} processes), {num_epochs:.1f} epochs",
        f"Strategy: {describe_strategy(plan.zero)}",
        f"Dataset: {len(plan.samples)} samples, "
        + ("frames spread over each clip" if args.data.fps == NATIVE_STRIDE else by_time),
        *plan.clip_summary,
    ]
    for resolution in args.data.train_resolution:
        video_tokens, text_tokens = spec.tokens(resolution)
        lines.append(f"Sample: {resolution}, {video_tokens} video and {text_tokens} text tokens")
    lines += [
        f"Validation: {len(plan.validation)} prompts" if plan.validation else "Validation: off",
        f"Latent cache: {plan.cache_dir}, {plan.cache_summary}",
        *bucket_notes(plan),
    ]
    if plan.unusable:
        lines.append(f"Unusable: {len(plan.unusable)} lines of the data, such as")
        lines += [f"  {message}" for message in plan.unusable[:MAX_SHOWN_LINES]]
    if plan.resume_from:
        lines.append(f"Resuming from {plan.resume_from}, at step {plan.progress.step}")
    if training.lr_scheduler != "constant" and training.lr_warmup_steps >= plan.total_steps:
        lines.append(
            f"Note: --lr_warmup_steps {training.lr_warmup_steps} is not below the {plan.total_steps} steps of the run, "
            "so the run never reaches --learning_rate."
        )
    return "\n".join(lines + [f"Note: {note}" for note in plan.notes])


def describe_strategy(zero: dict[str, Any] | None) -> str:
    if zero is None:
        return "DDP"
    section = zero["zero_optimization"]
    offloaded = [name for name in ("optimizer", "param") if get_key(section, f"offload_{name}.device") == "cpu"]
    return f"DeepSpeed ZeRO-{section['stage']}" + "".join(f", {name} offloaded" for name in offloaded)


def bucket_notes(plan: RunPlan) -> list[str]:
    """Returns notes on empty buckets, and on buckets with too few samples for one update in the whole run."""
    num_epochs = plan.total_steps * plan.samples_per_step / len(plan.samples)
    counts = Counter(clip_sample.resolution for clip_sample in plan.samples)
    small = [
        f"Note: {bucket} has {count} samples. An update takes {plan.samples_per_step} samples of one resolution, so "
        "the run never trains on this bucket. Leave the resolution out, or use fewer samples per update."
        for bucket, count in counts.items()
        if count * num_epochs < plan.samples_per_step
    ]
    empty = [f"Note: no clip fits {bucket} best." for bucket in plan.args.data.train_resolution if bucket not in counts]
    return small + empty
