"""Every check that can fail before weights are read. All faults are collected and told together.

What is found on the way (the form of the model, the samples, the names of their cache entries) is the plan of the run.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch

from dataset.latent_cache import Encoding, LatentCache, SampleKeys
from dataset.manifest import Sample, read_manifest
from dataset.survey import Survey, survey
from utils import components
from utils.args import Args
from utils.checkpoint import choose_checkpoint
from utils.encoders import IMAGE_NOISE_DRAWS
from utils.errors import UserError
from utils.model_form import ModelForm, read_form
from utils.schedule import total_updates
from utils.trainable import unknown_targets

Found = TypeVar("Found")


@dataclass(frozen=True)
class RunPlan:
    """A run that nothing speaks against, with everything resolved.

    Attributes:
        args: with every default that depends on the model filled in.
        keys, validation_keys: the cache entries of `samples` and `validation`, in their order.
        prompts: entry name -> text, of every prompt of the run, the empty one included.
        resume_from: the checkpoint to go on from.
        notes: what the user should know though it stops nothing.
    """

    args: Args
    model_dir: Path
    form: ModelForm
    samples: list[Sample]
    survey: Survey
    keys: list[SampleKeys]
    validation: list[Sample]
    validation_keys: list[SampleKeys]
    prompts: dict[str, str]
    empty_prompt: str
    cache_dir: Path
    resume_from: Path | None
    total_steps: int
    notes: list[str]

    @property
    def compute_dtype(self) -> torch.dtype:
        return components.DTYPES[self.args.training.mixed_precision]


@dataclass
class _Findings:
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def of(self, check: Callable[..., Found], *args: Any, **kwargs: Any) -> Found | None:
        """The result of a check, or None with its faults added."""
        try:
            return check(*args, **kwargs)
        except UserError as error:
            self.faults.extend(error.faults)
            return None


def preflight(args: Args, num_processes: int) -> RunPlan:
    """Checks everything; reads configs, line files and the clips' headers, but no weights.

    Raises:
        UserError: with every fault found.
    """
    found = _Findings()
    model_dir = found.of(components.resolve_model_dir, args.model.model_path)
    form = found.of(read_form, model_dir) if model_dir is not None else None
    if form is not None:
        args = resolve(args, form)
        found.faults += model_faults(args, form)
    found.faults += tracker_faults(args.output.report_to)
    found.of(check_writable, args.output.output_dir)
    resume_from = found.of(choose_checkpoint, args)
    if args.checkpoint.resume_from_checkpoint == "latest" and resume_from is None:
        found.notes.append(
            f"--resume_from_checkpoint latest: no checkpoint in {args.output.output_dir} yet; starting anew."
        )

    samples = found.of(read_training_samples, args) or []
    validation = found.of(read_validation_samples, args) or []
    fps = args.data.fps or 8.0  # the default is the model's own; without a model anything serves to look for faults
    data = args.data
    surveys = [survey(part, data.train_resolution, fps, data.resize_mode) for part in (samples, validation)]
    found.faults += [fault for one in surveys for fault in one.faults]
    found.notes += surveys[0].notes
    if found.faults:
        raise UserError(found.faults)

    encoding = Encoding(
        args.data.train_resolution,
        fps,
        args.data.resize_mode,
        vae=components.identity(model_dir / "vae", tiling=args.system.enable_tiling),
        text_encoder=components.identity(
            model_dir / "text_encoder",
            tokenizer=components.identity(model_dir / "tokenizer"),
            length=form.max_text_seq_length,
        ),
        with_images=form.task == "i2v",
    )
    cache_dir = args.data.cache_dir or common_folder(samples) / "latent"
    plan = RunPlan(
        args=replace(args, data=replace(args.data, cache_dir=cache_dir)),
        model_dir=model_dir,
        form=form,
        samples=samples,
        survey=surveys[0],
        keys=encoding.sample_keys(samples),
        validation=validation,
        validation_keys=encoding.sample_keys(validation),
        prompts={encoding.prompt_key(text): text for text in ["", *(s.prompt for s in samples + validation)]},
        empty_prompt=encoding.prompt_key(""),
        cache_dir=cache_dir,
        resume_from=resume_from,
        total_steps=total_updates(
            args.training.train_steps,
            args.training.train_epochs,
            len(samples),
            args.training.batch_size * args.training.gradient_accumulation_steps * num_processes,
        ),
        notes=found.notes,
    )
    check_disk_space(plan)
    return plan


def resolve(args: Args, form: ModelForm) -> Args:
    """Fills in the defaults that depend on the model or the machine."""
    precision = "fp16" if form.trained_in_fp16 and torch.cuda.is_available() else "bf16"
    return replace(
        args,
        data=replace(args.data, fps=args.data.fps or form.fps),
        training=replace(args.training, mixed_precision=args.training.mixed_precision or precision),
        lora=replace(args.lora, lora_alpha=args.lora.alpha),
        validation=replace(args.validation, gen_fps=args.validation.gen_fps or form.fps),
    )


def model_faults(args: Args, form: ModelForm) -> list[str]:
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
    elif precision == "fp16" and not torch.cuda.is_available():
        faults.append("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no.")
    if (
        precision == "bf16"
        and torch.cuda.is_available()
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        faults.append("--mixed_precision bf16: this GPU has no bf16; use no, or fp16 with CogVideoX-2b.")
    faults += form.resolution_faults(args.data.train_resolution, "--train_resolution")
    if args.model.training_type == "lora":
        for target in unknown_targets(form.transformer, args.lora.target_modules):
            faults.append(f"--target_modules {target}: the transformer has no linear layer of this name; try to_q.")
    return faults


def tracker_faults(report_to: str) -> list[str]:
    packages = {"tensorboard": ["tensorboard"], "wandb": ["wandb"], "all": ["tensorboard", "wandb"], "none": []}
    return [
        f"--report_to {report_to} needs the package {package}: pip install {package}."
        for package in packages[report_to]
        if find_spec(package) is None
    ]


def check_writable(output_dir: Path) -> None:
    """Raises UserError where nothing can be written to --output_dir. Leaves no trace."""
    parent = output_dir
    while not parent.exists():
        parent = parent.parent
    try:
        if not parent.is_dir():
            raise NotADirectoryError(f"{parent} is a file")
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written to ({error}).") from error


def read_training_samples(args: Args) -> list[Sample]:
    data = args.data
    return read_manifest(data.data_root, data.caption_column, data.video_column, data.image_column, data.id_token)


def read_validation_samples(args: Args) -> list[Sample]:
    """The validation folder; its clips are optional and, where there are any, give the held-out loss."""
    options = args.validation
    if not options.do_validation:
        return []
    videos = args.data.video_column
    if options.validation_dir.is_dir() and not (options.validation_dir / videos).exists():
        videos = None
    samples = read_manifest(
        options.validation_dir,
        options.validation_prompts,
        videos,
        options.validation_images,
        args.data.id_token,
        "--validation_dir",
    )
    if args.model.model_type == "i2v" and videos is None and options.validation_images is None:
        raise UserError(
            f"--validation_dir {options.validation_dir}: image-to-video needs an image a prompt; give "
            f"--validation_images, or a {args.data.video_column} whose clips' first frames serve."
        )
    return samples


def common_folder(samples: list[Sample]) -> Path:
    """The folder that holds the clips."""
    return Path(os.path.commonpath([sample.video.parent for sample in samples]))


def check_disk_space(plan: RunPlan) -> None:
    """Raises UserError where the entries that the cache lacks will not fit on its disk."""
    frames, height, width = plan.form.latent_size(plan.args.data.train_resolution)
    moments = 2 * plan.form.latent_channels * height * width * 4  # float32 at most
    sizes = {"video": moments * frames, "image": moments * IMAGE_NOISE_DRAWS}
    cache = LatentCache(plan.cache_dir)
    names = {name for keys in plan.keys + plan.validation_keys for name in (keys.video, keys.image) if name}
    needed = sum(sizes[name.partition("-")[0]] for name in names if not cache.path(name).exists())
    parent = plan.cache_dir
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(
            f"{plan.cache_dir}: the latent cache needs {needed / 2**30:.1f} GiB more, but {free / 2**30:.1f} GiB are "
            "free; make room or give another --cache_dir."
        )


def describe(plan: RunPlan, num_processes: int) -> str:
    """The plan of a run in a few lines, for the log and for --dry_run."""
    args, form = plan.args, plan.form
    resolution = args.data.train_resolution
    video_tokens, text_tokens = form.tokens(resolution)
    per_update = args.training.batch_size * args.training.gradient_accumulation_steps * num_processes
    lines = [
        f"Model: {form.task}, CogVideoX{'1.5' if form.is_v1_5 else ' 1.0'}, {form.positions} positions, "
        f"{plan.model_dir}",
        f"Training: {args.model.training_type}, {args.training.mixed_precision}, {plan.total_steps} steps of "
        f"{per_update} samples ({args.training.batch_size} x {args.training.gradient_accumulation_steps} accumulation "
        f"x {num_processes} processes), {plan.total_steps * per_update / len(plan.samples):.1f} epochs",
        f"Sample: {resolution}, {video_tokens} video and {text_tokens} text tokens",
        f"Dataset: {len(plan.samples)} samples, {len({sample.prompt for sample in plan.samples})} distinct prompts; "
        + plan.survey.summary(resolution, args.data.fps),
        f"Validation: {len(plan.validation)} prompts" if plan.validation else "Validation: off",
        f"Latent cache: {plan.cache_dir}",
    ]
    if plan.resume_from:
        lines.append(f"Resuming from {plan.resume_from}")
    return "\n".join(lines + [f"Note: {note}" for note in plan.notes])
