"""What training feeds the transformer is what the installed diffusers pipelines feed it, for every form and geometry.

The pipelines run for real up to their call of the transformer, which is recorded in place of being computed.
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

# sample size of the checkpoint's config, and the size generated
NATIVE_1_0, NATIVE_1_5 = (49, 480, 720), (81, 2400, 2400)
GEOMETRIES = {
    "2b": [(NATIVE_1_0, "49x480x720"), (NATIVE_1_0, "81x480x720"), (NATIVE_1_0, "17x256x384")],
    "5b": [(NATIVE_1_0, "49x480x720"), (NATIVE_1_0, "81x768x1360"), (NATIVE_1_0, "17x256x384")],
    "5b-i2v": [(NATIVE_1_0, "49x480x720"), (NATIVE_1_0, "81x480x720"), ((17, 256, 384), "17x256x384")],
    "1.5": [(NATIVE_1_5, "81x768x1360"), (NATIVE_1_5, "49x480x720"), (NATIVE_1_5, "17x256x384")],
    "1.5-i2v": [(NATIVE_1_5, "81x768x1360"), (NATIVE_1_5, "49x480x720"), (NATIVE_1_5, "17x256x384")],
}
CASES = [(form, sample, size) for form, geometries in GEOMETRIES.items() for sample, size in geometries]


def record_calls(module):
    """Replaces a transformer's forward: the arguments of every call are kept, the answer is zeros."""
    calls = []

    def forward(hidden_states, **kwargs):
        calls.append({"hidden_states": hidden_states, **kwargs})
        return (torch.zeros_like(hidden_states[:, :, : module.config.out_channels]),)

    module.forward = forward
    return calls


@pytest.mark.parametrize(("form_name", "sample", "size"), CASES)
def test_transformer_is_called_as_the_pipeline_calls_it(tiny, form_name, sample, size):
    model_dir, size = tiny(form_name, sample), Resolution.parse(size)
    form = read_spec(model_dir)
    pipeline = loading.PIPELINES[form.task].from_pretrained(model_dir)
    calls = record_calls(pipeline.transformer)
    decoded = []
    pipeline.decode_latents = lambda latents: decoded.append(latents) or torch.zeros(1, 3, 1, 8, 8)
    image = Image.effect_noise((size.width, size.height), 60).convert("RGB")
    prompt = "a red circle moves left"
    pipeline(
        prompt=prompt,
        **({"image": image} if form.task == "i2v" else {}),
        height=size.height,
        width=size.width,
        num_frames=size.frames,
        num_inference_steps=1,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(3),
        max_sequence_length=form.max_text_seq_length,
    )
    theirs = calls.pop()

    # ours, from a clip of the same size; the noisy latents are the pipeline's own
    frames, height, width = form.latent_size(size)
    clip = to_video_latents(torch.randn(1, form.latent_channels, frames, height, width), form)
    noisy = theirs["hidden_states"][:, :, : form.latent_channels]
    assert clip.shape == noisy.shape
    image_latents = None
    if form.task == "i2v":
        pixels = torch.from_numpy(np.array(image))
        moments = encoders.encode_video(pipeline.vae, pixels[None])[None]
        noise = torch.randn(1, form.latent_channels, 1, height, width, generator=torch.Generator().manual_seed(3))
        image_latents = to_image_latents(sample_moments(moments, noise), form, clip.shape[1])
    embedding = encoders.encode_prompt(pipeline.tokenizer, pipeline.text_encoder, form.max_text_seq_length, prompt)
    predict_velocity(
        pipeline.transformer, form, noisy, theirs["timestep"], embedding[None], image_latents, torch.float32
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
    # the padding frames, which training puts in front, are the ones that the pipeline drops before decoding
    padding = form.frames_to_pad(frames)
    assert decoded[0].shape[1] == clip.shape[1] - padding == frames
    assert torch.equal(clip[:, :padding], clip[:, padding : 2 * padding])


@pytest.mark.parametrize("form_name", VARIANTS)
def test_forms_are_told_apart_by_their_configs(tiny, form_name):
    form = read_spec(tiny(form_name))
    assert form.task == ("i2v" if "i2v" in form_name else "t2v")
    assert form.is_v1_5 == form_name.startswith("1.5")
    assert form.fps == (16 if form_name.startswith("1.5") else 8)


def test_tokens_of_the_published_models(tiny):
    """The counts of the CogVideoX papers' native clips."""
    assert read_spec(tiny("5b", NATIVE_1_0)).tokens(Resolution(49, 480, 720))[0] == 17_550
    assert read_spec(tiny("1.5", NATIVE_1_5)).tokens(Resolution(81, 768, 1360))[0] == 44_880
    assert read_spec(tiny("1.5", NATIVE_1_5)).native == Resolution(81, 768, 1360)


def test_posterior_sample_is_the_vaes_own():
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = torch.randn(2, 32, 3, 4, 4) * 20  # beyond the clamp of the log-variance on both sides
    theirs = DiagonalGaussianDistribution(moments).sample(torch.Generator().manual_seed(0))
    noise = torch.randn(2, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sample_moments(moments, noise), theirs, rtol=0, atol=0)
