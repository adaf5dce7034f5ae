"""The latent cache: content of entries, cache keys, damaged entries, and division among ranks."""

from __future__ import annotations

import gc
import json
import re
import shutil
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from dataset.bucketing import SamplingPolicy
from dataset.file_index import FileIndex
from dataset.latent_cache import DamagedEntry, EncoderSettings, LatentCache, SampleKeys
from dataset.manifest import read_manifest
from dataset.precompute import PixelEncoders, RankShard, precompute_clips, precompute_prompts
from dataset.scan import ScanResult, scan_and_sample
from dataset.video import Resolution, decode
from tests.conftest import LFS_POINTER, arguments
from utils.common.errors import UserError
from utils.config.args import parse_args
from utils.memory.pinned_memory import CopyStream
from utils.model import encoders, loading
from utils.model.encoders import to_model_range
from utils.run.preflight import preflight

SIZE = Resolution(9, 64, 64)
CPU = torch.device("cpu")
PROMPTS = ["a red circle moves left", "", "green " * 80]


def no_heartbeat():
    """No other rank waits."""


def scan(data: Path, **policy: Any) -> ScanResult:
    """Scans a data folder, by default at the resolution of the tests."""
    samples = read_manifest(data, "prompts.txt", "videos.txt", None)
    default = SamplingPolicy((SIZE,), 8.0, "stretch")
    indexes = [(FileIndex(data / "latent"), samples, True)]
    return scan_and_sample(samples, [], indexes, replace(default, **policy), 1, 60)


def test_clip_is_refused_as_an_image(data):
    first, second, *others = read_manifest(data, "prompts.txt", "videos.txt", None)
    samples = [replace(first, image=second.video), second, *others]
    policy = SamplingPolicy((SIZE,), 8.0, "stretch")
    scanned = scan_and_sample(samples, [], [(FileIndex(data / "latent"), samples, True)], policy, 1, 60)
    assert scanned.unusable == [f"{second.video} (line 1) is listed as an image, but is a video."]
    assert len(scanned.samples) == len(samples) - 1


def keys_of(scanned, flip=False, **facts) -> list[SampleKeys]:
    encoding = EncoderSettings(**{"vae": "v", "text_encoder": "t", "image_noise": "some", **facts})
    return encoding.keys(scanned.samples, scanned.facts, flip)


def fill(cache, clip_samples, keys, load_encoders, shard=RankShard(0, 1), workers=1):  # noqa: B008
    return precompute_clips(cache, clip_samples, keys, load_encoders, shard, workers, 60, no_heartbeat)


@contextmanager
def constant_encoders():
    yield PixelEncoders(lambda pixels: pixels[0].float(), lambda pixels, seed: pixels.float())


def test_entries_hold_the_moments_of_the_vae(tiny, data, tmp_path):
    model_dir, scanned, cache = tiny("1.5-i2v"), scan(data), LatentCache(tmp_path / "cache")
    keys = keys_of(scanned)
    load_encoders = partial(encoders.pixel_encoders, model_dir, CPU, True, True)
    assert fill(cache, scanned.samples, keys, load_encoders, workers=2) == {}
    vae = loading.load_vae(model_dir, CPU, True, True)
    clip_sample = scanned.samples[3]
    pixels = to_model_range(decode(Path(clip_sample.sample.clip), clip_sample.selection)).permute(3, 0, 1, 2)
    expected = vae.encode(pixels[None]).latent_dist.parameters[0]
    assert torch.equal(cache.read(keys[3].video[0]), expected)
    images = cache.read(keys[3].image[0])
    assert images.shape == (encoders.IMAGE_NOISE_DRAWS, 32, 1, 8, 8)
    # noise of sigma near exp(-3): close to the moments of the clean image, and different in each draw
    clean = vae.encode(pixels[None, :, :1]).latent_dist.parameters[0]
    distances = (images - clean).abs().mean((1, 2, 3, 4)) / clean.abs().mean()
    assert 0 < distances.min() < distances.max() < 1 and len(set(distances.tolist())) == len(distances)


def test_encoders_keep_their_stored_dtype_and_are_released(tiny, tmp_path):
    model_dir = shutil.copytree(tiny("5b"), tmp_path / "model")
    for name, kind in {"vae": AutoencoderKLCogVideoX, "text_encoder": T5EncoderModel}.items():
        kind.from_pretrained(model_dir / name, dtype=torch.bfloat16).save_pretrained(model_dir / name)
    with encoders.pixel_encoders(model_dir, CPU, True, True) as encode:
        assert encode.video(torch.zeros(9, 64, 64, 3, dtype=torch.uint8)).dtype == torch.bfloat16
    with encoders.prompt_encoder(model_dir, CPU, 26, offload=False) as encode_prompts:
        assert next(iter(encode_prompts(["a circle"], no_heartbeat))).dtype == torch.bfloat16
    del encode, encode_prompts
    models = [item for item in gc.get_objects() if isinstance(item, AutoencoderKLCogVideoX | T5EncoderModel)]
    assert all(parameter.is_meta for model in models for parameter in model.parameters())


def test_prompts_are_encoded_as_the_pipeline_does(tiny, tmp_path):
    model_dir, cache = tiny("5b"), LatentCache(tmp_path)
    prompts = {f"prompt-{index}": text for index, text in enumerate(PROMPTS)}
    load_encoder = partial(encoders.prompt_encoder, model_dir, CPU, 26, False)
    precompute_prompts(cache, prompts, load_encoder, RankShard(0, 1), no_heartbeat)
    pipeline = CogVideoXPipeline.from_pretrained(model_dir)
    for name, text in prompts.items():
        expected, _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=26)
        torch.testing.assert_close(cache.read(name), expected[0], rtol=0, atol=1e-5)
    batch = encoders.encode_prompts(pipeline.tokenizer, pipeline.text_encoder, 26, PROMPTS)  # as on a GPU
    torch.testing.assert_close(batch, torch.stack([cache.read(name) for name in prompts]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_offloaded_text_encoder_gives_equal_bits_and_copies_each_layer_once_per_pass(
    tiny, tmp_path, monkeypatch, dtype
):
    model_dir = shutil.copytree(tiny("5b"), tmp_path / "model")
    text_encoder = T5EncoderModel.from_pretrained(model_dir / "text_encoder")
    text_encoder.to(dtype).save_pretrained(model_dir / "text_encoder")
    monkeypatch.setattr(encoders, "PROMPTS_PER_PASS", 2)
    copies, beats = Mock(return_value=None), Mock()
    monkeypatch.setattr(CopyStream, "copy", lambda self, source, target: copies(target.copy_(source)))
    embeddings = []
    for offload in (False, True):
        with encoders.prompt_encoder(model_dir, torch.device("cpu", 0), 26, offload) as encode:
            embeddings.append(list(encode(PROMPTS, beats)))
    torch.testing.assert_close(embeddings[1], embeddings[0], rtol=0, atol=0)
    num_layers = len(text_encoder.encoder.block)
    streamed = [*text_encoder.encoder.block.parameters(), *text_encoder.encoder.final_layer_norm.parameters()]
    assert copies.call_count == 2 * len(streamed) and beats.call_count == num_layers * len(PROMPTS)


def test_keys_depend_on_everything_that_changes_the_bytes(data):
    scanned = scan(data)
    first = keys_of(scanned)
    changes: list[tuple[dict[str, Any], dict[str, str]]]
    changes = [({}, {"vae": "w"}), ({"mode": "crop"}, {}), ({"buckets": (Resolution(9, 64, 80),)}, {})]
    for policy, facts in changes:
        other = keys_of(scan(data, **policy), **facts)
        assert all(a.video != b.video and a.image != b.image for a, b in zip(first, other, strict=True))
    for policy in ({"rate": 4.0}, {"buckets": (Resolution(17, 64, 64),)}):  # these leave the first frame unchanged
        other = keys_of(scan(data, **policy))
        assert all(a.video != b.video and a.image == b.image for a, b in zip(first, other, strict=True))
    assert keys_of(scanned, text_encoder="u")[0].prompt != first[0].prompt
    mirrored = keys_of(scanned, flip=True)[0]
    assert (mirrored.video[0], mirrored.image[0]) == (first[0].video[0], first[0].image[0])
    assert len({*mirrored.video, *mirrored.image}) == 4
    windows = keys_of(scan(data, rate=16.0, clips_per_video=3))
    assert len({key.video for key in windows}) == 3 * len(first)
    # the first window does not depend on the number of windows
    assert windows[0].video == keys_of(scan(data, rate=16.0))[0].video
    clips = [Path(clip_sample.sample.clip) for clip_sample in scanned.samples]
    clips[0].write_bytes(clips[1].read_bytes())  # the key depends on the content, not on the name
    changed = keys_of(scan(data))
    assert changed[0].video == first[1].video and changed[2:] == first[2:]


def test_fingerprint_depends_on_weights_and_settings(tiny, tmp_path):
    folder = shutil.copytree(tiny("5b") / "vae", tmp_path / "vae")
    first = loading.fingerprint(folder, tiling=True)
    assert first == loading.fingerprint(tiny("5b") / "vae", tiling=True) != loading.fingerprint(folder, tiling=False)
    weights = bytearray((folder / "diffusion_pytorch_model.safetensors").read_bytes())
    weights[-3] ^= 1
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    assert loading.fingerprint(folder, tiling=True) != first


def test_fingerprint_ignores_who_wrote_the_files(tiny, tmp_path):
    folder = shutil.copytree(tiny("5b") / "vae", tmp_path / "vae")
    first, meaning = loading.fingerprint(folder), loading.fingerprint(folder, by_meaning=True)
    (folder / ".DS_Store").write_bytes(b"x")
    assert loading.fingerprint(folder) == first
    edit_config(folder, _diffusers_version="9.0")
    assert loading.fingerprint(folder) != first and loading.fingerprint(folder, by_meaning=True) == meaning
    edit_config(folder, norm_eps=1e-3)
    assert loading.fingerprint(folder, by_meaning=True) != meaning


def edit_config(folder: Path, name: str = "config.json", **changes: object) -> None:
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | changes))


def test_cache_and_checkpoint_stay_valid_for_another_release_of_the_model(tiny, data, tmp_path):
    model = shutil.copytree(tiny("5b"), tmp_path / "model")
    args = parse_args(arguments(model, data, tmp_path / "out", "--resume_from_checkpoint", "latest"))
    plan = preflight(args, 1)
    LatentCache(plan.cache_dir).add_encoders(plan.encoders[plan.cache_dir])
    progress = json.dumps(asdict(plan.progress) | {"step": 1})
    for component in ("vae", "text_encoder", "transformer"):
        edit_config(model / component, _diffusers_version="9.0", transformers_version="9.0")
    later = preflight(args, 1)
    assert (later.prompts, later.keys) == (plan.prompts, plan.keys)
    checkpoint = tmp_path / "out" / "checkpoint-1"
    (checkpoint / "training_state").mkdir(parents=True)
    (checkpoint / "args.json").write_text(json.dumps(plan.args.as_dict()))
    (checkpoint / "progress.json").write_text(progress)
    with pytest.raises(UserError) as caught:
        preflight(args, 1)
    assert len(caught.value.errors) == 1 and "optimizer.bin is missing" in caught.value.errors[0]
    (checkpoint / "training_state" / "optimizer.bin").write_bytes(b"x")
    (checkpoint / "training_state" / "random_states_0.pkl").touch()
    with pytest.raises(UserError, match=r"random_states_0.pkl is empty"):
        preflight(args, 1)
    (checkpoint / "progress.json").write_text(LFS_POINTER)
    with pytest.raises(UserError, match=r"progress.json is a Git LFS pointer"):
        preflight(args, 1)
    (checkpoint / "progress.json").write_text(progress)
    edit_config(model / "scheduler", "scheduler_config.json", snr_shift_scale=2.0, timestep_spacing="leading")
    with pytest.raises(UserError) as caught:
        preflight(args, 1)
    message = "snr_shift_scale in scheduler/scheduler_config.json is 2.0, but .*checkpoint-1 was trained with 1.0"
    assert len(caught.value.errors) == 1 and re.search(message, caught.value.errors[0])
    (checkpoint / "progress.json").write_text(json.dumps(json.loads(progress) | {"objective": {}}))  # not recorded
    with pytest.raises(UserError, match=r"^\S+ latest: \S+ is damaged"):
        preflight(args, 1)
    edit_config(model / "vae", norm_eps=1e-3)
    edit_config(model / "transformer", norm_eps=1e-3)
    with pytest.raises(UserError, match="is not the base"):
        preflight(args, 1)
    shutil.rmtree(checkpoint)
    assert preflight(args, 1).keys != plan.keys


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "deleted", "garbage", "swapped"])
def test_damaged_entries_are_rebuilt(data, tmp_path, damage):
    scanned, cache = scan(data), LatentCache(tmp_path / "cache")
    samples, keys = scanned.samples, keys_of(scanned)
    fill(cache, samples, keys, constant_encoders)
    path = cache.path(keys[2].video[0])
    content = path.read_bytes()
    if damage == "deleted":
        path.unlink()
    else:
        flipped = content[:-7] + bytes([content[-7] ^ 1]) + content[-6:]
        other_entry = cache.path(keys[3].video[0]).read_bytes()
        damages = {
            "truncated": content[:-5],
            "flipped": flipped,
            "emptied": b"",
            "garbage": b"x" * 99,
            "swapped": other_entry,
        }
        path.write_bytes(damages[damage])
    with pytest.raises(DamagedEntry):
        cache.read(keys[2].video[0])
    untouched = cache.path(keys[1].video[0]).stat().st_mtime_ns
    fill(cache, samples, keys, constant_encoders)
    assert path.read_bytes() == content
    assert cache.path(keys[1].video[0]).stat().st_mtime_ns == untouched


def test_bad_clips_are_reported_and_the_others_encoded(data, tmp_path):
    scanned, cache = scan(data), LatentCache(tmp_path / "cache")
    samples, keys = scanned.samples, keys_of(scanned)
    content = Path(samples[1].sample.clip).read_bytes()
    Path(samples[1].sample.clip).write_bytes(content[: len(content) // 2])
    Path(samples[4].sample.clip).write_bytes(b"nothing")

    @contextmanager
    def overflowing():
        def video(pixels):  # clip 6 gets latents that are not finite
            value = torch.inf if pixels.equal(decode(Path(samples[6].sample.clip), samples[6].selection)) else 1.0
            return torch.full((1, 1), value)

        yield PixelEncoders(video, lambda pixels, seed: torch.ones(1))

    errors = fill(cache, samples, keys, overflowing, workers=1)
    assert errors.keys() >= {keys[number].video[0] for number in (1, 4, 6)}
    assert len(errors) == 5  # the image of clip 6 can be encoded
    assert "not finite" in errors[keys[6].video[0]]
    intact = [cache.verify(key.video[0]) for key in keys]
    assert intact == [True, False, True, True, False, True, False, True]


def test_clip_replaced_during_the_run_is_not_encoded_under_its_old_key(data, tmp_path):
    scanned, cache = scan(data), LatentCache(tmp_path / "cache")
    shutil.copy(scanned.samples[1].sample.clip, scanned.samples[0].sample.clip)
    errors = fill(cache, scanned.samples, keys_of(scanned), constant_encoders)
    assert errors.keys() == {*keys_of(scanned)[0].video, *keys_of(scanned)[0].image}
    assert all("was changed during the run" in error for error in errors.values())


def test_foreign_files_are_not_entries(tmp_path):
    cache = LatentCache(tmp_path)
    cache.write("video-" + "0" * 32, torch.zeros(1))
    (tmp_path / "model.safetensors").touch()
    assert list(cache.names()) == ["video-" + "0" * 32]


def test_ranks_share_the_work_and_idle_ranks_load_no_encoder(data, tmp_path):
    scanned, cache = scan(data), LatentCache(tmp_path / "cache")
    samples, keys = scanned.samples, keys_of(scanned)
    for rank in range(3):
        fill(cache, samples, keys, constant_encoders, RankShard(rank, 3))
    assert all(cache.verify(key.video[0]) and cache.verify(key.image[0]) for key in keys)

    def never():
        raise AssertionError("an encoder was loaded without need")

    for rank in range(12):  # more ranks than clips, and no work left
        assert fill(cache, samples, keys, never, RankShard(rank, 12)) == {}
        precompute_prompts(cache, {}, never, RankShard(rank, 12), no_heartbeat)
    assert not list(cache.folder.glob(".*"))  # no temporary files remain


def test_other_variant_in_a_folder_is_not_read(tiny, tmp_path):
    folder = shutil.copytree(tiny("5b") / "text_encoder", tmp_path / "text_encoder")
    state = load_file(folder / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in state.items()}, folder / "model.fp16.safetensors")
    assert loading.stored_dtype(folder) == torch.float32
