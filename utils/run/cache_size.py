"""Sizes of latent cache entries on disk, which are known before anything is encoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset.bucketing import ClipSample
from dataset.condition_frames import latent_frames
from dataset.latent_cache import SampleKeys
from dataset.video import Resolution
from utils.common.units import format_size
from utils.model import loading
from utils.model.encoders import IMAGE_NOISE_DRAWS
from utils.model.spec import ModelSpec
from utils.run.plan import RunPlan


@dataclass(frozen=True)
class CacheSizes:
    """Sizes of the entries of some samples, in bytes and without the headers of the files.

    Attributes:
        entries: entry name -> size.
        samples: resolution -> number of samples, and size of the largest of them without its prompt.
        prompt: size of a prompt.
        num_prompts: number of distinct prompts, the empty one included.
    """

    entries: dict[str, int]
    samples: dict[Resolution, tuple[int, int]]
    prompt: int
    num_prompts: int

    def describe(self, missing: set[str]) -> str:
        """Returns the size of the cache, of its parts, and of the missing entries."""
        parts = [
            f"{count} samples of {resolution} at {format_size(size)}"
            for resolution, (count, size) in self.samples.items()
        ]
        parts.append(f"{self.num_prompts} prompts at {format_size(self.prompt)}")
        still = sum(self.entries[name] for name in missing)
        rest = f"{format_size(still)} are still to be encoded" if still else "nothing is to be encoded"
        return f"{format_size(sum(self.entries.values()))}: {', '.join(parts)}; {rest}"


def plan_sizes(plan: RunPlan) -> CacheSizes:
    """Returns the sizes of all entries of a run."""
    clip_samples, keys = plan.samples + plan.validation, plan.keys + plan.validation_keys
    return cache_sizes(plan.spec, plan.model_dir, plan.args.model.variant, clip_samples, keys, plan.prompts)


def cache_sizes(
    spec: ModelSpec,
    model_dir: Path,
    variant: str | None,
    clip_samples: list[ClipSample],
    keys: list[SampleKeys],
    prompts: Iterable[str],
) -> CacheSizes:
    """Returns the sizes of the entries of samples and prompts.

    Args:
        keys: names of the entries, in the order of the samples.
        prompts: names of the entries of all prompts.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    itemsize = loading.working_dtype(model_dir / "vae", device, variant).itemsize
    prompt = spec.max_text_seq_length * spec.transformer["text_embed_dim"]
    prompt *= loading.stored_dtype(model_dir / "text_encoder", variant).itemsize
    entries = dict.fromkeys(prompts, prompt)
    num_prompts, counts, largest = len(entries), Counter[Resolution](), Counter[Resolution]()
    for clip_sample, names in zip(clip_samples, keys, strict=True):
        frames, height, width = spec.latent_size(clip_sample.resolution)
        moments = 2 * spec.latent_channels * height * width * itemsize  # of one latent frame
        sizes = dict.fromkeys(names.video, moments * frames) | dict.fromkeys(names.image, moments * IMAGE_NOISE_DRAWS)
        for addition, added in names.additions.items():
            sizes |= dict.fromkeys(added, moments * IMAGE_NOISE_DRAWS * latent_frames(addition))
        entries |= sizes
        counts[clip_sample.resolution] += 1
        largest[clip_sample.resolution] = max(largest[clip_sample.resolution], sum(sizes.values()))
    samples = {resolution: (count, largest[resolution]) for resolution, count in counts.items()}
    return CacheSizes(entries, samples, prompt, num_prompts)
