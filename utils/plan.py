"""A run that nothing speaks against: everything resolved, every cache entry named."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataset.latent_cache import Encoding, LatentCache, SampleKeys
from dataset.manifest import Sample
from dataset.survey import Survey
from utils import components
from utils.args import Args
from utils.checkpoint import Progress
from utils.encoders import IMAGE_NOISE, IMAGE_NOISE_DRAWS
from utils.errors import UserError
from utils.model_form import ModelForm
from utils.schedule import total_updates


@dataclass(frozen=True)
class RunPlan:
    """What preflight found and every later part of the run goes by.

    Attributes:
        args: with every default that depends on the model filled in.
        keys, validation_keys: the cache entries of `samples` and `validation`, in their order.
        prompts: entry name -> text, of every prompt of the run, the empty one included.
        resume_from, progress: the checkpoint to go on from, and how far the run has come.
        zero: the configuration of DeepSpeed; None for DDP.
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
    progress: Progress
    samples_per_step: int
    num_processes: int
    zero: dict[str, Any] | None
    notes: list[str]

    @property
    def total_steps(self) -> int:
        training = self.args.training
        return total_updates(training.train_steps, training.train_epochs, len(self.samples), self.samples_per_step)

    def lacking_entries(self) -> set[str]:
        """Names of the cache entries that are not there yet."""
        clips = {name for keys in self.keys + self.validation_keys for name in (keys.video, keys.image) if name}
        cache = LatentCache(self.cache_dir)
        return {name for name in clips | self.prompts.keys() if not cache.path(name).exists()}

    @property
    def fps(self) -> float:
        """Frames a second at which clips are sampled."""
        return self.args.data.fps or self.form.fps

    @property
    def gen_fps(self) -> float:
        """Frames a second of validation videos."""
        return self.args.validation.gen_fps or self.form.fps


def make_plan(
    args: Args,
    model_dir: Path,
    form: ModelForm,
    samples: list[Sample],
    validation: list[Sample],
    found: Survey,
    resume_from: Path | None,
    progress: Progress,
    num_processes: int,
    zero: dict[str, Any] | None,
    notes: list[str],
) -> RunPlan:
    """Names the cache entries of a run that has been checked."""
    encoding = Encoding(
        args.data.train_resolution,
        args.data.fps or form.fps,
        args.data.resize_mode,
        vae=components.identity(model_dir / "vae", tiling=args.system.enable_tiling),
        text_encoder=components.identity(
            model_dir / "text_encoder",
            tokenizer=components.identity(model_dir / "tokenizer"),
            length=form.max_text_seq_length,
        ),
        image_noise=IMAGE_NOISE if form.task == "i2v" else None,
    )
    cache_dir = args.data.cache_dir or common_folder(samples, args.data.data_root) / "latent"
    training = args.training
    return RunPlan(
        args=replace(args, data=replace(args.data, cache_dir=cache_dir)),
        model_dir=model_dir,
        form=form,
        samples=samples,
        survey=found,
        keys=encoding.sample_keys(samples),
        validation=validation,
        validation_keys=encoding.sample_keys(validation),
        prompts={encoding.prompt_key(text): text for text in ["", *(s.prompt for s in samples + validation)]},
        empty_prompt=encoding.prompt_key(""),
        cache_dir=cache_dir,
        resume_from=resume_from,
        progress=progress,
        samples_per_step=training.batch_size * training.gradient_accumulation_steps * num_processes,
        num_processes=num_processes,
        zero=zero,
        notes=notes,
    )


def common_folder(samples: list[Sample], root: Path) -> Path:
    """The folder that holds the clips; the data folder where they lie scattered outside of it."""
    folders = {sample.clip.parent.absolute() for sample in samples}
    common = Path(os.path.commonpath(folders))
    return common if len(folders) == 1 or common.is_relative_to(root.absolute()) else root


def nearest_existing(path: Path) -> Path:
    """The path, or the closest folder above it that is there."""
    while not path.exists():
        path = path.parent
    return path


def check_disk_space(plan: RunPlan, lacking: set[str]) -> None:
    """Raises UserError where the entries that the cache lacks will not fit on its disk."""
    frames, height, width = plan.form.latent_size(plan.args.data.train_resolution)
    moments = 2 * plan.form.latent_channels * height * width * 4  # float32 at most
    sizes = {
        "video": moments * frames,
        "image": moments * IMAGE_NOISE_DRAWS,
        "prompt": plan.form.max_text_seq_length * plan.form.transformer["text_embed_dim"] * 4,
    }
    needed = sum(sizes[name.partition("-")[0]] for name in lacking)
    free = shutil.disk_usage(nearest_existing(plan.cache_dir)).free
    if needed > free:
        raise UserError(
            f"{plan.cache_dir}: the latent cache needs {needed / 2**30:.1f} GiB more, but {free / 2**30:.1f} GiB are "
            "free; make room or give another --cache_dir."
        )


def strategy(zero: dict[str, Any] | None) -> str:
    if zero is None:
        return "DDP"
    section = zero["zero_optimization"]
    offloaded = [name for name in ("optimizer", "param") if section.get(f"offload_{name}", {}).get("device") == "cpu"]
    return f"DeepSpeed ZeRO-{section['stage']}" + "".join(f", {name} offloaded" for name in offloaded)


def describe(plan: RunPlan) -> str:
    """The plan of a run in a few lines, for the log and for --dry_run."""
    args, training, form = plan.args, plan.args.training, plan.form
    resolution = args.data.train_resolution
    video_tokens, text_tokens = form.tokens(resolution)
    lines = [
        f"Model: {form.task}, CogVideoX{'1.5' if form.is_v1_5 else ' 1.0'}, {form.positions} positions, "
        f"{plan.model_dir}",
        f"Training: {args.model.training_type}, {training.mixed_precision}, {plan.total_steps} steps of "
        f"{plan.samples_per_step} samples ({training.batch_size} x {training.gradient_accumulation_steps} accumulation "
        f"x {plan.num_processes} processes), {plan.total_steps * plan.samples_per_step / len(plan.samples):.1f} epochs",
        f"Strategy: {strategy(plan.zero)}",
        f"Sample: {resolution}, {video_tokens} video and {text_tokens} text tokens",
        f"Dataset: {len(plan.samples)} samples, {len({sample.prompt for sample in plan.samples})} distinct prompts; "
        + plan.survey.summary(resolution, plan.fps),
        f"Validation: {len(plan.validation)} prompts" if plan.validation else "Validation: off",
        f"Latent cache: {plan.cache_dir}",
    ]
    if plan.resume_from:
        lines.append(f"Resuming from {plan.resume_from}, at step {plan.progress.step}")
    if training.lr_scheduler != "constant" and training.lr_warmup_steps >= plan.total_steps:
        lines.append(
            f"Note: the {plan.total_steps} steps end before --lr_warmup_steps {training.lr_warmup_steps} are over; "
            "the learning rate will not be reached."
        )
    return "\n".join(lines + [f"Note: {note}" for note in plan.notes])
