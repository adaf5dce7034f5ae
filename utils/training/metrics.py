"""Writes the metrics of a run to `metrics.jsonl`, to the trackers of `--report_to` and to the progress bar."""

from __future__ import annotations

import io
import json
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from utils.common.units import GIB

METRICS_FILE = "metrics.jsonl"
# Value of --report_to -> names of accelerate's trackers, which are also the names of their packages.
TRACKERS = {"tensorboard": ["tensorboard"], "wandb": ["wandb"], "all": ["tensorboard", "wandb"], "none": []}
# Losses are also averaged over each of this many equal ranges of timesteps.
QUARTERS = 4


class Metrics:
    """Writes metrics on the main process; does nothing on the others.

    Args:
        config: resolved arguments by group, for the trackers.
        step: number of updates done. Lines of later steps, which a killed run may have left, are removed.
        total: number of updates of the whole run.
    """

    def __init__(
        self, accelerator: Accelerator, output_dir: Path, config: dict[str, Any], step: int, total: int
    ) -> None:
        self.accelerator = accelerator
        self.path = output_dir / METRICS_FILE
        if accelerator.is_main_process:
            _remove_lines_after(self.path, step)
        # trackers accept only numbers and strings
        flat = {f"{group}/{name}": value for group, values in config.items() for name, value in values.items()}
        accelerator.init_trackers(
            "cogvideox-finetune",
            {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in flat.items()},
            init_kwargs={"wandb": {"dir": str(output_dir)}},
        )
        self.bar = tqdm(
            total=total, initial=step, desc="Training", unit="step", disable=not accelerator.is_main_process
        )

    def log(self, step: int, **values: float) -> None:
        """Writes values to the metrics file and the trackers."""
        if not self.accelerator.is_main_process:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log(values, step=step)

    def advance(self, **values: float) -> None:
        """Advances the progress bar by one update and shows values on it."""
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)
        self.bar.update()

    def log_videos(self, step: int, videos: list[tuple[Path, str]], fps: float) -> None:
        """Sends mp4 files and their prompts to the trackers."""
        for tracker in self.accelerator.trackers if self.accelerator.is_main_process else []:
            if tracker.name == "tensorboard":
                for path, prompt in videos:
                    _add_gif(tracker.writer, f"validation/{path.stem}", path, prompt, fps, step)
            elif tracker.name == "wandb":
                import wandb

                clips = [wandb.Video(str(path), caption=prompt, format="mp4") for path, prompt in videos]
                tracker.tracker.log({"validation": clips}, step=step)

    def close(self) -> None:
        """Closes progress bar and trackers."""
        self.bar.close()
        self.accelerator.end_training()


def reset_peak_memory() -> None:
    """Starts a new peak of GPU memory: that of training does not include encoding."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> str:
    """Describes the peak memory of this process: reserved on the GPU, if there is one, and resident on the host."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    if not torch.cuda.is_available():
        return f"peak memory {host:.2f} GiB (host)"
    return f"peak memory {torch.cuda.max_memory_reserved() / GIB:.2f} GiB (GPU), {host:.2f} GiB (host)"


def quarter_means(losses: torch.Tensor, timesteps: torch.Tensor, num_timesteps: int, name: str) -> dict[str, float]:
    """Returns the mean loss of each quarter of the timesteps; quarter 1 is the least noisy. Omits empty quarters.

    The mean over all timesteps varies mostly with the timesteps that were drawn. Means per quarter show learning.

    Args:
        losses, timesteps: one per sample.
        name: prefix of the keys.
    """
    quarter = timesteps * QUARTERS // num_timesteps
    return {
        f"{name}_quarter_{q + 1}": losses[quarter == q].mean().item() for q in range(QUARTERS) if (quarter == q).any()
    }


def _remove_lines_after(path: Path, step: int) -> None:
    """Removes the lines of later steps from a metrics file; all lines if `step` is 0."""
    if path.exists():
        # a run without a checkpoint starts over and logs its baseline at step 0 again
        lines = [line for line in path.read_text().splitlines() if step > 0 and _step_of(line) <= step]
        tmp_path = path.with_suffix(".tmp")
        tmp_path.write_text("".join(f"{line}\n" for line in lines))
        tmp_path.replace(path)


def read_metrics(output_dir: Path) -> list[dict[str, float]]:
    """Returns the lines of the metrics file of a run; empty if it has none. Skips a line that a kill cut off."""
    path, lines = output_dir / METRICS_FILE, []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def _step_of(line: str) -> float:
    """Returns the step of a line of a metrics file; infinite for an incomplete line."""
    try:
        return json.loads(line)["step"]
    except ValueError:  # truncated by a kill
        return float("inf")


def _add_gif(writer: Any, tag: str, path: Path, prompt: str, fps: float, step: int) -> None:
    """Logs a clip to TensorBoard as an animated GIF. `SummaryWriter.add_video` would need moviepy."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    from dataset.decoders import open_reader

    reader = open_reader(path)
    frames = [Image.fromarray(frame) for frame in reader.read(list(range(len(reader.times) - 1)))]
    for frame in frames:
        frame.thumbnail((320, 320))  # a full-size GIF takes tens of megabytes
    gif = io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    image = Summary.Image(
        height=frames[0].height, width=frames[0].width, colorspace=3, encoded_image_string=gif.getvalue()
    )
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
    writer.add_text(tag, prompt, step)
