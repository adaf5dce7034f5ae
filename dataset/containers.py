"""Opens clips with PyAV, chooses the video stream, and reads what containers state about it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from av import Packet, VideoCodecContext
    from av.container import InputContainer
    from av.video.stream import VideoStream

CONVERT = "ffmpeg -i IN -c:v libx264 -crf 14 OUT.mp4"
EMPTY = "is empty; copy it again"
_IMAGES = ("image2", "gif", "apng", "webp")
_PLAYLISTS = ("hls", "dash", "concat", "imf")
# Containers whose length is stated, not estimated from the frames that are found, by their names in libavformat.
_STATE_LENGTH = ("matroska", "flv", "mov", "avi")
_ESTIMATED = "Estimating duration from bitrate"
# Frames and seconds by which the stated length may exceed the end of the last packet. Audio packets take up to 0.1 s.
_LENGTH_TOLERANCE = (2, 0.1)


class ClipError(Exception):
    """Raised for an unusable clip or image. The message continues a sentence that starts with its path."""


@contextmanager
def open_container(path: Path) -> Iterator[tuple[InputContainer, VideoStream, VideoCodecContext]]:
    """Opens a clip with PyAV and chooses its video stream, as `choose_stream` does.

    Raises:
        ClipError: the file is not a video, or has a codec without a decoder.
    """
    container, _ = _open(path)
    with container:
        name = container.format.name
        if name in _IMAGES or name.endswith("_pipe"):
            raise ClipError(f"is an image under the name of a video; rename it, or, if it moves, {CONVERT} converts it")
        if name in _PLAYLISTS:  # the index would not notice changes of the listed files
            raise ClipError("is a list of other files and not a video")
        stream, codec = choose_stream(path, container)
        codec.thread_count = 1  # each core has a decoding process already
        yield container, stream, codec


def _open(path: Path) -> tuple[InputContainer, str]:
    """Returns an open file and the warnings of libavformat. Raises ClipError."""
    import av  # native code, so only the processes that decode load it

    if path.is_file() and path.stat().st_size == 0:
        raise ClipError(EMPTY)
    av.logging.set_level(av.logging.WARNING)  # some errors have no text otherwise
    av.logging.set_skip_repeated(False)
    with av.logging.Capture() as messages:
        try:
            # tags that are not UTF-8 must not make a clip unusable
            container = av.open(str(path), metadata_errors="replace")
        except Exception as error:
            reason = messages[-1][2].strip() if messages else getattr(error, "strerror", None) or str(error)
            raise ClipError(f"cannot be read as a video ({reason})") from error
        finally:
            av.logging.set_level(None)
    return container, "".join(text for _, _, text in messages)


def choose_stream(path: Path, container: InputContainer) -> tuple[VideoStream, VideoCodecContext]:
    """Returns the video stream that the ffmpeg program converts by default, but never a still picture beside a video.

    It is the stream that is marked as the default one, otherwise the one with the most pixels.

    Raises:
        ClipError: there is no video stream, or its codec has no decoder.
    """
    from av.stream import Disposition
    from av.video.stream import VideoStream

    streams = moving_streams(path, container)
    if not streams and isinstance(container.streams.best("video"), VideoStream | None):
        raise ClipError("has no video, only sound or other data; or it was cut short")
    decodable = [(stream, stream.codec_context) for stream in streams if stream.codec_context is not None]
    if not decodable:
        raise ClipError(f"has a codec that cannot be decoded, or was cut short; {CONVERT} converts it if it is whole")
    return max(decodable, key=lambda item: (Disposition.default in item[0].disposition, item[1].width * item[1].height))


def moving_streams(path: Path, container: InputContainer) -> list[VideoStream]:
    """Returns the video streams without covers and other still pictures. If all have one frame, none of them is still.

    Matroska does not state numbers of frames, so packets are counted, but only if there are several streams.
    """
    from av.stream import Disposition

    streams = [stream for stream in container.streams.video if Disposition.attached_pic not in stream.disposition]
    if len(streams) < 2:
        return streams
    with _open(path)[0] as copy:
        packets = copy.demux(video=list(range(len(copy.streams.video))))
        counts = Counter(packet.stream_index for packet in packets if packet.size)
    return [stream for stream in streams if counts[stream.index] > 1] or streams


def side_data(container: Any, stream: VideoStream) -> str:
    """Returns the side data of a stream as the ffmpeg program prints it, which is the only form that PyAV offers."""
    import av

    av.logging.set_level(av.logging.INFO)
    try:
        listing = container.dumps_format()
    finally:
        av.logging.set_level(None)
    _, *parts = re.split(r"^ *Stream #0:(\d+)", listing, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True)).get(str(stream.index), "")


def check_length(path: Path, seconds: float, frame_s: float) -> None:
    """Checks that a clip does not end before the time that its container states.

    Args:
        seconds: end of the last frame that was found, from the start of the first one.
        frame_s: mean duration of a frame.

    Raises:
        ClipError: the clip was cut short.
    """
    container, warnings = _open(path)
    with container:
        name = container.format.name.split(",")[0]
        if name not in _STATE_LENGTH or _ESTIMATED in warnings or container.duration is None:
            return
        stream, _ = choose_stream(path, container)
        stated = container.duration / 1e6
        if name == "avi" and stream.average_rate:  # its duration is estimated, but its header states a number of frames
            stated = float(stream.frames / stream.average_rate)
        frames, audio_s = _LENGTH_TOLERANCE
        limit = stated - frames * frame_s - audio_s
        if seconds >= limit:
            return
        # sound or subtitles may be longer
        end = max((_end(packet) for packet in container.demux()), default=0.0)
    if end < limit:
        raise ClipError(
            f"is cut short: its header states {stated:.2f} s, but it ends after {max(end, seconds):.2f} s; "
            f"{CONVERT} keeps what is left"
        )


def _end(packet: Packet) -> float:
    """Returns the end of a packet in seconds; 0 if it has no time."""
    time = packet.dts if packet.pts is None else packet.pts
    return 0.0 if time is None else float((time + (packet.duration or 0)) * packet.time_base)
