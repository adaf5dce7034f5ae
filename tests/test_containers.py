"""Clips as phones, cameras, recorders and DVDs write them, decoded frame by frame against the ffmpeg program.

The clips show their frame number as eight bars, black for 0 and white for 1.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from dataset.containers import ClipError
from dataset.decoders import DecordReader, PyavReader, open_reader
from dataset.images import image_size
from dataset.stream_info import read_stream_info
from dataset.video import FrameSelection, Resolution, choose_frames, decode, probe

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
BITS = 8

H264 = ("libx264", "-g", 12)
HEVC = ("libx265", "-x265-params", "log-level=error:keyint=12:min-keyint=12")  # open groups of pictures by default
AV1 = ("libsvtav1", "-preset", 12, "-g", 12)
MPEG2 = ("mpeg2video", "-g", 12, "-bf", 2, "-q:v", 2)
MPEG4 = ("mpeg4", "-g", 12, "-q:v", 2)
DECORD, PYAV = DecordReader, PyavReader
# kind -> (file extension, reader, options of the encoder)
KINDS = {
    "phone h264": ("mp4", DECORD, H264),
    "phone hevc": ("mov", DECORD, (*HEVC, "-tag:v", "hvc1")),
    "phone hevc 10 bits": ("mp4", DECORD, (*HEVC, "-pix_fmt", "yuv420p10le")),
    "phone fragments": ("mp4", DECORD, (*H264, "-movflags", "+frag_keyframe+empty_moov")),
    "phone h263": ("3gp", DECORD, ("h263", "-g", 12, "-q:v", 2, "-s", "128x96")),
    "phone mpeg4": ("3gp", DECORD, MPEG4),
    "open groups": ("mkv", DECORD, ("libx264", "-x264-params", "open-gop=1:keyint=12:min-keyint=12")),
    "obs h264": ("mkv", DECORD, H264),
    "obs hevc": ("mkv", DECORD, HEVC),
    "obs av1": ("mkv", PYAV, AV1),
    "obs flv": ("flv", DECORD, H264),
    "obs flv hevc": ("flv", PYAV, HEVC),
    "obs ts": ("ts", PYAV, HEVC),
    "web av1": ("mp4", PYAV, AV1),
    "web vp8": ("webm", DECORD, ("libvpx", "-g", 12, "-b:v", "1M")),
    "web vp9": ("webm", DECORD, ("libvpx-vp9", "-g", 12, "-b:v", "1M", "-cpu-used", 8)),
    "web theora": ("ogv", PYAV, ("libtheora", "-g", 12, "-q:v", 8)),
    "camcorder": ("mts", PYAV, (*H264, "-f", "mpegts", "-mpegts_m2ts_mode", 1)),
    "camcorder interlaced": (
        *("mts", PYAV),
        (*H264, "-flags", "+ilme+ildct", "-field_order", "tt", "-f", "mpegts", "-mpegts_m2ts_mode", 1),
    ),
    "broadcast h264": ("ts", PYAV, ("libx264", "-g", 30)),
    "one key frame": ("ts", PYAV, ("libx264", "-g", 250)),
    "broadcast mpeg2": ("ts", PYAV, MPEG2),
    "intra refresh": ("ts", PYAV, ("libx264", "-x264-params", "intra-refresh=1:keyint=20:bframes=0")),
    "dvd": ("vob", PYAV, (*MPEG2, "-f", "dvd")),
    "dvd interlaced": ("vob", PYAV, (*MPEG2, "-flags", "+ilme+ildct", "-f", "dvd")),
    "mpg": ("mpg", PYAV, MPEG2),
    "mpeg1": ("mpg", PYAV, ("mpeg1video", "-g", 12, "-bf", 2, "-q:v", 2)),
    "avi mjpeg": ("avi", DECORD, ("mjpeg", "-q:v", 3, "-pix_fmt", "yuvj420p")),
    "avi mpeg4": ("avi", DECORD, (*MPEG4, "-bf", 2)),
    "avi h264": ("avi", PYAV, H264),
    "avi mpeg2": ("avi", PYAV, MPEG2),
    "avi raw": ("avi", DECORD, ("rawvideo", "-pix_fmt", "bgr24")),
    "wmv": ("wmv", DECORD, ("wmv2", "-g", 12, "-q:v", 2)),
    "mxf mpeg2": ("mxf", DECORD, MPEG2),
    "mxf dnxhd": ("mxf", DECORD, ("dnxhd", "-profile:v", "dnxhr_lb", "-s", "256x128", "-pix_fmt", "yuv422p")),
    "mov prores": ("mov", DECORD, ("prores_ks", "-pix_fmt", "yuv422p10le")),
    "mov mjpeg": ("mov", DECORD, ("mjpeg", "-q:v", 3, "-pix_fmt", "yuvj420p")),
    "mov jpeg2000": ("mov", PYAV, ("jpeg2000", "-pix_fmt", "rgb24")),
    "mov animation": ("mov", PYAV, ("qtrle", "-pix_fmt", "rgb24")),
    "mov vvc": ("mp4", PYAV, ("libvvenc", "-preset", "faster", "-pix_fmt", "yuv420p10le")),
    "dv": ("dv", DECORD, ("dvvideo", "-s", "720x576", "-r", 25)),
}


def ffmpeg(*args: object, source: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([FFMPEG, "-y", *map(str, args)], input=source, check=True, capture_output=True)


def write_clip(path: Path, options: tuple[object, ...], frames: int = 60, size=(96, 64)) -> None:
    """Writes a clip of 25 frames per second that shows its frame numbers."""
    bits = np.arange(frames)[:, None] >> np.arange(BITS) & 1
    rows = np.repeat(np.where(bits, 235, 16).astype(np.uint8), size[0] // BITS, axis=1)
    pictures = np.repeat(rows[:, None], size[1], axis=1)
    raw = ("-f", "rawvideo", "-pix_fmt", "gray", "-s", f"{size[0]}x{size[1]}", "-r", 25, "-i", "-")
    pixel_format = () if "-pix_fmt" in options else ("-pix_fmt", "yuv420p")
    ffmpeg(*raw, "-sws_flags", "neighbor", *pixel_format, "-c:v", *options, path, source=pictures.tobytes())


def read_numbers(pictures: np.ndarray) -> list[int]:
    """Reads the frame numbers of pictures uint8 [F, h, w, 3]. A picture that is not clean gives -1."""
    _, height, width, _ = pictures.shape
    middle = pictures[:, height // 2 - 8 : height // 2 + 8, :, 1].reshape(len(pictures), 16, BITS, width // BITS)
    bars = middle[..., width // BITS // 4 : -width // BITS // 4].mean((1, 3))
    is_clean = np.minimum(bars, 255 - bars).max(1) < 90
    return np.where(is_clean, ((bars > 128) << np.arange(BITS)).sum(1), -1).tolist()


def shown_by_ffmpeg(path: Path, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the frames that the ffmpeg program decodes, uint8 [F, h, w, 3], and their times from the first one."""
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    result = ffmpeg("-i", path, "-map", "0:v", "-vf", "showinfo", "-fps_mode", "passthrough", *raw)
    times = np.array([float(time) for time in re.findall(rb"pts_time:(\S+)", result.stderr)])
    return np.frombuffer(result.stdout, np.uint8).reshape(-1, height, width, 3), times - times[0]


def check_against_ffmpeg(path: Path) -> list[int]:
    """Checks the frames of two selections. Returns the numbers that all frames of ffmpeg show."""
    info = probe(path)
    size = next(open_reader(path).read([0])).shape[:2]
    shown, times = shown_by_ffmpeg(path, *size)
    assert info.frames == len(shown)
    ends = np.append(times, times[-1] + 1 / 25)
    for rate, first, frames in ((8.0, 0, 9), (25.0, 10, 9)):
        selection = FrameSelection(Resolution(frames, *size), rate, "stretch", first, frames)
        expected = shown[choose_frames(ends, selection)]
        pixels = decode(path, selection).numpy()
        assert read_numbers(pixels) == read_numbers(expected)
        assert abs(pixels.astype(np.int16) - expected).mean() < 2
    return read_numbers(shown)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_frames_match_ffmpeg(tmp_path: Path, kind: str):
    extension, reader, options = KINDS[kind]
    path = tmp_path / f"clip.{extension}"
    write_clip(path, options, frames=20 if kind in ("dv", "mov vvc") else 60)
    assert isinstance(open_reader(path), reader)
    numbers = check_against_ffmpeg(path)
    assert numbers == list(range(len(numbers))) and len(numbers) >= 20
    assert probe(path).interlaced == (kind in ("camcorder interlaced", "dvd interlaced", "dv"))


@pytest.mark.parametrize(
    ("name", "options", "cut_at"),
    [
        ("h264.ts", ("libx264", "-x264-params", "keyint=30:min-keyint=30"), 0.3),
        ("hevc.ts", HEVC, 0.4),
        ("mpeg2.ts", MPEG2, 0.4),
        ("mpeg2.mpg", MPEG2, 0.4),
    ],
)
def test_stream_cut_in_the_middle_starts_at_its_first_intact_frame(tmp_path: Path, name, options, cut_at):
    path = tmp_path / name
    write_clip(path, options)
    content = path.read_bytes()
    path.write_bytes(content[int(len(content) * cut_at) :])
    numbers = check_against_ffmpeg(path)
    assert numbers == list(range(60 - len(numbers), 60)) and 5 < len(numbers) < 48


@pytest.mark.parametrize("name", ["h264.ts", "mpeg2.ts", "mpeg2.mpg"])
def test_lost_bytes_are_an_error(tmp_path: Path, name: str):
    path = tmp_path / name
    write_clip(path, H264 if "h264" in name else MPEG2)
    content = path.read_bytes()
    lost = len(content) // 2 // 188 * 188  # whole packets of a transport stream
    path.write_bytes(content[:lost] + content[lost + 4 * 188 :])
    with pytest.raises(ClipError, match="is damaged"):
        decode(path, FrameSelection(Resolution(17, 64, 96), 8.0, "stretch", 0, 17))


@pytest.mark.parametrize("codec", [MPEG4, (*MPEG4, "-bf", 2), H264], ids=["mpeg4", "mpeg4 with B-frames", "h264"])
def test_frames_dropped_from_avi_keep_the_speed(tmp_path: Path, codec: tuple):
    write_clip(tmp_path / "clip.avi", (*codec, "-vf", "select='not(mod(n,3))'", "-fps_mode", "passthrough"))
    assert check_against_ffmpeg(tmp_path / "clip.avi") == list(range(0, 60, 3))
    assert probe(tmp_path / "clip.avi").last == pytest.approx(57 / 25, abs=0.001)


def test_avi_of_a_stopped_recorder_is_an_error(tmp_path: Path):
    """The header of an AVI that cannot be sought, such as a pipe, states 2^30 frames, which decord dies of."""
    write_clip(tmp_path / "clip.mp4", H264)
    piped = ffmpeg("-i", tmp_path / "clip.mp4", "-c:v", "mjpeg", "-pix_fmt", "yuvj420p", "-f", "avi", "-")
    (tmp_path / "clip.avi").write_bytes(piped.stdout)
    with pytest.raises(ClipError, match="states no length"):
        probe(tmp_path / "clip.avi")


def test_empty_packets_repeat_frames(tmp_path: Path):
    write_clip(tmp_path / "clip.ogv", ("libtheora", "-q:v", 8, "-vf", "fps=50"))
    assert check_against_ffmpeg(tmp_path / "clip.ogv") == list(range(60))


def test_incomplete_last_frame_is_an_error(tmp_path: Path):
    path = tmp_path / "mpeg2.ts"
    write_clip(path, MPEG2)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.8)])
    reader = open_reader(path)
    *_, last = range(len(reader.times) - 1)
    with pytest.raises(ClipError, match="is damaged"):
        list(reader.read([0, last]))


def test_second_fields_may_be_listed(tmp_path: Path):
    """Cameras may list the two fields of a frame as two packets. No encoder at hand does, so the list is made here."""
    path = tmp_path / "camcorder.mts"
    write_clip(path, KINDS["camcorder interlaced"][2])
    reader = PyavReader(path, read_stream_info(path))
    assert reader.info.interlaced and reader._pts is not None
    reader._pts = [time for start in reader._pts for time in (start, start + 1800)]
    assert read_numbers(np.stack(list(reader.read([0, 1, 2, 5, 10, 118, 119])))) == [0, 0, 1, 2, 5, 59, 59]


def test_joined_streams_are_an_error(tmp_path: Path):
    write_clip(tmp_path / "one.ts", H264)
    (tmp_path / "two.ts").write_bytes((tmp_path / "one.ts").read_bytes() * 2)
    with pytest.raises(ClipError, match=r"two files joined into one; ffmpeg .* converts it"):
        probe(tmp_path / "two.ts")


def test_last_frame_of_avi_without_times(tmp_path: Path):
    """Skipping in decord returns another frame, or an error, in four of five attempts."""
    write_clip(tmp_path / "clip.avi", (*MPEG4, "-bf", 2), frames=5)
    for _ in range(10):
        reader = open_reader(tmp_path / "clip.avi")
        assert isinstance(reader, DecordReader) and read_numbers(np.stack(list(reader.read([4])))) == [4]


@pytest.mark.parametrize(
    ("extension", "options", "frames"),
    [
        *(("mkv", HEVC, 1), ("avi", (*MPEG4, "-bf", 2), 1), ("flv", H264, 1), ("flv", H264, 3)),
        *(("wmv", KINDS["wmv"][2], 3), ("mxf", MPEG2, 1)),
    ],
)
def test_few_frames(tmp_path: Path, extension: str, options: tuple, frames: int):
    """A single frame may have no time, and decord cannot open some clips of up to three frames."""
    path = tmp_path / f"clip.{extension}"
    write_clip(path, options, frames=frames)
    assert (probe(path).frames, round(probe(path).fps)) == (frames, 25)
    assert read_numbers(np.stack(list(open_reader(path).read([*range(frames)])))) == [*range(frames)]


@pytest.mark.parametrize("extension", ["mkv", "avi", "mxf", "mov"])
def test_cut_drops_frames_without_references(tmp_path: Path, extension: str):
    write_clip(tmp_path / f"whole.{extension}", MPEG2)
    path = tmp_path / f"cut.{extension}"
    ffmpeg("-ss", "1.3", "-i", tmp_path / f"whole.{extension}", "-c", "copy", "-use_editlist", 0, path)
    assert check_against_ffmpeg(path) == list(range(24, 60))


@pytest.mark.parametrize("extension", ["mkv", "mp4"])
@pytest.mark.parametrize(
    ("first", "default", "is_second"),
    [("cover.png", 0, True), ("cover.png", 1, True), ("large.mp4", 0, False), ("large.mp4", 1, True)],
)
def test_stream_is_the_default_of_ffmpeg_but_no_picture(tmp_path: Path, first, default, is_second, extension):
    """The first stream is larger, the second one shows its frame numbers."""
    path = tmp_path / f"clip.{extension}"
    frames = ("-frames:v", 1 if first == "cover.png" else 25)
    ffmpeg("-f", "lavfi", "-i", "testsrc=size=256x128:rate=25", *frames, tmp_path / first)
    write_clip(tmp_path / "second.mp4", H264)
    marks = ("-disposition:v", 0, f"-disposition:v:{default}", "default")
    ffmpeg("-i", tmp_path / first, "-i", tmp_path / "second.mp4", "-map", 0, "-map", 1, "-c", "copy", *marks, path)
    info = probe(path)
    assert (info.frames, info.width) == ((60, 96) if is_second else (25, 256))
    if is_second:
        assert read_numbers(np.stack(list(open_reader(path).read([0, 17, 59])))) == [0, 17, 59]


def test_empty_file_is_called_that(tmp_path: Path):
    (tmp_path / "clip.mp4").touch()
    for read in (probe, image_size):
        with pytest.raises(ClipError, match="is empty"):
            read(tmp_path / "clip.mp4")


def test_playlist_is_an_error(tmp_path: Path):
    write_clip(tmp_path / "clip.ts", H264)
    ffmpeg("-i", tmp_path / "clip.ts", "-c", "copy", tmp_path / "list.m3u8")
    with pytest.raises(ClipError, match="is a list of other files"):
        probe(tmp_path / "list.m3u8")


def test_stream_without_frame_times_is_an_error(tmp_path: Path):
    write_clip(tmp_path / "clip.h264", H264)
    with pytest.raises(ClipError, match=r"no frame times; ffmpeg .* converts it"):
        probe(tmp_path / "clip.h264")


def test_hidden_frames_of_av1_are_not_trained(tmp_path: Path):
    write_clip(tmp_path / "whole.mp4", AV1)
    ffmpeg("-ss", "1.2", "-i", tmp_path / "whole.mp4", "-c", "copy", tmp_path / "cut.mp4")
    assert check_against_ffmpeg(tmp_path / "cut.mp4") == list(range(30, 60))
    content = bytearray((tmp_path / "cut.mp4").read_bytes())
    duration = slice(content.index(b"elst") + 12, content.index(b"elst") + 16)
    content[duration] = (int.from_bytes(content[duration]) * 2 // 3).to_bytes(4)  # the last third is hidden too
    (tmp_path / "cut.mp4").write_bytes(content)
    assert check_against_ffmpeg(tmp_path / "cut.mp4") == list(range(30, 50))
