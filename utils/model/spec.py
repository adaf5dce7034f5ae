"""What a checkpoint's own configs say of it. Nothing here, or anywhere else, looks at the name of a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel

from dataset.video import Resolution
from utils.common.errors import CheckReport, UserError
from utils.model.weight_files import check_weights, read_config

COMPONENTS = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")


@dataclass(frozen=True)
class ModelSpec:
    """The facts that training and sampling depend on, from `transformer/config.json` and `vae/config.json`."""

    transformer: dict[str, Any]
    vae: dict[str, Any]

    @property
    def task(self) -> Literal["t2v", "i2v"]:
        """An image-to-video model takes the image's latents on as many more channels."""
        return "i2v" if self.transformer["in_channels"] == 2 * self.latent_channels else "t2v"

    @property
    def latent_channels(self) -> int:
        return self.vae["latent_channels"]

    @property
    def is_v1_5(self) -> bool:
        """CogVideoX1.5 patches in time as well."""
        return self.patch_size_t is not None

    @property
    def patch_size(self) -> int:
        return self.transformer["patch_size"]

    @property
    def patch_size_t(self) -> int | None:
        return self.transformer.get("patch_size_t")

    @property
    def has_rotary_positions(self) -> bool:
        return bool(self.transformer.get("use_rotary_positional_embeddings"))

    @property
    def has_learned_positions(self) -> bool:
        return bool(self.transformer.get("use_learned_positional_embeddings"))

    @property
    def positions(self) -> str:
        if self.has_learned_positions:
            return "rotary and learned"
        return "rotary" if self.has_rotary_positions else "sincos"

    @property
    def has_ofs(self) -> bool:
        return self.transformer.get("ofs_embed_dim") is not None

    @property
    def max_text_seq_length(self) -> int:
        return self.transformer.get("max_text_seq_length", 226)

    @property
    def width(self) -> int:
        """Of a token inside the transformer."""
        return self.transformer["num_attention_heads"] * self.transformer["attention_head_dim"]

    @property
    def scaling_factor(self) -> float:
        return self.vae["scaling_factor"]

    @property
    def inverts_image_latents(self) -> bool:
        return bool(self.vae.get("invert_scale_latents"))

    @cached_property
    def spatial_factor(self) -> int:
        """Pixels a latent, along height and width."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def temporal_factor(self) -> int:
        return int(self.vae.get("temporal_compression_ratio", 4))

    @property
    def fps(self) -> float:
        """Frames a second of the clips that the model was trained on."""
        return 16.0 if self.is_v1_5 else 8.0

    @property
    def trained_in_fp16(self) -> bool:
        """CogVideoX-2b, the one with added sincos positions, is published in fp16; the others overflow in it."""
        return not self.has_rotary_positions

    @property
    def largest(self) -> Resolution:
        """The grid of `sample_*` in pixels: the native clip of 1.0, the bound of the rotary table of 1.5."""
        return Resolution(
            self.transformer["sample_frames"],
            self.transformer["sample_height"] * self.spatial_factor,
            self.transformer["sample_width"] * self.spatial_factor,
        )

    @property
    def native(self) -> Resolution:
        """What to generate when not told. 1.5 states a square bound (2400x2400) instead of its 768x1360 clip."""
        if not self.is_v1_5:
            return self.largest
        return Resolution(self.largest.frames, min(768, self.largest.height), min(1360, self.largest.width))

    def latent_size(self, resolution: Resolution) -> tuple[int, int, int]:
        """Latent frames (before padding), height and width of a clip."""
        return (
            (resolution.frames - 1) // self.temporal_factor + 1,
            resolution.height // self.spatial_factor,
            resolution.width // self.spatial_factor,
        )

    def frames_to_pad(self, latent_frames: int) -> int:
        """Latent frames that 1.5 puts in front so that `patch_size_t` divides their number."""
        return -latent_frames % (self.patch_size_t or 1)

    def tokens(self, resolution: Resolution) -> tuple[int, int]:
        """Video tokens and text tokens of one sample."""
        frames, height, width = self.latent_size(resolution)
        frames = (frames + self.frames_to_pad(frames)) // (self.patch_size_t or 1)
        return frames * (height // self.patch_size) * (width // self.patch_size), self.max_text_seq_length

    def frames_notes(self, frames: int) -> list[str]:
        """A sentence where diffusers would put computed positions in place of the learned ones."""
        if not self.has_learned_positions or frames == self.largest.frames:
            return []
        return [
            f"the learned positions of this checkpoint are for {self.largest.frames} frames; with {frames}, training "
            "and sampling compute positions instead."
        ]

    def resolution_errors(self, resolution: Resolution, flag: str) -> list[str]:
        """Sentences on why a clip of this size cannot go through the model; empty where it can."""
        multiple = self.spatial_factor * self.patch_size
        off = [
            f"{name} {size} (use {size // multiple * multiple or multiple} or {(size // multiple + 1) * multiple})"
            for name, size in (("height", resolution.height), ("width", resolution.width))
            if size % multiple
        ]
        if off:
            return [f"{flag} {resolution}: height and width must be multiples of {multiple}; {' and '.join(off)}."]
        fixed = self.largest
        size = (resolution.height, resolution.width)
        if self.has_learned_positions and size != (fixed.height, fixed.width):
            return [
                f"{flag} {resolution}: this checkpoint has learned positions of a fixed size; "
                f"height and width must be {fixed.height}x{fixed.width}."
            ]
        if self.is_v1_5 and (size[0] > fixed.height or size[1] > fixed.width):
            return [
                f"{flag} {resolution}: this checkpoint's rotary table ends at {fixed.height}x{fixed.width}; "
                "use a smaller height and width."
            ]
        return []


# Component -> file with its config, class that reads it.
CONFIGS = {
    "transformer": ("config.json", CogVideoXTransformer3DModel),
    "vae": ("config.json", AutoencoderKLCogVideoX),
    "scheduler": ("scheduler_config.json", CogVideoXDPMScheduler),
    "text_encoder": ("config.json", None),
}


def read_spec(model_dir: Path) -> ModelSpec:
    """Reads the configs of a checkpoint in the diffusers format, and the headers of its weights.

    Raises:
        UserError: with everything that is missing or damaged, or is not a CogVideoX checkpoint.
    """
    if not model_dir.is_dir():
        raise UserError(
            f"--model_path {model_dir}: there is no such folder. Give the folder of a CogVideoX checkpoint in the "
            "diffusers format, or its id on the model hub, such as THUDM/CogVideoX-2b."
        )
    errors = [
        f"--model_path {model_dir}: the folder {name}/ is missing; a checkpoint in the diffusers format has "
        f"{', '.join(COMPONENTS)}."
        for name in COMPONENTS
        if not (model_dir / name).is_dir()
    ]
    configs = {}
    for name, (file, kind) in CONFIGS.items():
        try:
            configs[name] = read_config(model_dir / name / file, kind)
        except UserError as error:
            errors += error.errors
    report = CheckReport()
    for name, (_, kind) in CONFIGS.items():
        if name != "scheduler":
            report.run(check_weights, model_dir / name, "--model_path", kind, configs.get(name))
    errors += report.errors
    if not any((model_dir / "tokenizer" / file).is_file() for file in ("spiece.model", "tokenizer.json")):
        errors.append(f"--model_path: {model_dir / 'tokenizer'} lacks spiece.model.")
    if errors:
        raise UserError(errors)
    if errors := list(_contradictions(model_dir, **configs)):
        raise UserError(errors)
    return ModelSpec(configs["transformer"], configs["vae"])


def text_encoder_config(model_dir: Path) -> dict[str, Any]:
    return json.loads((model_dir / "text_encoder" / "config.json").read_text())


def _contradictions(
    model_dir: Path,
    transformer: dict[str, Any],
    vae: dict[str, Any],
    scheduler: dict[str, Any],
    text_encoder: dict[str, Any],
) -> Iterator[str]:
    channels, latent = transformer["in_channels"], vae["latent_channels"]
    if channels not in (latent, 2 * latent):
        yield f"--model_path {model_dir}: the transformer takes {channels} channels, but the VAE gives {latent}."
    if scheduler["prediction_type"] != "v_prediction":
        yield f"--model_path {model_dir}: the scheduler predicts {scheduler['prediction_type']}, not v_prediction."
    if text_encoder.get("d_model") != transformer["text_embed_dim"]:
        yield (
            f"--model_path {model_dir}: the text encoder's width is {text_encoder.get('d_model')}, but the transformer "
            f"takes {transformer['text_embed_dim']}."
        )
