"""Loads and releases the components of a checkpoint. Components keep their stored dtype unless `dtype` is given."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import imageio
import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogVideoXVideoToVideoPipeline,
)
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors import safe_open
from transformers import T5EncoderModel, T5Tokenizer

from utils.common.errors import UserError
from utils.common.filesystem import disk_is_full, expand_user, unreadable_in
from utils.model.conditioned_pipeline import ConditionedImageToVideoPipeline
from utils.model.spec import COMPONENTS
from utils.model.weight_files import has_variant, weight_files

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PIPELINES = {
    "t2v": CogVideoXPipeline,
    "i2v": ConditionedImageToVideoPipeline,
    "v2v": CogVideoXVideoToVideoPipeline,
}
# Entries of a config that name the software which wrote it.
_WRITER = ("_diffusers_version", "_name_or_path", "transformers_version")
_TOKENIZER_FILES = (
    *("spiece.model", "tokenizer.json", "tokenizer_config.json"),
    *("added_tokens.json", "special_tokens_map.json"),
)
_STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def is_hub_id(model_path: str) -> bool:
    """Whether `--model_path` has the form of a model hub id, which a folder may have too."""
    return model_path.count("/") == 1 and not model_path.startswith((".", "/", "~"))


def resolve_model_dir(model_path: str) -> Path:
    """Returns the folder of a checkpoint. Downloads a model hub id to the hub's cache if it is not there yet.

    Raises:
        UserError: the download fails.
    """
    if Path(model_path).is_dir() or not is_hub_id(model_path):
        return expand_user(model_path)
    try:
        return Path(snapshot_download(model_path, allow_patterns=[f"{name}/*" for name in COMPONENTS]))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--model_path {model_path}: there is no such folder, and the model hub download failed ({reason})."
        ) from error


def stored_dtype(folder: Path, variant: str | None = None) -> torch.dtype:
    """Returns the dtype of the first tensor in a component's safetensors files."""
    with safe_open(weight_files(folder, variant)[0], framework="pt") as weights:
        name = next(iter(weights.keys()))
        return _STORED_DTYPES.get(weights.get_slice(name).get_dtype(), torch.float32)


def _from_pretrained(model_class: Any, folder: Path, dtype: torch.dtype, variant: str | None) -> Any:
    """Loads a component from its weights of a variant, or from the plain ones if it has none, as diffusers does."""
    variant = variant if variant is not None and has_variant(folder, variant) else None
    return model_class.from_pretrained(folder, dtype=dtype, variant=variant)


def variant_notes(model_dir: Path, variant: str | None) -> list[str]:
    """Returns a note that lists the weights which `--variant` selects, with their dtypes; empty without the flag."""
    if variant is None:
        return []
    selected: list[str] = []
    plain: list[str] = []
    for name in ("transformer", "vae", "text_encoder"):
        folder = model_dir / name
        (selected if has_variant(folder, variant) else plain).append(f"{name} ({_dtype_name(folder, variant)})")
    others = f"; plain weights: {', '.join(plain)}" if plain else ""
    return [f"--variant {variant} selects weights of the variant: {', '.join(selected)}{others}."]


def _dtype_name(folder: Path, variant: str | None) -> str:
    return str(stored_dtype(folder, variant)).removeprefix("torch.")


def text_encoder_config(model_dir: Path, variant: str | None = None) -> dict[str, Any]:
    """Returns the config of the text encoder; its `dtype` is that of the files, which `load_text_encoder` keeps."""
    folder = model_dir / "text_encoder"
    config = json.loads((folder / "config.json").read_text())
    return config | {"dtype": _dtype_name(folder, variant)}


def working_dtype(folder: Path, device: torch.device, variant: str | None = None) -> torch.dtype:
    """Returns the stored dtype, but float32 instead of float16 on a CPU, where float16 convolutions are very slow."""
    stored = stored_dtype(folder, variant)
    return torch.float32 if stored == torch.float16 and device.type == "cpu" else stored


def fingerprint(folder: Path, by_meaning: bool = False, variant: str | None = None, **settings: Any) -> str:
    """Returns a digest of a component's files and settings, 32 hex digits; part of the cache keys.

    Files up to 64 MiB are hashed in full. Of larger files, the size and 256 evenly spaced blocks of 64 KiB are hashed;
    any retraining changes them. Hidden files, such as those of file managers, do not count.

    Args:
        by_meaning: whether to hash the entries of config.json in place of its text, except those that name the
            software that wrote it. Such a digest identifies the component in any release of its files.
        variant: which weights to hash if the folder has them. The digest is then always by meaning, and equals that of
            the same weights under the plain names.
    """
    suffix = f".{variant}" if variant is not None and has_variant(folder, variant) else ""
    by_meaning = by_meaning or suffix != ""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    paths = _identifying_files(folder, variant) if by_meaning else [path for path in folder.iterdir() if path.is_file()]
    for path in sorted(path for path in paths if path.name[0] != "."):
        if path.name == "config.json" and by_meaning:
            digest.update(_meaning_of_config(path))
            continue
        size = path.stat().st_size
        digest.update(f"{path.name.replace(suffix, '')} {size}".encode())
        with path.open("rb") as file:
            if size <= 2**26:
                digest.update(file.read())
                continue
            for block in range(256):
                file.seek(block * (size - 2**16) // 255)
                digest.update(file.read(2**16))
    return digest.hexdigest()[:32]


def _meaning_of_config(path: Path) -> bytes:
    config = json.loads(path.read_text())
    return json.dumps({name: config[name] for name in config if name not in _WRITER}, sort_keys=True).encode()


def _identifying_files(folder: Path, variant: str | None) -> list[Path]:
    """Returns the files that are loaded from a component's folder."""
    names = {file.name for file in weight_files(folder, variant)} | {"config.json", *_TOKENIZER_FILES}
    return [path for path in folder.iterdir() if path.name in names]


def load_vae(
    model_dir: Path,
    device: torch.device,
    slicing: bool,
    tiling: bool,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
) -> AutoencoderKLCogVideoX:
    folder = model_dir / "vae"
    dtype = dtype or working_dtype(folder, device, variant)
    vae = _from_pretrained(AutoencoderKLCogVideoX, folder, dtype, variant).to(device)
    if slicing:
        vae.enable_slicing()
    if tiling:
        vae.enable_tiling()
    return vae.requires_grad_(False).eval()


def load_tokenizer(model_dir: Path) -> T5Tokenizer:
    """Loads the tokenizer. Raises UserError if it cannot be read."""
    folder = model_dir / "tokenizer"
    try:
        return T5Tokenizer.from_pretrained(folder)
    except Exception as error:  # whatever the readers of its files raise
        reason = unreadable_in(folder) or f"{folder} cannot be read ({error})"
        raise UserError(f"--model_path: {reason}.") from error


def load_text_encoder(
    model_dir: Path, device: torch.device, dtype: torch.dtype | None = None, variant: str | None = None
) -> T5EncoderModel:
    folder = model_dir / "text_encoder"
    dtype = dtype or stored_dtype(folder, variant)
    encoder = _from_pretrained(T5EncoderModel, folder, dtype, variant).to(device)
    return encoder.requires_grad_(False).eval()


def load_transformer(
    folder: Path, dtype: torch.dtype | None = None, device: str = "cpu", variant: str | None = None
) -> CogVideoXTransformer3DModel:
    """Loads a transformer.

    The weights are memory-mapped until they are copied or cast, so the processes of a machine share the pages.
    """
    transformer = _from_pretrained(CogVideoXTransformer3DModel, folder, stored_dtype(folder, variant), variant)
    return torch.nn.Module.to(transformer, device, dtype)  # the `to` of diffusers warns about every cast


def load_scheduler(model_dir: Path) -> CogVideoXDPMScheduler:
    """Loads the checkpoint's noise schedule into the sampler that validation and demo share.

    "trailing" spacing starts at the last timestep, where the rescaled schedule has no signal left. Other spacings start
    at a lower timestep, where the model expects some signal although sampling starts from pure noise (arXiv:2305.08891,
    section 3.3).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # harmless: configs of the DDIM scheduler have the same fields
        return CogVideoXDPMScheduler.from_pretrained(model_dir / "scheduler", timestep_spacing="trailing")


def write_video(frames: list[Image.Image], path: Path, fps: float, comment: str = "") -> None:
    """Writes an mp4 file with the settings of diffusers' `export_to_video`. Equal arguments give equal bytes.

    Sizes that are no multiples of 16 are kept, which diffusers rounds up.

    Args:
        frames: of even height and width, which the encoder needs.
        comment: text for the metadata.

    Raises:
        OSError: the file was not written; imageio does not report this.
    """
    path.unlink(missing_ok=True)
    metadata = ["-metadata", f"comment={comment}"] if comment else []
    try:
        with imageio.get_writer(path, fps=fps, quality=5.0, macro_block_size=2, output_params=metadata) as writer:
            for frame in frames:
                writer.append_data(np.asarray(frame))
    except OSError:  # without a number if ffmpeg has ended early
        if not disk_is_full(path.parent):
            raise
    if not path.is_file() or path.stat().st_size == 0:
        code = errno.ENOSPC if disk_is_full(path.parent) else errno.EIO
        path.unlink(missing_ok=True)
        raise OSError(code, "the video could not be written", str(path))


@contextmanager
def released(*models: torch.nn.Module) -> Iterator[None]:
    """Frees the device and host memory of the models when the context exits."""
    try:
        yield
    finally:
        for model in models:
            model.to("meta")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
