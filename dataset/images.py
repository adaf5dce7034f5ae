"""Reads image files as pixels.

Legend: C channels (RGB), H W height and width of a sample, h w height and width of the source, in pixels.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from dataset.containers import CONVERT, EMPTY, ClipError
from dataset.stream_info import HDR_TRANSFERS
from dataset.video import Resolution, resize

# A file with one of these suffixes in the place of a clip is an image.
_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
# Formats whose further pictures are an animation, and not pages or previews.
_ANIMATED = ("AVIF", "GIF", "PNG", "WEBP")


def is_image_file(path: str) -> bool:
    """Returns whether a file that is listed as a clip is an image, by its suffix."""
    return path.lower().endswith(_SUFFIXES)


def check_is_still(path: Path) -> None:
    """Raises ClipError if an image file is an animation. A file that cannot be read passes."""
    pictures = 1
    with suppress(Exception), Image.open(path) as file:
        pictures = getattr(file, "n_frames", 1) if file.format in _ANIMATED else 1
    if pictures > 1:
        raise ClipError(f"is an animation and not a still image; {CONVERT} converts it")


def load_image(path: Path, resolution: Resolution, mode: str) -> torch.Tensor:
    """Reads an image and resizes it to the training resolution: uint8 [H, W, C].

    Applies the EXIF rotation, scales 16 bits to 8 and composites transparency over white.

    Raises:
        ClipError: the file cannot be read as an image, or it is HDR.
    """
    pixels = torch.from_numpy(_read_image(path)).movedim(-1, 0)
    return resize(pixels, resolution, mode).movedim(0, -1)


def image_size(path: Path) -> tuple[int, int]:
    """Returns height and width of an image after EXIF rotation. Decodes the whole image to verify it.

    Raises:
        ClipError: the file cannot be read as an image, or it is HDR.
    """
    height, width, _ = _read_image(path).shape
    return height, width


def _hdr_transfer(path: Path) -> str | None:
    """Returns the name of the HDR curve that a PNG or AVIF states in its first 64 KiB, or None. Pillow ignores it."""
    header = b""
    with suppress(OSError), path.open("rb") as file:  # opening it as an image reports the error
        header = file.read(65536).partition(b"IDAT")[0]
    # PNG: the second byte of the chunk; AVIF: the low byte of the second 16-bit field of the box
    for marker, position in ((b"cICP", 1), (b"colrnclx", 3)):
        stated = header.partition(marker)[2]
        if len(stated) > position and stated[position] in HDR_TRANSFERS:
            return HDR_TRANSFERS[stated[position]][0]
    return None


def _read_image(path: Path) -> np.ndarray:
    """Returns uint8 [h, w, C]."""
    if transfer := _hdr_transfer(path):
        raise ClipError(f"is HDR ({transfer}) and would be read too dark; export it in standard dynamic range")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):
                image = Image.fromarray(
                    (np.array(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8)
                )
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    except UnidentifiedImageError as error:
        if path.stat().st_size == 0:
            raise ClipError(EMPTY) from error
        raise ClipError("cannot be read as an image: its format is unknown; convert it to PNG or JPEG") from error
    except Exception as error:
        raise ClipError(f"cannot be read as an image ({error})") from error
