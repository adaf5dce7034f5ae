"""Where the figures of a run go: `metrics.jsonl` always, the trackers that `--report_to` names, the progress bar."""

from __future__ import annotations

import io
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"
# --report_to -> the trackers of accelerate, which are the packages' names too
TRACKERS = {"tensorboard": ["tensorboard"], "wandb": ["wandb"], "all": ["tensorboard", "wandb"], "none": []}
QUARTERS = 4


class Metrics:
    """Writes on the main process; a no-op on the others.

    Args:
        step: updates already done; lines of a later step, left by a run that was killed, are dropped.
    """

    def __init__(
        self, accelerator: Accelerator, output_dir: Path, config: dict[str, Any], step: int, total: int
    ) -> None:
        self.accelerator = accelerator
        self.path = output_dir / METRICS_FILE
        self.laps: list[float] = []
        if accelerator.is_main_process:
            _drop_after(self.path, step)
        # trackers take numbers and strings only
        flat = {f"{group}/{name}": value for group, values in config.items() for name, value in values.items()}
        accelerator.init_trackers(
            "cogvideox-finetune",
            {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in flat.items()},
            init_kwargs={"wandb": {"dir": str(output_dir)}},
        )
        self.bar = tqdm(
            total=total, initial=step, desc="Training", unit="step", disable=not accelerator.is_main_process
        )

    def start_lap(self) -> None:
        """Time from here on belongs to the next update."""
        self.lap_started = time.perf_counter()

    def lap(self) -> float:
        """Seconds that the update took, without validation and checkpoints before it."""
        self.laps.append(time.perf_counter() - self.lap_started)
        return self.laps[-1]

    def log(self, step: int, **values: float) -> None:
        if not self.accelerator.is_main_process:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log(values, step=step)

    def advance(self, **shown: float) -> None:
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()}, refresh=False)
        self.bar.update()

    def log_videos(self, step: int, videos: list[tuple[Path, str]], fps: float) -> None:
        """Hands finished mp4 files and their prompts to the trackers."""
        for tracker in self.accelerator.trackers if self.accelerator.is_main_process else []:
            if tracker.name == "tensorboard":
                for path, prompt in videos:
                    _add_gif(tracker.writer, f"validation/{path.stem}", path, prompt, fps, step)
            elif tracker.name == "wandb":
                import wandb

                clips = [wandb.Video(str(path), caption=prompt, format="mp4") for path, prompt in videos]
                tracker.tracker.log({"validation": clips}, step=step)

    def close(self, step: int) -> str:
        """Ends the trackers; returns the closing line."""
        self.bar.close()
        self.accelerator.end_training()
        seconds = statistics.median(self.laps)
        return f"Done: step {step}, {len(self.laps)} updates in this run, {seconds:.3g} s a step, {peak_memory()}."


def peak_memory() -> str:
    """The most memory this process has held: reserved on the GPU where there is one, resident on the host."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    if not torch.cuda.is_available():
        return f"peak memory {host:.2f} GiB (host)"
    return f"peak memory {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB (GPU), {host:.2f} GiB (host)"


def quarter_means(losses: torch.Tensor, timesteps: torch.Tensor, num_timesteps: int, name: str) -> dict[str, float]:
    """Mean loss of each quarter of the timesteps, 1 the least noisy; a quarter without a sample is left out.

    A loss over all timesteps mostly shows which timesteps were drawn; within a quarter it shows learning.

    Args:
        losses, timesteps: one a sample.
    """
    quarter = timesteps * QUARTERS // num_timesteps
    return {
        f"{name}_quarter_{q + 1}": losses[quarter == q].mean().item() for q in range(QUARTERS) if (quarter == q).any()
    }


def _drop_after(path: Path, step: int) -> None:
    if path.exists():
        # a run that has no checkpoint yet begins anew, with its baseline at step 0
        kept = [line for line in path.read_text().splitlines() if step > 0 and _step_of(line) <= step]
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(f"{line}\n" for line in kept))
        aside.replace(path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # cut short by a kill
        return float("inf")


def _add_gif(writer: Any, tag: str, path: Path, prompt: str, fps: float, step: int) -> None:
    """Adds a clip as an animated picture; `SummaryWriter.add_video` would need moviepy for the same."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    from dataset.video import open_clip

    reader = open_clip(path)
    frames = [Image.fromarray(frame) for frame in reader.get_batch(range(len(reader))).asnumpy()]
    for frame in frames:
        frame.thumbnail((320, 320))  # a GIF of the full size would be tens of megabytes
    gif = io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    picture = Summary.Image(
        height=frames[0].height, width=frames[0].width, colorspace=3, encoded_image_string=gif.getvalue()
    )
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=picture)]), step)
    writer.add_text(tag, prompt, step)
