"""From raw footage to a data folder: scenes, what is dropped, captions, and what a second run does."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    pipeline,
)

from dataset.bucketing import SamplingPolicy
from dataset.caption_model import CaptionModel, CaptionSettings, describe_all
from dataset.file_index import FileIndex
from dataset.manifest import Table, read_manifest
from dataset.parts import FrameRange
from dataset.prepare import Clip, drop_duplicates
from dataset.scan import scan_and_sample
from dataset.scenes import Analysis, find_bars
from dataset.video import Resolution, decode
from tests.conftest import ROOT
from tests.test_video import ffmpeg
from utils.commands import prepare_dataset
from utils.commands.prepare_dataset import PrepareArgs, prepare
from utils.common.errors import UserError

SIZE = Resolution(9, 64, 64)  # 1.125 s at 8 fps
ENCODE = ("-c:v", "libx264", "-crf", 16, "-g", 30, "-pix_fmt", "yuv420p")
# Scenes of the film: a test picture, black, a fractal that is long enough for two clips, a still.
SCENES = (("testsrc2", 2), ("color=black", 1), ("mandelbrot", 3), ("smptebars", 2))


def lavfi(source: str, size: str, seconds: float, rate: int = 30) -> tuple[object, ...]:
    joint = ":" if "=" in source else "="
    return ("-f", "lavfi", "-t", seconds, "-i", f"{source}{joint}size={size}:rate={rate}")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    (folder / "deep").mkdir()
    inputs = [part for source, seconds in SCENES for part in lavfi(source, "96x64", seconds)]
    joined = (
        "".join(f"[{number}]format=yuv420p,setsar=1[v{number}];" for number in range(4)) + "[v0][v1][v2][v3]concat=n=4"
    )
    ffmpeg(*inputs, "-filter_complex", joined, *ENCODE, folder / "film.mp4")
    ffmpeg(*lavfi("testsrc2", "96x64", 2, 24), "-vf", "scale=80:54", *ENCODE, folder / "deep" / "again.mov")
    pad = "format=yuv420p,pad=128:128:0:24:black"
    ffmpeg(*lavfi("cellauto=rule=18", "128x80", 1.5), "-vf", pad, *ENCODE, folder / "deep" / "boxed.mkv")
    ffmpeg(*lavfi("testsrc", "96x64", 0.5), *ENCODE, folder / "short.mp4")
    (folder / "damaged.mp4").write_bytes((folder / "film.mp4").read_bytes()[:2000])
    (folder / "notes.md").write_text("no video")
    (folder / ".hidden.mp4").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def prepared(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare(arguments(raw, out))
    return out


@pytest.fixture
def out(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a copy of the result for further runs, which draw no contact sheets."""
    monkeypatch.setattr(prepare_dataset, "write_sheets", lambda *_: None)
    return shutil.copytree(prepared, tmp_path / "out")


def arguments(raw: Path, out: Path, **options) -> PrepareArgs:
    default: dict[str, Any] = {"train_resolution": (SIZE,), "fps": 8.0, "num_workers": 2}
    return PrepareArgs(raw, out, **default | options)


def table(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]


def name(row: dict) -> str:
    return Path(row["video"]).name


def test_scenes_become_clips_and_the_rest_is_dropped_with_its_reason(raw, prepared):
    clips = [(name(row), row["start"], row["end"], row.get("crop")) for row in table(prepared)]
    expected = [
        ("boxed.mkv", 0, 1.5, "128:76:0:26"),  # compression blurs the edges of the bars
        ("film.mp4", 0, 2, None),
        ("film.mp4", 3, 4.5, None),
        ("film.mp4", 4.5, 6, None),
    ]
    assert [(file, crop) for file, *_, crop in clips] == [(file, crop) for file, *_, crop in expected]
    for (_, start, end, _), (_, first, last, _) in zip(clips, expected, strict=True):
        # a cut lies between two frames that are compared, and no clip has a frame of the other scene
        assert first - 1e-4 <= start < first + 0.07 and last - 0.07 < end <= last + 1e-4
    with (prepared / "dropped.csv").open(newline="") as file:
        dropped = {(name(row), row["start"][:1]): row["reason"] for row in csv.DictReader(file)}
    assert dropped.pop(("damaged.mp4", "")).startswith("cannot be read as a video")
    assert dropped.pop(("again.mov", "0")).startswith(f"is a near-duplicate of {raw / 'film.mp4'} from 0.00 s")
    assert dropped.pop(("short.mp4", "0")).startswith("is shorter than a sample: it has 0.50 s, but 9 frames at 8 fps")
    assert dropped == {("film.mp4", "2"): "is black", ("film.mp4", "6"): "is static: nothing moves"}
    for sheet, rows in (("kept.png", 4), ("dropped.png", 5)):
        assert Image.open(prepared / sheet).height == rows * 136


def test_second_run_analyses_new_files_only_and_keeps_typed_captions(raw, out, tmp_path, capsys):
    (out / "metadata.jsonl").write_text(
        (out / "metadata.jsonl").read_text().replace('"prompt": ""', '"prompt": "typed"', 1)
    )
    more = shutil.copytree(raw, tmp_path / "more")
    (out / "prepare.json").write_text(json.dumps({"raw": str(raw)}))
    with patch("dataset.scenes.analyse", side_effect=AssertionError):
        prepare(arguments(raw, out))
    assert [row["prompt"] for row in table(out)] == ["typed", "", "", ""]
    report = capsys.readouterr().out
    assert "4 clips kept; dropped: 1 unusable, 1 black, 1 static, 1 too short, 1 near-duplicates" in report
    assert "3 clips have no caption, the first in line 2." in report
    with pytest.raises(UserError, match=f"was prepared from {raw}; give another folder for"):
        prepare(arguments(more, out))


@pytest.mark.slow
def test_training_takes_the_result(raw, out, tmp_path):
    """Typed prompts win over captions. Each clip gives a sample. Written clips are the parts of the sources."""
    typed = (out / "metadata.jsonl").read_text().replace('"prompt": ""', '"prompt": "typed"', 1)
    (out / "metadata.jsonl").write_text(typed)
    (raw / "film.txt").write_text("a film\nof patterns\n")
    (tmp_path / "captions.csv").write_text('video,prompt\ndeep/boxed.mkv,"rules, of cells"\nnone.mp4,x\n')
    options: dict[str, Any] = {"captions": tmp_path / "captions.csv", "caption_prefix": "SKS"}
    try:
        prepare(arguments(raw, out, **options))
        prepare(arguments(raw, tmp_path / "written", write_clips=True, **options))
    finally:
        (raw / "film.txt").unlink()
    film = ["SKS a film of patterns"] * 3
    assert [row["prompt"] for row in table(tmp_path / "written")] == ["SKS rules, of cells", *film]
    assert [row["prompt"] for row in table(out)] == ["typed", *film]
    policy = SamplingPolicy((SIZE,), 8.0, "stretch")
    folders = (out, tmp_path / "written")
    samples = [read_manifest(folder, table=Table("metadata.jsonl")) for folder in folders]
    results = [
        scan_and_sample(found, [], [(FileIndex(folder), found, False)], policy, 1, 60)
        for folder, found in zip(folders, samples, strict=True)
    ]
    assert [len(result.samples) for result in results] == [4, 4] and not results[0].unusable + results[1].unusable
    for part, written in zip(*(result.samples for result in results), strict=True):
        first, second = (decode(Path(chosen.sample.clip), chosen.selection).float() for chosen in (part, written))
        differences = torch.cdist(second.flatten(1), first.flatten(1))
        # each frame is that frame of the part; compression changes it less than motion does
        assert differences.argmin(1).tolist() == list(range(9)) and written.selection.frames is None


def test_clips_of_one_scene_are_no_duplicates():
    analysis = Analysis(0, 64, 96, 1.0, np.arange(20.0), None, ())
    hashes = np.arange(4, dtype=np.uint64)

    def clip(source: str, scene: int, first: int, hashes: np.ndarray = hashes) -> Clip:
        return Clip(source, analysis, scene, FrameRange(first, first + 2), None, hashes)

    other = hashes ^ np.uint64(2**5 - 1)  # five bits
    clips = [clip("a", 0, 0), clip("a", 0, 2), clip("a", 1, 4), clip("b", 0, 0), clip("b", 0, 2, other)]
    kept, dropped = drop_duplicates(clips)
    assert kept == [clips[0], clips[1], clips[4]]
    assert [item.reason for item in dropped] == ["is a near-duplicate of a from 0.00 s to 2.00 s"] * 2


def test_bars_are_black_rows_and_columns():
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[6:30, 10:55, 1] = 90
    assert find_bars(picture) == (6, 10, 10, 5)
    assert find_bars(np.zeros((40, 60, 3), np.uint8)) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw, out: {"raw": raw / "none"}, "none: there is no such folder"),
        (lambda raw, out: {"raw": raw / ".." / "empty"}, "empty holds no video, at any depth"),
        (lambda raw, out: {"out": raw}, "is the raw folder; give another folder"),
        (lambda raw, out: {"out": out / "notes"}, "notes exists and was not made by this command: it holds a.txt"),
        (
            lambda raw, out: {"caption_model": "t5"},
            "--caption_model .*t5 is a model of type t5, which does not describe",
        ),
        (lambda raw, out: {"caption_model": "none/none/none"}, "--caption_model none/none/none cannot be loaded"),
        (lambda raw, out: {"captions": out / "none.csv"}, "--captions .*none.csv: there is no such file"),
        (lambda raw, out: {"captions": out / "notes" / "a.txt"}, "a.txt, line 1: not valid JSON"),
    ],
)
def test_bad_input_is_refused_before_any_video_is_read(raw, tmp_path, change, message):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("text")
    (raw.parent / "empty").mkdir(exist_ok=True)
    options = {"raw": raw, "out": tmp_path / "out"} | change(raw, tmp_path)
    if options.get("caption_model") == "t5":
        T5Config().save_pretrained(tmp_path / "t5")
        options["caption_model"] = str(tmp_path / "t5")
    before = sorted(tmp_path.rglob("*"))
    with (
        patch("utils.commands.prepare_dataset.analyse_sources", side_effect=AssertionError),
        pytest.raises(UserError, match=message),
    ):
        prepare(arguments(**options))
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_usable_is_one_sentence(raw, tmp_path):
    (tmp_path / "raw").mkdir()
    shutil.copy(raw / "damaged.mp4", tmp_path / "raw")
    with pytest.raises(UserError, match=r"none of the 1 files in .* gives a clip; .*dropped.csv says why"):
        prepare(arguments(tmp_path / "raw", tmp_path / "out"))
    assert not (tmp_path / "out" / "metadata.jsonl").exists()


@pytest.fixture(scope="module")
def caption_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LLaVA with random weights."""
    folder = tmp_path_factory.mktemp("llava")
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *(f"word{number}" for number in range(60))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), words, strict=False))
    template = (
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %} {{ c.text }}"
        "{% endif %}{% endfor %}{% endfor %}"
    )
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens={"image_token": "<image>"}, **special),
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(num_hidden_layers=2, image_size=16, patch_size=8, **small),
        text_config=LlamaConfig(
            vocab_size=len(words), num_hidden_layers=1, num_key_value_heads=2, pad_token_id=0, **small
        ),
        image_token_index=4,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


def test_captions_equal_those_of_the_pipeline(caption_model):
    """In batches, and with different numbers of frames."""
    random = np.random.default_rng(0)
    clips = [[Image.fromarray(random.integers(0, 255, (40, 60, 3), np.uint8)) for _ in range(n)] for n in (3, 1, 2)]
    captions = CaptionModel(CaptionSettings(caption_model, 3, "word1 word2", 6, 4)).describe(clips)
    describe = pipeline("image-text-to-text", model=caption_model)
    for frames, caption in zip(clips, captions, strict=True):
        content = [*({"type": "image", "image": frame} for frame in frames), {"type": "text", "text": "word1 word2"}]
        dialogue = [{"role": "user", "content": content}]
        (answer,) = describe(text=dialogue, max_new_tokens=6, do_sample=False, return_full_text=False)
        assert answer["generated_text"].split() == caption.split() and caption


@pytest.mark.slow
def test_captions_are_generated_once_and_again_for_another_instruction(raw, out, caption_model, capsys):
    options: dict[str, Any] = {"caption_model": caption_model, "caption_frames": 2, "caption_max_tokens": 5}
    prepare(arguments(raw, out, **options))
    first = [row["prompt"] for row in table(out)]
    assert all(first)
    (out / "metadata.jsonl").unlink()  # as of a run that was killed after its last caption
    with patch("dataset.captions.CaptionModel", side_effect=AssertionError):
        prepare(arguments(raw, out, **options))
        prepare(arguments(raw, out))
    assert [row["prompt"] for row in table(out)] == first
    options |= {"caption_instruction": "word7 word9", "caption_prefix": "SKS"}
    with patch.object(CaptionModel, "describe", side_effect=[["a", "", "b", "c"]]):
        prepare(arguments(raw, out, **options))
    assert sorted(row["prompt"] for row in table(out)) == ["", "SKS a", "SKS b", "SKS c"]
    assert "could not be described (the model returned no text)" in capsys.readouterr().out


def test_batch_is_halved_if_memory_does_not_suffice():
    sizes = []

    def describe(clips: list) -> list[str]:
        sizes.append(len(clips))
        if len(clips) > 2:
            raise torch.OutOfMemoryError
        if "bad" in clips:
            raise ValueError("odd picture")
        return [f"caption of {clip}" for clip in clips]

    settings = CaptionSettings("m", 1, None, 5, 6)
    clips = [*"abcdefgh", "bad"]
    captions = dict(describe_all(((clip, clip) for clip in clips), describe, settings))  # type: ignore[misc, arg-type]
    assert [str(caption) for caption in captions.values()] == [*(f"caption of {c}" for c in "abcdefgh"), "odd picture"]
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    with pytest.raises(UserError, match="memory does not suffice for one clip"):
        list(describe_all([("a", [])], lambda clips: describe([0, 0, 0]), settings))
    with pytest.raises(UserError, match=r"--caption_model m describes no clip \(odd picture\)"):
        list(describe_all([("bad", "bad")], describe, settings))  # type: ignore[list-item, arg-type]


def test_training_does_not_need_the_packages_of_preparation():
    pattern = re.compile(r"^ +(?:import|from) (?:cv2|scenedetect|imagehash)", re.MULTILINE)
    files = [path for folder in ("dataset", "utils") for path in (ROOT / folder).rglob("*.py")]
    assert [path.name for path in files if pattern.search(path.read_text())] == ["scenes.py"]
    outside = re.compile(r"^(?:import|from) (?:cv2|scenedetect|imagehash)", re.MULTILINE)
    assert not [path for path in files if outside.search(path.read_text())]
