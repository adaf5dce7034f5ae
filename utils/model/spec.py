"""Facts about a checkpoint, read from its configs and never from the name of its folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from sentencepiece import SentencePieceProcessor
from transformers import T5EncoderModel

from dataset.video import Resolution
from utils.common.errors import CheckReport, UserError
from utils.common.filesystem import unreadable
from utils.model.weight_files import check_weights, has_variant, read_config

COMPONENTS = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")
# Entries of the transformer's config: whether it has learned positions, and `interpolate` if they are interpolated.
# diffusers ignores names with an underscore.
LEARNED, LEARNED_POSITIONS = "use_learned_positional_embeddings", "_learned_positions"


@dataclass(frozen=True)
class ModelSpec:
    """Properties of a model that training and sampling depend on.

    Attributes:
        transformer: `transformer/config.json`, completed with the defaults of its class.
        vae: `vae/config.json`, likewise.
    """

    transformer: dict[str, Any]
    vae: dict[str, Any]

    @property
    def task(self) -> Literal["t2v", "i2v"]:
        """The task; an i2v transformer takes the image latents on additional channels."""
        return "i2v" if self.transformer["in_channels"] == 2 * self.latent_channels else "t2v"

    @property
    def latent_channels(self) -> int:
        return self.vae["latent_channels"]

    @property
    def is_v1_5(self) -> bool:
        """Whether this is CogVideoX1.5, whose patches span several latent frames."""
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
        return bool(self.transformer.get(LEARNED))

    @property
    def learned_positions(self) -> Literal["keep", "interpolate"] | None:
        """How learned positions are treated at other sizes than that of their table; None without learned positions."""
        if not self.has_learned_positions:
            return None
        return "interpolate" if self.transformer.get(LEARNED_POSITIONS) == "interpolate" else "keep"

    def with_learned_positions(self, choice: str) -> ModelSpec:
        """Returns the spec with another treatment of its learned positions: keep, interpolate or drop."""
        changes = {LEARNED: self.has_learned_positions and choice != "drop", LEARNED_POSITIONS: choice}
        return replace(self, transformer=self.transformer | changes)

    @property
    def positions(self) -> str:
        """Description of the position embeddings for logs."""
        if self.has_learned_positions:
            return "rotary and learned" + (" (interpolated)" if self.learned_positions == "interpolate" else "")
        return "rotary" if self.has_rotary_positions else "sincos"

    @property
    def has_ofs(self) -> bool:
        """Whether the transformer takes the `ofs` input (CogVideoX1.5-I2V)."""
        return self.transformer.get("ofs_embed_dim") is not None

    @property
    def max_text_seq_length(self) -> int:
        return self.transformer.get("max_text_seq_length", 226)

    @property
    def width(self) -> int:
        """Hidden size of the transformer."""
        return self.transformer["num_attention_heads"] * self.transformer["attention_head_dim"]

    @property
    def scaling_factor(self) -> float:
        return self.vae["scaling_factor"]

    @property
    def inverts_image_latents(self) -> bool:
        """Whether image latents are divided by the scaling factor instead of multiplied."""
        return bool(self.vae.get("invert_scale_latents"))

    @cached_property
    def spatial_factor(self) -> int:
        """Pixels per latent along height and width."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame."""
        return int(self.vae.get("temporal_compression_ratio", 4))

    @property
    def fps(self) -> float:
        """Frame rate of the clips that the model was trained on."""
        return 16.0 if self.is_v1_5 else 8.0

    @property
    def trained_in_fp16(self) -> bool:
        """Whether the model was trained in fp16 (2b, recognized by its sincos positions). Others overflow in fp16."""
        return not self.has_rotary_positions

    @property
    def largest(self) -> Resolution:
        """The config's sample size in pixels: the native clip of 1.0, the limit of the rotary table of 1.5."""
        return Resolution(
            self.transformer["sample_frames"],
            self.transformer["sample_height"] * self.spatial_factor,
            self.transformer["sample_width"] * self.spatial_factor,
        )

    @property
    def native(self) -> Resolution:
        """Default size for sampling. The config of 1.5 has a square limit (2400x2400) instead of its clip, 768x1360."""
        if not self.is_v1_5:
            return self.largest
        return Resolution(self.largest.frames, min(768, self.largest.height), min(1360, self.largest.width))

    def latent_size(self, resolution: Resolution) -> tuple[int, int, int]:
        """Returns latent frames before padding, height and width of a clip."""
        return (
            (resolution.frames - 1) // self.temporal_factor + 1,
            resolution.height // self.spatial_factor,
            resolution.width // self.spatial_factor,
        )

    def frames_to_pad(self, latent_frames: int) -> int:
        """Returns how many latent frames CogVideoX1.5 adds at the front to reach a multiple of `patch_size_t`."""
        return -latent_frames % (self.patch_size_t or 1)

    def tokens(self, resolution: Resolution) -> tuple[int, int]:
        """Returns the number of video tokens and of text tokens per sample."""
        frames, height, width = self.latent_size(resolution)
        frames = (frames + self.frames_to_pad(frames)) // (self.patch_size_t or 1)
        return frames * (height // self.patch_size) * (width // self.patch_size), self.max_text_seq_length

    def frames_notes(self, frames: int) -> list[str]:
        """Returns a note if diffusers would replace the learned positions with computed ones, else an empty list."""
        if self.learned_positions != "keep" or frames == self.largest.frames:
            return []
        length = f"{frames} frames" if frames > 1 else "images"
        return [
            f"this checkpoint has learned positions for {self.largest.frames} frames; with {length}, training "
            "and sampling use computed positions instead. --learned_positions interpolate keeps the learned ones."
        ]

    def resolution_errors(self, resolution: Resolution, flag: str) -> list[str]:
        """Returns an error message if the model cannot process clips of this size, else an empty list."""
        multiple = self.spatial_factor * self.patch_size
        misaligned = [
            f"{name} {size} (use {size // multiple * multiple or multiple} or {(size // multiple + 1) * multiple})"
            for name, size in (("height", resolution.height), ("width", resolution.width))
            if size % multiple
        ]
        if misaligned:
            return [
                f"{flag} {resolution}: height and width must be multiples of {multiple}; {' and '.join(misaligned)}."
            ]
        limit = self.largest
        size = (resolution.height, resolution.width)
        if self.learned_positions == "keep" and size != (limit.height, limit.width):
            return [
                f"{flag} {resolution}: this checkpoint has learned positions of fixed size; height and width must be "
                f"{limit.height}x{limit.width}; other sizes need --learned_positions interpolate or drop."
            ]
        if self.is_v1_5 and (size[0] > limit.height or size[1] > limit.width):
            return [
                f"{flag} {resolution}: this checkpoint's rotary table ends at {limit.height}x{limit.width}; "
                "use a smaller height and width."
            ]
        return []


# Component -> name of its config file, and its class.
CONFIGS = {
    "transformer": ("config.json", CogVideoXTransformer3DModel),
    "vae": ("config.json", AutoencoderKLCogVideoX),
    "scheduler": ("scheduler_config.json", CogVideoXDPMScheduler),
    "text_encoder": ("config.json", T5EncoderModel),
}

# Component -> entries of its config that the objective of training depends on. Scheduler: the noise of each timestep.
_OBJECTIVE = {
    "scheduler": (
        *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
        *("snr_shift_scale", "rescale_betas_zero_snr"),
    ),
    "vae": ("scaling_factor", "invert_scale_latents"),
}


def read_objective(model_dir: Path) -> dict[str, Any]:
    """Returns the entries of configs, other than the transformer's, that the objective of training depends on.

    Returns:
        Name such as `snr_shift_scale in scheduler/scheduler_config.json` -> value.
    """
    objective: dict[str, Any] = {}
    for component, names in _OBJECTIVE.items():
        file, model_class = CONFIGS[component]
        config = read_config(model_dir / component / file, model_class)
        objective |= {f"{name} in {component}/{file}": config.get(name) for name in names}
    return objective


def read_spec(model_dir: Path, variant: str | None = None) -> ModelSpec:
    """Reads the configs of a checkpoint in the diffusers format and checks the headers of its weight files.

    Args:
        variant: as in `weight_files`.

    Raises:
        UserError: files are missing or damaged, or this is not a CogVideoX checkpoint. Lists all errors.
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
    for name, (file, model_class) in CONFIGS.items():
        try:
            configs[name] = read_config(model_dir / name / file, model_class)
        except UserError as error:
            errors += error.errors
    report = CheckReport()
    for name, (_, model_class) in CONFIGS.items():
        if name != "scheduler":
            report.run(check_weights, model_dir / name, "--model_path", model_class, configs.get(name), variant)
    errors += report.errors
    if variant is not None and not any(has_variant(model_dir / name, variant) for name in COMPONENTS):
        errors.append(
            f"--variant {variant}: {model_dir} has no weights of this variant; leave the flag out or give another."
        )
    tokenizer_files = [model_dir / "tokenizer" / file for file in ("spiece.model", "tokenizer.json")]
    found = [file for file in tokenizer_files if file.is_file()]
    if not found:
        errors.append(f"--model_path: {model_dir / 'tokenizer'} lacks spiece.model.")
    for path in found:
        if reason := unreadable(path):
            errors.append(f"--model_path: {reason}.")
        elif path.suffix == ".model" and not _is_sentencepiece(path):
            errors.append(f"--model_path: {path} is damaged; is the download complete?")
    if errors:
        raise UserError(errors)
    if errors := list(_config_errors(model_dir, **configs)):
        raise UserError(errors)
    return ModelSpec(configs["transformer"], configs["vae"])


def _is_sentencepiece(path: Path) -> bool:
    """Whether a file holds a vocabulary of sentencepiece. If not, transformers takes it for another tokenizer's."""
    try:
        return SentencePieceProcessor(model_file=str(path)).vocab_size() > 0
    except (OSError, RuntimeError):
        return False


def _config_errors(
    model_dir: Path,
    transformer: dict[str, Any],
    vae: dict[str, Any],
    scheduler: dict[str, Any],
    text_encoder: dict[str, Any],
) -> Iterator[str]:
    """Yields an error message for each pair of configs that do not fit together."""
    channels, latent = transformer["in_channels"], vae["latent_channels"]
    if channels not in (latent, 2 * latent):
        yield (
            f"--model_path {model_dir}: the transformer has {channels} input channels, but the VAE has {latent} latent "
            f"channels; {latent} (t2v) or {2 * latent} (i2v) are expected."
        )
    if scheduler["prediction_type"] != "v_prediction":
        yield f"--model_path {model_dir}: the scheduler predicts {scheduler['prediction_type']}, not v_prediction."
    try:
        CogVideoXDPMScheduler.from_config(scheduler)
    except Exception as error:  # whatever its constructor raises
        yield f"--model_path: {model_dir / 'scheduler' / CONFIGS['scheduler'][0]} cannot be used ({error})."
    if text_encoder.get("d_model") != transformer["text_embed_dim"]:
        yield (
            f"--model_path {model_dir}: the text encoder's width is {text_encoder.get('d_model')}, but the transformer "
            f"expects {transformer['text_embed_dim']}."
        )
