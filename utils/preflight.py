"""Every check that can fail before weights are read. All faults are collected and told together.

What was checked becomes the plan of the run.
"""

from __future__ import annotations

import netrc
import os
import tempfile
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

import torch

from dataset.excerpts import Cutting
from dataset.files import FileIndex
from dataset.manifest import Sample, Table, find_table, read_manifest
from dataset.survey import Found, examine
from utils import components
from utils.args import Args, DataArgs, ValidationArgs
from utils.budget import check_fits, fit_to_budget
from utils.checkpoint import Progress
from utils.errors import Findings, UserError
from utils.metrics import TRACKERS
from utils.model_form import ModelForm, read_form, text_encoder_config
from utils.plan import RunPlan, check_disk_space, find_cache_dir, make_plan, nearest_existing
from utils.resume import choose_checkpoint, dictated_memory, read_progress
from utils.trainable import compile_fault, unfit_targets, weight_dtype
from utils.zero_config import find_template, resolve_template

# So many clips that other mistakes are told before they are looked at.
MANY_CLIPS = 1000


def preflight(args: Args, num_processes: int) -> RunPlan:
    """Checks everything; reads configs, line files, the headers of weights and the first frame of each clip.


    Raises:
        UserError: with every fault found.
    """
    out_of_range = list(args.faults())
    found = Findings(list(out_of_range))
    model_dir = found.of(components.resolve_model_dir, args.model.model_path)
    form = found.of(read_form, model_dir) if model_dir is not None else None
    resume_from = progress = zero = None
    template = found.of(find_template)
    if form is not None and model_dir is not None:
        args = resolve(args, form, template is not None)
        if template is not None:
            zero = found.of(resolve_template, template, args, form.width, num_processes)
        found.faults += model_faults(args, form, template is not None, num_processes)
        found.faults += machine_faults(args, template is not None)
        found.notes += [note for size in args.data.train_resolution for note in form.frames_notes(size.frames)]
        resume_from = found.of(choose_checkpoint, args)
        if not found.faults:
            text_encoder = text_encoder_config(model_dir)
            if args.memory.vram_budget_gib is not None:
                dictated = dictated_memory(resume_from)
                fitted = found.of(fit_to_budget, args, form, text_encoder, zero, num_processes, dictated)
                args, note = fitted or (args, "")
                found.notes.append(note)
            else:
                found.notes += found.of(check_fits, args, form, text_encoder, zero, num_processes) or []
        progress = Progress(
            base=components.identity(model_dir / "transformer"),
            zero_stage=zero["zero_optimization"]["stage"] if zero else 0,
            num_processes=num_processes,
        )
        if resume_from is not None and (template is None) == (zero is None):
            progress = found.of(read_progress, args, resume_from, progress)
    found.faults += tracker_faults(args.output.report_to)
    found.of(check_writable, args.output.output_dir, "--output_dir")
    if args.checkpoint.resume_from_checkpoint == "latest" and resume_from is None:
        found.notes.append(
            f"--resume_from_checkpoint latest: {args.output.output_dir} has no checkpoint; starting anew."
        )

    samples = found.of(read_training_samples, args.data, args.model.model_type) or []
    validation = found.of(read_validation_samples, args.data, args.validation, args.model.model_type) or []
    if form is not None:
        found.notes += found.of(prompt_notes, model_dir, samples + validation, form.max_text_seq_length) or []
    plan = None
    if form is not None and samples and not out_of_range:
        cache_dir = find_cache_dir(args.data, samples)
        if found.faults and len(samples) > MANY_CLIPS:
            raise UserError(found.faults)  # not after an hour
        data = look_at_data(args.data, samples, validation, cache_dir, not args.output.dry_run)
        if (args.output.dry_run and not args.data.skip_bad_samples) or not data.samples:
            found.faults += data.bad
        if data.samples:
            plan = found.of(
                make_plan,
                args,
                model_dir,
                form,
                data,
                cache_dir,
                resume_from,
                progress,
                num_processes,
                zero,
                found.notes,
            )
    if plan is not None and (lacking := plan.lacking_entries()):
        found.of(check_writable, plan.cache_dir, "--cache_dir")
        found.of(check_disk_space, plan, lacking)
    if found.faults:
        raise UserError(found.faults)
    assert plan is not None
    return plan


def resolve(args: Args, form: ModelForm, is_zero: bool = False) -> Args:
    """Fills in the defaults that depend on the model or the machine."""
    precision: Literal["no", "fp16", "bf16"] = args.training.mixed_precision or (
        "fp16" if form.trained_in_fp16 and torch.cuda.is_available() else "bf16"
    )
    export_dtype = args.checkpoint.export_dtype
    if is_zero and args.model.training_type == "sft" and export_dtype is None:
        export_dtype = "fp32" if precision == "no" else precision
    return replace(
        args,
        data=replace(args.data, fps=args.data.fps or form.fps),
        training=replace(args.training, mixed_precision=precision),
        lora=replace(args.lora, lora_alpha=args.lora.alpha),
        system=replace(args.system, num_workers=min(args.system.num_workers, len(os.sched_getaffinity(0)))),
        checkpoint=replace(args.checkpoint, export_dtype=export_dtype),
        validation=replace(args.validation, gen_fps=args.validation.gen_fps or form.fps),
    )


def model_faults(args: Args, form: ModelForm, is_zero: bool, num_processes: int) -> list[str]:
    """What does not go together between the command line and the model's configs."""
    faults = []
    if form.task != args.model.model_type:
        faults.append(
            f"--model_type {args.model.model_type}: {args.model.model_path} is a {form.task} checkpoint "
            f"({form.transformer['in_channels']} input channels); use --model_type {form.task} or another --model_path."
        )
    precision = args.training.mixed_precision
    if precision == "fp16" and not form.trained_in_fp16:
        faults.append(
            "--mixed_precision fp16: this checkpoint overflows in fp16 (only CogVideoX-2b was trained in it); use bf16."
        )
    if args.checkpoint.export_dtype is not None and not (is_zero and args.model.training_type == "sft"):
        faults.append(
            "--export_dtype is for full fine-tuning under DeepSpeed. Adapters are float32, and the transformer/ of DDP "
            "is as it was trained, since resuming reads it; python -m utils.export makes a copy in another dtype."
        )
    if args.memory.quantize_base != "none" and is_zero:
        faults.append("--quantize_base is for DDP; DeepSpeed would cast the codes.")
    if args.memory.offload_optimizer and (is_zero or num_processes > 1):
        faults.append(
            "--offload_optimizer is for one GPU without DeepSpeed; on several, ZERO=zero2_offload and the "
            "train_zero_*.sh scripts divide what is offloaded."
        )
    memory = args.memory
    if memory.quantize_optimizer != "none" and is_zero:
        faults.append("--quantize_optimizer is for DDP; DeepSpeed has an optimizer of its own.")
    if memory.compile_blocks and is_zero:
        faults.append("--compile_blocks is for DDP; ZeRO-3 gathers the weights layer by layer within a block.")
    if memory.release_gradients and num_processes > 1:
        faults.append("--release_gradients is for one GPU; several have to average their gradients first.")
    if memory.release_gradients and precision == "fp16":
        faults.append(
            "--release_gradients: in fp16 an update is given up where a gradient overflows, which is seen too late; "
            "use --mixed_precision bf16."
        )
    if not memory.autocast and precision != "no" and weight_dtype(args, is_zero) == torch.float32:
        faults.append(
            "--autocast false needs weights in half precision; for sft that is --quantize_optimizer 8bit or "
            "--offload_optimizer true."
        )
    for resolution in args.data.train_resolution:
        faults += form.resolution_faults(resolution, "--train_resolution")
    if args.model.training_type == "lora":
        for target in unfit_targets(form.transformer, args.lora.target_modules):
            faults.append(
                f"--target_modules {target}: it must name linear layers of the transformer and no others; try to_q."
            )
    return faults


def machine_faults(args: Args, is_zero: bool) -> list[str]:
    """What this machine lacks for the command line."""
    precision, kernel, has_gpu = args.training.mixed_precision, args.memory.attention_kernel, torch.cuda.is_available()
    faults = []
    if precision == "fp16" and not (has_gpu or (is_zero and deepspeed_has_fp16())):
        faults.append("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no.")
    if precision == "bf16" and has_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        faults.append("--mixed_precision bf16: this GPU has no bf16; use no, or fp16 with CogVideoX-2b.")
    if kernel in ("cudnn", "efficient") and not has_gpu:
        faults.append(f"--attention_kernel {kernel} needs a GPU; on a CPU use auto, flash or math.")
    if kernel in ("flash", "cudnn") and has_gpu and precision == "no":
        faults.append(f"--attention_kernel {kernel} computes in half precision; use auto, efficient or math.")
    if args.memory.compile_blocks and (fault := compile_fault()):
        faults.append(f"--compile_blocks: torch.compile does not work on this machine ({fault}).")
    return faults


def deepspeed_has_fp16() -> bool:
    """Whether DeepSpeed computes in fp16 on this machine; it does on CPUs that have instructions for it."""
    from deepspeed.accelerator import get_accelerator  # two seconds to import

    return bool(get_accelerator().is_fp16_supported())


def tracker_faults(report_to: str) -> list[str]:
    missing = [package for package in TRACKERS[report_to] if find_spec(package) is None]
    if not missing and "wandb" in TRACKERS[report_to] and not _wandb_can_log():
        return [f"--report_to {report_to}: W&B is not logged in; run `wandb login`, or set WANDB_MODE=offline."]
    return [f"--report_to {report_to} needs the package {package}: pip install {package}." for package in missing]


def _wandb_can_log() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    try:
        host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def check_writable(wanted: Path, flag: str) -> None:
    """Raises UserError where nothing can be written to a folder that need not exist yet. Leaves no trace."""
    try:
        folder = nearest_existing(wanted)
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file")
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{flag} {wanted} cannot be written to ({error}).") from error


def prompt_notes(model_dir: Path, samples: list[Sample], max_length: int) -> list[str]:
    """Says how many prompts are cut. Raises UserError where the tokenizer cannot be read."""
    try:
        tokenizer = components.load_tokenizer(model_dir)
    except Exception as error:
        raise UserError(f"--model_path: {model_dir / 'tokenizer'} cannot be read ({error}).") from error
    # a token has a byte at least
    long = sorted({sample.prompt for sample in samples if len(sample.prompt.encode()) >= max_length})
    cut: list[str] = []
    for start in range(0, len(long), 100):  # all at once they would take more memory than the whole dataset
        some = long[start : start + 100]
        tokens = tokenizer(some).input_ids
        cut += [text for text, ids in zip(some, tokens, strict=True) if len(ids) > max_length]
    if not cut:
        return []
    return [f"{len(cut)} distinct prompts are longer than {max_length} tokens and are cut: {cut[0][:60]!r}..."]


def look_at_data(
    data: DataArgs,
    samples: list[Sample],
    validation: list[Sample],
    cache_dir: Path,
    saves: bool,
) -> Found:
    """Args as of `survey`; `data` with the rate at which clips are sampled."""
    assert data.fps is not None
    how = Cutting(data.train_resolution, data.fps, data.resize_mode, data.clips_per_video, data.pad_short_clips)
    workers = len(os.sched_getaffinity(0))  # the other processes of the run wait meanwhile
    return examine(samples, validation, FileIndex(cache_dir), how, workers, data.clip_timeout, saves)


def read_training_samples(data: DataArgs, task: str) -> list[Sample]:
    table = find_table(data.data_root, data.caption_column, data.metadata)
    if table is not None and data.image_column is not None:
        raise UserError(f"--image_column {data.image_column}: the table {table} has a column for images, 'image'.")
    if table is not None:
        optional = ("image",) if task == "i2v" else ()
        return read_manifest(data.data_root, table=Table(table, optional=optional), id_token=data.id_token)
    return read_manifest(data.data_root, data.caption_column, data.video_column, data.image_column, data.id_token)


def read_validation_samples(data: DataArgs, options: ValidationArgs, task: str) -> list[Sample]:
    """The validation folder; its clips are optional and, where there are any, give the held-out loss."""
    root = options.validation_dir
    if not options.do_validation or root is None:
        return []
    read = partial(read_manifest, root, id_token=data.id_token, flag="--validation_dir")
    table = find_table(root, options.validation_prompts, None)
    if table is not None:
        samples = read(table=Table(table, ("prompt",), ("video", "image") if task == "i2v" else ("video",)))
    else:
        videos = data.video_column if (root / data.video_column).exists() or not root.is_dir() else None
        samples = read(options.validation_prompts, videos, options.validation_images)
    if task == "i2v" and not all(sample.video or sample.image for sample in samples):
        raise UserError(
            f"--validation_dir {root}: image-to-video needs an image a prompt; give --validation_images, or a "
            f"{data.video_column} whose clips' first frames serve."
        )
    return samples
