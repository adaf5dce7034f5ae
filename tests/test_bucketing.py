"""Which bucket a clip goes to, which windows are cut from it, and the tables that name the clips."""

from __future__ import annotations

import json

import pytest

from dataset.bucketing import SamplingPolicy, choose_bucket, select_clip_samples, windows
from dataset.file_index import FileFacts
from dataset.manifest import Sample, Table, read_manifest
from dataset.video import SPREAD, ClipInfo, Resolution
from utils.common.errors import UserError

WIDE, TALL, LONG = Resolution(49, 480, 720), Resolution(49, 720, 480), Resolution(81, 480, 720)


def info(seconds: float, height: int, width: int, fps: float = 30.0) -> ClipInfo:
    frames = round(seconds * fps)
    return ClipInfo(frames, frames / fps, (frames - 1) / fps, height, width)


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        (info(7, 480, 720), WIDE),
        (info(11, 480, 720), LONG),
        (info(7, 1920, 1080), TALL),
        (info(60, 1080, 1920), LONG),
        (info(12, 1280, 720), TALL),  # half of the picture is worse than half of the time
        (info(5, 480, 720), None),
    ],
)
def test_a_clip_goes_where_most_of_it_is_kept(clip, expected):
    assert choose_bucket(clip, SamplingPolicy((WIDE, TALL, LONG), 8.0, "crop")) == expected


def test_of_equal_shapes_the_one_that_enlarges_least_is_taken_and_then_the_largest():
    sizes = tuple(Resolution(49, height, height * 3 // 2) for height in (320, 480, 640))
    policy = SamplingPolicy(sizes, 8.0, "crop")
    assert [choose_bucket(info(7, height, height * 3 // 2), policy).height for height in (240, 500, 1280)] == [
        320,
        480,
        640,
    ]


def test_windows_do_not_overlap_and_cover_the_clip():
    policy = SamplingPolicy((WIDE,), 8.0, "crop", clips_per_video=3)
    assert windows(info(30, 480, 720), WIDE, policy) == [(0, 49), (95, 49), (191, 49)]
    assert windows(info(13, 480, 720), WIDE, policy) == [(0, 49), (55, 49)]
    assert windows(info(7, 480, 720), WIDE, policy) == [(0, 49)]
    spread = SamplingPolicy((WIDE,), SPREAD, "crop", clips_per_video=3)
    assert windows(info(10, 480, 720), WIDE, spread) == [(0, 100), (100, 100), (200, 100)]


def test_short_clips_are_told_with_their_length_or_padded():
    samples = [Sample(4, "a", "short.mp4", None), Sample(5, "b", "long.mp4", None)]
    facts = {
        "short.mp4": FileFacts(b"x", info(6, 480, 720, 8), 0),
        "long.mp4": FileFacts(b"y", info(9, 480, 720, 8), 0),
    }
    clip_samples, errors = select_clip_samples(samples, facts, SamplingPolicy((LONG, WIDE), 8.0, "crop"))
    assert [clip_sample.sample.line for clip_sample in clip_samples] == [5]
    assert len(errors) == 1 and errors[0].startswith(
        "short.mp4 (line 4) is too short: its 48 frames are 6.00 s, but 49 frames at 8 fps take 6.12 s"
    )
    clip_samples, errors = select_clip_samples(
        samples, facts, SamplingPolicy((LONG, WIDE), 8.0, "crop", pad_short_clips=True)
    )
    assert [clip_sample.resolution for clip_sample in clip_samples] == [WIDE, WIDE] and not errors


ROWS = [{"video": "a.mp4", "prompt": 'a "red", circle'}, {"video": "b.mp4", "prompt": "two\nlines", "image": "b.png"}]
TABLE = Table("metadata.jsonl", optional=("image",))


@pytest.fixture
def folder(tmp_path):
    for name in ("a.mp4", "b.mp4", "b.png"):
        (tmp_path / name).touch()
    return tmp_path


def test_tables_name_the_samples(folder):
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    samples = read_manifest(folder, table=Table("metadata.jsonl"), id_token="SKS")
    assert [(sample.line, sample.prompt) for sample in samples] == [(1, 'SKS a "red", circle'), (2, "SKS two\nlines")]
    assert [sample.video for sample in samples] == [f"{folder}/a.mp4", f"{folder}/b.mp4"]
    (folder / "metadata.csv").write_text('video,prompt,note\na.mp4,"a ""red"", circle",x\nb.mp4,"two\nlines",y\n')
    rows = read_manifest(folder, table=Table("metadata.csv"), id_token="SKS")
    assert [(sample.video, sample.prompt) for sample in rows] == [(sample.video, sample.prompt) for sample in samples]


def test_paths_may_be_absolute(folder):
    (folder / "prompts.txt").write_text("a\n")
    (folder / "videos.txt").write_text(f"{folder / 'a.mp4'}\n")
    assert read_manifest(folder, "prompts.txt", "videos.txt")[0].video == str(folder / "a.mp4")


def test_a_comma_outside_of_quotes_cuts_no_prompt(folder):
    (folder / "metadata.csv").write_text("video,prompt\na.mp4,a cat, sitting on a mat\n")
    with pytest.raises(UserError, match="line 2: the row has more fields than the header"):
        read_manifest(folder, table=Table("metadata.csv"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"video": "a.mp4", "text": "x"}\n', "has no column 'prompt'; it has video, text"),
        ('{"video": "a.mp4", "prompt": "x"}\n{"video": "b.mp4"}\n', "line 2: 'prompt' is missing or not a text"),
        ('{"video": "a.mp4", "prompt": "x"}\n["b.mp4"]\n', "line 2: not a JSON object"),
        ('{"video": "a.mp4", "prompt": "x"}\n\n{"video"\n', "line 3: not valid JSON ("),
        ('{"video": "c.mp4", "prompt": " "}\n', "line 1: there is no file"),
        ('{"video": "c.mp4", "prompt": " "}\n', "line 1: the prompt is empty"),
        ('{"video": 7, "prompt": "x"}\n', "line 1: 'video' is missing or not a text"),
        (json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1]), "line 1: 'image' is missing or not a text"),
        ("", "the table is empty"),
    ],
)
def test_mistakes_in_tables_are_told_by_line(folder, text, message):
    (folder / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError) as caught:
        read_manifest(folder, table=TABLE)
    assert any(message in fault for fault in caught.value.errors), caught.value.errors
