"""Every check that can fail before weights are read. All errors are collected and told together.

What was checked becomes the plan of the run.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Literal

import torch

from utils.checkpoint.manager import Progress
from utils.checkpoint.resume import choose_checkpoint, dictated_memory, read_progress
from utils.common.errors import CheckReport, UserError
from utils.common.filesystem import check_writable
from utils.config.args import Args
from utils.config.deepspeed_config import find_template, resolve_template
from utils.estimate.settings_search import check_fits, fit_to_budget
from utils.model import loading
from utils.model.spec import ModelSpec, read_spec, text_encoder_config
from utils.run.checks import machine_errors, model_errors, prompt_notes, tracker_errors
from utils.run.data import find_cache_dir, read_training_samples, read_validation_samples, scan_data
from utils.run.plan import RunPlan, check_disk_space, make_plan

# So many clips that other mistakes are told before they are looked at.
MANY_CLIPS = 1000


def preflight(args: Args, num_processes: int) -> RunPlan:
    """Checks everything; reads configs, line files, the headers of weights and the first frame of each clip.


    Raises:
        UserError: with every fault found.
    """
    out_of_range = list(args.errors())
    report = CheckReport(list(out_of_range))
    model_dir = report.run(loading.resolve_model_dir, args.model.model_path)
    spec = report.run(read_spec, model_dir) if model_dir is not None else None
    resume_from = progress = zero = None
    template = report.run(find_template)
    if spec is not None and model_dir is not None:
        args = resolve(args, spec, template is not None)
        if template is not None:
            zero = report.run(resolve_template, template, args, spec.width, num_processes)
        report.errors += model_errors(args, spec, template is not None, num_processes)
        report.errors += machine_errors(args, template is not None)
        report.notes += [note for size in args.data.train_resolution for note in spec.frames_notes(size.frames)]
        resume_from = report.run(choose_checkpoint, args)
        if not report.errors:
            text_encoder = text_encoder_config(model_dir)
            if args.memory.vram_budget_gib is not None:
                dictated = dictated_memory(resume_from)
                fitted = report.run(fit_to_budget, args, spec, text_encoder, zero, num_processes, dictated)
                args, note = fitted or (args, "")
                report.notes.append(note)
            else:
                report.notes += report.run(check_fits, args, spec, text_encoder, zero, num_processes) or []
        progress = Progress(
            base=loading.fingerprint(model_dir / "transformer"),
            zero_stage=zero["zero_optimization"]["stage"] if zero else 0,
            num_processes=num_processes,
        )
        if resume_from is not None and (template is None) == (zero is None):
            progress = report.run(read_progress, args, resume_from, progress)
    report.errors += tracker_errors(args.output.report_to)
    report.run(check_writable, args.output.output_dir, "--output_dir")
    if args.checkpoint.resume_from_checkpoint == "latest" and resume_from is None:
        report.notes.append(
            f"--resume_from_checkpoint latest: {args.output.output_dir} has no checkpoint; starting anew."
        )

    samples = report.run(read_training_samples, args.data, args.model.model_type) or []
    validation = report.run(read_validation_samples, args.data, args.validation, args.model.model_type) or []
    if spec is not None:
        report.notes += report.run(prompt_notes, model_dir, samples + validation, spec.max_text_seq_length) or []
    plan = None
    if spec is not None and samples and not out_of_range:
        cache_dir = find_cache_dir(args.data, samples)
        if report.errors and len(samples) > MANY_CLIPS:
            raise UserError(report.errors)  # not after an hour
        data = scan_data(args.data, samples, validation, cache_dir, not args.output.dry_run)
        if (args.output.dry_run and not args.data.skip_bad_samples) or not data.samples:
            report.errors += data.bad
        if data.samples:
            plan = report.run(
                make_plan,
                args,
                model_dir,
                spec,
                data,
                cache_dir,
                resume_from,
                progress,
                num_processes,
                zero,
                report.notes,
            )
    if plan is not None and (lacking := plan.lacking_entries()):
        report.run(check_writable, plan.cache_dir, "--cache_dir")
        report.run(check_disk_space, plan, lacking)
    if report.errors:
        raise UserError(report.errors)
    assert plan is not None
    return plan


def resolve(args: Args, spec: ModelSpec, uses_deepspeed: bool = False) -> Args:
    """Fills in the defaults that depend on the model or the machine."""
    precision: Literal["no", "fp16", "bf16"] = args.training.mixed_precision or (
        "fp16" if spec.trained_in_fp16 and torch.cuda.is_available() else "bf16"
    )
    export_dtype = args.checkpoint.export_dtype
    if uses_deepspeed and args.model.training_type == "sft" and export_dtype is None:
        export_dtype = "fp32" if precision == "no" else precision
    return replace(
        args,
        data=replace(args.data, fps=args.data.fps or spec.fps),
        training=replace(args.training, mixed_precision=precision),
        lora=replace(args.lora, lora_alpha=args.lora.alpha),
        system=replace(args.system, num_workers=min(args.system.num_workers, len(os.sched_getaffinity(0)))),
        checkpoint=replace(args.checkpoint, export_dtype=export_dtype),
        validation=replace(args.validation, gen_fps=args.validation.gen_fps or spec.fps),
    )
