"""Draws rows of pictures with captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

# Pictures per row, and heights in pixels.
THUMBNAILS, THUMBNAIL_HEIGHT, CAPTION_HEIGHT = 6, 120, 16


def strip(pictures: Sequence[np.ndarray | Image.Image]) -> Image.Image:
    """Returns pictures of one size, uint8 [H, W, 3] if arrays, in a row of thumbnails."""
    images = [Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture for picture in pictures]
    width = round(THUMBNAIL_HEIGHT * images[0].width / images[0].height)
    row = Image.new("RGB", (len(images) * width, THUMBNAIL_HEIGHT))
    for column, image in enumerate(images):
        row.paste(image.resize((width, THUMBNAIL_HEIGHT)), (column * width, 0))
    return row


def evenly_spaced(count: int, number: int = THUMBNAILS) -> list[int]:
    """Returns up to `number` different positions in a sequence of `count`, the first and the last included."""
    return sorted(set(np.linspace(0, count - 1, number).round().astype(int).tolist()))


def contact_sheet(rows: Sequence[tuple[str, Image.Image | str]]) -> Image.Image:
    """Draws rows of a caption and a strip. An error message in place of a strip is drawn in red."""
    width = max([row.width for _, row in rows if isinstance(row, Image.Image)], default=480)
    sheet = Image.new("RGB", (width, len(rows) * (THUMBNAIL_HEIGHT + CAPTION_HEIGHT)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (caption, row) in enumerate(rows):
        top = number * (THUMBNAIL_HEIGHT + CAPTION_HEIGHT)
        draw.text((2, top + 2), caption.encode("ascii", "replace").decode(), fill="black")
        if isinstance(row, Image.Image):
            sheet.paste(row, (0, top + CAPTION_HEIGHT))
        else:
            draw.text((2, top + CAPTION_HEIGHT + 2), row, fill="red")
    return sheet
