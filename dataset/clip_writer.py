"""Writes clips to files of their own, for training on a machine without the raw footage."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dataset.containers import ClipError
from dataset.decoders import Reader, open_reader
from dataset.parts import Crop, FrameRange
from dataset.prepare import Clip
from dataset.seeking import open_at
from dataset.video import shown_pixel_aspect
from dataset.worker_pool import Failure, run_in_workers
from utils.common.filesystem import atomic_write

CLIPS = "clips"
# As in the commands that error messages give: hardly visible loss.
_CRF = "14"
_TIME_BASE = Fraction(1, 90000)
_Job = tuple[int, str, FrameRange, Crop | None, Path]


def write_clips(
    out: Path, clips: Sequence[Clip], num_workers: int, timeout: float
) -> tuple[dict[int, Path], list[str]]:
    """Writes the clips that the folder does not hold yet, each atomically.

    Returns:
        Position of a clip -> its file, relative to the folder; and an error for each clip that cannot be written.
    """
    files = {number: Path(CLIPS, _name(clip)) for number, clip in enumerate(clips)}
    jobs: list[_Job] = [
        (number, clip.source, clip.frames, clip.crop, out / files[number])
        for number, clip in enumerate(clips)
        if not (out / files[number]).is_file()
    ]
    errors = []
    results = run_in_workers(_write, jobs, num_workers, timeout)
    for result in tqdm(results, "Writing clips", len(jobs), unit="clip", disable=not jobs):
        if isinstance(result.outcome, Failure):
            number = result.job[0]
            errors.append(f"{clips[number]} {result.outcome.reason}")
            del files[number]
    return files, errors


def _name(clip: Clip) -> str:
    """Returns a file name that changes with the content of the clip."""
    content = f"{clip.source} {clip.analysis.signature} {clip.frames} {clip.crop}"
    return f"{Path(clip.source).stem[:60]}-{hashlib.sha256(content.encode()).hexdigest()[:12]}.mp4"


def _write(job: _Job, buffer: Any) -> bool:
    """Writes one clip in a worker process."""
    _, source, frames, crop, file = job
    with open_at(Path(source), frames) as opened, suppress(ClipError):
        if opened is not None:
            _encode(*opened, frames, crop, file)
            return True
    _encode(open_reader(Path(source)), frames.first, frames, crop, file)
    return True


def _encode(reader: Reader, first: int, frames: FrameRange, crop: Crop | None, file: Path) -> None:
    """Encodes frames as H.264, each shown at its time. `first` is the index of the first frame in the reader."""
    import av

    count = frames.stop - frames.first
    seconds = reader.times[first : first + count + 1] - reader.times[first]
    times = np.round(seconds / float(_TIME_BASE)).astype(int).tolist()
    with atomic_write(file) as tmp_path, av.open(str(tmp_path), "w") as output:
        stream = output.add_stream("libx264", options={"crf": _CRF})
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = _TIME_BASE
        stream.codec_context.sample_aspect_ratio = Fraction(shown_pixel_aspect(reader.info)).limit_denominator(1000)
        for number, picture in enumerate(reader.read(list(range(first, first + count)))):
            if crop is not None:
                picture = picture[crop.y : crop.y + crop.height, crop.x : crop.x + crop.width]
            picture = picture[: len(picture) // 2 * 2, : picture.shape[1] // 2 * 2]  # yuv420p has even sizes
            if number == 0:
                stream.height, stream.width = picture.shape[:2]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = times[number], _TIME_BASE
            frame.duration = times[number + 1] - times[number]
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
