"""A resolved run and the machine that it must fit, each as a frozen dataclass."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from dataset.video import Resolution
from utils.common.units import GIB
from utils.config.args import Args
from utils.model.spec import ModelSpec


@dataclass(frozen=True)
class RunContext:
    """A resolved run, before any weights are read.

    Attributes:
        args: arguments with all defaults filled in.
        text_encoder: config of the T5 encoder, with the dtype of its files.
        zero: DeepSpeed configuration without "auto"; None for DDP.
        num_processes: number of processes on all machines.
    """

    args: Args
    spec: ModelSpec
    text_encoder: dict[str, Any]
    zero: dict[str, Any] | None = None
    num_processes: int = 1

    @property
    def uses_deepspeed(self) -> bool:
        return self.zero is not None

    @property
    def resolution(self) -> Resolution:
        """The training resolution with the most tokens."""
        return max(self.args.data.train_resolution, key=lambda resolution: sum(self.spec.tokens(resolution)))

    def with_memory(self, **settings: Any) -> RunContext:
        """Returns the same run with other memory options."""
        return replace(self, args=replace(self.args, memory=replace(self.args.memory, **settings)))

    def with_num_layers(self, num_layers: int) -> RunContext:
        """Returns the same run with another number of transformer blocks."""
        return replace(self, spec=replace(self.spec, transformer=self.spec.transformer | {"num_layers": num_layers}))


@dataclass(frozen=True)
class Machine:
    """Resources of the machine that a run must fit.

    Attributes:
        gpu_gib: free memory of this process's GPU; None without a GPU.
        host_gib: available host memory; infinite without a GPU, since the run will happen elsewhere.
        local_processes: processes of the run on this machine; None for all of them.
    """

    gpu_gib: float | None = None
    host_gib: float = math.inf
    local_processes: int | None = None


def this_machine() -> Machine:
    """Returns the resources of this machine."""
    local_processes = int(os.environ["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else None
    if not torch.cuda.is_available():
        return Machine(local_processes=local_processes)
    return Machine(
        gpu_gib=torch.cuda.mem_get_info()[0] / GIB,
        host_gib=psutil.virtual_memory().available / GIB,
        local_processes=local_processes,
    )
