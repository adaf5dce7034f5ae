"""Training calls the transformer with the inputs that the installed diffusers pipelines use.

The pipelines run up to their call of the transformer, which is recorded instead of computed.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.video import Resolution
from examples.tiny_configs import VARIANTS
from utils.model import encoders, loading
from utils.model.conditioning import predict_velocity, sample_moments, to_image_latents, to_video_latents
from utils.model.spec import read_spec

# sample size in the checkpoint's config, and resolution of the generated clip
NATIVE_1_0, NATIVE_1_5 = (49, 480, 720), (81, 2400, 2400)
GEOMETRIES = {
    "2b": [(NATIVE_1_0, "49x480x720"), (NATIVE_1_0, "81x480x720"), (NATIVE_1_0, "17x256x384")],
    "5b": [(NATIVE_1_0, "49x480x720"), (NATIVE_1_0, "81x768x1360"), (NATIVE_1_0, "17x256x384")],
    "5b-i2v": [(NATIVE_1_0, "49x480x720"), (NATIVE_1_0, "81x480x720"), ((17, 256, 384), "17x256x384")],
    "1.5": [(NATIVE_1_5, "81x768x1360"), (NATIVE_1_5, "49x480x720"), (NATIVE_1_5, "17x256x384")],
    "1.5-i2v": [(NATIVE_1_5, "81x768x1360"), (NATIVE_1_5, "49x480x720"), (NATIVE_1_5, "17x256x384")],
}
CASES = [(variant, sample, size) for variant, geometries in GEOMETRIES.items() for sample, size in geometries]
CASES += [(variant, geometries[0][0], "1x256x384") for variant, geometries in GEOMETRIES.items()]  # images


def record_calls(module):
    """Replaces the forward method of a transformer. Returns a list that receives the arguments of each call."""
    calls = []

    def forward(hidden_states, **kwargs):
        calls.append({"hidden_states": hidden_states, **kwargs})
        return (torch.zeros_like(hidden_states[:, :, : module.config.out_channels]),)

    module.forward = forward
    return calls


@pytest.mark.parametrize(("variant", "sample", "size"), CASES)
def test_transformer_inputs_match_the_pipeline(tiny, variant, sample, size):
    model_dir, size = tiny(variant, sample), Resolution.parse(size)
    spec = read_spec(model_dir)
    pipeline = loading.PIPELINES[spec.task].from_pretrained(model_dir)
    calls = record_calls(pipeline.transformer)
    decoded = []

    def decode_latents(latents):
        decoded.append(latents)
        return torch.zeros(1, 3, 1, 8, 8)

    pipeline.decode_latents = decode_latents
    image = Image.effect_noise((size.width, size.height), 60).convert("RGB")
    prompt = "a red circle moves left"
    pipeline(
        prompt=prompt,
        **({"image": image} if spec.task == "i2v" else {}),
        height=size.height,
        width=size.width,
        num_frames=size.frames,
        num_inference_steps=1,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(3),
        max_sequence_length=spec.max_text_seq_length,
    )
    theirs = calls.pop()

    # training inputs from a clip of the same size, with the noisy latents of the pipeline
    frames, height, width = spec.latent_size(size)
    clip = to_video_latents(torch.randn(1, spec.latent_channels, frames, height, width), spec)
    noisy = theirs["hidden_states"][:, :, : spec.latent_channels]
    assert clip.shape == noisy.shape
    image_latents = None
    if spec.task == "i2v":
        pixels = torch.from_numpy(np.array(image))
        moments = encoders.encode_video(pipeline.vae, pixels[None])[None]
        noise = torch.randn(1, spec.latent_channels, 1, height, width, generator=torch.Generator().manual_seed(3))
        image_latents = to_image_latents(sample_moments(moments, noise), spec, clip.shape[1])
    embedding = encoders.encode_prompts(pipeline.tokenizer, pipeline.text_encoder, spec.max_text_seq_length, [prompt])[
        0
    ]
    predict_velocity(
        pipeline.transformer, spec, noisy, theirs["timestep"], embedding[None], image_latents, torch.float32
    )
    ours = calls.pop()

    assert ours.keys() - {"ofs"} == theirs.keys() - {"ofs", "attention_kwargs"}
    for name in ("hidden_states", "encoder_hidden_states", "timestep", "ofs"):
        if theirs.get(name) is None:
            assert ours[name] is None
        else:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
    if theirs["image_rotary_emb"] is None:
        assert ours["image_rotary_emb"] is None
    else:
        for table, expected in zip(ours["image_rotary_emb"], theirs["image_rotary_emb"], strict=True):
            assert torch.equal(table, expected)
    # training pads at the front, with the frames that the pipeline drops before decoding
    padding = spec.frames_to_pad(frames)
    assert decoded[0].shape[1] == clip.shape[1] - padding == frames
    assert torch.equal(clip[:, :padding], clip[:, padding : 2 * padding])


@pytest.mark.parametrize("variant", VARIANTS)
def test_spec_identifies_the_variant_by_its_configs(tiny, variant):
    spec = read_spec(tiny(variant))
    assert spec.task == ("i2v" if "i2v" in variant else "t2v")
    assert spec.is_v1_5 == variant.startswith("1.5")
    assert spec.fps == (16 if variant.startswith("1.5") else 8)


def test_token_counts_of_the_published_models(tiny):
    """The counts for native clips in the CogVideoX papers."""
    assert read_spec(tiny("5b", NATIVE_1_0)).tokens(Resolution(49, 480, 720))[0] == 17_550
    assert read_spec(tiny("1.5", NATIVE_1_5)).tokens(Resolution(81, 768, 1360))[0] == 44_880
    assert read_spec(tiny("1.5", NATIVE_1_5)).native == Resolution(81, 768, 1360)


def test_posterior_sample_matches_diffusers():
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = torch.randn(2, 32, 3, 4, 4) * 20  # exceeds the clamp of the log-variance in both directions
    theirs = DiagonalGaussianDistribution(moments).sample(torch.Generator().manual_seed(0))
    noise = torch.randn(2, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sample_moments(moments, noise), theirs, rtol=0, atol=0)
