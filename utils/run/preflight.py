"""Runs every check that needs no weights, in stages: model, strategy, checkpoint, memory, data.

The errors of all stages are raised together. Without errors, the result is the plan of the run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from dataset.folder import DataFolder
from dataset.manifest import Sample
from dataset.scan import ScanResult
from utils.checkpoint.manager import Progress
from utils.checkpoint.resume import choose_checkpoint, fixed_memory_options, read_progress
from utils.common.errors import CheckReport, UserError
from utils.common.filesystem import check_writable
from utils.common.subprocesses import run_in_subprocess
from utils.config.args import Args
from utils.config.deepspeed_config import find_template, resolve_template
from utils.estimate.context import RunContext, this_machine
from utils.estimate.settings_search import check_fits, fit_to_budget
from utils.model import loading
from utils.model.encoders import prompt_notes
from utils.model.positions import choose_positions
from utils.model.spec import LEARNED_POSITIONS, ModelSpec, read_objective, read_spec
from utils.run.cache_size import plan_sizes
from utils.run.checks import (
    check_disk_space,
    check_init_lora,
    machine_errors,
    model_errors,
    tracker_errors,
)
from utils.run.data import find_cache_dirs, read_training_samples, read_validation_samples, scan_data
from utils.run.hub import check_hub
from utils.run.plan import RunPlan, make_plan
from utils.run.tiling import choose_tiling
from utils.training.trainable import compile_error, needs_autocast

# Scanning more clips than this takes minutes, so errors found before are reported first.
MAX_CLIPS_SCANNED_AFTER_ERRORS = 1000


@dataclass(frozen=True)
class BaseModel:
    """The checkpoint that is fine-tuned."""

    folder: Path
    spec: ModelSpec
    text_encoder: dict[str, Any]


def preflight(args: Args, num_processes: int) -> RunPlan:
    """Checks the whole run, from configs and headers of weight files to the first frame of each clip.

    Raises:
        UserError: lists all errors.
    """
    report = CheckReport(list(args.errors()))
    values_are_valid = not report.errors
    args = check_output(report, args)
    model = report.run(read_model, args)
    if model is None:
        choose_resume(report, args)
        read_samples(report, args)
        raise UserError(report.errors)

    args, context = resolve_strategy(report, args, model, num_processes)
    resume_from, progress = choose_resume(report, args), None
    check_initial_lora(report, args, model, resume_from)
    if context is not None:
        context = fit_memory(report, context, resume_from)
        args = context.args
        progress = check_resume(report, context, model, resume_from)

    samples, validation = read_samples(report, args)
    if not samples or not values_are_valid:
        raise UserError(report.errors)
    check_prompts(report, model, samples + validation)
    cache_dirs = find_cache_dirs(args.data, samples)
    scan = scan_samples(report, args, samples, validation, cache_dirs)
    if any(clip_sample.resolution not in args.data.train_resolution for clip_sample in scan.samples):  # of images
        report.notes += model.spec.frames_notes(1)
    if context is None or progress is None or not scan.samples:
        raise UserError(report.errors)
    make = partial(make_plan, context, model.folder, scan, cache_dirs, resume_from, progress, report.notes)
    plan = check_cache(report, *choose_tiling(make, context, this_machine()))
    if report.errors:
        raise UserError(report.errors)
    return plan


def read_model(args: Args) -> BaseModel:
    """Reads the configs of the checkpoint, and downloads it if it is an id on the hub. Raises UserError."""
    folder = loading.resolve_model_dir(args.model.model_path)
    spec = with_positions(read_spec(folder, args.model.variant), args)
    return BaseModel(folder, spec, loading.text_encoder_config(folder, args.model.variant))


def with_positions(spec: ModelSpec, args: Args) -> ModelSpec:
    """Returns the spec of a base checkpoint with the learned positions of the run. Raises UserError."""
    requested, stated = args.model.learned_positions, spec.transformer.get(LEARNED_POSITIONS)
    return choose_positions(spec, requested, stated, f"--model_path {args.model.model_path}")


def resolve_strategy(
    report: CheckReport, args: Args, model: BaseModel, num_processes: int
) -> tuple[Args, RunContext | None]:
    """Fills in defaults and the DeepSpeed template, and checks them against the model and the machine.

    Returns:
        The resolved arguments, and the context of the run; None if the template is unusable.
    """
    template = report.run(find_template)
    uses_deepspeed = template is not None
    args = fill_in_defaults(args, model.spec, uses_deepspeed)
    args = choose_compilation(report, args, uses_deepspeed)
    zero = report.run(resolve_template, template, args, model.spec.width, num_processes) if template else None
    report.errors += model_errors(args, model.spec, uses_deepspeed, num_processes)
    report.errors += machine_errors(args, uses_deepspeed)
    if notes := loading.variant_notes(model.folder, args.model.variant):
        report.notes += [*notes, f"prompts are encoded in {model.text_encoder['dtype']}."]
    report.notes += [note for size in args.data.train_resolution for note in model.spec.frames_notes(size.frames)]
    if uses_deepspeed and zero is None:
        return args, None
    return args, RunContext(args, model.spec, model.text_encoder, zero, num_processes)


def fill_in_defaults(args: Args, spec: ModelSpec, uses_deepspeed: bool = False) -> Args:
    """Fills in the defaults that depend on the model or the machine, except that of `--compile_blocks`."""
    num_workers = max(1, min(args.system.num_workers, len(os.sched_getaffinity(0))))
    precision: Literal["no", "fp16", "bf16"] = args.training.mixed_precision or (
        "fp16" if spec.trained_in_fp16 and torch.cuda.is_available() else "bf16"
    )
    export_dtype = args.checkpoint.export_dtype
    if uses_deepspeed and args.model.training_type == "sft" and export_dtype is None:
        export_dtype = "fp32" if precision == "no" else precision
    args = replace(
        args,
        model=replace(args.model, learned_positions=args.model.learned_positions or spec.learned_positions),
        data=replace(args.data, fps=args.data.fps or spec.fps),
        training=replace(args.training, mixed_precision=precision),
        lora=replace(args.lora, lora_alpha=args.lora.alpha),
        system=replace(args.system, num_workers=num_workers),
        checkpoint=replace(args.checkpoint, export_dtype=export_dtype),
        validation=replace(args.validation, gen_fps=args.validation.gen_fps or spec.fps),
    )
    if args.memory.autocast is None:
        args = replace(args, memory=replace(args.memory, autocast=needs_autocast(args, uses_deepspeed)))
    return args


def choose_compilation(report: CheckReport, args: Args, uses_deepspeed: bool) -> Args:
    """Fills in the default of `--compile_blocks`. Trying the compiler takes seconds."""
    compiles = args.memory.compile_blocks
    if compiles is None:
        compiles = torch.cuda.is_available() and not uses_deepspeed and not args.data.precompute_only
        if compiles and (error := compile_error()):
            compiles = False
            report.notes.append(f"torch.compile does not work on this machine ({error}), so blocks are not compiled.")
    return replace(args, memory=replace(args.memory, compile_blocks=compiles))


def check_output(report: CheckReport, args: Args) -> Args:
    """Checks the trackers, the output folder and the hub. Returns the arguments with the whole name on the hub."""
    report.errors += tracker_errors(args.output.report_to)
    report.run(check_writable, args.output.output_dir, "--output_dir")
    if args.output.push_to_hub is None or args.data.precompute_only:
        return args
    name = args.output.push_to_hub or args.output.output_dir.resolve().name
    return replace(args, output=replace(args.output, push_to_hub=report.run(check_hub, name) or name))


def choose_resume(report: CheckReport, args: Args) -> Path | None:
    """Returns the checkpoint to resume from, or None for a new run."""
    errors_before = len(report.errors)
    resume_from = report.run(choose_checkpoint, args)
    is_new = resume_from is None and len(report.errors) == errors_before
    if is_new and args.checkpoint.resume_from_checkpoint == "latest":
        report.notes.append(
            f"--resume_from_checkpoint latest: {args.output.output_dir} has no checkpoint; starting new."
        )
    return resume_from


def check_initial_lora(report: CheckReport, args: Args, model: BaseModel, resume_from: Path | None) -> None:
    """Checks the LoRA that a new run starts from. A checkpoint to resume from replaces it."""
    if args.lora.init_lora is None or args.model.training_type != "lora":
        return
    if resume_from is None:
        report.notes += report.run(check_init_lora, args, model.spec) or []
    else:
        report.notes.append(f"--init_lora {args.lora.init_lora} is not read; the run resumes from {resume_from}.")


def fit_memory(report: CheckReport, context: RunContext, resume_from: Path | None) -> RunContext:
    """Chooses settings for `--vram_budget_gib`, or else checks that the run fits the free memory of the GPU.

    Both take seconds, so they wait until everything else on the command line is right.
    """
    if report.errors:
        return context
    machine = this_machine()
    if context.args.memory.vram_budget_gib is None:
        if machine.gpu_gib is not None:
            report.notes += report.run(run_in_subprocess, check_fits, context, machine) or []
        return context
    chosen = report.run(run_in_subprocess, fit_to_budget, context, machine, fixed_memory_options(resume_from))
    if chosen is None:
        return context
    args, note = chosen
    report.notes.append(note)
    return replace(context, args=args)


def check_resume(
    report: CheckReport, context: RunContext, model: BaseModel, resume_from: Path | None
) -> Progress | None:
    """Returns the progress at which the run starts; None if it cannot resume from the checkpoint."""
    folder, variant = model.folder / "transformer", context.args.model.variant
    start = Progress(
        base=loading.fingerprint(folder, variant=variant),
        base_by_meaning=loading.fingerprint(folder, by_meaning=True, variant=variant),
        objective=read_objective(model.folder),
        zero_stage=context.zero["zero_optimization"]["stage"] if context.zero else 0,
        num_processes=context.num_processes,
    )
    if resume_from is None:
        return start
    return report.run(read_progress, context.args, resume_from, start)


def read_samples(report: CheckReport, args: Args) -> tuple[list[Sample], list[Sample]]:
    """Reads the lines of the training and validation folders."""
    samples = report.run(read_training_samples, args.data, args.model.model_type) or []
    validation = report.run(read_validation_samples, args.data, args.validation, args.model.model_type) or []
    return samples, validation


def check_prompts(report: CheckReport, model: BaseModel, samples: list[Sample]) -> None:
    """Notes prompts of which the text encoder sees only a part."""
    prompts = [sample.prompt for sample in samples]
    report.notes += report.run(prompt_notes, model.folder, prompts, model.spec.max_text_seq_length) or []


def scan_samples(
    report: CheckReport,
    args: Args,
    samples: list[Sample],
    validation: list[Sample],
    cache_dirs: Mapping[DataFolder, Path],
) -> ScanResult:
    """Scans all clips. Unusable clips are errors in a dry run, and in any run that has no usable sample."""
    if report.errors and len(samples) > MAX_CLIPS_SCANNED_AFTER_ERRORS:
        raise UserError(report.errors)
    scan = scan_data(args.data, samples, validation, cache_dirs, lambda cache_dir: not args.output.dry_run)
    if (args.output.dry_run and not args.data.skip_bad_samples) or not scan.samples:
        report.errors += scan.unusable
    return scan


def check_cache(report: CheckReport, plan: RunPlan, missing: set[str]) -> RunPlan:
    """Checks that the missing cache entries can be written, and that they and a checkpoint fit the disk.

    Returns:
        The plan with a summary of the size of the cache.
    """
    for cache_dir in sorted({plan.cache.folder_of(name) for name in missing}):
        report.run(check_writable, cache_dir, "--cache_dir")
    sizes = plan_sizes(plan)
    report.run(check_disk_space, plan, missing, sizes.entries)
    return replace(plan, cache_summary=sizes.describe(missing))
