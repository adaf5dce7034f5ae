"""Finds the scenes of a source video, and measures what decides whether a scene is worth training on.

Runs in worker processes. OpenCV, PySceneDetect and ImageHash are imported here only, so training does not need them.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset.decoders import open_reader
from dataset.file_index import stat_signature
from dataset.parts import Crop, FrameRange
from dataset.seeking import presentation_times
from dataset.video import shown_pixel_aspect
from utils.common.filesystem import atomic_write

# Increase it whenever the same file could give another analysis than before.
ANALYSIS_VERSION = 1
# Frames per second that are compared to find cuts. A cut lies between two of them, and no scene contains both.
_CUT_FPS = 15.0
_PROBES_PER_S = 2.0
# Height in pixels of the pictures for cuts, and of those that are compared for motion.
_CUT_HEIGHT, _MOTION_HEIGHT = 144, 72
# Scenes are at least this long in seconds, so that a camera flash is no scene.
_MIN_SCENE_S = 0.3
# Pictures that differ by less than this level on average are repeated, unless they have been for longer than this.
_REPEATED_LEVEL, _MAX_REPEATED_S = 1.0, 0.5
# A picture is black if 98 % of its pixels are darker than this, of 255.
_BLACK_LEVEL = 32
# Pixels that change by more than this count as moving; compression changes less.
_MOTION_LEVEL = 8
# Highest mean and maximum of a row or column of a letterbox bar.
_BAR_MEAN, _BAR_MAX = 24, 48


@dataclass(frozen=True)
class Probe:
    """A frame that was measured.

    Attributes:
        frame: index of the frame.
        moved: share of the pixels that moved since the last probe of the scene; None for the first one.
        bars: pixels of black at the top, bottom, left and right.
        phash: perceptual hash of the picture without its bars, 64 bits in hexadecimal.
    """

    frame: int
    moved: float | None
    bars: tuple[int, int, int, int]
    phash: str


@dataclass(frozen=True)
class Scene:
    """Frames [first, stop) without a cut."""

    first: int
    stop: int
    is_black: bool
    probes: tuple[Probe, ...]


@dataclass(frozen=True)
class Analysis:
    """What is known about a source.

    Attributes:
        signature: stat signature of the file.
        height, width: size in stored pixels, as it is shown.
        pixel_aspect: width divided by height of a pixel as it is shown.
        times: start of each frame and end of the last one, in seconds from the first.
        pts: presentation time of each frame, as of `FrameRange`.
    """

    signature: int
    height: int
    width: int
    pixel_aspect: float
    times: tuple[float, ...]
    pts: tuple[int, ...] | None
    scenes: tuple[Scene, ...]

    def frames(self, first: int, stop: int) -> FrameRange:
        """Returns frames [first, stop) as the readers find them."""
        return FrameRange(first, stop, (self.pts[first], self.pts[stop - 1]) if self.pts else None)


def analyse_to_file(job: tuple[str, Path], buffer: Any) -> bool:
    """Analyses a source in a worker process. The job is (path of the source, file to write)."""
    source, file = job
    analysis = analyse(Path(source))
    with atomic_write(file) as tmp_path:
        tmp_path.write_text(json.dumps({"version": ANALYSIS_VERSION, "source": source, **asdict(analysis)}))
    return True


def read_analysis(source: str, file: Path) -> Analysis | None:
    """Returns the analysis in a file, or None if there is none of this version of the source."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        values = json.loads(file.read_text())
        is_current = values.pop("version") == ANALYSIS_VERSION and values.pop("source") == source
        if is_current and values["signature"] == stat_signature(source):
            scenes = tuple(
                Scene(**{**scene, "probes": tuple(Probe(**probe) for probe in scene["probes"])})
                for scene in values.pop("scenes")
            )
            return Analysis(**values, scenes=scenes)
    return None


def analyse(path: Path) -> Analysis:
    """Finds cuts and black pictures in a source, and probes each scene.

    Raises:
        ClipError: the source cannot be decoded.
    """
    import cv2
    from scenedetect import FrameTimecode
    from scenedetect.detectors import AdaptiveDetector

    cv2.setNumThreads(1)  # each core has a worker process already
    signature = stat_signature(str(path))
    reader = open_reader(path)
    times = reader.times
    fps = (len(times) - 1) / float(times[-1])
    stride = max(round(fps / _CUT_FPS), 1)
    detector = AdaptiveDetector(min_scene_len=max(round(_MIN_SCENE_S * fps / stride), 1))
    frames = list(range(0, len(times) - 1, stride))
    probe_stride = max(round(fps / stride / _PROBES_PER_S), 1)
    cuts: set[int] = set()
    black, probes = [], []
    height = width = 0
    compared: tuple[int, Any] = 0, None  # the last picture that differs from the one before it
    for number, picture in enumerate(reader.read(frames)):
        height, width = picture.shape[:2]
        small_size = (max(round(width * _CUT_HEIGHT / height), 16), _CUT_HEIGHT)
        small = cv2.resize(picture, small_size, interpolation=cv2.INTER_AREA)
        grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
        # between repeated pictures, as of a film on twos, every motion would look like a cut
        is_repeated = number and cv2.absdiff(grey, compared[1]).mean() < _REPEATED_LEVEL
        if not is_repeated or number - compared[0] > _MAX_REPEATED_S * fps / stride:
            found = detector.process_frame(FrameTimecode(number, fps / stride), cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
            cuts.update(timecode.frame_num for timecode in found)
        if not is_repeated:
            compared = number, grey
        black.append(bool(np.percentile(grey, 98) < _BLACK_LEVEL))
        if number % probe_stride == 0:
            motion_size = (max(round(width * _MOTION_HEIGHT / height), 8), _MOTION_HEIGHT)
            bars = find_bars(picture)
            probes.append(
                (number, cv2.resize(grey, motion_size, interpolation=cv2.INTER_AREA), bars, _hash(small, bars, height))
            )
    starts = [
        number for number in range(len(frames)) if not number or number in cuts or black[number] != black[number - 1]
    ]
    scenes = []
    for start, stop in zip(starts, [*starts[1:], len(frames)], strict=True):
        inside = [probe for probe in probes if start <= probe[0] < stop]
        end = len(times) - 1 if stop == len(frames) else frames[stop - 1] + 1
        scenes.append(Scene(frames[start], end, black[start], _with_motion(inside, frames)))
    pts = presentation_times(path, reader)
    return Analysis(
        signature,
        height,
        width,
        shown_pixel_aspect(reader.info),
        tuple(round(float(time), 6) for time in times),
        tuple(pts) if pts else None,
        tuple(scenes),
    )


def _with_motion(
    probes: list[tuple[int, np.ndarray, tuple[int, int, int, int], str]], frames: list[int]
) -> tuple[Probe, ...]:
    found = []
    for position, (number, grey, bars, phash) in enumerate(probes):
        moved = None
        if position:
            difference = np.abs(grey.astype(np.int16) - probes[position - 1][1])
            moved = round(float((difference > _MOTION_LEVEL).mean()), 5)
        found.append(Probe(frames[number], moved, bars, phash))
    return tuple(found)


def _hash(small: np.ndarray, bars: tuple[int, int, int, int], height: int) -> str:
    """Returns the perceptual hash of a picture without its bars, which are those of the full picture."""
    import imagehash
    from PIL import Image

    top, bottom, left, right = (round(bar * len(small) / height) for bar in bars)
    picture = small[top : len(small) - bottom, left : small.shape[1] - right]
    return str(imagehash.phash(Image.fromarray(picture if picture.size else small)))


def find_bars(picture: np.ndarray) -> tuple[int, int, int, int]:
    """Returns the black rows and columns at the top, bottom, left and right of a picture [h, w, C]."""
    brightest = picture.max(axis=2)
    bars = []
    for axis in (1, 0):
        is_bar = (brightest.mean(axis=axis) < _BAR_MEAN) & (brightest.max(axis=axis) < _BAR_MAX)
        inside = np.flatnonzero(~is_bar)
        bars += [int(inside[0]), int(len(is_bar) - 1 - inside[-1])] if len(inside) else [0, 0]
    return bars[0], bars[1], bars[2], bars[3]


def crop_of(analysis: Analysis, scene: Scene) -> Crop | None:
    """Returns the picture of a scene without its bars, or None if it has no bars.

    A bar is black in every probe. If opposite sides differ, a dark part of the picture touches a bar, so the wider bar
    counts as wide as the other.
    """
    thickness = np.min([probe.bars for probe in scene.probes], axis=0) if scene.probes else np.zeros(4, int)
    edges = []
    for (first, second), side in zip(thickness.reshape(2, 2), (analysis.height, analysis.width), strict=True):
        if abs(first - second) > max(4, side * 0.01):
            first = second = min(first, second)
        # compression blurs the edge of a bar, and codecs need even sizes
        first, second = (int(bar + 3) // 2 * 2 if bar >= side * 0.01 else 0 for bar in (first, second))
        if side - first - second < side * 0.3:
            first = second = 0
        edges.append((first, side - first - second if first or second else side))
    (y, height), (x, width) = edges
    return (
        None
        if (height, width) == (analysis.height, analysis.width)
        else Crop(width - width % 2, height - height % 2, x, y)
    )
