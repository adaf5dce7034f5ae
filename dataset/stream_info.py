"""Reads what a clip states about its video stream, and decides which decoder reads it.

The container and the codec state the shape of a pixel, the orientation of the picture, and its transfer curve. Errors
name the ffmpeg command that converts a clip that cannot be used.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dataset.containers import CONVERT, ClipError, moving_streams, open_container, side_data

if TYPE_CHECKING:
    from av import VideoCodecContext, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

DEINTERLACE = "ffmpeg -i IN -vf bwdif=send_frame -c:v libx264 -crf 14 OUT.mp4"
# Diffuse white of HDR, 203 nits (ITU-R BT.2408), becomes 234 of 255, and 1000 nits become 252. Levels below 60 % of
# diffuse white keep their brightness.
_TONE_MAP = (
    "ffmpeg -i IN -vf zscale=tin={transfer}:min=bt2020nc:pin=bt2020:t=linear:npl=203:p=bt709:m=gbr,format=gbrpf32le,"
    "tonemap=mobius:param=0.6:desat=0,zscale=t=bt709:m=bt709:r=tv,format=yuv420p -c:v libx264 -crf 14 OUT.mp4"
)
_DOLBY_VISION = (
    "ffmpeg -i IN -vf libplacebo=colorspace=bt709:color_primaries=bt709:color_trc=bt709:format=yuv420p "
    "-c:v libx264 -crf 14 OUT.mp4"
)
# Code point of the transfer curve (ITU-T H.273) -> its name, and its name in ffmpeg
HDR_TRANSFERS = {16: ("PQ", "smpte2084"), 18: ("HLG", "arib-std-b67")}
_UNSPECIFIED = 2
# mp4 sample entries of Dolby Vision without a layer that other decoders can show (profile 5), and what other containers
# state about it
_DOLBY_VISION_TAGS = ("dvh1", "dvhe", "dav1")
_DOLBY_VISION_ALONE = re.compile(r"DOVI configuration record:.*compatibility id: 0")
_CROPPING = re.compile(r"Frame Cropping: (\d+)/(\d+)/(\d+)/(\d+)", re.IGNORECASE)

_CODECS = {
    *("h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video", "msmpeg4v2", "msmpeg4v3", "h263", "flv1", "wmv1", "wmv2"),
    *("vp8", "vp9", "mjpeg", "jpeg2000", "prores", "dnxhd", "dvvideo", "cfhd", "hap"),
    *("ffv1", "huffyuv", "ffvhuff", "utvideo", "magicyuv", "rawvideo", "v210"),
}
# Container -> codecs that decord decodes correctly in it, by their names in libavformat and libavcodec. MPEG streams
# are not listed: decord skips their first frames. AVI and ASF have no presentation times, so decord may lose reordered
# frames.
_DECORD = {
    "mov": _CODECS,
    "matroska": _CODECS,
    "avi": _CODECS - {"h264", "hevc", "mpeg1video", "mpeg2video"},
    "flv": {"h264", "flv1"},
    "asf": {"wmv1", "wmv2", "msmpeg4v3"},
    "mxf": {"h264", "mpeg2video", "dnxhd"},
    "dv": {"dvvideo"},
    "yuv4mpegpipe": {"rawvideo"},
}
# Number of frames that ffmpeg writes to the header of an AVI before it knows them. decord reserves memory for as many.
_PLACEHOLDER = 2**30
# Codecs whose decoders drop a frame without its references. Others decode it or mark it as corrupt.
_NEEDS_REFERENCES = ("mpeg1video", "mpeg2video", "mpeg4")


class Cropping(NamedTuple):
    """Columns and rows of the stored picture that the container hides, in the order in which ffmpeg prints them."""

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0


_NOTHING_HIDDEN = Cropping()


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """The video stream of a clip. Codec, container and pixel format have their names in ffmpeg.

    Attributes:
        pixel_aspect: width of a stored pixel divided by its height, before the picture is transposed.
        transposed, flip_x, flip_y: how the stored picture is shown: rows and columns are exchanged, then the result is
            mirrored horizontally and vertically.
        has_lost_times: whether frames are reordered and dropped from a constant rate in AVI, which stores no times.
        lacks_references: whether it was cut at a key frame of MPEG-1, 2 or 4, and visible frames refer to lost frames.
        is_one_of_several: whether decord might read another moving stream of the container.
    """

    container: str
    codec: str
    pixel_format: str
    pixel_aspect: float
    transposed: bool
    flip_x: bool
    flip_y: bool
    interlaced: bool
    has_lost_times: bool
    lacks_references: bool = False
    cropping: Cropping = _NOTHING_HIDDEN
    is_one_of_several: bool = False

    @property
    def is_mirrored(self) -> bool:
        return (self.flip_x != self.flip_y) != self.transposed

    @property
    def is_special(self) -> bool:
        """Whether earlier versions read other pixels: of another stream, or outside the cropping."""
        return any(self.cropping) or self.is_one_of_several

    @property
    def uses_decord(self) -> bool:
        """Whether decord decodes the stream correctly.

        decord rotates pictures only in mov and mp4, mirrors none, misreads frames that are stored as rgb24, does not
        notice frames that were dropped from AVI with reordered frames, takes frames without references for damage,
        ignores the cropping of containers, and chooses another stream than the ffmpeg program.
        """
        is_turned = self.transposed or self.flip_x or self.flip_y
        return (
            self.codec in _DECORD.get(self.container, ())
            and self.pixel_format != "rgb24"
            and not self.is_mirrored
            and not self.has_lost_times
            and not self.lacks_references
            and not self.is_special
            and (self.container == "mov" or not is_turned)
        )


def read_stream_info(path: Path) -> StreamInfo:
    """Reads the stream information of a clip. Decodes one key frame, which states orientation and interlacing.

    Raises:
        ClipError: the file is not a video, its codec cannot be decoded, or it is HDR.
    """
    with open_container(path) as (container, stream, codec):
        aspect = _usable_aspect(float(stream.sample_aspect_ratio or 1))
        stated, pixel_format = int(codec.color_trc), codec.pix_fmt or ""
        name = container.format.name.split(",")[0]
        if name == "avi" and stream.frames >= _PLACEHOLDER:
            raise ClipError(f"states no length, as after a recorder was stopped; {CONVERT} converts it")
        has_lost_times = name == "avi" and codec.has_b_frames and len(stream.index_entries) < stream.frames
        streams = moving_streams(path, container)
        is_one_of_several = len(streams) > 1 or (bool(streams) and stream != container.streams.best("video"))
        stated_by_container = side_data(container, stream)
        cropping = _CROPPING.search(stated_by_container)
        frame = _first_key_frame(container, stream, codec)
        stated_by_frame: Any = frame.side_data if frame is not None else {}
        # broadcasts in HLG state the transfer of SDR in the header, and HLG in a message that only the decoder reads
        decoded = int(frame.color_trc) if frame is not None else stated
        transfer = decoded if decoded in HDR_TRANSFERS else stated
        if transfer in HDR_TRANSFERS:
            curve, ffmpeg_name = HDR_TRANSFERS[transfer]
            command = _TONE_MAP.format(transfer=ffmpeg_name)
            raise ClipError(f"is HDR ({curve}) and would be read too dark; {command} converts it")
        is_dolby_vision = codec.codec_tag in _DOLBY_VISION_TAGS or _DOLBY_VISION_ALONE.search(stated_by_container)
        if transfer == _UNSPECIFIED and is_dolby_vision:
            raise ClipError(
                f"is Dolby Vision and would be read in wrong colours; with Vulkan, {_DOLBY_VISION} converts it"
            )
        has_matrix = "DISPLAYMATRIX" in stated_by_frame
        matrix = np.frombuffer(stated_by_frame["DISPLAYMATRIX"], np.int32) if has_matrix else None
        return StreamInfo(
            name,
            codec.codec.canonical_name,
            pixel_format,
            aspect,
            *_orientation(matrix),
            interlaced=frame is not None and frame.interlaced_frame,
            has_lost_times=has_lost_times,
            lacks_references=codec.name in _NEEDS_REFERENCES and _lacks_references(path),
            cropping=Cropping(*map(int, cropping.groups())) if cropping else _NOTHING_HIDDEN,
            is_one_of_several=is_one_of_several,
        )


def _usable_aspect(stated: float) -> float:
    """Returns the stated pixel aspect ratio, or 1 if it is within 1 % of a square or implausible.

    Encoders round the ratio of square pixels, and faulty headers state ratios beyond 10.
    """
    return stated if abs(stated - 1) > 0.01 and 0.1 <= stated <= 10 else 1.0


def _orientation(matrix: np.ndarray | None) -> tuple[bool, bool, bool]:
    """Returns `transposed`, `flip_x` and `flip_y` of a display matrix int32 [9]; all False for other angles than 90.

    The matrix maps stored (x, y) to shown (a x + c y, b x + d y), with a, b, c, d at positions 0, 1, 3 and 4.
    """
    if matrix is None:
        return False, False, False
    a, b, c, d = (int(matrix[position]) for position in (0, 1, 3, 4))
    if b == c == 0:
        return False, a < 0, d < 0
    if a == d == 0:
        return True, c < 0, b < 0
    return False, False, False


def _first_key_frame(container: InputContainer, stream: VideoStream, codec: VideoCodecContext) -> VideoFrame | None:
    """Decodes the first key frame that can be decoded alone; returns None if there is none."""
    from av import FFmpegError

    for packet in container.demux(stream):
        if packet.is_keyframe and packet.size:
            try:
                frames = codec.decode(packet) + codec.decode(None)
            except FFmpegError:
                frames = []
            if frames:
                return frames[0]
            codec.flush_buffers()
    return None


def _lacks_references(path: Path) -> bool:
    """Returns whether the packet behind the first key frame is shown before it, but cannot be decoded."""
    from av import FFmpegError

    with open_container(path) as (container, stream, codec):
        packets = itertools.dropwhile(lambda packet: not packet.is_keyframe, container.demux(stream))
        key, following = next(packets, None), next(packets, None)
        if key is None or following is None or key.is_discard:  # an edit list hides discarded frames
            return False
        if key.pts is None or following.pts is None or following.pts > key.pts:
            return False
        try:
            return len(codec.decode(key) + codec.decode(following) + codec.decode(None)) < 2
        except FFmpegError:
            return False
