"""Turns raw footage into the clips of a data folder: cuts scenes, drops what is not worth training on.

Legend: a source is a video file of the raw folder; a scene is a range of its frames without a cut; a clip is a part of
a scene that is long enough for a sample.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset.decoders import TIE_S
from dataset.parts import Crop, FrameRange
from dataset.scenes import Analysis, Probe, Scene, analyse_to_file, crop_of, read_analysis
from dataset.worker_pool import Failure, run_in_workers
from utils.common.errors import UserError

# Files that are no videos, although some decoder would try. Everything else in the raw folder is tried.
_OTHER_FILES = {
    *(".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".md", ".pdf", ".srt", ".vtt", ".ass", ".nfo", ".log", ".zip"),
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".thm", ".dng", ".cr2"),
    *(".mp3", ".wav", ".flac", ".aac", ".m4a", ".opus", ".wma", ".py", ".sh", ".html", ".safetensors", ".part"),
}
# A clip is static if a smaller share of its pixels moves, on average, from one half second to the next.
_STATIC_SHARE = 0.002
# A clip is a near-duplicate if its hashes differ in fewer of 64 bits, on average over `_HASHES` moments.
_DUPLICATE_BITS, _HASHES = 5.0, 4


@dataclass(frozen=True)
class Clip:
    """A part of a source that was kept.

    Attributes:
        analysis: what is known about the source.
        scene: number of the scene in its source.
        hashes: uint64 [_HASHES], perceptual hashes at evenly spaced moments.
    """

    source: str
    analysis: Analysis
    scene: int
    frames: FrameRange
    crop: Crop | None
    hashes: np.ndarray

    @property
    def start(self) -> float:
        return float(self.analysis.times[self.frames.first])

    @property
    def end(self) -> float:
        return float(self.analysis.times[self.frames.stop])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the picture without its bars, in stored pixels."""
        return (self.crop.height, self.crop.width) if self.crop else (self.analysis.height, self.analysis.width)

    @property
    def aspect(self) -> float:
        """Width divided by height of the picture on a display."""
        return self.size[1] * self.analysis.pixel_aspect / self.size[0]

    def __str__(self) -> str:
        return f"{self.source} from {self.start:.2f} s to {self.end:.2f} s"


@dataclass(frozen=True)
class Dropped:
    """A part of a source, or all of it, that was not kept.

    Attributes:
        kind: short name of the reason, for a summary.
        reason: continues a sentence that starts with the source.
        analysis, frames: as in `Clip`; None for a source that cannot be used.
    """

    source: str
    kind: str
    reason: str
    analysis: Analysis | None = None
    frames: FrameRange | None = None

    @property
    def span(self) -> tuple[float, float] | None:
        """Start and end in seconds."""
        if self.analysis is None or self.frames is None:
            return None
        return float(self.analysis.times[self.frames.first]), float(self.analysis.times[self.frames.stop])


def find_sources(raw: Path, out: Path) -> list[str]:
    """Returns the files of the raw folder that may be videos, at any depth. Hidden files and `out` are left out.

    Raises:
        UserError: there is none.
    """
    found, visited = [], set()
    for folder, subfolders, names in os.walk(raw, followlinks=True):
        real = os.path.realpath(folder)
        is_known = real in visited or Path(real) == out.resolve()
        visited.add(real)
        subfolders[:] = [] if is_known else sorted(name for name in subfolders if not name.startswith("."))
        for name in [] if is_known else sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() not in _OTHER_FILES:
                found.append(str(Path(folder, name).absolute()))
    if not found:
        raise UserError(f"{raw} holds no video, at any depth.")
    return sorted(found)


def analyse_sources(
    sources: list[str], folder: Path, num_workers: int, timeout: float
) -> tuple[dict[str, Analysis], list[Dropped]]:
    """Analyses the new and changed sources in worker processes, and takes the others from the folder.

    Args:
        folder: one file per source; two runs may write it at once.
        timeout: maximum number of seconds per source.
    """
    files = {source: folder / f"{hashlib.sha256(os.fsencode(source)).hexdigest()[:24]}.json" for source in sources}
    dropped = []
    for source in sources:
        try:
            source.encode()
        except UnicodeEncodeError:  # a table is UTF-8
            dropped.append(Dropped(source, "unusable", "has a name that is not UTF-8; rename it"))
            del files[source]
    analyses = {source: analysis for source, file in files.items() if (analysis := read_analysis(source, file))}
    sizes = {source: Path(source).stat().st_size for source in files if source not in analyses}
    jobs = [(source, files[source]) for source in sizes]
    with tqdm(total=sum(sizes.values()), desc="Finding scenes", unit="B", unit_scale=True, disable=not jobs) as bar:
        for number, result in enumerate(run_in_workers(analyse_to_file, jobs, num_workers, timeout), 1):
            source, file = result.job
            if isinstance(result.outcome, Failure):
                dropped.append(Dropped(source, "unusable", result.outcome.reason))
            elif (analysis := read_analysis(source, file)) is None:
                dropped.append(Dropped(source, "unusable", "was changed during the run; run the same command again"))
            else:
                analyses[source] = analysis
            bar.set_postfix_str(f"{number} of {len(jobs)} files", refresh=False)
            bar.update(sizes[source])
    return {source: analyses[source] for source in sources if source in analyses}, dropped


def select_clips(analyses: dict[str, Analysis], lengths: Iterable[int], fps: float) -> tuple[list[Clip], list[Dropped]]:
    """Cuts scenes into clips, and drops those that are black, too short, static, or like another clip.

    Args:
        lengths: numbers of frames of the training resolutions.
        fps: sampling rate of training.
    """
    clips: list[Clip] = []
    dropped: list[Dropped] = []
    for source, analysis in analyses.items():
        for number, scene in enumerate(analysis.scenes):
            for found in _clips_of_scene(source, analysis, number, scene, sorted(lengths), fps):
                (clips if isinstance(found, Clip) else dropped).append(found)  # type: ignore[arg-type]
    kept, duplicates = drop_duplicates(clips)
    return kept, dropped + duplicates


def _clips_of_scene(
    source: str, analysis: Analysis, number: int, scene: Scene, lengths: list[int], fps: float
) -> Iterator[Clip | Dropped]:
    times = analysis.times

    def drop(first: int, stop: int, kind: str, reason: str) -> Dropped:
        return Dropped(source, kind, reason, analysis, analysis.frames(first, stop))

    if scene.is_black:
        yield drop(scene.first, scene.stop, "black", "is black")
        return
    ranges = cut_scene(times, scene.first, scene.stop, lengths, fps)
    if not ranges:
        needed = f"{lengths[0]} frames at {fps:g} fps take {lengths[0] / fps:.2f} s"
        seconds = times[scene.stop] - times[scene.first]
        yield drop(
            scene.first, scene.stop, "too short", f"is shorter than a sample: it has {seconds:.2f} s, but {needed}"
        )
    crop = crop_of(analysis, scene)
    for first, stop in ranges:
        probes = [probe for probe in scene.probes if first <= probe.frame < stop]
        moved = [probe.moved for probe in probes[1:] if probe.moved is not None]
        if not moved or np.mean(moved) < _STATIC_SHARE:
            yield drop(first, stop, "static", "is static: nothing moves")
            continue
        yield Clip(source, analysis, number, analysis.frames(first, stop), crop, _hashes_of(probes, first, stop))


def _hashes_of(probes: list[Probe], first: int, stop: int) -> np.ndarray:
    moments = [first + (stop - first) * (number + 0.5) / _HASHES for number in range(_HASHES)]
    nearest = [min(probes, key=lambda probe: abs(probe.frame - moment)) for moment in moments]
    return np.array([int(probe.phash, 16) for probe in nearest], np.uint64)


def cut_scene(times: np.ndarray, first: int, stop: int, lengths: list[int], fps: float) -> list[tuple[int, int]]:
    """Cuts frames [first, stop) into equal ranges, as many as there are samples of the longest length that fits.

    Returns an empty list if no length fits.

    Args:
        times: as of `Analysis`.
        lengths: numbers of frames of a sample, in increasing order.
    """

    def available(first: int, stop: int) -> int:
        # as in `frames_available`, of the times of a part
        middle = (times[stop - 1] + times[stop]) / 2 - times[first]
        return max(math.ceil((middle - TIE_S) * fps), 1)

    fitting = [length for length in lengths if length <= available(first, stop)]
    if not fitting:
        return []
    for count in range(available(first, stop) // fitting[-1], 0, -1):
        targets = np.linspace(times[first], times[stop], count + 1)[1:-1]
        bounds = [first, *np.searchsorted(times, targets - TIE_S).tolist(), stop]
        ranges = list(pairwise(bounds))
        if all(a < b and available(a, b) >= fitting[-1] for a, b in ranges):
            break
    return ranges


def drop_duplicates(clips: list[Clip]) -> tuple[list[Clip], list[Dropped]]:
    """Drops each clip that looks like another one; of such clips the one with the most pixels is kept.

    Clips of one scene look alike, but move differently, so they are not compared.
    """
    order = sorted(range(len(clips)), key=lambda number: (-math.prod(clips[number].size), number))
    hashes = np.zeros((len(clips), _HASHES), np.uint64)
    scenes = np.zeros(len(clips), np.int64)
    numbers: defaultdict[tuple[str, int], int] = defaultdict(lambda: len(numbers))
    kept: list[int] = []
    dropped = []
    for number in order:
        clip, scene = clips[number], numbers[clips[number].source, clips[number].scene]
        count = len(kept)
        bits = np.bitwise_count(hashes[:count] ^ clip.hashes).mean(axis=1) + 64.0 * (scenes[:count] == scene)
        if count and bits.min() < _DUPLICATE_BITS:
            reason = f"is a near-duplicate of {clips[kept[int(bits.argmin())]]}"
            dropped.append(Dropped(clip.source, "near-duplicates", reason, clip.analysis, clip.frames))
            continue
        hashes[count], scenes[count] = clip.hashes, scene
        kept.append(number)
    return [clips[number] for number in sorted(kept)], dropped
