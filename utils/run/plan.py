"""The plan of a run: resolved settings, samples and the names of their cache entries."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from dataset.bucketing import ClipSample
from dataset.folder import DataFolder
from dataset.latent_cache import EncoderSettings, LatentCache, SampleKeys
from dataset.scan import ScanResult
from dataset.summary import summarize
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
        cache_dirs: latent cache of each data folder. New entries of the validation folder are in the first one.
        elsewhere: folder of each entry that is not in the first latent cache.
        cache_summary: size of the latent cache and of its parts.
        tiling: whether the VAE encodes in tiles, not whole pictures.
        encoders: latent cache -> lines to add to the encoders that it knows.
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
    cache_dirs: dict[DataFolder, Path]
    elsewhere: dict[str, Path]
    cache_summary: str
    tiling: bool
    encoders: dict[Path, dict[str, str]]
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
    def cache_dir(self) -> Path:
        """The first latent cache."""
        return next(iter(self.cache_dirs.values()))

    @property
    def cache(self) -> LatentCache:
        """All latent caches."""
        return LatentCache(self.cache_dir, self.elsewhere)

    @property
    def folders(self) -> list[DataFolder]:
        """Data folder of each sample."""
        return [clip_sample.sample.folder for clip_sample in self.samples]

    @cached_property
    def samples_per_epoch(self) -> int:
        return sum(folder.repeats for folder in self.folders)

    @property
    def num_epochs(self) -> float:
        return self.total_steps * self.samples_per_step / self.samples_per_epoch

    @property
    def samples_per_step(self) -> int:
        training = self.args.training
        return training.batch_size * training.gradient_accumulation_steps * self.num_processes

    @property
    def total_steps(self) -> int:
        training = self.args.training
        return total_updates(training.train_steps, training.train_epochs, self.samples_per_epoch, self.samples_per_step)

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
            if (repeats := clip_sample.sample.folder.repeats) != 1:
                digest.update(f" {repeats}".encode())
        return digest.hexdigest()

    def missing_entries(self) -> set[str]:
        """Names of the entries that the cache does not hold yet."""
        clips = (name for keys in self.keys + self.validation_keys for name in keys.pixels)
        cache = self.cache
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
                reasons = [failed[name] for name in keys.all if name in failed]
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
    cache_dirs: dict[DataFolder, Path],
    resume_from: Path | None,
    progress: Progress,
    notes: list[str],
    tiling: bool,
) -> RunPlan:
    """Returns the plan of a checked run, with the names of its cache entries."""
    args, spec = context.args, context.spec
    caches = list(dict.fromkeys(cache_dirs.values()))
    encodings, encoders = {}, {}
    for cache_dir in caches:
        encodings[cache_dir], encoders[cache_dir] = encoder_settings(
            model_dir, spec, tiling, LatentCache(cache_dir), args.model.variant
        )
    main = encodings[caches[0]]
    keys: list[SampleKeys] = []
    for folder, part in groupby(scan.samples, lambda clip_sample: clip_sample.sample.folder):
        keys += encodings[cache_dirs[folder]].keys(list(part), scan.facts, folder.flip, args.data.additions)
    validation_keys = main.keys(scan.validation, scan.facts, additions=args.data.additions)
    prompts = {main.prompt_key(""): ""}
    for clip_sample, names in zip(scan.samples + scan.validation, keys + validation_keys, strict=True):
        prompts[names.prompt] = clip_sample.sample.prompt
    elsewhere: dict[str, Path] = {}
    if len(caches) > 1:
        shared = (main.prompt_key(""), *(name for names in validation_keys for name in names.all))
        needs = [(cache_dir, shared) for cache_dir in caches]
        needs += [
            (cache_dirs[clip_sample.sample.folder], names.all)
            for clip_sample, names in zip(scan.samples, keys, strict=True)
        ]
        elsewhere = place_entries(needs)
    common_cache = caches[0] if len(caches) == 1 else args.data.cache_dir
    return RunPlan(
        context=replace(context, args=replace(args, data=replace(args.data, cache_dir=common_cache))),
        model_dir=model_dir,
        samples=scan.samples,
        unusable=scan.unusable,
        clip_summary=summarize(scan.samples, scan.facts, args.data.resize_mode, args.data.fps or spec.fps),
        keys=keys,
        validation=scan.validation,
        validation_keys=validation_keys,
        prompts=prompts,
        empty_prompt=main.prompt_key(""),
        cache_dirs=cache_dirs,
        elsewhere=elsewhere,
        cache_summary="",
        tiling=tiling,
        encoders=encoders,
        resume_from=resume_from,
        progress=progress,
        notes=notes,
    )


def place_entries(needs: Sequence[tuple[Path, Iterable[str]]]) -> dict[str, Path]:
    """Returns the latent cache of each entry that is not in the first one.

    An entry is in the cache of its data folder, so that the folder can be trained alone too. An entry that several data
    folders need is in the first of their caches that has it, otherwise in the first one.

    Args:
        needs: latent caches, the first one before all others, and entries that may be in them.
    """
    handles = {cache: LatentCache(cache) for cache in {cache for cache, _ in needs}}
    placed: dict[str, Path] = {}
    for cache, name in ((cache, name) for cache, names in needs for name in names):
        first = placed.setdefault(name, cache)
        if first != cache and not handles[first].has(name) and handles[cache].has(name):
            placed[name] = cache
    return {name: cache for name, cache in placed.items() if cache != needs[0][0]}


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
