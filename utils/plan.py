"""A run that nothing speaks against: everything resolved, every cache entry named."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from dataset.excerpts import Excerpt
from dataset.latent_cache import Encoding, LatentCache, SampleKeys
from dataset.manifest import Sample
from dataset.survey import Found, summary
from dataset.video import SPREAD
from utils import components
from utils.args import Args, DataArgs
from utils.checkpoint import Progress
from utils.encoders import IMAGE_NOISE, IMAGE_NOISE_DRAWS
from utils.errors import UserError
from utils.model_form import ModelForm
from utils.schedule import total_updates

# Lines of the data that cannot be used, shown at the start; all of them are listed in the end.
MOST_LISTED = 5


@dataclass(frozen=True)
class RunPlan:
    """What preflight found and every later part of the run goes by.

    Attributes:
        args: with every default that depends on the model filled in.
        bad: a sentence for each line of the data folders that cannot be used.
        clips: what the clips are and what is taken of them, for the log.
        keys, validation_keys: the cache entries of `samples` and `validation`, in their order.
        prompts: entry name -> text, of every prompt of the run, the empty one included.
        resume_from, progress: the checkpoint to go on from, and how far the run has come.
        zero: the configuration of DeepSpeed; None for DDP.
        notes: what the user should know though it stops nothing.
    """

    args: Args
    model_dir: Path
    form: ModelForm
    samples: list[Excerpt]
    bad: list[str]
    clips: list[str]
    keys: list[SampleKeys]
    validation: list[Excerpt]
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
        clips = (name for keys in self.keys + self.validation_keys for name in keys.video + keys.image)
        cache = LatentCache(self.cache_dir)
        return {name for name in chain(clips, self.prompts) if not cache.has(name)}

    def without(self, unusable: dict[str, str]) -> RunPlan:
        """The same run without the samples that need a cache entry that could not be made; they are `bad` now.

        Args:
            unusable: entry -> what is wrong.
        """
        bad = list(self.bad)

        def kept(excerpts: list[Excerpt], keys: list[SampleKeys]) -> tuple[list[Excerpt], list[SampleKeys]]:
            pairs = []
            for excerpt, names in zip(excerpts, keys, strict=True):
                faults = [unusable[name] for name in (*names.video, *names.image, names.prompt) if name in unusable]
                bad.extend(f"{excerpt} {fault}." for fault in dict.fromkeys(faults))
                if not faults:
                    pairs.append((excerpt, names))
            return [excerpt for excerpt, _ in pairs], [names for _, names in pairs]

        samples, keys = kept(self.samples, self.keys)
        held_out, held_out_keys = kept(self.validation, self.validation_keys)
        return replace(self, bad=bad, samples=samples, keys=keys, validation=held_out, validation_keys=held_out_keys)

    @property
    def data_digest(self) -> str:
        """Changes with anything that changes the order or the content of the samples."""
        digest = hashlib.blake2b(f"{self.args.training.seed} {self.samples_per_step}".encode(), digest_size=16)
        for excerpt, names in zip(self.samples, self.keys, strict=True):
            digest.update(f"{excerpt.resolution} {names}".encode())
        return digest.hexdigest()

    @property
    def gen_fps(self) -> float:
        """Frames a second of validation videos."""
        return self.args.validation.gen_fps or self.form.fps


def make_plan(
    args: Args,
    model_dir: Path,
    form: ModelForm,
    found: Found,
    cache_dir: Path,
    resume_from: Path | None,
    progress: Progress,
    num_processes: int,
    zero: dict[str, Any] | None,
    notes: list[str],
) -> RunPlan:
    """Names the cache entries of a run that has been checked."""
    encoding = encoding_of(model_dir, form, args.system.enable_tiling)
    training = args.training
    keys = encoding.keys(found.samples, found.facts, args.data.flip)
    validation_keys = encoding.keys(found.validation, found.facts)
    prompts = {encoding.prompt_key(""): ""}
    for excerpt, names in zip(found.samples + found.validation, keys + validation_keys, strict=True):
        prompts[names.prompt] = excerpt.sample.prompt
    return RunPlan(
        args=replace(args, data=replace(args.data, cache_dir=cache_dir)),
        model_dir=model_dir,
        form=form,
        samples=found.samples,
        bad=found.bad,
        clips=summary(found.samples, found.facts, args.data.resize_mode, args.data.fps or form.fps),
        keys=keys,
        validation=found.validation,
        validation_keys=validation_keys,
        prompts=prompts,
        empty_prompt=encoding.prompt_key(""),
        cache_dir=cache_dir,
        resume_from=resume_from,
        progress=progress,
        samples_per_step=training.batch_size * training.gradient_accumulation_steps * num_processes,
        num_processes=num_processes,
        zero=zero,
        notes=notes,
    )


def encoding_of(model_dir: Path, form: ModelForm, tiling: bool) -> Encoding:
    return Encoding(
        vae=components.identity(model_dir / "vae", tiling=tiling),
        text_encoder=components.identity(
            model_dir / "text_encoder",
            tokenizer=components.identity(model_dir / "tokenizer"),
            length=form.max_text_seq_length,
        ),
        image_noise=IMAGE_NOISE if form.task == "i2v" else None,
    )


def find_cache_dir(data: DataArgs, samples: list[Sample]) -> Path:
    return data.cache_dir or common_folder(samples, data.data_root) / "latent"


def common_folder(samples: list[Sample], root: Path) -> Path:
    """The folder that holds the clips; the data folder where they lie scattered outside of it."""
    folders = {Path(folder).absolute() for folder in {os.path.dirname(sample.clip) for sample in samples}}  # noqa: PTH120
    common = Path(os.path.commonpath(folders))
    return common if len(folders) == 1 or common.is_relative_to(root.absolute()) else root


def nearest_existing(path: Path) -> Path:
    """The path, or the closest folder above it that is there."""
    while not path.exists():
        path = path.parent
    return path


def check_disk_space(plan: RunPlan, lacking: set[str]) -> None:
    """Raises UserError where the entries that the cache lacks will not fit on its disk."""
    prompt_size = plan.form.max_text_seq_length * plan.form.transformer["text_embed_dim"]
    sizes = dict.fromkeys(plan.prompts, prompt_size)
    for excerpt, keys in zip(plan.samples + plan.validation, plan.keys + plan.validation_keys, strict=True):
        frames, height, width = plan.form.latent_size(excerpt.resolution)
        moments = 2 * plan.form.latent_channels * height * width
        sizes |= dict.fromkeys(keys.video, moments * frames) | dict.fromkeys(keys.image, moments * IMAGE_NOISE_DRAWS)
    needed = 4 * sum(sizes[name] for name in lacking)  # float32 at most
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


def bucket_notes(plan: RunPlan) -> list[str]:
    """Buckets with so few samples that they will hardly fill an update."""
    epochs = plan.total_steps * plan.samples_per_step / len(plan.samples)
    counts = Counter(excerpt.resolution for excerpt in plan.samples)
    return [
        f"Note: {bucket} has {count} samples; an update takes {plan.samples_per_step} of one resolution, and the run "
        "ends before they fill one. Leave this resolution out, or make updates smaller."
        for bucket, count in counts.items()
        if count * epochs < plan.samples_per_step
    ] + [f"Note: no clip goes to {bucket}." for bucket in plan.args.data.train_resolution if bucket not in counts]


def describe(plan: RunPlan) -> str:
    """The plan of a run in a few lines, for the log and for --dry_run."""
    args, training, form = plan.args, plan.args.training, plan.form
    lines = [
        f"Model: {form.task}, CogVideoX{'1.5' if form.is_v1_5 else ' 1.0'}, {form.positions} positions, "
        f"{plan.model_dir}",
        f"Training: {args.model.training_type}, {training.mixed_precision}, {plan.total_steps} steps of "
        f"{plan.samples_per_step} samples ({training.batch_size} x {training.gradient_accumulation_steps} accumulation "
        f"x {plan.num_processes} processes), {plan.total_steps * plan.samples_per_step / len(plan.samples):.1f} epochs",
        f"Strategy: {strategy(plan.zero)}",
        f"Dataset: {len(plan.samples)} samples, {len({excerpt.sample.prompt for excerpt in plan.samples})} distinct "
        f"prompts, frames by time at {args.data.fps} fps"
        if args.data.fps != SPREAD
        else f"Dataset: {len(plan.samples)} samples, frames spread over each clip",
        *plan.clips,
    ]
    for resolution in args.data.train_resolution:
        video_tokens, text_tokens = form.tokens(resolution)
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
