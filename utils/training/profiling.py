"""Profiler traces of a few updates, and tables of the kernels that take most of the time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, schedule

# Updates before the trace: the first ones compile, choose kernels and create optimizer states. The last of them already
# runs under the profiler, whose start takes time.
WARM_UP = 3
TRACE_FILE, TABLE_FILE = "trace.json.gz", "kernels.txt"


class UpdateProfiler:
    """Writes a trace and a kernel table of `num_updates` updates; does nothing if that is 0."""

    def __init__(self, num_updates: int, folder: Path) -> None:
        self.folder = folder
        self.profiler = None
        if num_updates:
            steps = schedule(wait=WARM_UP - 1, warmup=1, active=num_updates, repeat=1)
            self.profiler = profile(schedule=steps, on_trace_ready=self._write)
            self.profiler.start()

    def step(self) -> None:
        """Ends an update."""
        if self.profiler is not None:
            self.profiler.step()

    def stop(self) -> None:
        """Writes what was recorded, if the run ends during the trace."""
        if self.profiler is not None:
            self.profiler.stop()

    def _write(self, profiler: Any) -> None:
        self.folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / TRACE_FILE))
        (self.folder / TABLE_FILE).write_text("\n".join(kernel_table(profiler)) + "\n")


def kernel_table(profiler: Any, num_rows: int = 20) -> list[str]:
    """Returns lines with the share of time, milliseconds, calls and name of the longest GPU kernels.

    Without a GPU, the rows are operations of PyTorch. The figures are those of the whole trace.
    """
    events = [event for event in profiler.key_averages() if not event.is_user_annotation]
    if on_gpu := [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]:
        rows = [(event.self_device_time_total, event.count, event.key) for event in on_gpu]
    else:
        rows = [(event.self_cpu_time_total, event.count, event.key) for event in events]
    rows.sort(reverse=True)
    total = sum(microseconds for microseconds, _, _ in rows) or 1
    return [f"{'share':>6} {'ms':>10} {'calls':>7}  name"] + [
        f"{microseconds / total:6.1%} {microseconds / 1000:10.2f} {count:7}  {name[:120]}"
        for microseconds, count, name in rows[:num_rows]
    ]
