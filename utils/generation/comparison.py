"""Shows the base and several strengths of a LoRA side by side, from the same noise."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from utils.common.contact_sheet import contact_sheet, evenly_spaced, strip

# Height of the titles above a video, in pixels; encoders need an even height.
TITLE_HEIGHT = 16


def side_by_side(videos: dict[str, list[Image.Image]]) -> list[Image.Image]:
    """Returns the frames of one video that shows several videos of one size, title -> frames, in a row."""
    frames = []
    for pictures in zip(*videos.values(), strict=True):
        width, height = pictures[0].size
        frame = Image.new("RGB", (width * len(videos), height + TITLE_HEIGHT), "white")
        for column, (title, picture) in enumerate(zip(videos, pictures, strict=True)):
            ImageDraw.Draw(frame).text((column * width + 4, 2), title, fill="black")
            frame.paste(picture, (column * width, TITLE_HEIGHT))
        frames.append(frame)
    return frames


def save_picture(videos: dict[str, list[Image.Image]], path: Path) -> None:
    """Writes a picture with a row of frames for each video."""
    rows = [(title, strip([frames[n] for n in evenly_spaced(len(frames))])) for title, frames in videos.items()]
    contact_sheet(rows).save(path)
