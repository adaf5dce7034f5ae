"""Reads a part of a long clip without decoding what is before it.

The readers decode forward from the start of a file, since seeking by frame number returns wrong frames in many of them.
Here the packets of the part, from the key frame before it on, are copied to a file in memory, and a reader decodes that
file from its start. Frames are found by the presentation times that the container states.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dataset.containers import ClipError, open_container
from dataset.decoders import TIE_S, Reader, open_reader
from dataset.parts import FrameRange
from dataset.stream_info import StreamInfo, read_stream_info

if TYPE_CHECKING:
    from av import Packet, VideoCodecContext
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Container -> the one that its packets are copied to. Others have no reliable index of key frames.
_COPY_TO = {"mov": "mov", "matroska": "matroska"}
# Codecs that mov does not hold, but mp4 does.
_MP4_CODECS = ("vp8", "vp9", "av1")
# A seek goes to the last key frame that is decoded before the part. Its frame may be shown later, so the search begins
# earlier by this many seconds, then by four times as many, and so on.
_MARGIN_S = 0.5
# Larger parts are read from the file: their packets are copied to memory.
_MAX_BYTES = 2**30


def presentation_times(path: Path, reader: Reader) -> list[int] | None:
    """Returns the presentation time of each frame of a reader in units of the stream.

    Returns None if the container does not find frames by their times, or states other times than the reader.
    """
    if reader.info.container not in _COPY_TO or reader.info.interlaced:
        return None
    with open_container(path) as (container, stream, _):
        packets = (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)
        pts = sorted(packet.pts for packet in packets if packet.pts is not None)
        unit = float(stream.time_base or 0)
    count = len(reader.times) - 1
    pts = pts[max(len(pts) - count, 0) :]  # readers skip frames at the start whose references are missing
    if len(pts) != count or len(set(pts)) != count:
        return None
    starts = (np.array(pts, np.float64) - pts[0]) * unit
    # decord gives times in single precision
    return pts if np.allclose(starts, reader.times[:-1], rtol=1e-6, atol=TIE_S) else None


@contextmanager
def open_at(path: Path, frames: FrameRange) -> Iterator[tuple[Reader, int] | None]:
    """Opens a clip near a part. Gives a reader and the index that the first frame of the part has in it.

    Gives None if the part cannot be reached by a seek.
    """
    if frames.pts is None or frames.first == 0:
        yield None
        return
    memory = os.memfd_create("part")
    try:
        copy = Path(f"/proc/self/fd/{memory}")
        info = read_stream_info(path)
        try:
            times = _copy_packets(path, copy, info, frames.pts)
            opened = _locate(open_reader(copy, info), times, frames) if times is not None else None
        except (ClipError, OSError, ValueError):  # FFmpegError is one of the last two
            opened = None
        yield opened
    finally:
        os.close(memory)


def _locate(reader: Reader, times: np.ndarray, frames: FrameRange) -> tuple[Reader, int] | None:
    """Returns the reader and the index of the first frame, or None if the reader has other frames than were copied.

    Args:
        times: start of each copied frame in seconds from the first frame of the part, in increasing order.
    """
    first = int(np.searchsorted(times, -TIE_S))
    stop = first + frames.stop - frames.first
    starts = reader.times[:-1]
    if len(starts) != len(times) or stop > len(times) or not np.allclose(starts, times - times[0], atol=1e-3):
        return None
    # the copy rounds times to its own unit
    reader.times = np.append(times - times[0], reader.times[-1])
    return reader, first


def _copy_packets(path: Path, copy: Path, info: StreamInfo, pts: tuple[int, int]) -> np.ndarray | None:
    """Copies the packets that the frames from pts[0] to pts[1] need. Returns their times as in `_locate`, or None."""
    import av

    with open_container(path) as (container, stream, codec):
        packets = _packets_at(container, stream, pts)
        if packets is None or not _is_intact(codec, packets[0]):
            return None
        key = packets[0].pts or 0
        # the references of these pictures are before the key frame, and the reader would skip or refuse them
        packets = packets[:1] + [packet for packet in packets[1:] if (packet.pts or 0) > key]
        shown = sorted(packet.pts or 0 for packet in packets)
        times = (np.array(shown) - pts[0]) * float(stream.time_base or 0)
        if any(packet.dts is None for packet in packets):  # matroska states no decoding times
            delay = max(time - (packet.pts or 0) for packet, time in zip(packets, shown, strict=True))
            for packet, time in zip(packets, shown, strict=True):
                packet.dts = time - delay
        kind = "mp4" if info.codec in _MP4_CODECS and info.container == "mov" else _COPY_TO[info.container]
        with av.open(str(copy), "w", format=kind) as output:
            target = output.add_stream_from_template(stream, opaque=True)
            target.time_base = stream.time_base
            for packet in packets:
                packet.stream = target
                output.mux(packet)
    return times


def _packets_at(container: InputContainer, stream: VideoStream, pts: tuple[int, int]) -> list[Packet] | None:
    """Returns the packets from a key frame that is shown at pts[0] or before, to the last one shown by pts[1]."""
    unit, margin = float(stream.time_base or 1), _MARGIN_S
    while True:
        container.seek(max(pts[0] - round(margin / unit), 0), stream=stream)
        packets: list[Packet] = []
        size = 0
        for packet in container.demux(stream):
            if not packet.size or (not packets and not packet.is_keyframe):
                continue
            if packet.pts is None or packet.is_discard:
                return None
            if not packets and packet.pts > pts[0]:
                break
            if packet.dts is not None and packet.dts > pts[1]:
                return packets
            packets.append(packet)
            size += packet.size
            if size > _MAX_BYTES:
                return None
        else:
            return packets or None
        if margin > pts[0] * unit:
            return None
        margin *= 4


def _is_intact(codec: VideoCodecContext, key: Packet) -> bool:
    """Whether a key frame refers to no other frame. Containers also mark the frames from which a picture recovers."""
    from av import FFmpegError
    from av.video.frame import PictureType

    try:
        frames = codec.decode(key) + codec.decode(None)
    except FFmpegError:
        return False
    return len(frames) == 1 and frames[0].pict_type == PictureType.I and not frames[0].is_corrupt
