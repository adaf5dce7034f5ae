"""Shape of pixels, orientation, HDR and interlacing, as streams state them, and their effect on the trained frames."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from dataset.bucketing import ClipSample
from dataset.containers import ClipError
from dataset.decoders import open_reader
from dataset.file_index import INDEX_FILE, FileIndex
from dataset.images import image_size
from dataset.latent_cache import EncoderSettings
from dataset.manifest import Sample
from dataset.scan import scan_files
from dataset.summary import summarize
from dataset.video import ClipInfo, FrameSelection, Resolution, cropped, decode, probe
from tests.test_containers import H264, MPEG2, ffmpeg, shown_by_ffmpeg, write_clip

LOSSLESS = ("libx264", "-qp", 0, "-pix_fmt", "yuv420p")
RESOLUTION = Resolution(9, 480, 720)


def write_picture(path: Path, picture: np.ndarray, *options: object) -> None:
    """Writes a clip of nine frames at 8 fps that all show a grey picture uint8 [h, w]."""
    height, width = picture.shape
    raw = ("-f", "rawvideo", "-pix_fmt", "gray", "-s", f"{width}x{height}", "-r", 8, "-i", "-")
    ffmpeg(*raw, *options, path, source=picture.tobytes() * 9)


def write_circle(path: Path, pixel_aspect: str, *options: object) -> None:
    """Writes a clip of 720x576 pixels that shows a circle if its pixels are 64:45."""
    rows, columns = np.mgrid[:576, :720]
    is_inside = ((columns - 359.5) * 64 / 45) ** 2 + (rows - 287.5) ** 2 < 200**2
    write_picture(path, np.where(is_inside, 255, 0).astype(np.uint8), "-vf", f"setsar={pixel_aspect}", *options)


def extent(path: Path, mode: str, resolution: Resolution) -> tuple[int, int]:
    """Returns width and height of the white part of the first trained frame."""
    pixels = decode(path, FrameSelection(resolution, 8.0, mode, 0, resolution.frames))[0, :, :, 1].numpy() > 128
    rows, columns = np.nonzero(pixels)
    return int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1


@pytest.mark.parametrize(
    ("name", "options"), [("pal.mp4", LOSSLESS), ("pal.mpg", (*MPEG2, "-pix_fmt", "yuv420p"))], ids=["decord", "pyav"]
)
def test_pixels_that_are_not_square_keep_a_circle_round(tmp_path: Path, name: str, options: tuple):
    path = tmp_path / name
    write_circle(path, "64/45", "-c:v", *options)
    info = probe(path)
    assert (info.height, info.width) == (576, 1024)
    assert round(cropped(info, RESOLUTION), 3) == 0.156  # 16:9 to 3:2
    assert extent(path, "crop", RESOLUTION) == pytest.approx((400 * 480 / 576,) * 2, abs=2)
    assert extent(path, "stretch", Resolution(9, 576, 1024)) == pytest.approx((400, 400), abs=2)


def test_turned_pixels_are_turned(tmp_path: Path):
    write_circle(tmp_path / "pal.mp4", "64/45", "-c:v", *LOSSLESS)
    for turn in ((), ("-display_hflip",)):
        ffmpeg("-display_rotation", 90, *turn, "-i", tmp_path / "pal.mp4", "-c", "copy", tmp_path / "turned.mp4")
        info = probe(tmp_path / "turned.mp4")
        assert (info.height, info.width) == (1024, 576)
        assert extent(tmp_path / "turned.mp4", "crop", Resolution(9, 1024, 576)) == pytest.approx((400, 400), abs=2)


@pytest.mark.parametrize(("stated", "used"), [("0/1", 1), ("12/1", 1), ("1/12", 1), ("10240/10227", 1), ("2/1", 2)])
def test_implausible_pixels_count_as_square(tmp_path: Path, stated: str, used: float):
    write_picture(tmp_path / "clip.mkv", np.zeros((64, 96), np.uint8), "-vf", f"setsar={stated}", "-c:v", *LOSSLESS)
    info = probe(tmp_path / "clip.mkv")
    assert (info.pixel_aspect, info.width) == (used, 96 * used)


def test_container_overrides_the_codec(tmp_path: Path):
    write_picture(tmp_path / "clip.mp4", np.zeros((64, 96), np.uint8), "-vf", "setsar=2", "-c:v", *LOSSLESS)
    ffmpeg("-i", tmp_path / "clip.mp4", "-c", "copy", "-aspect", "4:1", tmp_path / "wide.mkv")
    assert probe(tmp_path / "wide.mkv").width == 256


@pytest.mark.parametrize("extension", ["mp4", "mkv"])
def test_all_orientations_match_ffmpeg(tmp_path: Path, extension: str):
    picture = np.random.default_rng(0).integers(0, 255, (4, 6), np.uint8).repeat(16, 0).repeat(16, 1)
    write_picture(tmp_path / "plain.mp4", picture, "-c:v", *LOSSLESS)
    path = tmp_path / f"turned.{extension}"
    for angle, flip in product((0, 90, 180, 270), ((), ("-display_hflip",))):
        ffmpeg("-display_rotation", angle, *flip, "-i", tmp_path / "plain.mp4", "-c", "copy", path)
        height, width = (96, 64) if angle in (90, 270) else (64, 96)
        (frame,) = open_reader(path).read([4])
        shown, _ = shown_by_ffmpeg(path, height, width)
        assert np.array_equal(frame, shown[4]), (angle, flip)


def pq(nits: float) -> float:
    """Encodes luminance as SMPTE ST 2084 does."""
    power = (nits / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


@pytest.mark.parametrize(
    ("transfer", "name", "white"), [("smpte2084", "PQ", pq(203)), ("arib-std-b67", "HLG", 0.75)], ids=["PQ", "HLG"]
)
def test_hdr_is_refused_with_a_command_that_keeps_white_white(tmp_path: Path, transfer, name, white):
    path, converted = tmp_path / "hdr.mp4", tmp_path / "sdr.mp4"
    colours = f"scale=out_color_matrix=bt2020:out_range=tv,setparams=color_trc={transfer}"
    picture = np.full((64, 96), round(white * 255), np.uint8)
    encoder = ("-c:v", "libx265", "-x265-params", "log-level=error", "-pix_fmt", "yuv420p10le")
    write_picture(path, picture, "-vf", f"format=gbrp,{colours}:color_primaries=bt2020:colorspace=bt2020nc", *encoder)
    with pytest.raises(ClipError, match=re.escape(f"is HDR ({name})")) as caught:
        probe(path)
    (command,) = re.findall("ffmpeg (.*OUT.mp4)", str(caught.value))
    ffmpeg(*({"IN": path, "OUT.mp4": converted}.get(word, word) for word in shlex.split(command)))
    shown, _ = shown_by_ffmpeg(converted, 64, 96)
    assert shown.min() > 225 and shown.max() < 245


def test_hlg_of_broadcasts_is_refused(tmp_path: Path):
    """The header states the transfer of BT.2020 SDR, and an SEI message of each key frame states HLG."""
    colours = "log-level=error:transfer=bt2020-10:colorprim=bt2020:colormatrix=bt2020nc:atc-sei=18"
    encoder = ("-c:v", "libx265", "-x265-params", colours, "-pix_fmt", "yuv420p10le")
    write_picture(tmp_path / "clip.mp4", np.zeros((64, 96), np.uint8), *encoder)
    with pytest.raises(ClipError, match=re.escape("is HDR (HLG)")):
        probe(tmp_path / "clip.mp4")


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.png", ("-pix_fmt", "rgb48be")), ("a.avif", ("-c:v", "libaom-av1", "-cpu-used", 8, "-pix_fmt", "yuv420p10le"))],
)
def test_hdr_images_are_refused(tmp_path: Path, name: str, options: tuple):
    for transfer, is_refused in (("smpte2084", True), ("bt709", False)):
        colours = f"setparams=color_trc={transfer}:color_primaries=bt2020"
        ffmpeg("-f", "lavfi", "-i", f"color=gray:size=96x64,{colours}", "-frames:v", 1, *options, tmp_path / name)
        if is_refused:
            with pytest.raises(ClipError, match=re.escape("is HDR (PQ)")):
                image_size(tmp_path / name)
        else:
            assert image_size(tmp_path / name) == (64, 96)


def test_dolby_vision_without_a_standard_layer_is_refused(tmp_path: Path):
    encoder = ("-c:v", "libx265", "-x265-params", "log-level=error", "-pix_fmt", "yuv420p10le", "-tag:v", "hvc1")
    write_picture(tmp_path / "clip.mp4", np.zeros((64, 96), np.uint8), *encoder)
    (tmp_path / "clip.mp4").write_bytes((tmp_path / "clip.mp4").read_bytes().replace(b"hvc1", b"dvh1"))
    with pytest.raises(ClipError, match="Dolby Vision"):
        probe(tmp_path / "clip.mp4")


def scan(folder: Path, *names: str):
    samples = [Sample(line, "a clip", str(folder / name), None) for line, name in enumerate(names, 1)]
    facts, errors = scan_files(samples, FileIndex(folder / "latent"), 1, 60, save_index=True)
    assert not errors
    return samples, facts


def test_index_of_the_previous_version_is_reused(tmp_path: Path):
    """The digest of an unchanged file is reused, and all its facts if decord reads it and its pixels are square."""
    (tmp_path / "latent").mkdir()
    write_clip(tmp_path / "plain.mp4", LOSSLESS, frames=9)
    write_clip(tmp_path / "stream.ts", LOSSLESS, frames=9)
    write_circle(tmp_path / "wide.mp4", "64/45", "-c:v", *LOSSLESS)
    names = ("plain.mp4", "stream.ts", "wide.mp4")
    scan(tmp_path, *names)
    path = tmp_path / "latent" / INDEX_FILE
    header, *rows = path.read_text().splitlines()
    old_info, old_digest = [5, 1.0, 0.9, 64, 96], "00" * 32
    old_rows = [[name, signature, old_digest, old_info] for name, signature, _, _ in map(json.loads, rows)]
    path.write_text("\n".join([str(int(header) - 1), *map(json.dumps, old_rows)]))
    _, facts = scan(tmp_path, "plain.mp4", "wide.mp4")
    assert facts[str(tmp_path / "plain.mp4")].info == ClipInfo(5, 1.0, 0.9, 64, 96)
    assert facts[str(tmp_path / "wide.mp4")].info.width == 1024
    assert all(entry.digest == bytes(32) for entry in facts.values())
    _, facts = scan(tmp_path, *names)  # the row that was not scanned again is not taken for a current one
    info = facts[str(tmp_path / "stream.ts")].info
    assert (info.frames, info.pixels_version) == (9, 3)


def test_only_clips_with_other_pixels_have_another_key(tmp_path: Path):
    """A clip that decord decodes correctly has the cache key of earlier versions."""
    for name, options in (
        ("plain.mp4", LOSSLESS),
        ("stream.ts", LOSSLESS),
        ("wide.mp4", (*LOSSLESS, "-aspect", "3:1")),
    ):
        write_clip(tmp_path / name, options, frames=9)
    samples, facts = scan(tmp_path, "plain.mp4", "stream.ts", "wide.mp4")
    for path, fact in facts.items():
        facts[path] = replace(fact, digest=bytes(32))  # one content, so that keys can be compared
    keys = {}
    for mode in ("stretch", "crop"):
        selection = FrameSelection(Resolution(9, 64, 96), 8.0, mode, 0, 9)
        clip_samples = [ClipSample(sample, selection, 0) for sample in samples]
        keys[mode] = [key.video[0] for key in EncoderSettings("v", "t", None).keys(clip_samples, facts)]
    plain, stream, wide = keys["stretch"]
    assert plain == wide == "video-5df8344342b70c3f9e2d483356e54885" != stream
    plain, stream, wide = keys["crop"]
    assert len({plain, stream, wide}) == 3


def test_interlaced_clips_are_noted(tmp_path: Path):
    write_clip(tmp_path / "field.vob", (*MPEG2, "-flags", "+ilme+ildct", "-f", "dvd"), frames=20)
    samples, facts = scan(tmp_path, "field.vob")
    selection = FrameSelection(Resolution(9, 64, 96), 8.0, "crop", 0, 9)
    lines = summarize([ClipSample(sample, selection, 0) for sample in samples], facts, "crop", 8.0)
    assert any("1 of 1 clips are interlaced" in line and "bwdif" in line for line in lines)


def insert_box(path: Path, name: bytes, content: bytes) -> None:
    """Inserts a box at the end of the description of the video stream of an mp4 file."""
    data = bytearray(path.read_bytes())
    assert data.index(b"mdat") < data.index(b"moov")  # the positions of the frames stay the same
    box = (len(content) + 8).to_bytes(4) + name + content
    starts = [data.index(parent, data.index(b"moov")) - 4 for parent in PARENTS]
    end = starts[-1] + int.from_bytes(data[starts[-1] : starts[-1] + 4])
    for start in starts:
        data[start : start + 4] = (int.from_bytes(data[start : start + 4]) + len(box)).to_bytes(4)
    data[end:end] = box
    path.write_bytes(data)


PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1")


@pytest.mark.parametrize("extension", ["mp4", "mkv"])
def test_hidden_pixels_are_cropped(tmp_path: Path, extension: str):
    write_clip(tmp_path / "clip.mp4", H264)
    aperture = (64, 1, 48, 1, 8, 1, 0, 1)  # width, height, and how far their centre is from that of the picture
    insert_box(tmp_path / "clip.mp4", b"clap", b"".join(number.to_bytes(4) for number in aperture))
    path = tmp_path / f"cropped.{extension}"
    ffmpeg("-i", tmp_path / "clip.mp4", "-c", "copy", path)
    shown, _ = shown_by_ffmpeg(path, 48, 64)
    (frame,) = open_reader(path).read([10])
    assert frame.shape == (48, 64, 3) and abs(frame.astype(np.int16) - shown[10]).max() < 3
    assert (probe(path).width, probe(path).pixels_version) == (64, 4)


def test_dolby_vision_is_recognized_in_mkv(tmp_path: Path):
    write_clip(tmp_path / "clip.mp4", H264)
    insert_box(tmp_path / "clip.mp4", b"dvcC", bytes([1, 0, 5 << 1, 0x0D, *[0] * 20]))  # profile 5
    ffmpeg("-i", tmp_path / "clip.mp4", "-c", "copy", "-strict", "unofficial", tmp_path / "clip.mkv")
    with pytest.raises(ClipError, match="is Dolby Vision"):
        probe(tmp_path / "clip.mkv")
