"""The plan of a run: resolved settings, samples and the names of their cache entries."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from dataset.bucketing import ClipSample
from dataset.latent_cache import EncoderSettings, LatentCache, SampleKeys
from dataset.scan import ScanResult, summarize
from utils.checkpoint.manager import Progress
from utils.config.args import Args
from utils.estimate.context import RunContext
from utils.model import loading
from utils.model.encoders import IMAGE_NOISE
from utils.model.spec import ModelSpec
from utils.training.schedule import total_updates


@dataclass(frozen=True)
class RunPlan:
    """The result of preflight, which every later part of the run reads.

    Attributes:
        context: resolved arguments, model, strategy and number of processes.
        unusable: one message per unusable line of the data folders.
        clip_summary: log lines about the clips and buckets.
        keys, validation_keys: cache entries of `samples` and `validation`, in the same order.
        prompts: entry name -> text of every prompt of the run, the empty prompt included.
        cache_summary: size of the latent cache and of its parts.
        tiling: whether the VAE encodes in tiles, not whole pictures.
        encoders: lines to add to the encoders that the cache knows.
        resume_from: checkpoint to resume from; None for a new run.
        progress: progress at the start of this run.
        notes: facts that the user should know but that do not stop the run.
    """

    context: RunContext
    model_dir: Path
    samples: list[ClipSample]
    unusable: list[str]
    clip_summary: list[str]
    keys: list[SampleKeys]
    validation: list[ClipSample]
    validation_keys: list[SampleKeys]
    prompts: dict[str, str]
    empty_prompt: str
    cache_dir: Path
    cache_summary: str
    tiling: bool
    encoders: dict[str, str]
    resume_from: Path | None
    progress: Progress
    notes: list[str]

    @property
    def args(self) -> Args:
        return self.context.args

    @property
    def spec(self) -> ModelSpec:
        return self.context.spec

    @property
    def zero(self) -> dict[str, Any] | None:
        """The DeepSpeed configuration; None for DDP."""
        return self.context.zero

    @property
    def num_processes(self) -> int:
        return self.context.num_processes

    @property
    def samples_per_step(self) -> int:
        training = self.args.training
        return training.batch_size * training.gradient_accumulation_steps * self.num_processes

    @property
    def total_steps(self) -> int:
        training = self.args.training
        return total_updates(training.train_steps, training.train_epochs, len(self.samples), self.samples_per_step)

    @property
    def is_finished(self) -> bool:
        """Whether the checkpoint to resume from has all steps."""
        return self.resume_from is not None and self.progress.step >= self.total_steps

    @property
    def gen_fps(self) -> float:
        """Frames per second of validation videos."""
        return self.args.validation.gen_fps or self.spec.fps

    @property
    def data_digest(self) -> str:
        """Changes with anything that changes the order or the content of the samples."""
        digest = hashlib.blake2b(f"{self.args.training.seed} {self.samples_per_step}".encode(), digest_size=16)
        for clip_sample, names in zip(self.samples, self.keys, strict=True):
            digest.update(f"{clip_sample.resolution} {names}".encode())
        return digest.hexdigest()

    def missing_entries(self) -> set[str]:
        """Names of the entries that the cache does not hold yet."""
        clips = (name for keys in self.keys + self.validation_keys for name in keys.pixels)
        cache = LatentCache(self.cache_dir)
        return {name for name in chain(clips, self.prompts) if not cache.has(name)}

    def without(self, failed: dict[str, str]) -> RunPlan:
        """Returns the plan without the samples that need a failed cache entry; these are added to `unusable`.

        Args:
            failed: entry name -> reason.
        """
        unusable = list(self.unusable)

        def usable(
            clip_samples: list[ClipSample], all_keys: list[SampleKeys]
        ) -> tuple[list[ClipSample], list[SampleKeys]]:
            pairs = []
            for clip_sample, keys in zip(clip_samples, all_keys, strict=True):
                reasons = [failed[name] for name in (*keys.pixels, keys.prompt) if name in failed]
                unusable.extend(f"{clip_sample} {reason}." for reason in dict.fromkeys(reasons))
                if not reasons:
                    pairs.append((clip_sample, keys))
            return [clip_sample for clip_sample, _ in pairs], [keys for _, keys in pairs]

        samples, keys = usable(self.samples, self.keys)
        validation, validation_keys = usable(self.validation, self.validation_keys)
        return replace(
            self, unusable=unusable, samples=samples, keys=keys, validation=validation, validation_keys=validation_keys
        )


def make_plan(
    context: RunContext,
    model_dir: Path,
    scan: ScanResult,
    cache_dir: Path,
    resume_from: Path | None,
    progress: Progress,
    notes: list[str],
    tiling: bool,
) -> RunPlan:
    """Returns the plan of a checked run, with the names of its cache entries."""
    args, spec = context.args, context.spec
    encoding, encoders = encoder_settings(model_dir, spec, tiling, LatentCache(cache_dir), args.model.variant)
    keys = encoding.keys(scan.samples, scan.facts, args.data.flip, args.data.additions)
    validation_keys = encoding.keys(scan.validation, scan.facts, additions=args.data.additions)
    prompts = {encoding.prompt_key(""): ""}
    for clip_sample, names in zip(scan.samples + scan.validation, keys + validation_keys, strict=True):
        prompts[names.prompt] = clip_sample.sample.prompt
    return RunPlan(
        context=replace(context, args=replace(args, data=replace(args.data, cache_dir=cache_dir))),
        model_dir=model_dir,
        samples=scan.samples,
        unusable=scan.unusable,
        clip_summary=summarize(scan.samples, scan.facts, args.data.resize_mode, args.data.fps or spec.fps),
        keys=keys,
        validation=scan.validation,
        validation_keys=validation_keys,
        prompts=prompts,
        empty_prompt=encoding.prompt_key(""),
        cache_dir=cache_dir,
        cache_summary="",
        tiling=tiling,
        encoders=encoders,
        resume_from=resume_from,
        progress=progress,
        notes=notes,
    )


def encoder_settings(
    model_dir: Path, spec: ModelSpec, tiling: bool, cache: LatentCache, variant: str | None = None
) -> tuple[EncoderSettings, dict[str, str]]:
    """Returns the encoder settings that are part of the cache keys.

    They are those under which the cache knows the encoders, so that another release of the same encoders finds their
    entries. Also returns the line for each encoder in `LatentCache.encoders`.
    """

    def settings(by_meaning: bool) -> EncoderSettings:
        fingerprint = partial(loading.fingerprint, by_meaning=by_meaning)
        return EncoderSettings(
            vae=fingerprint(model_dir / "vae", variant=variant, tiling=tiling),
            text_encoder=fingerprint(
                model_dir / "text_encoder",
                variant=variant,
                tokenizer=fingerprint(model_dir / "tokenizer"),
                length=spec.max_text_seq_length,
            ),
            image_noise=IMAGE_NOISE if spec.task == "i2v" else None,
        )

    current, meaning = settings(by_meaning=False), settings(by_meaning=True)
    encoders = {meaning.vae: current.vae, meaning.text_encoder: current.text_encoder}
    encoders |= {name: known for name, known in cache.encoders().items() if name in encoders}
    return replace(current, vae=encoders[meaning.vae], text_encoder=encoders[meaning.text_encoder]), encoders
