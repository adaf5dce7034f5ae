"""The frames of a clip that condition an image-to-video model."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

LAST = "last"


@dataclass(frozen=True, slots=True)
class ConditionFrames:
    """Frames of a clip that the model is given, written `first`, `first_last` or `prefix:N`.

    Attributes:
        prefix: number of frames at the start, 4k+1; 1 for the condition image alone.
        has_last: whether the last frame is given too.
    """

    prefix: int = 1
    has_last: bool = False

    @classmethod
    def parse(cls, text: str) -> ConditionFrames:
        """Parses the written form.

        Raises:
            ValueError: `text` has another form, or the number of frames is not 4k+1.
        """
        if text in ("first", "first_last"):
            return cls(has_last=text == "first_last")
        match = re.fullmatch(r"prefix:(\d+)", text)
        if match is None:
            raise ValueError(f"'{text}' is not first, first_last or prefix:N, such as prefix:9")
        frames = int(match[1])
        if frames < 5 or frames % 4 != 1:
            below = max((frames - 1) // 4 * 4 + 1, 5)
            raise ValueError(f"'{text}': the number must be 4k+1 and at least 5, such as {below} or {below + 4}")
        return cls(prefix=frames)

    def __str__(self) -> str:
        return "first_last" if self.has_last else "first" if self.prefix == 1 else f"prefix:{self.prefix}"

    @property
    def addition(self) -> str | None:
        """Name of the cache entry that the model is given besides the condition image; None for `first`."""
        return LAST if self.has_last else None if self.prefix == 1 else str(self)


FIRST = ConditionFrames()


def select_frames(clip: torch.Tensor, addition: str) -> torch.Tensor:
    """Returns the frames of a clip [F, ...] that belong to an addition."""
    return clip[-1:] if addition == LAST else clip[: ConditionFrames.parse(addition).prefix]


def latent_frames(addition: str) -> int:
    """Returns the number of latent frames of an addition."""
    return 1 if addition == LAST else (ConditionFrames.parse(addition).prefix - 1) // 4 + 1
