"""Readers that decode a clip forward: decord, and PyAV for the containers and codecs that decord decodes wrongly.

A reader gives the times of the visible frames and decodes selected frames once, in order. It raises an error for damage
and never replaces a frame. Legend: F frames, C channels (RGB), h w height and width as shown, in stored pixels.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dataset.containers import CONVERT, ClipError, open_container
from dataset.stream_info import StreamInfo, read_stream_info

if TYPE_CHECKING:
    from av import VideoFrame

# Tolerance in seconds for rounded container timestamps. A time halfway between two frames selects the later one.
TIE_S = 1e-4
# Duration in seconds of the only frame of a clip without a rate.
_DEFAULT_FRAME_S = 1 / 25
# The times of flv, in milliseconds, wrap at 32 bits. A clip with negative times seems to be longer than this.
_WRAPPED_S = 2e6
# decord gives a frame without a time a number far beyond this one.
_NO_TIME_S = 1e12
# A clip with more frames than these can be read by decord, whatever its container.
_FEW_FRAMES = 3
_BELOW_ZERO = f"has frame times below zero; {CONVERT} converts it"
_DAMAGED = "is damaged: some frames cannot be decoded, or it has fewer frames than its header states"
# Part of decord's error message when it cannot open a file -> explanation.
_OPEN_ERRORS = {
    "broken metadata": f"states no length, or was cut short; {CONVERT} converts it",
    "av_read_frame failed": "is damaged or cut short",
}


class Reader(Protocol):
    """A clip that is read once, from its start.

    Attributes:
        info: the video stream.
        times: float64 [F + 1], the start of each visible frame and the end of the last one, in seconds from the first.
    """

    info: StreamInfo
    times: np.ndarray

    def read(self, indices: list[int]) -> Iterator[np.ndarray]:
        """Yields uint8 [h, w, C] for each frame index. The indices must not decrease.

        Raises:
            ClipError: a frame cannot be decoded.
        """


def open_reader(path: Path, info: StreamInfo | None = None) -> Reader:
    """Opens a clip with the decoder that decodes it correctly.

    Args:
        info: the video stream; read from the file if None.

    Raises:
        ClipError: the clip cannot be used.
    """
    info = info or read_stream_info(path)
    if not info.uses_decord:
        return PyavReader(path, info)
    try:
        reader = DecordReader(path, info)
        if len(reader.times) - 1 <= _FEW_FRAMES:
            list(DecordReader(path, info).read([0]))
        return reader
    except ClipError:
        # decord cannot read the only frames of some flv, wmv and mxf
        if _has_few_frames(path):
            return PyavReader(path, info)
        raise


def _has_few_frames(path: Path) -> bool:
    with open_container(path) as (container, stream, _):
        packets = (packet for packet in container.demux(stream) if packet.size)
        return len(list(itertools.islice(packets, _FEW_FRAMES + 1))) <= _FEW_FRAMES


class DecordReader:
    """Reads a clip with decord.

    A clip that was cut without re-encoding starts at the key frame before the cut, and its edit list hides the frames
    before the cut. Hidden frames have negative times. decord counts them, but does not return them.
    """

    def __init__(self, path: Path, info: StreamInfo) -> None:
        import decord  # native code, so only the processes that decode load it

        decord.logging.set_level(decord.logging.FATAL)  # errors are reported per clip, as sentences
        self.info = info
        try:
            # decord replaces a frame that it cannot decode with a neighbouring frame, and raises an error only if more
            # than this share of the clip is affected
            self._reader = decord.VideoReader(str(path), num_threads=1, fault_tol=1e-9)
            spans = self._reader.get_frame_timestamp(np.arange(len(self._reader))).astype(np.float64)
        except Exception as error:
            reasons = [reason for fragment, reason in _OPEN_ERRORS.items() if fragment in str(error)]
            raise ClipError(reasons[0] if reasons else "cannot be read as a video") from error
        if len(spans) == 0:
            raise ClipError("has no frames")
        self.times, self._can_skip = self._frame_times(spans)
        self._wraps = info.container == "flv" and np.ptp(spans[:, 0]) > _WRAPPED_S

    def _frame_times(self, spans: np.ndarray) -> tuple[np.ndarray, bool]:
        """Returns `times` and whether frames can be skipped. `spans` [F, 2] is the start and the end of each frame."""
        starts, fps = spans[:, 0], float(self._reader.get_avg_fps())
        has_times = np.abs(starts) < _NO_TIME_S
        if self.info.container == "matroska" and len(starts) > _FEW_FRAMES and not has_times.all():
            raise ClipError(_BELOW_ZERO)
        # AVI with B-frames has no usable timestamps; a single frame may have the number that stands for no time
        if not np.all(np.diff(starts) > 0) or not has_times[0]:
            return np.arange(len(starts) + 1) * _frame_length(fps), False
        hidden = int((starts < -TIE_S).sum())
        if hidden == len(starts):
            raise ClipError("has no visible frames")
        length = spans[-1, 1] - starts[-1]
        if length <= 0:  # mp4 with VP9 does not store the duration of the last frame
            length = _frame_length(fps)
        return np.append(starts[hidden:], starts[-1] + length) - starts[hidden], hidden == 0

    def read(self, indices: list[int]) -> Iterator[np.ndarray]:
        """Yields frames as in `Reader`.

        Reads only forward and never skips across a key frame. decord would seek there, which returns wrong frames for
        open groups of pictures (the default of x265) and for containers without presentation times (AVI with B-frames).
        If there are hidden frames or no times, it does not skip to the right frame, so every frame is read.
        """
        try:
            key_frames = self._reader.get_key_indices() if self._can_skip else []
            position, frame = 0, np.empty(0)
            for index in indices:
                while position < index:
                    next_key = bisect.bisect_right(key_frames, position)
                    limit = min(index, key_frames[next_key] - 1 if next_key < len(key_frames) else index)
                    if not self._can_skip or limit <= position:
                        self._reader.next()
                        position += 1
                    else:
                        self._reader.skip_frames(limit - position)
                        position = limit
                if position == index:
                    frame = self._reader.next().asnumpy()
                    position += 1
                yield frame
        except Exception as error:
            raise ClipError(_BELOW_ZERO if self._wraps else _DAMAGED) from error


def _frame_length(fps: float) -> float:
    """Returns the duration of a frame in seconds at a stated rate."""
    return 1 / fps if 0 < fps < math.inf else _DEFAULT_FRAME_S


class PyavReader:
    """Reads a clip with PyAV.

    The clip starts at its first intact frame, since a stream that was cut anywhere starts with frames whose references
    are missing. From there on the decoder must return the frames that the container lists.
    """

    def __init__(self, path: Path, info: StreamInfo) -> None:
        self.info = info
        # a camera may store the two fields of an H.264 frame in two packets, the second one without a time
        self._lists_fields = info.interlaced and info.codec == "h264"
        self._frames = self._decode(path)
        first = next(self._frames, None)
        if first is None:
            raise ClipError("has no frames that can be decoded")
        self._frames = itertools.chain([first], self._frames)
        self._pts, self.times = self._frame_times(path, first)

    def _frame_times(self, path: Path, first: VideoFrame) -> tuple[list[int] | None, np.ndarray]:
        """Returns the presentation time of each frame in units of the stream, and `times`.

        AVI does not store presentation times, and neither does a container whose times increase although the codec
        reorders frames. Frame i is then presented at the i-th decoding time. No frame can be recognized by its time,
        so None is returned in place of the presentation times.

        Raises:
            ClipError: the container states no times, or times that repeat or jump back.
        """
        with open_container(path) as (container, stream, codec):
            packets = [
                (packet.pts, packet.dts, packet.duration or 0)
                for packet in itertools.dropwhile(lambda packet: not packet.is_keyframe, container.demux(stream))
                if packet.size and not packet.is_discard  # an edit list hides discarded frames
            ]
            rate, unit, reorders = stream.guessed_rate, float(stream.time_base or 0), codec.has_b_frames
        # no frame comes from the packets behind the key frame that are shown before it
        lost = 0
        if packets and packets[0][0] == first.pts is not None:
            shown_before = (pts is not None and pts <= first.pts for pts, _, _ in packets[1:])
            lost = len(list(itertools.takewhile(bool, shown_before)))
        # containers round decoding times, so they may fall a little; at the start of a joined file they fall by seconds
        decoded = [(dts, duration) for _, dts, duration in packets[lost:] if dts is not None]
        del packets[1 : 1 + lost]
        jumps_back = any((after - before) * unit < -1 for (before, _), (after, _) in itertools.pairwise(decoded))
        listed = sorted((pts, duration) for pts, _, duration in packets if pts is not None)
        if not listed:
            raise ClipError(f"has no frame times; {CONVERT} converts it")
        if len(listed) < len(packets) and not self._lists_fields:
            raise ClipError(f"lacks the times of some frames, as after damage; {CONVERT} converts it")
        is_increasing = [pts for pts, _, _ in packets] == [pts for pts, _ in listed]
        only_decoding_times = self.info.container == "avi" or (reorders and is_increasing)
        if only_decoding_times and len(decoded) == len(listed):
            listed = decoded
        else:
            listed = [(pts, duration) for pts, duration in listed if first.pts is None or pts >= first.pts]
        pts = [time for time, _ in listed]
        if not pts or jumps_back or len(set(pts)) < len(pts):
            raise ClipError(f"has frame times that repeat, like two files joined into one; {CONVERT} converts it")
        length = listed[-1][1] * unit or (float(1 / rate) if rate else _DEFAULT_FRAME_S)
        starts = (np.array(pts, np.float64) - pts[0]) * unit
        return None if only_decoding_times else pts, np.append(starts, starts[-1] + length)

    def _decode(self, path: Path) -> Iterator[VideoFrame]:
        """Yields the intact frames in the order of presentation.

        Raises:
            ClipError: a packet or frame after the first key frame is damaged.
        """
        from av import FFmpegError

        has_key, has_frame = False, False
        with open_container(path) as (container, stream, codec):
            # an empty packet repeats the last frame, but the decoder would take it for the end of the stream
            packets = (packet for packet in container.demux(stream) if packet.size)
            for packet in itertools.chain(packets, [None]):
                has_key |= packet is not None and packet.is_keyframe
                if has_key and packet is not None and packet.is_corrupt:
                    raise ClipError(_DAMAGED)
                try:
                    frames = codec.decode(packet)
                except FFmpegError as error:
                    if has_key:
                        raise ClipError(_DAMAGED) from error
                    continue
                for frame in frames:
                    if not frame.is_corrupt:
                        has_frame = True
                        yield frame
                    elif has_frame:
                        raise ClipError(_DAMAGED)

    def _numbered(self) -> Iterator[tuple[int, VideoFrame]]:
        """Yields each frame with its index in `times`.

        Raises:
            ClipError: a listed frame is missing.
        """
        steps = (1, 2) if self._lists_fields else (1,)
        index = -1
        for frame in self._frames:
            if self._pts is None:
                index += 1
            else:
                following = [index + step for step in steps if index + step < len(self._pts)]
                index = next((number for number in following if self._pts[number] == frame.pts), -1)
                if index < 0:
                    raise ClipError(_DAMAGED)
            yield index, frame

    def read(self, indices: list[int]) -> Iterator[np.ndarray]:
        """Yields frames as in `Reader`."""
        frames = self._numbered()
        number, frame = next(frames)
        following: tuple[int, VideoFrame] | None = None
        picture: np.ndarray | None = None
        for index in indices:
            while number < index:
                following = following or next(frames, None)
                if following is None:
                    if self._lists_fields and index == number + 1:
                        break  # the second field of the last frame
                    raise ClipError(_DAMAGED)
                if following[0] > index:
                    break  # a second field
                (number, frame), following = following, None
                picture = None
            if picture is None:
                picture = self._picture(frame)
            yield picture

    def _picture(self, frame: VideoFrame) -> np.ndarray:
        """Returns a frame as it is shown, uint8 [h, w, C]. The conversion to RGB is that of the ffmpeg program."""
        from av.video.reformatter import Interpolation

        picture = frame.reformat(format="rgb24", interpolation=Interpolation.BICUBIC, threads=1).to_ndarray()
        hidden = self.info.cropping
        picture = picture[hidden.top : len(picture) - hidden.bottom, hidden.left : picture.shape[1] - hidden.right]
        if self.info.transposed:
            picture = picture.swapaxes(0, 1)
        if self.info.flip_x:
            picture = picture[:, ::-1]
        if self.info.flip_y:
            picture = picture[::-1]
        return np.ascontiguousarray(picture)
