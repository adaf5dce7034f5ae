"""The plan of a run as text, for the log and for `--dry_run`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

from dataset.folder import DataFolder
from dataset.video import NATIVE_STRIDE, Resolution
from utils.config.deepspeed_config import get_key
from utils.run.plan import RunPlan

# Number of unusable lines of the data that are shown at the start of the log. The end lists all of them.
MAX_SHOWN_LINES = 5


def describe(plan: RunPlan) -> str:
    """Returns a summary of the plan."""
    args, training, spec = plan.args, plan.args.training, plan.spec
    num_prompts = len({clip_sample.sample.prompt for clip_sample in plan.samples})
    by_time = f"{num_prompts} distinct prompts, frames by time at {args.data.fps} fps"
    lines = [
        f"Model: {spec.task}, CogVideoX{'1.5' if spec.is_v1_5 else ' 1.0'}, {spec.positions} positions, "
        f"{plan.model_dir}",
        f"Training: {args.model.training_type}, {training.mixed_precision}, {plan.total_steps} steps of "
        f"{plan.samples_per_step} samples ({training.batch_size} x {training.gradient_accumulation_steps} accumulation "
        f"x {plan.num_processes} processes), {plan.num_epochs:.1f} epochs",
        f"Strategy: {describe_strategy(plan.zero)}",
        f"Dataset: {len(plan.samples)} samples, "
        + ("frames spread over each clip" if args.data.fps == NATIVE_STRIDE else by_time),
        *folder_lines(plan),
        *plan.clip_summary,
    ]
    for resolution in dict.fromkeys((*args.data.train_resolution, *(sample.resolution for sample in plan.samples))):
        video_tokens, text_tokens = spec.tokens(resolution)
        lines.append(f"Sample: {resolution}, {video_tokens} video and {text_tokens} text tokens")
    lines += [
        f"Validation: {len(plan.validation)} prompts" if plan.validation else "Validation: off",
        f"Latent cache: {', '.join(map(str, plan.encoders))}, {plan.cache_summary}",
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


def folder_lines(plan: RunPlan) -> list[str]:
    """Returns a line per data folder: its samples, its share of an epoch, and what its folder.toml sets.

    Returns no line for one folder with the settings of the flags.
    """
    data, counts = plan.args.data, Counter(plan.folders)
    flags = DataFolder(id_token=data.id_token, caption_dropout=data.caption_dropout, flip=data.flip)
    if list(plan.cache_dirs) == [replace(flags, root=root) for root in data.data_root]:
        return []
    lines = [f"Epoch: {plan.samples_per_epoch} samples"]
    for folder in plan.cache_dirs:
        repeated = f" x {folder.repeats}" if folder.repeats != 1 else ""
        share = counts[folder] * folder.repeats / plan.samples_per_epoch
        own = [
            name
            for name in ("loss_weight", "id_token", "caption_dropout", "flip")
            if getattr(folder, name) != getattr(flags, name)
        ]
        settings = "".join(f", {name} {json.dumps(getattr(folder, name), ensure_ascii=False)}" for name in own)
        lines.append(f"  {folder.root}: {counts[folder]} samples{repeated}, {share:.0%} of an epoch{settings}")
    return lines


def describe_strategy(zero: dict[str, Any] | None) -> str:
    if zero is None:
        return "DDP"
    section = zero["zero_optimization"]
    offloaded = [name for name in ("optimizer", "param") if get_key(section, f"offload_{name}.device") == "cpu"]
    return f"DeepSpeed ZeRO-{section['stage']}" + "".join(f", {name} offloaded" for name in offloaded)


def bucket_notes(plan: RunPlan) -> list[str]:
    """Returns notes on empty buckets, and on buckets with too few samples for one update in the whole run."""
    counts: Counter[Resolution] = Counter()
    for clip_sample in plan.samples:
        counts[clip_sample.resolution] += clip_sample.sample.folder.repeats
    small = [
        f"Note: {bucket} has {count} samples. An update takes {plan.samples_per_step} samples of one resolution, so "
        "the run never trains on this bucket. Leave the resolution out, or use fewer samples per update."
        for bucket, count in counts.items()
        if count * plan.num_epochs < plan.samples_per_step
    ]
    empty = [
        f"Note: no {'image' if bucket.frames == 1 else 'clip'} fits {bucket} best."
        for bucket in plan.args.data.train_resolution
        if bucket not in counts
    ]
    return small + empty
