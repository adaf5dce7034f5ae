"""`--learned_positions`: CogVideoX-5b-I2V at sizes other than that of its table of learned positions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import grid_sample

from dataset.decoders import open_reader
from tests.conftest import FIRST_FRAME, arguments, generate, succeed
from utils.checkpoint.export import TRANSFORMER_CONFIG, TransformerWeights, export_comfyui
from utils.checkpoint.stored_weights import read_safetensors
from utils.common.errors import UserError
from utils.config.args import parse_args
from utils.generation.args import DemoArgs
from utils.generation.checks import check_transformer, with_positions
from utils.generation.pipeline import load_pipeline
from utils.model.conditioning import rotary_for
from utils.model.positions import set_learned_positions
from utils.model.spec import read_spec
from utils.run.preflight import preflight


def load(model: Path, choice: str) -> CogVideoXTransformer3DModel:
    transformer = CogVideoXTransformer3DModel.from_pretrained(model / "transformer")
    set_learned_positions(transformer, read_spec(model).with_learned_positions(choice))
    return transformer.eval()


@torch.no_grad()
def output_of(transformer: CogVideoXTransformer3DModel, model: Path, frames: int, height: int, width: int):
    """Returns the output for latents of this size, with the rotary positions that the pipelines use."""
    generator, config = torch.Generator().manual_seed(0), transformer.config
    latents = torch.randn(1, frames, config.in_channels, height, width, generator=generator)
    prompt = torch.randn(1, config.max_text_seq_length, config.text_embed_dim, generator=generator)
    rotary = rotary_for(read_spec(model), latents)
    return transformer(latents, prompt, torch.tensor([500]), image_rotary_emb=rotary, return_dict=False)[0]


def test_interpolated_positions_are_read_at_the_rotary_coordinates(tiny):
    """The table at its own size; elsewhere, what grid_sample of torch reads at the coordinates of diffusers."""
    model = tiny("5b-i2v", (17, 96, 64))
    plain, embedding = load(model, "keep"), load(model, "interpolate").patch_embed
    table, text = plain.patch_embed.pos_embedding, plain.config.max_text_seq_length
    native = (5, 12, 8)
    assert torch.equal(output_of(load(model, "interpolate"), model, *native), output_of(plain, model, *native))
    video = table[0, text:].T.reshape(1, -1, 5, 6, 4).float()
    for frames, height, width in [(5, 6, 4), (3, 6, 12), (7, 10, 10)]:
        (top, left), (bottom, right) = get_resize_crop_region_for_grid((height, width), 4, 6)
        axes = [
            torch.arange(frames) / 2 - 1,
            torch.linspace(top, bottom * (height - 1) / height, height) / 2.5 - 1,
            torch.linspace(left, right * (width - 1) / width, width) / 1.5 - 1,
        ]
        points = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1)[None]
        expected = grid_sample(video, points, padding_mode="border", align_corners=True)
        positions = embedding._get_positional_embeddings(2 * height, 2 * width, 4 * frames - 3)
        assert torch.equal(positions[:, :text], table[:, :text])
        torch.testing.assert_close(
            positions[0, text:].T.reshape_as(expected[0]).float(), expected[0], rtol=0, atol=1e-5
        )


def test_dropped_positions_equal_those_of_diffusers(tiny, tmp_path):
    """A transformer whose config has no learned positions; diffusers adds no computed ones to rotary positions."""
    model = tiny("5b-i2v")
    theirs = CogVideoXTransformer3DModel.from_pretrained(
        model / "transformer", use_learned_positional_embeddings=False
    ).eval()
    ours = load(model, "drop")
    for size in [(3, 8, 8), (5, 12, 8)]:
        assert torch.equal(output_of(ours, model, *size), output_of(theirs, model, *size))
    assert not torch.equal(output_of(ours, model, 3, 8, 8), output_of(load(model, "keep"), model, 3, 8, 8))
    ours.save_pretrained(tmp_path)
    reloaded = CogVideoXTransformer3DModel.from_pretrained(tmp_path)
    assert not reloaded.config["use_learned_positional_embeddings"]
    torch.testing.assert_close(output_of(reloaded, model, 5, 12, 8), output_of(ours, model, 5, 12, 8))


def test_fine_tuned_transformers_state_their_positions(tiny, tmp_path):
    """In their config or the metadata of a file for ComfyUI.

    For the output of zero_to_fp32.py, in the config of the checkpoint or by the missing table.
    """
    model = tiny("5b-i2v")

    def positions_of(folder: Path, requested: str | None = None) -> str | None:
        args = DemoArgs(prompt="x", model_path="", transformer_path=folder, learned_positions=requested)  # type: ignore[arg-type]
        spec = with_positions(args, read_spec(model))
        check_transformer(folder, spec)
        loaded = load_pipeline(args, model, spec).transformer
        assert loaded.config["use_learned_positional_embeddings"] == spec.has_learned_positions
        return spec.learned_positions

    for choice, expected in (("interpolate", "interpolate"), ("drop", None), ("keep", "keep")):
        transformer, folder = load(model, choice), tmp_path / choice
        transformer.save_pretrained(folder / "transformer")
        save_file(transformer.state_dict(), folder / "model.safetensors")
        assert positions_of(folder / "transformer") == expected
        weights = read_safetensors([folder / "model.safetensors"])
        comfyui = tmp_path / f"{choice}.safetensors"
        export_comfyui(TransformerWeights(weights, folder / "transformer" / "config.json", ""), comfyui, torch.float32)
        assert positions_of(comfyui) == expected
        (folder / "transformer").rename(tmp_path / "done")
        assert positions_of(folder) == ("keep" if choice == "interpolate" else expected)
        (tmp_path / "done" / "config.json").rename(tmp_path / TRANSFORMER_CONFIG)
        assert positions_of(folder) == expected
        (tmp_path / TRANSFORMER_CONFIG).unlink()
        shutil.rmtree(tmp_path / "done")
    with pytest.raises(
        UserError, match=r"--learned_positions interpolate: --transformer_path .* was trained with drop"
    ):
        positions_of(tmp_path / "drop", "interpolate")


@pytest.mark.slow
def test_lora_states_its_positions_and_the_demo_follows(tiny, data, validation, tmp_path):
    """Two sizes in one run, neither of them native; the demo and the validation need no flag."""
    model, out, choice = tiny("5b-i2v"), tmp_path / "out", "interpolate"
    more = ["--train_resolution", "9x64x96", "17x96x64", "--train_steps", 2, "--learned_positions", choice]
    more += ["--do_validation", "--validation_dir", validation, "--num_inference_steps", 1]
    output = succeed("train.py", *arguments(model, data, out, *more, task="i2v"))
    assert "Validation failed" not in output
    lora = out / "checkpoint-2"
    with safe_open(lora / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert file.metadata()["learned_positions"] == choice
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.r"] == 8
    videos = {}
    for number, flags in enumerate([[], ["--learned_positions", choice]]):
        videos[number] = tmp_path / f"{number}.mp4"
        demo = ["--image_or_video_path", FIRST_FRAME, "--num_inference_steps", 2, "--height", 96, *flags]
        generate("--model_path", model, "--lora_path", lora, "--prompt", "x", "--output_path", videos[number], *demo)
    one, other = (list(open_reader(video).read(list(range(9)))) for video in videos.values())
    np.testing.assert_array_equal(one, other)
    args = DemoArgs(prompt="x", model_path=str(model), lora_path=(lora,), learned_positions="drop")
    with pytest.raises(UserError, match=f"--learned_positions drop: --lora_path .* was trained with {choice}"):
        with_positions(args, read_spec(model))
    resumed = arguments(model, data, out, "--resume_from_checkpoint", "latest", task="i2v")
    with pytest.raises(UserError, match=f"--learned_positions is keep, but .*checkpoint-2 was trained with {choice}"):
        preflight(parse_args(resumed), 1)
