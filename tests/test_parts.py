"""Parts of clips: their frames and pixels, their place in the scan and in the cache keys."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from dataset.bucketing import SamplingPolicy
from dataset.file_index import FileIndex
from dataset.latent_cache import EncoderSettings
from dataset.manifest import Sample, Table, read_manifest
from dataset.parts import Crop, Part
from dataset.scan import ScanResult, scan_and_sample
from dataset.seeking import open_at
from dataset.video import NATIVE_STRIDE, Resolution, decode
from tests.test_video import SOURCE, ffmpeg

SIZE = Resolution(9, 32, 48)
POLICY = SamplingPolicy((SIZE,), 8.0, "stretch")
KINDS = {
    "open.mp4": ("libx264", "-x264-params", "open-gop=1:keyint=12:bframes=5:b-pyramid=normal"),
    "variable.mkv": ("libx265", "-x265-params", "log-level=error:keyint=12", "-vf", "select='not(mod(n,3))+gt(n,60)'"),
    "variable.mp4": ("libx264", "-g", "12", "-vf", "select='not(mod(n,3))+gt(n,60)'", "-fps_mode", "vfr"),
}
CUT = ("-fps_mode", "passthrough", "-enc_time_base", "demux", "-c:v", "libx264", "-qp", 0)


def scan(folder: Path, samples: list[Sample], policy: SamplingPolicy = POLICY) -> ScanResult:
    return scan_and_sample(samples, [], [(FileIndex(folder / "latent"), samples, True)], policy, 1, 60)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "plain.mp4"
    ffmpeg(*SOURCE, "-c:v", "libx264", "-g", 24, "-pix_fmt", "yuv420p", path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_part_is_decoded_as_ffmpeg_cuts_it(tmp_path, kind):
    """The part after a seek equals the part that ffmpeg cuts and encodes without loss, decoded as a clip of its own."""
    source, cut = tmp_path / kind, tmp_path / f"cut{Path(kind).suffix}"
    ffmpeg(*SOURCE, "-c:v", *KINDS[kind], "-pix_fmt", "yuv420p", source)
    ffmpeg("-i", source, "-ss", 1.91, "-to", 3.51, *CUT, cut)
    samples = [Sample(1, "", str(source), None, part=Part(1.91, 3.51)), Sample(2, "", str(cut), None)]
    for rate, count in ((8.0, 1), (16.0, 2), (NATIVE_STRIDE, 2), (3.0, 1)):
        policy = replace(POLICY, rate=rate, clips_per_video=2, pad_short_clips=rate == 3)
        found = scan(tmp_path, samples, policy).samples
        parts, cuts = ([chosen for chosen in found if chosen.sample.line == line] for line in (1, 2))
        assert len(parts) == len(cuts) == count
        for part, expected in zip(parts, cuts, strict=True):
            assert replace(part.selection, frames=None) == expected.selection
            assert torch.equal(decode(source, part.selection), decode(cut, expected.selection))
    frames = parts[0].selection.frames
    assert frames is not None
    with open_at(source, frames) as opened:
        assert opened is not None and opened[1] < frames.first  # the reader starts at a key frame


@pytest.mark.parametrize("options", [("-display_rotation", 90), ("-ss", 0.7)], ids=["turned", "edit list"])
def test_seek_keeps_what_the_container_states(tmp_path, clip, options):
    """The part equals the one that is read from the start of the clip."""
    ffmpeg(*options, "-i", clip, "-c", "copy", tmp_path / "stated.mov")
    (chosen,) = scan(tmp_path, [Sample(1, "", str(tmp_path / "stated.mov"), None, part=Part(1.5, 3.0))]).samples
    frames = chosen.selection.frames
    assert frames is not None
    with open_at(tmp_path / "stated.mov", frames) as opened:
        assert opened is not None
    forward = replace(chosen.selection, frames=frames._replace(pts=None))
    assert torch.equal(*(decode(tmp_path / "stated.mov", selection) for selection in (chosen.selection, forward)))


def test_part_without_key_frame_is_read_from_the_start_of_the_clip(tmp_path, clip):
    """Containers mark the frames from which an intra refresh recovers as key frames."""
    refreshed = tmp_path / "refreshed.mp4"
    ffmpeg("-i", clip, "-c:v", "libx264", "-qp", 0, "-intra-refresh", 1, "-g", 24, refreshed)
    samples = [Sample(1, "", str(path), None, part=Part(1.5)) for path in (refreshed, clip)]
    selections = [chosen.selection for chosen in scan(tmp_path, samples).samples]
    assert selections[0].frames is not None
    with open_at(refreshed, selections[0].frames) as opened:
        assert opened is None
    assert torch.equal(decode(refreshed, selections[0]), decode(clip, selections[1]))


def test_rectangle_is_cropped_as_ffmpeg_does(tmp_path, clip):
    ffmpeg("-i", clip, "-vf", "crop=64:40:16:8", *CUT, tmp_path / "cut.mp4")
    samples = [Sample(1, "", str(clip), None, part=Part(crop=Crop.parse("64:40:16:8")))]
    samples.append(Sample(2, "", str(tmp_path / "cut.mp4"), None))
    result = scan(tmp_path, samples, replace(POLICY, mode="crop"))
    part, cut = (decode(Path(chosen.sample.clip), chosen.selection) for chosen in result.samples)
    assert torch.equal(part, cut)
    info = result.facts[str(clip)].info_of(samples[0].part)
    assert (info.height, info.width) == (40, 64)


def test_unusable_parts_are_named_with_their_line(tmp_path, clip):
    rows: list[tuple[dict[str, object], str | None]] = [
        ({"start": 5}, "ends after 4.00 s, but its part starts at 5 s"),
        ({"start": 1, "end": 4.5}, "ends after 4.00 s, but its part ends at 4.5 s"),
        ({"start": 1.01, "end": 1.02}, "has no frame from 1.01 s to 1.02 s"),
        ({"crop": "96:64:2:0"}, "has no rectangle 96:64:2:0: its picture is 96x64"),
        ({"start": "1", "end": "2.0"}, "is too short: its 30 frames from 1 s to 2 s are 1.00 s, but 9 frames at 8 fps"),
        ({"start": 0, "end": 4.02, "crop": None}, None),
        ({"start": "0.5", "end": ""}, None),
    ]
    table = "\n".join(json.dumps({"video": str(clip), "prompt": "a", **row}) for row, _ in rows)
    (tmp_path / "metadata.jsonl").write_text(table)
    samples = read_manifest(tmp_path, table=Table("metadata.jsonl"))
    first = scan(tmp_path, samples)
    expected = [f"{clip} (line {line}) {error}" for line, (_, error) in enumerate(rows, 1) if error]
    assert len(first.unusable) == len(expected)
    assert all(found.startswith(start) for found, start in zip(first.unusable, expected, strict=True))
    assert [chosen.sample.line for chosen in first.samples] == [6, 7]
    with patch("dataset.scan._scan_file", side_effect=AssertionError):  # the index knows these parts
        assert scan(tmp_path, samples[5:]).samples == first.samples


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"start": 3, "end": 2.5}, "'end' is 2.5, but the part starts at 3 s"),
        ({"end": "0"}, "'end' is 0, but the part starts at 0 s"),
        ({"start": -1}, "'start' is -1; times count from the first frame"),
        ({"start": float("nan")}, "'start' is 'nan', not a number of seconds"),
        ({"end": "inf"}, "'end' is 'inf', not a number of seconds"),
        ({"start": "00:01:05"}, "'start' is '00:01:05', not a number of seconds"),
        ({"start": True}, "'start' is 'True', not a number of seconds"),
        ({"end": 10**400}, "not a number of seconds"),
        ({"crop": "100x100"}, "'crop' is '100x100', not W:H:X:Y in pixels"),
        ({"crop": [0, 0, 1, 1]}, "'crop' is [0, 0, 1, 1], not a text W:H:X:Y"),
    ],
)
def test_part_that_is_none_is_refused(row, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Part.from_row(row)


def test_cache_keys_of_parts(tmp_path, clip):
    settings = EncoderSettings("v", "t", "n")

    def keys(parts: list[Part | None], image: str | None = None) -> list[tuple[str, str]]:
        result = scan(tmp_path, [Sample(1, "", str(clip), image, part=part) for part in parts])
        return [(names.video[0], names.image[0]) for names in settings.keys(result.samples, result.facts)]

    parts = [Part(1.0), Part(1.5), Part(1.5, 3.5), Part(1.5, crop=Crop(64, 64, 0, 0)), Part(crop=Crop(64, 64, 0, 0))]
    whole, all_frames, near, same, *others = keys([None, Part(0, 4.0), Part(1.499), Part(1.48), *parts])
    assert all_frames == whole and near == same
    assert len({name for names in (whole, *others) for name in names}) == 2 * len(parts) + 2
    ffmpeg("-i", clip, "-frames:v", 1, tmp_path / "image.png")
    assert len({image for _, image in keys([None, *parts], str(tmp_path / "image.png"))}) == 1
