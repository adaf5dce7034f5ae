"""The learned positions of CogVideoX-5b-I2V at sizes for which the checkpoint has no table.

The table is a buffer, not a parameter: training never changes it. diffusers accepts only the height and width of the
table, and replaces it with computed positions for other numbers of frames.
"""

from __future__ import annotations

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import CogVideoXPatchEmbed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

from utils.common.errors import UserError
from utils.model.spec import LEARNED, LEARNED_POSITIONS, ModelSpec


class InterpolatedPatchEmbed(CogVideoXPatchEmbed):
    """Patch embedding whose learned positions fit latents of any size. At the table's own size, it is the table."""

    def _get_positional_embeddings(
        self, sample_height: int, sample_width: int, sample_frames: int, device: torch.device | None = None
    ) -> torch.Tensor:
        """Returns positions [1, S + F*H*W, D] for latents of another size; called by `forward`.

        Args:
            sample_height, sample_width: size of the latents.
            sample_frames: number of frames of the clip before the VAE.
        """
        frames, *grid = self._grid(sample_height, sample_width, sample_frames)
        table_grid = self._grid(self.sample_height, self.sample_width, self.sample_frames)
        text, video = self.pos_embedding[0].split(
            [self.max_text_seq_length, self.pos_embedding.shape[1] - self.max_text_seq_length]
        )
        video = video.unflatten(0, table_grid).float()  # [F*H*W, D] -> [F, H, W, D]
        starts, stops = get_resize_crop_region_for_grid(tuple(grid), table_grid[2], table_grid[1])
        video = read_axis(video, 0, torch.arange(frames, device=device, dtype=torch.float32))
        for axis, (start, stop, size) in enumerate(zip(starts, stops, grid, strict=True), start=1):
            video = read_axis(video, axis, torch.linspace(start, stop * (size - 1) / size, size, device=device))
        return torch.cat([text, video.flatten(0, 2).to(text.dtype)])[None]

    def _grid(self, height: int, width: int, frames: int) -> tuple[int, int, int]:
        """Returns the number of tokens along time, height and width."""
        return (frames - 1) // self.temporal_compression_ratio + 1, height // self.patch_size, width // self.patch_size


def read_axis(table: torch.Tensor, axis: int, coordinates: torch.Tensor) -> torch.Tensor:
    """Reads a table at fractional coordinates along one axis, by linear interpolation; beyond its end, repeats the end.

    Args:
        coordinates: float32 [n], in entries of the table.
    """
    last = table.shape[axis] - 1
    coordinates = coordinates.clamp(0, last)
    lower = coordinates.floor().long()
    upper = (lower + 1).clamp(max=last)
    share = (coordinates - lower).view(-1, *[1] * (table.ndim - 1 - axis))
    return torch.lerp(table.index_select(axis, lower), table.index_select(axis, upper), share)


def set_learned_positions(transformer: CogVideoXTransformer3DModel, spec: ModelSpec) -> None:
    """Makes a transformer treat its learned positions as the spec says, in place. The choice is in its config then.

    The table is read at the rotary coordinates of each token (interpolate), or removed (drop). Both leave the rotary
    positions as they are.
    """
    embedding = transformer.patch_embed
    if not transformer.config[LEARNED] or spec.learned_positions == "keep":
        return
    if spec.learned_positions == "interpolate":
        transformer.register_to_config(**{LEARNED_POSITIONS: "interpolate"})
        # `forward` refuses other sizes for learned positions; for computed ones, it calls the method above
        embedding.__class__ = InterpolatedPatchEmbed
        embedding.use_positional_embeddings, embedding.use_learned_positional_embeddings = True, False
    else:
        transformer.register_to_config(**{LEARNED: False})
        embedding.use_learned_positional_embeddings = False
        del embedding.pos_embedding


def choose_positions(spec: ModelSpec, requested: str | None, stated: str | None, source: str) -> ModelSpec:
    """Returns the spec with the treatment of learned positions that the command line or a trained file asks for.

    Args:
        requested: value of `--learned_positions`; None without the flag.
        stated: value that a LoRA or a config states; None if it states none.
        source: flag and path of that file, for messages.

    Raises:
        UserError: the two differ, or the checkpoint has no learned positions.
    """
    # a LoRA that was trained at the size of the table fits `interpolate`, which equals `keep` there
    if requested and stated and requested != stated and (stated, requested) != ("keep", "interpolate"):
        raise UserError(
            f"--learned_positions {requested}: {source} was trained with {stated}, which is used without the flag."
        )
    choice = requested or stated
    if choice in ("keep", "interpolate") and not spec.has_learned_positions:
        subject = f"--learned_positions {requested}" if requested else f"{source} needs learned positions ({stated})"
        raise UserError(f"{subject}: this checkpoint has none; among the published models, only CogVideoX-5b-I2V has.")
    return spec.with_learned_positions(choice) if choice else spec
