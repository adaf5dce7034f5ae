"""The plan of a run as text, for the log and for `--dry_run`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from dataset.video import SPREAD
from utils.run.plan import RunPlan

# Lines of the data that cannot be used, shown at the start; all of them are listed in the end.
MOST_LISTED = 5


def strategy(zero: dict[str, Any] | None) -> str:
    if zero is None:
        return "DDP"
    section = zero["zero_optimization"]
    offloaded = [name for name in ("optimizer", "param") if section.get(f"offload_{name}", {}).get("device") == "cpu"]
    return f"DeepSpeed ZeRO-{section['stage']}" + "".join(f", {name} offloaded" for name in offloaded)


def bucket_notes(plan: RunPlan) -> list[str]:
    """Buckets with so few samples that they will hardly fill an update."""
    epochs = plan.total_steps * plan.samples_per_step / len(plan.samples)
    counts = Counter(clip_sample.resolution for clip_sample in plan.samples)
    return [
        f"Note: {bucket} has {count} samples; an update takes {plan.samples_per_step} of one resolution, and the run "
        "ends before they fill one. Leave this resolution out, or make updates smaller."
        for bucket, count in counts.items()
        if count * epochs < plan.samples_per_step
    ] + [f"Note: no clip goes to {bucket}." for bucket in plan.args.data.train_resolution if bucket not in counts]


def describe(plan: RunPlan) -> str:
    """The plan of a run in a few lines, for the log and for --dry_run."""
    args, training, spec = plan.args, plan.args.training, plan.spec
    num_prompts = len({clip_sample.sample.prompt for clip_sample in plan.samples})
    lines = [
        f"Model: {spec.task}, CogVideoX{'1.5' if spec.is_v1_5 else ' 1.0'}, {spec.positions} positions, "
        f"{plan.model_dir}",
        f"Training: {args.model.training_type}, {training.mixed_precision}, {plan.total_steps} steps of "
        f"{plan.samples_per_step} samples ({training.batch_size} x {training.gradient_accumulation_steps} accumulation "
        f"x {plan.num_processes} processes), {plan.total_steps * plan.samples_per_step / len(plan.samples):.1f} epochs",
        f"Strategy: {strategy(plan.zero)}",
        f"Dataset: {len(plan.samples)} samples, {num_prompts} distinct prompts, frames by time at {args.data.fps} fps"
        if args.data.fps != SPREAD
        else f"Dataset: {len(plan.samples)} samples, frames spread over each clip",
        *plan.clips,
    ]
    for resolution in args.data.train_resolution:
        video_tokens, text_tokens = spec.tokens(resolution)
        lines.append(f"Sample: {resolution}, {video_tokens} video and {text_tokens} text tokens")
    lines += [
        f"Validation: {len(plan.validation)} prompts" if plan.validation else "Validation: off",
        f"Latent cache: {plan.cache_dir}",
        *bucket_notes(plan),
    ]
    if plan.bad:
        lines.append(f"Cannot be used: {len(plan.bad)} lines of the data, such as")
        lines += [f"  {sentence}" for sentence in plan.bad[:MOST_LISTED]]
    if plan.resume_from:
        lines.append(f"Resuming from {plan.resume_from}, at step {plan.progress.step}")
    if training.lr_scheduler != "constant" and training.lr_warmup_steps >= plan.total_steps:
        lines.append(
            f"Note: the {plan.total_steps} steps end before --lr_warmup_steps {training.lr_warmup_steps} are over; "
            "the learning rate will not be reached."
        )
    return "\n".join(lines + [f"Note: {note}" for note in plan.notes])
