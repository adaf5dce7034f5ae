"""A look at every clip and image before anything is encoded: what cannot be used, and what is worth a word."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tqdm import tqdm

from dataset.manifest import Sample
from dataset.video import ClipError, ClipInfo, Resolution, choose_frames, load_image, probe, stretch

# A clip drawn out by more than this is worth a word.
STRETCH_WORTH_A_WORD = 0.03


@dataclass
class Survey:
    """What was found.

    Attributes:
        clips: of the usable samples that have one.
        faults: one sentence for each sample that cannot be used.
        notes: sentences on the whole.
    """

    clips: list[ClipInfo] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def summary(self, resolution: Resolution, fps: float) -> str:
        sizes = Counter(f"{info.width}x{info.height} at {info.fps:g} fps" for info in self.clips)
        listed = ", ".join(f"{count} of {size}" for size, count in sizes.most_common(3))
        more = f" and {len(sizes) - 3} more sizes" if len(sizes) > 3 else ""
        used = resolution.frames / fps
        total = sum(info.seconds for info in self.clips)
        share = sum(min(used, info.seconds) for info in self.clips) / total
        return (
            f"{listed}{more}; {total:.0f} s in all, of which the first {used:.2f} s of each clip "
            f"({resolution.frames} frames at {fps:g} fps) are {share:.0%}"
        )


def survey(samples: list[Sample], resolution: Resolution, fps: float, mode: str) -> Survey:
    """Probes clips and images in threads."""

    def look(sample: Sample) -> ClipInfo | str | None:
        at_fault = sample.video
        try:
            info = None
            if sample.video is not None:
                info, times = probe(sample.video)
                choose_frames(times, resolution.frames, fps)
            if sample.image is not None:
                at_fault = sample.image
                load_image(sample.image, Resolution(1, 16, 16), "stretch")
            return info
        except ClipError as error:
            return f"{at_fault} (line {sample.line}) {error}."

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        looks = list(tqdm(pool.map(look, samples), "Looking at clips", len(samples), unit="clip", delay=3, leave=False))
    usable = [(info, sample) for info, sample in zip(looks, samples, strict=True) if isinstance(info, ClipInfo)]
    found = Survey([info for info, _ in usable], [fault for fault in looks if isinstance(fault, str)])
    distorted = [(stretch(info, resolution), sample.video) for info, sample in usable]
    beyond = [pair for pair in distorted if pair[0] > STRETCH_WORTH_A_WORD]
    if beyond and mode == "stretch":
        worst, path = max(beyond)
        found.notes.append(
            f"{len(beyond)} of {len(usable)} clips are stretched to {resolution.height}x{resolution.width}, the worst "
            f"by {worst:.0%} ({path}); --resize_mode crop keeps the aspect ratio."
        )
    slower = sum(info.fps < fps - 0.5 for info in found.clips)
    if slower:
        found.notes.append(f"{slower} of {len(usable)} clips have fewer than {fps:g} frames a second; frames repeat.")
    return found
