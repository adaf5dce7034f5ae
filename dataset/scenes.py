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

from dataset.decoders import Reader, open_reader
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
        times: float64 [F + 1], start of each frame and end of the last one, in seconds from the first.
        pts: int64 [F], presentation time of each frame, as of `FrameRange`.
    """

    signature: int
    height: int
    width: int
    pixel_aspect: float
    times: np.ndarray
    pts: np.ndarray | None
    scenes: tuple[Scene, ...]

    def frames(self, first: int, stop: int) -> FrameRange:
        """Returns frames [first, stop) as the readers find them."""
        pts = None if self.pts is None else (int(self.pts[first]), int(self.pts[stop - 1]))
        return FrameRange(first, stop, pts)


def analyse_to_file(job: tuple[str, Path], buffer: Any) -> bool:
    """Analyses a source in a worker process. The job is (path of the source, file to write)."""
    source, file = job
    analysis = analyse(Path(source))
    values = {"version": ANALYSIS_VERSION, "source": source, **asdict(analysis)}
    with atomic_write(file) as tmp_path:
        tmp_path.write_text(json.dumps(values, default=np.ndarray.tolist))
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
            pts = values.pop("pts")
            return Analysis(
                **values | {"times": np.array(values["times"])},
                pts=None if pts is None else np.array(pts),
                scenes=scenes,
            )
    return None


def analyse(path: Path) -> Analysis:
    """Finds cuts and black pictures in a source, and probes each scene.

    Raises:
        ClipError: the source cannot be decoded.
    """
    signature = stat_signature(str(path))
    reader = open_reader(path)
    times = reader.times
    stride = max(round((len(times) - 1) / float(times[-1]) / _CUT_FPS), 1)
    frames = list(range(0, len(times) - 1, stride))
    cuts, black, probes, size = _compare(reader, frames, (len(times) - 1) / float(times[-1]) / stride)
    starts = [
        number for number in range(len(frames)) if not number or number in cuts or black[number] != black[number - 1]
    ]
    scenes = []
    for start, stop in zip(starts, [*starts[1:], len(frames)], strict=True):
        end = len(times) - 1 if stop == len(frames) else frames[stop - 1] + 1
        inside = [probe for probe in probes if start <= probe.number < stop]
        scenes.append(Scene(frames[start], end, black[start], _with_motion(inside, frames)))
    pts = presentation_times(path, reader)
    aspect = shown_pixel_aspect(reader.info)
    return Analysis(
        signature, *size, aspect, times.round(6), None if pts is None else np.array(pts, np.int64), tuple(scenes)
    )


@dataclass(frozen=True)
class _Picture:
    """A measured frame: its number among the compared ones, uint8 [h, w], bars of the full picture, and its hash."""

    number: int
    grey: np.ndarray
    bars: tuple[int, int, int, int]
    phash: str


def _compare(
    reader: Reader, frames: list[int], rate: float
) -> tuple[set[int], list[bool], list[_Picture], tuple[int, int]]:
    """Compares frames. Returns the numbers of those behind a cut, which are black, the probes, and the picture's size.

    Args:
        frames: indices of the frames to compare.
        rate: how many of them are shown per second.
    """
    import cv2
    from scenedetect import FrameTimecode
    from scenedetect.detectors import AdaptiveDetector

    cv2.setNumThreads(1)  # each core has a worker process already
    detector = AdaptiveDetector(min_scene_len=max(round(_MIN_SCENE_S * rate), 1))
    cuts: set[int] = set()
    black, probes, size = [], [], (0, 0)
    changed: tuple[int, Any] = 0, None  # the last picture that differs from the one before it
    for number, picture in enumerate(reader.read(frames)):
        size = picture.shape[:2]
        small = _scaled(picture, _CUT_HEIGHT)
        grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
        black.append(bool(np.percentile(grey, 98) < _BLACK_LEVEL))
        # between repeated pictures, as of a film on twos, every motion would look like a cut
        is_repeated = number > 0 and cv2.absdiff(grey, changed[1]).mean() < _REPEATED_LEVEL
        if not is_repeated or number - changed[0] > _MAX_REPEATED_S * rate:
            found = detector.process_frame(FrameTimecode(number, rate), cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
            cuts.update(timecode.frame_num for timecode in found)
        if not is_repeated:
            changed = number, grey
        if number % max(round(rate / _PROBES_PER_S), 1) == 0:
            bars = find_bars(picture)
            probes.append(_Picture(number, _scaled(grey, _MOTION_HEIGHT), bars, _hash(small, bars, size[0])))
    return cuts, black, probes, size


def _scaled(picture: np.ndarray, height: int) -> np.ndarray:
    import cv2

    width = max(round(picture.shape[1] * height / picture.shape[0]), 8)
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def _with_motion(pictures: list[_Picture], frames: list[int]) -> tuple[Probe, ...]:
    """Returns the probes of a scene."""
    probes = []
    for position, picture in enumerate(pictures):
        moved = None
        if position:
            difference = np.abs(picture.grey.astype(np.int16) - pictures[position - 1].grey)
            moved = round(float((difference > _MOTION_LEVEL).mean()), 5)
        probes.append(Probe(frames[picture.number], moved, picture.bars, picture.phash))
    return tuple(probes)


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
