"""A run that nothing speaks against: everything resolved, every cache entry named."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from dataset.bucketing import ClipSample
from dataset.latent_cache import Encoding, LatentCache, SampleKeys
from dataset.scan import ScanResult, summarize
from utils.checkpoint.manager import Progress
from utils.common.errors import UserError
from utils.common.filesystem import nearest_existing
from utils.config.args import Args
from utils.model import loading
from utils.model.encoders import IMAGE_NOISE, IMAGE_NOISE_DRAWS
from utils.model.spec import ModelSpec
from utils.training.schedule import total_updates


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
    spec: ModelSpec
    samples: list[ClipSample]
    bad: list[str]
    clips: list[str]
    keys: list[SampleKeys]
    validation: list[ClipSample]
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

        def kept(clip_samples: list[ClipSample], keys: list[SampleKeys]) -> tuple[list[ClipSample], list[SampleKeys]]:
            pairs = []
            for clip_sample, names in zip(clip_samples, keys, strict=True):
                errors = [unusable[name] for name in (*names.video, *names.image, names.prompt) if name in unusable]
                bad.extend(f"{clip_sample} {fault}." for fault in dict.fromkeys(errors))
                if not errors:
                    pairs.append((clip_sample, names))
            return [clip_sample for clip_sample, _ in pairs], [names for _, names in pairs]

        samples, keys = kept(self.samples, self.keys)
        held_out, held_out_keys = kept(self.validation, self.validation_keys)
        return replace(self, bad=bad, samples=samples, keys=keys, validation=held_out, validation_keys=held_out_keys)

    @property
    def data_digest(self) -> str:
        """Changes with anything that changes the order or the content of the samples."""
        digest = hashlib.blake2b(f"{self.args.training.seed} {self.samples_per_step}".encode(), digest_size=16)
        for clip_sample, names in zip(self.samples, self.keys, strict=True):
            digest.update(f"{clip_sample.resolution} {names}".encode())
        return digest.hexdigest()

    @property
    def gen_fps(self) -> float:
        """Frames a second of validation videos."""
        return self.args.validation.gen_fps or self.spec.fps


def make_plan(
    args: Args,
    model_dir: Path,
    spec: ModelSpec,
    report: ScanResult,
    cache_dir: Path,
    resume_from: Path | None,
    progress: Progress,
    num_processes: int,
    zero: dict[str, Any] | None,
    notes: list[str],
) -> RunPlan:
    """Names the cache entries of a run that has been checked."""
    encoding = encoding_of(model_dir, spec, args.system.enable_tiling)
    training = args.training
    keys = encoding.keys(report.samples, report.facts, args.data.flip)
    validation_keys = encoding.keys(report.validation, report.facts)
    prompts = {encoding.prompt_key(""): ""}
    for clip_sample, names in zip(report.samples + report.validation, keys + validation_keys, strict=True):
        prompts[names.prompt] = clip_sample.sample.prompt
    return RunPlan(
        args=replace(args, data=replace(args.data, cache_dir=cache_dir)),
        model_dir=model_dir,
        spec=spec,
        samples=report.samples,
        bad=report.bad,
        clips=summarize(report.samples, report.facts, args.data.resize_mode, args.data.fps or spec.fps),
        keys=keys,
        validation=report.validation,
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


def encoding_of(model_dir: Path, spec: ModelSpec, tiling: bool) -> Encoding:
    return Encoding(
        vae=loading.fingerprint(model_dir / "vae", tiling=tiling),
        text_encoder=loading.fingerprint(
            model_dir / "text_encoder",
            tokenizer=loading.fingerprint(model_dir / "tokenizer"),
            length=spec.max_text_seq_length,
        ),
        image_noise=IMAGE_NOISE if spec.task == "i2v" else None,
    )


def check_disk_space(plan: RunPlan, lacking: set[str]) -> None:
    """Raises UserError where the entries that the cache lacks will not fit on its disk."""
    prompt_size = plan.spec.max_text_seq_length * plan.spec.transformer["text_embed_dim"]
    sizes = dict.fromkeys(plan.prompts, prompt_size)
    for clip_sample, keys in zip(plan.samples + plan.validation, plan.keys + plan.validation_keys, strict=True):
        frames, height, width = plan.spec.latent_size(clip_sample.resolution)
        moments = 2 * plan.spec.latent_channels * height * width
        sizes |= dict.fromkeys(keys.video, moments * frames) | dict.fromkeys(keys.image, moments * IMAGE_NOISE_DRAWS)
    needed = 4 * sum(sizes[name] for name in lacking)  # float32 at most
    free = shutil.disk_usage(nearest_existing(plan.cache_dir)).free
    if needed > free:
        raise UserError(
            f"{plan.cache_dir}: the latent cache needs {needed / 2**30:.1f} GiB more, but {free / 2**30:.1f} GiB are "
            "free; make room or give another --cache_dir."
        )
