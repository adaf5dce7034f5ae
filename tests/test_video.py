"""Selection of frames by time, resizing, and decoding of real files."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import decord
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from imageio.v3 import imwrite
from PIL import Image

from dataset.containers import ClipError
from dataset.decoders import open_reader
from dataset.images import load_image
from dataset.video import (
    NATIVE_STRIDE,
    ClipInfo,
    FrameSelection,
    Resolution,
    choose_frames,
    decode,
    frames_available,
    probe,
    resize,
    stretch,
)


def times(frames: int, fps: float) -> np.ndarray:
    return np.arange(frames + 1) / fps


def selection(frames: int, rate=8.0, first=0, span=None, size=(64, 96), mode="stretch") -> FrameSelection:
    return FrameSelection(Resolution(frames, *size), rate, mode, first, span or frames)


def info(frames: int, fps: float, height=64, width=96) -> ClipInfo:
    return ClipInfo(frames, frames / fps, (frames - 1) / fps, height, width)


def test_frames_are_selected_by_time():
    assert choose_frames(times(49, 8), selection(49)) == list(range(49))
    # 30 fps to 8 fps: every 3.75th frame, six seconds for 49 frames
    chosen = choose_frames(times(300, 30), selection(49))
    assert chosen[:5] == [0, 4, 8, 11, 15] and chosen[-1] == 180
    assert choose_frames(times(10, 8), selection(9, 16.0)) == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert choose_frames(times(300, 30), selection(5, first=8)) == [30, 34, 38, 41, 45]
    assert choose_frames(times(4, 8), selection(9)) == [0, 1, 2, 3, 3, 3, 3, 3, 3]  # padded
    assert [frames_available(info(49, rate), rate) for rate in (8, 24, 30000 / 1001, 30)] == [49] * 4
    # "30 fps" television material has 29.97 fps and must not run out of frames at the end
    assert choose_frames(times(49, 30000 / 1001), selection(49, 30.0))[-1] == 48


def test_frames_spread_over_the_clip():
    assert choose_frames(times(97, 30), selection(49, NATIVE_STRIDE, span=97)) == list(range(0, 97, 2))
    assert choose_frames(times(60, 24), selection(3, NATIVE_STRIDE, first=20, span=20)) == [20, 30, 39]
    assert choose_frames(times(4, 24), selection(9, NATIVE_STRIDE, span=4)) == [0, 1, 2, 3, 3, 3, 3, 3, 3]  # padded


def test_frames_are_selected_by_time_at_a_variable_rate():
    """One second at 24 fps and one at 6 fps give the same number of frames at 6 fps."""
    starts = np.concatenate([np.arange(24) / 24, 1 + np.arange(7) / 6])
    assert choose_frames(starts, selection(12, 6.0)) == [0, 4, 8, 12, 16, 20, 24, 25, 26, 27, 28, 29]


def test_images_are_loaded_as_a_viewer_shows_them(tmp_path: Path):
    size = Resolution(1, 16, 32)
    turned = Image.new("RGB", (16, 32))
    turned.paste("white", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise: the top moves to the right
    turned.save(tmp_path / "turned.png", exif=exif)
    pixels = load_image(tmp_path / "turned.png", size, "stretch")
    assert pixels[:, :16].max() == 0 and pixels[:, 16:].min() == 255
    Image.fromarray(np.full((16, 32), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert load_image(tmp_path / "deep.png", size, "stretch").unique().tolist() == [128]
    Image.new("RGBA", (32, 16), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png", size, "stretch").min() == 255


def test_decoded_frames_match_decord(tmp_path: Path):
    path = tmp_path / "noise.mp4"
    imwrite(path, np.random.default_rng(0).integers(0, 255, (30, 64, 96, 3), np.uint8), fps=24)
    clip_info = probe(path)
    assert (clip_info.frames, round(clip_info.fps), clip_info.height, clip_info.width) == (30, 24, 64, 96)
    pixels = decode(path, selection(9))
    expected = decord.VideoReader(str(path)).get_batch(range(0, 27, 3)).asnumpy()
    assert pixels.shape == (9, 64, 96, 3)
    assert np.array_equal(pixels.numpy(), expected)
    mirrored = decode(path, replace(selection(9), flipped=True))
    assert torch.equal(mirrored, pixels.flip(2))


def test_resize_modes():
    frame = torch.zeros(1, 3, 100, 300, dtype=torch.uint8)
    frame[..., 100:200] = 255  # the middle third is white
    target = Resolution(1, 64, 64)
    assert resize(frame, target, "crop")[..., 1:-1].min() == 255  # only the middle remains
    stretched = resize(frame, target, "stretch")
    assert stretched.shape == (1, 3, 64, 64)
    assert stretched[..., :18].max() == 0 and stretched[..., 26:38].min() == 255
    assert stretch(info(1, 1, 480, 720), Resolution(1, 480, 720)) == 0
    assert round(stretch(info(1, 1, 480, 720), Resolution(1, 480, 480)), 3) == 0.5


def ffmpeg(*args: object) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", *map(str, args)]
    return subprocess.run(command, check=True, capture_output=True).stdout


SOURCE = ("-f", "lavfi", "-i", "testsrc2=size=96x64:rate=30:duration=4")


def make_clip(kind: str, folder: Path) -> Path:
    """Writes a clip as users have them: various codecs and rates, or cut without re-encoding."""
    path = folder / f"{kind}.{'avi' if kind == 'mpeg4' else 'mp4'}"
    plain = folder / "plain.mp4"
    ffmpeg(*SOURCE, "-c:v", "libx264", "-g", "48", "-pix_fmt", "yuv420p", plain)
    coders = {
        "hevc": ("libx265", "-x265-params", "log-level=error:keyint=48:min-keyint=48"),  # open groups of pictures
        "mpeg4": ("mpeg4", "-g", "48", "-bf", "2", "-q:v", "2"),  # no presentation times
        "vp9": ("libvpx-vp9", "-g", "48"),
        "variable": ("libx264", "-vf", "select='not(mod(n,3))+gt(n,60)'", "-fps_mode", "vfr"),
    }
    if kind == "cut":
        ffmpeg("-ss", "0.7", "-i", plain, "-c", "copy", path)
    else:
        ffmpeg(*SOURCE, "-c:v", *coders[kind], "-pix_fmt", "yuv420p", path)
    return path


@pytest.mark.parametrize("kind", ["hevc", "mpeg4", "vp9", "variable", "cut"])
def test_decoded_frames_match_ffmpeg(tmp_path: Path, kind: str):
    """Each decoded frame is closest to the frame that ffmpeg shows at its index, from the start and from the middle."""
    path = make_clip(kind, tmp_path)
    shown = np.frombuffer(
        ffmpeg("-i", path, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"), np.uint8
    ).reshape(-1, 64, 96, 3)
    clip_info = probe(path)
    assert (clip_info.frames, clip_info.height, clip_info.width) == (len(shown), 64, 96)
    times = open_reader(path).times
    for frame_selection in (selection(17), selection(9, 30.0, first=40)):
        pixels = decode(path, frame_selection).numpy().astype(int)
        for frame, index in zip(pixels, choose_frames(times, frame_selection), strict=True):
            near = range(max(index - 6, 0), min(index + 7, len(shown)))
            differences = {number: abs(shown[number] - frame).mean() for number in near}
            assert min(differences, key=differences.__getitem__) == index


SONG = ("-f", "lavfi", "-i", "sine=duration=1", "-f", "lavfi", "-i", "color", "-frames:v", 1)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: ffmpeg("-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac", path), "has no video, only sound"),
        (
            lambda path: ffmpeg(*SONG, "-c:v", "mjpeg", "-disposition:v", "attached_pic", path),
            "has no video, only sound",
        ),
        (lambda path: Image.new("RGB", (64, 64)).save(path, "PNG"), "is an image"),
        (lambda path: Image.new("RGB", (64, 64)).save(path, "JPEG"), "is an image"),
    ],
)
def test_error_names_the_reason(tmp_path: Path, make, reason: str):
    make(tmp_path / "odd.mp4")
    with pytest.raises(ClipError, match=reason):
        probe(tmp_path / "odd.mp4")


def test_single_frame_is_a_clip(tmp_path: Path):
    ffmpeg(*SOURCE, "-frames:v", 1, tmp_path / "one.mp4")
    clip_info = probe(tmp_path / "one.mp4")
    assert clip_info.frames == 1 and clip_info.seconds > 0 and frames_available(clip_info, 8.0) == 1
    assert len(decode(tmp_path / "one.mp4", selection(9)).unique(dim=0)) == 1


@pytest.mark.parametrize("size", [0.5, 0.97])
def test_truncated_clip_is_refused(tmp_path: Path, size: float):
    path = tmp_path / "cut.mp4"
    ffmpeg(*SOURCE, "-c:v", "libx264", "-movflags", "+faststart", path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * size)])
    with pytest.raises(ClipError, match="damaged or cut short"):
        probe(path)


@pytest.mark.parametrize("content", [b"", b"not a video", b"\0" * 5000])
def test_other_files_are_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    with pytest.raises(ClipError):
        probe(path)
