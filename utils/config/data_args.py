"""Options of the data folder, the sampling of clips and the latent cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dataset.condition_frames import FIRST, ConditionFrames
from dataset.video import NATIVE_STRIDE, Rate, Resolution
from utils.config.options import option, require_positive, require_text, require_unit_interval


@dataclass(frozen=True)
class DataArgs:
    data_root: tuple[Path, ...] = option(
        help="data folder: line files with one sample per line, and the clips; several folders are mixed, and "
        "folder.toml in each sets its repeats, loss_weight, id_token, caption_dropout and flip"
    )
    caption_column: str = option("prompts.txt", help="file in --data_root with one caption per line")
    video_column: str = option(
        "videos.txt", help="file in --data_root with one clip or image per line, relative to --data_root"
    )
    image_column: str | None = option(
        None, help="i2v: file in --data_root with one image per line; default: the first frame of each clip is used"
    )
    id_token: str = option("", help="identifier to put before every prompt, in training and validation")
    metadata: str | None = option(
        None,
        help=".jsonl or .csv file in --data_root with the columns video, prompt[, image], read in place of the line "
        "files; default: metadata.jsonl or metadata.csv if there is no caption file",
    )
    train_resolution: tuple[Resolution, ...] = option(
        (Resolution(49, 480, 720),),
        help="FxHxW: frames (8N+1), height, width; with several, each clip uses the resolution that preserves most of "
        "it; images use those of one frame, by default 1xHxW for each height and width",
    )
    resize_mode: Literal["stretch", "crop"] = option(
        "stretch", help="stretch: resize to the exact size; crop: keep the aspect ratio and crop the centre"
    )
    fps: Rate | None = option(
        None,
        help="sampling rate of clips in frames per second; default: the rate of the model; native_stride: frames "
        "spread evenly over the whole clip",
    )
    clips_per_video: int = option(1, help="maximum number of samples per clip; they do not overlap")
    pad_short_clips: bool = option(False, help="repeat the last frame of clips that are too short")
    flip: bool = option(
        False, help="also train on mirrored clips; doubles the cache; avoid it if left and right matter"
    )
    skip_bad_samples: bool = option(False, help="continue without unusable clips instead of stopping")
    clip_timeout: float = option(120.0, help="maximum number of seconds to decode one clip")
    cache_dir: Path | None = option(
        None, help="latent cache; default: latent/ in the folder of the clips of each data folder"
    )
    precompute_only: bool = option(False, help="fill the latent cache and stop")
    caption_dropout: float = option(0.0, help="share of samples trained with the empty prompt")
    image_dropout: float = option(0.0, help="i2v: share of samples trained without the condition image")
    condition_frames: tuple[ConditionFrames, ...] = option(
        (FIRST,),
        help="i2v: frames of the clip that the model is given: first; first_last; prefix:N, the first N frames (4k+1); "
        "with several, each sample draws one",
    )

    @property
    def additions(self) -> tuple[str, ...]:
        """Names of the cache entries that `--condition_frames` needs besides the condition image."""
        return tuple(dict.fromkeys(filter(None, (condition.addition for condition in self.condition_frames))))

    def errors(self) -> Iterator[str]:
        for resolution in self.train_resolution:
            if resolution.frames % 8 != 1:
                below = max(resolution.frames // 8 * 8 + 1, 9)
                yield (
                    f"--train_resolution {resolution}: {resolution.frames} frames; "
                    f"the number must be 8N+1, such as {below} or {below + 8}."
                )
        if len(set(self.train_resolution)) < len(self.train_resolution):
            yield f"--train_resolution {' '.join(map(str, self.train_resolution))}: a resolution is listed twice."
        shortest = min((size.frames for size in self.train_resolution if size.frames > 1), default=1)
        for condition in self.condition_frames:
            if condition.prefix >= shortest:
                yield (
                    f"--condition_frames {condition}: a prefix must be shorter than the clip, and --train_resolution "
                    f"has {shortest} frames."
                )
        if self.fps != NATIVE_STRIDE:
            yield from require_positive(self, "fps")
        yield from require_positive(self, "clips_per_video", "clip_timeout")
        yield from require_text(self, "id_token")
        yield from require_unit_interval(self, "caption_dropout", "image_dropout")
