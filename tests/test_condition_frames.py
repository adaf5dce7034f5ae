"""`--condition_frames`: last frames and prefixes in the image latents, in training, validation and sampling."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from imageio.v3 import imwrite
from PIL import Image

from dataset.condition_frames import LAST, ConditionFrames
from dataset.latent_cache import LatentCache
from dataset.video import Resolution, decode
from tests.conftest import FIRST_FRAME, arguments, generate, succeed
from tests.test_parity import record_calls
from utils.common.seeds import DRAWS, seed_for
from utils.config.args import parse_args
from utils.model import encoders, loading
from utils.model.conditioned_pipeline import Condition
from utils.model.conditioning import to_image_latents
from utils.model.spec import read_spec
from utils.run.preflight import preflight
from utils.training.loss import sample_inputs
from utils.training.step import DenoisingObjective

CPU = torch.device("cpu")


@pytest.mark.parametrize("variant", ["5b-i2v", "1.5-i2v"])
@pytest.mark.parametrize("addition", [LAST, "prefix:5"])
def test_pipeline_and_training_put_the_frames_in_the_same_places(tiny, variant, addition):
    """Both equal the image latents of diffusers except where the frames stand, which the VAE encodes by themselves."""
    model, size = tiny(variant), Resolution(17, 64, 64)
    spec, pipeline = read_spec(model), loading.PIPELINES["i2v"].from_pretrained(model)
    calls = record_calls(pipeline.transformer)
    pipeline.decode_latents = lambda latents: torch.zeros(1, 3, 1, 8, 8)
    clip = torch.randint(256, (17, 64, 64, 3), dtype=torch.uint8)
    frames = clip[-1:] if addition == LAST else clip[:5]
    channels, factor = spec.latent_channels, spec.scaling_factor
    for pipeline.condition in (None, Condition(spec, addition, encoders.to_model_range(frames)[None])):
        pipeline(
            prompt="a red circle",
            image=Image.fromarray(clip[0].numpy()),
            height=size.height,
            width=size.width,
            num_frames=size.frames,
            num_inference_steps=1,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(3),
            max_sequence_length=spec.max_text_seq_length,
        )
    plain, conditioned = (call["hidden_states"][0, :, channels:] for call in calls)
    assert torch.equal(*(call["hidden_states"][0, :, :channels] for call in calls))  # the initial noise
    generator = torch.Generator().manual_seed(3)
    for shape in ((channels, 1, 8, 8), calls[0]["hidden_states"][:, :, :channels].shape):  # image and noise come first
        torch.randn(shape, generator=generator)
    posterior = pipeline.vae.encode(encoders.to_model_range(frames).permute(3, 0, 1, 2)[None]).latent_dist
    latents = posterior.sample(generator)[0].transpose(0, 1) * (1 / factor if variant == "1.5-i2v" else factor)
    expected = plain.clone()
    if addition == LAST:
        expected[-1:] = latents
    elif variant == "5b-i2v":
        expected[:2] = latents
    else:  # the padding frame comes first
        expected[:3] = torch.cat([latents[:1], latents])
    torch.testing.assert_close(conditioned, expected, rtol=0, atol=1e-5)

    # training: the addition does not change the other draws
    video = torch.randn(1, 2 * channels, 5, 8, 8)
    image, added = torch.randn(1, 4, 2 * channels, 1, 8, 8), torch.randn(4, 2 * channels, len(latents), 8, 8)
    added[:, channels:] = -60  # no variance: a sample is the mean
    before = sample_inputs(spec, video, image, [7], 1000)
    after = sample_inputs(spec, video, image, [7], 1000, additions=[(addition, added)])
    assert torch.equal(before.latents, after.latents) and torch.equal(before.noise, after.noise)
    assert before.image_latents is not None and after.image_latents is not None
    changed = before.image_latents.ne(after.image_latents).flatten(2).any(2)[0].tolist()
    assert changed == plain.ne(conditioned).flatten(1).any(1).tolist()
    placed = after.image_latents[0, -1 if addition == LAST else spec.frames_to_pad(1)]
    means = [to_image_latents(draw[None, :channels, :1], spec, 1)[0, 0] for draw in added]
    assert any(torch.allclose(placed, mean, atol=1e-5) for mean in means)  # the variance is e^-30


def test_last_frame_alone_equals_the_end_of_a_static_group(tiny):
    """The VAE is causal and repeats the first frame before it, so five equal frames have the latents of one."""
    vae = loading.load_vae(tiny("5b-i2v"), CPU, False, False)
    frame = torch.rand(1, 3, 1, 64, 64)
    alone, group = (vae.encode(frame.repeat(1, 1, count, 1, 1)).latent_dist.mean[:, :, -1] for count in (1, 5))
    torch.testing.assert_close(group, alone, rtol=0, atol=1e-5)


def test_condition_frames_add_cache_entries_and_change_none(tiny, data, tmp_path):
    plans = [
        preflight(parse_args(arguments(tiny("5b-i2v"), data, tmp_path, "--flip", *more, task="i2v")), 1)
        for more in ([], ["--condition_frames", "first", "first_last", "prefix:5"])
    ]
    assert plans[0].data_digest == plans[1].data_digest
    for before, after in zip(plans[0].keys, plans[1].keys, strict=True):
        assert (before.video, before.image, before.prompt) == (after.video, after.image, after.prompt)
        assert before.additions == {} and [len(names) for names in after.additions.values()] == [2, 2]
    assert len(plans[1].missing_entries()) == len(plans[0].missing_entries()) + 4 * len(plans[1].keys)


def test_each_sample_draws_one_of_the_condition_frames(tiny):
    """Evenly, by its seed alone."""
    frames = tuple(map(ConditionFrames.parse, ("first", "first_last", "prefix:5")))
    objective = DenoisingObjective(read_spec(tiny("5b-i2v")), torch.ones(1000), torch.float32, condition_frames=frames)
    seeds = [seed_for(DRAWS, 42, number) for number in range(300)]
    drawn = [objective._draw_addition(seed) for seed in seeds]
    assert drawn == [objective._draw_addition(seed) for seed in seeds]
    assert all(80 < drawn.count(name) < 120 for name in (None, LAST, "prefix:5"))


@pytest.mark.slow
def test_run_validates_and_the_demo_takes_last_images_and_prefixes(tiny, data, validation, tmp_path):
    model, out = tiny("5b-i2v"), tmp_path / "out"
    rows = [
        {"prompt": f"circle {number}", "image": str(FIRST_FRAME), "last_image": str(FIRST_FRAME)} for number in (0, 1)
    ]
    (validation / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (validation / "prompts.txt").unlink()
    more = ["--train_steps", 2, "--batch_size", 2, "--flip", "--condition_frames", "first_last", "first", "prefix:5"]
    more += ["--do_validation", "--validation_dir", validation, "--num_inference_steps", 1]
    output = succeed("train.py", *arguments(model, data, out, *more, task="i2v"))
    assert "Validation failed" not in output
    # an entry holds the frames with four draws of noise; mirrored clips have their own
    plan = preflight(parse_args(arguments(model, data, tmp_path / "new", *more, task="i2v")), 1)
    assert not plan.missing_entries()
    vae, selection = loading.load_vae(model, CPU, True, True), plan.samples[0].selection
    clip = encoders.to_model_range(decode(Path(plan.samples[0].sample.clip), selection))
    for addition, frames in (("last", clip[-1:]), ("prefix:5", clip[:5])):
        for number, pixels in enumerate((frames, frames.flip(2))):
            clean = vae.encode(pixels.permute(3, 0, 1, 2)[None]).latent_dist.parameters
            name = plan.keys[0].additions[addition][number]
            entry = LatentCache(plan.cache_dir).read(name)
            distances = (entry - clean).abs().mean((1, 2, 3, 4)) / clean.abs().mean()
            assert 0 < distances.min() < distances.max() < 1 and len(set(distances.tolist())) == len(distances)

    common = ["--model_path", model, "--lora_path", out / "checkpoint-2", "--prompt", "x", "--num_inference_steps", 1]
    first = ["--image_or_video_path", FIRST_FRAME]
    videos = []
    for number, flags in enumerate(
        [first, [*first, "--last_image", FIRST_FRAME], ["--prefix_video", tmp_path / "clip.mp4"]]
    ):
        imwrite(tmp_path / "clip.mp4", np.zeros((6, 64, 64, 3), np.uint8), fps=8, codec="libx264")
        text = generate(*common, *flags, "--output_path", tmp_path / f"{number}.mp4")
        videos.append((tmp_path / f"{number}.mp4").read_bytes())
    assert len(set(videos)) == 3 and "the last 5 of 6 frames" in text
