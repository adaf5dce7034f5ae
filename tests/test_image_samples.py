"""Images as training samples: buckets, errors, cache entries, and updates beside clips."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dataset.bucketing import SamplingPolicy, select_clip_samples
from dataset.cached_dataset import CachedDataset, batches
from dataset.condition_frames import ConditionFrames
from dataset.file_index import FileFacts, FileIndex
from dataset.folder import DataFolder
from dataset.images import load_image
from dataset.latent_cache import EncoderSettings, LatentCache, SampleKeys
from dataset.manifest import Sample
from dataset.precompute import PixelEncoders, RankShard, precompute_clips
from dataset.sampler import SampleStream
from dataset.scan import scan_and_sample
from dataset.summary import summarize
from dataset.video import NATIVE_STRIDE, ClipInfo, Resolution
from tests.conftest import FIRST_FRAME, ROOT
from utils.model.spec import read_spec
from utils.run.data import common_folder
from utils.training.step import DenoisingObjective

WIDE, TALL, LONG = Resolution(49, 480, 720), Resolution(49, 720, 480), Resolution(81, 480, 720)
CLIP = ROOT / "examples" / "dataset" / "videos" / "red_circle_left_white.mp4"


def select(buckets: tuple[Resolution, ...], *samples: Sample, **policy: Any):
    """Returns the buckets of an image of 800x480 and of a clip of 7 seconds, and the errors."""
    infos = {"a.png": ClipInfo(1, 1.0, 0.0, 480, 800), "b.mp4": ClipInfo(210, 7.0, 209 / 30, 480, 720)}
    facts = {path: FileFacts(b"x", info, 0) for path, info in infos.items()}
    clip_samples, errors = select_clip_samples(
        list(samples), facts, SamplingPolicy(buckets, **{"rate": 8.0, "mode": "crop", **policy})
    )
    return [clip_sample.resolution for clip_sample in clip_samples], errors


def test_images_and_clips_have_buckets_of_their_own():
    image, clip = Sample(1, "", "a.png", None), Sample(2, "", "b.mp4", None)
    small, own = replace(WIDE, frames=1), Resolution(1, 768, 1024)
    assert select((WIDE, LONG), image, clip)[0] == [small, WIDE]
    assert select((TALL, own, WIDE), image, clip)[0] == [own, WIDE]
    assert select((small,), image, clip)[0] == [small, small]
    for policy in ({"rate": NATIVE_STRIDE}, {"clips_per_video": 3}, {"pad_short_clips": True}):
        assert select((WIDE,), image, **policy)[0] == [small]
    # a condition image of a validation prompt does not make a video of one frame
    assert select((own, WIDE), Sample(1, "", None, "a.png"), Sample(2, "", None, None))[0] == [WIDE, WIDE]
    resolutions, [error] = select((TALL,), image, replace(clip, line=4))
    assert resolutions == [TALL] and error.startswith("a.png (line 1) is 800 pixels wide and 480 high, and 1x720x480")
    assert error.endswith("--train_resolution 49x720x480 1x720x480 1x448x768.")


def test_images_beside_clips_do_not_move_the_cache(tmp_path):
    clips, images = Sample(1, "", f"{tmp_path}/videos/a.mp4", None), Sample(2, "", f"{tmp_path}/pictures/b.png", None)
    assert common_folder([clips, images], tmp_path) == common_folder([clips], tmp_path) == tmp_path / "videos"
    assert common_folder([images], tmp_path) == tmp_path / "pictures"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    header, _, rest = FIRST_FRAME.read_bytes().partition(b"IDAT")
    (tmp_path / "hdr.png").write_bytes(header[:-4] + b"\0\0\0\4cICP\x09\x10\0\1\0\0\0\0" + header[-4:] + b"IDAT" + rest)
    (tmp_path / "video.webp").write_bytes(CLIP.read_bytes())
    (tmp_path / "picture.mp4").write_bytes(FIRST_FRAME.read_bytes())
    Image.effect_noise((96, 80), 90).convert("RGB").save(tmp_path / "noise.jpg")
    (tmp_path / "cut.JPG").write_bytes((tmp_path / "noise.jpg").read_bytes()[:-300])
    return tmp_path


def scan(folder: Path, *samples: Sample, rate: float = 8.0):
    policy = SamplingPolicy((Resolution(9, 64, 64),), rate, "stretch")
    return scan_and_sample(list(samples), [], [(FileIndex(folder / "latent"), list(samples), False)], policy, 1, 60)


def test_unusable_images_are_refused_with_their_line(folder):
    names = ("moving.gif", "cut.JPG", "hdr.png", "video.webp", "picture.mp4")
    samples = [Sample(n, "", f"{folder}/{name}", None, folder=DataFolder(label="b")) for n, name in enumerate(names, 1)]
    noise = f"{folder}/noise.jpg"
    scanned = scan(folder, *samples, Sample(6, "", noise, noise))
    reasons = (
        "is an animation and",
        "cannot be read as an image",
        "is HDR (PQ)",
        "its format is un",
        "is an image under",
    )
    for number, (error, name, reason) in enumerate(zip(scanned.unusable, names, reasons, strict=True), 1):
        assert error.startswith(f"{folder}/{name} (line {number} of b) ") and reason in error
    assert [clip_sample.sample.line for clip_sample in scanned.samples] == [6]
    lines = summarize(scanned.samples, scanned.facts, "stretch", 8.0)
    changed = f"1 stretched, by 20% on average, at most 20% ({noise}); --resize_mode crop keeps the aspect ratio"
    assert lines[:2] == ["Images: 1 of 96x80", f"  1x64x64: 1 images; {changed}"]
    assert "all samples are images" in lines[-1] and len(lines) == 4


def test_entries_of_an_image_hold_its_pixels_and_do_not_depend_on_the_rate(folder):
    samples = Sample(1, "", f"{folder}/noise.jpg", None), Sample(2, "", str(CLIP), None)
    scanned, faster = scan(folder, *samples), scan(folder, *samples, rate=12.0)
    encoding, cache = EncoderSettings("v", "t", "noise"), LatentCache(folder / "cache")
    keys = encoding.keys(scanned.samples, scanned.facts, flip=True, additions=("last",))
    assert not keys[0].additions and keys[1].additions
    assert encoding.keys(faster.samples, faster.facts, flip=True)[0] == keys[0]
    image_column = encoding.keys(
        [replace(scanned.samples[1], sample=replace(scanned.samples[1].sample, image=f"{folder}/noise.jpg"))],
        scanned.facts,
        flip=True,
    )
    assert keys[0].image == image_column[0].image

    @contextmanager
    def plain_encoders():
        yield PixelEncoders(lambda pixels: pixels.clone(), lambda pixels, seed: pixels.clone())

    assert not precompute_clips(
        cache, scanned.samples[:1], keys[:1], plain_encoders, RankShard(0, 1), 1, 60, lambda: None
    )
    expected = load_image(folder / "noise.jpg", Resolution(1, 64, 64), "stretch")[None]
    for names in (keys[0].video, keys[0].image):
        assert torch.equal(cache.read(names[0]), expected) and torch.equal(cache.read(names[1]), expected.flip(2))


def test_resumed_batches_of_a_mixed_run_are_equal_bit_for_bit(tmp_path):
    """Clips, and images of another folder with repeats, weight and caption dropout, with two sizes of updates."""
    cache, keys, folders, buckets = LatentCache(tmp_path), [], [], []
    clips, images = DataFolder(tmp_path), DataFolder(tmp_path, repeats=3, loss_weight=0.5, caption_dropout=0.4)
    for number in range(9):
        is_image = number % 3 == 0
        names = tuple(f"video-{number}-{side}" for side in range(1 + is_image))
        keys.append(SampleKeys(names, (), f"prompt-{number}"))
        folders.append(images if is_image else clips)
        buckets.append("image" if is_image else "clip")
        for name in (*names, f"prompt-{number}"):
            cache.write(name, torch.randn(4, 1 if is_image else 3, 2, 2))
    cache.write("empty", torch.zeros(4, 1, 2, 2))
    dataset = CachedDataset(cache, keys, "empty", folders, 42)

    def read(start: int, count: int, rank: int = 0, ranks: int = 1):
        repeats = [folder.repeats for folder in folders]
        stream = SampleStream(buckets, 2, 4, rank, ranks, 42, start, repeats)
        return list(islice(batches(dataset, stream, False), count))

    whole = read(0, 20)
    assert {(batch["video"].shape[2], *batch["loss_weight"]) for batch in whole} == {(1, 0.5, 0.5), (3, 1.0, 1.0)}
    assert any((prompt == 0).all() for batch in whole for prompt in batch["prompt"])
    two_ranks = [batch for pair in zip(read(0, 10, 0, 2), read(0, 10, 1, 2), strict=True) for batch in pair]
    for other in (read(0, 6) + read(12, 14), two_ranks):
        for batch, expected in zip(other, whole, strict=True):
            for name, value in expected.items():
                assert torch.equal(batch[name], value) if torch.is_tensor(value) else batch[name] == value


@pytest.mark.parametrize("variant", ["5b-i2v", "1.5-i2v"])
def test_image_has_no_further_condition_frames(tiny, variant):
    spec, frames = read_spec(tiny(variant)), 1 + variant.startswith("1.5")
    batch = {
        "video": torch.randn(2, 32, 1, 8, 8),
        "image": torch.randn(2, 4, 32, 1, 8, 8),
        "prompt": torch.randn(2, 5, 8),
    }
    shapes = []

    def transformer(hidden_states, **inputs):
        shapes.append(hidden_states.shape)
        return (hidden_states[:, :, :16],)

    losses = [
        DenoisingObjective(spec, torch.linspace(0.99, 0, 1000), torch.float32, 0.0, conditions)(
            transformer, batch, [1, 2]
        )
        for conditions in ((ConditionFrames(),), (ConditionFrames(has_last=True), ConditionFrames(prefix=5)))
    ]
    assert torch.equal(losses[0][0], losses[1][0]) and set(shapes) == {(2, frames, 32, 8, 8)}
