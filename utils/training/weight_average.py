"""The exponential moving average of the trained weights, float32, in host memory.

average = decay * average + (1 - decay) * weight after every update. The decay grows to its final value over the first
updates, as in diffusers' `EMAModel`, so that the average does not remember the initial weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed import broadcast

from utils.config.args import Args


class WeightAverage:
    """The average of some weights. Every process must make the same calls.

    Args:
        weights: name -> weight. Under ZeRO, the float32 weights that this process updates.
        decay: share of the average that an update keeps, from 0 to 1.
        is_kept: whether this process keeps the average. Under DDP only the main process does; all have its weights.
        publish: called after the weights of this process were set.
    """

    def __init__(
        self, weights: Mapping[str, torch.Tensor], decay: float, is_kept: bool, publish: Callable[[], None]
    ) -> None:
        self.weights, self.decay, self.publish = weights, decay, publish
        self.averages = {name: _to_host(weight) for name, weight in weights.items()} if is_kept else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Adds the weights after `step` updates."""
        decay = min(self.decay, step / (9 + step)) if step > 1 else 0.0
        for name, average in self.averages.items():
            average.lerp_(_to_host(self.weights[name]), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the average as its weights inside the block. The weights wait in host memory."""
        waiting = {name: self.weights[name].detach().to("cpu", copy=True) for name in self.averages}
        self._set_weights(self.averages)
        try:
            yield
        finally:
            self._set_weights(waiting)

    @torch.no_grad()
    def _set_weights(self, weights: dict[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            self.weights[name].data.copy_(weight)
        self.publish()

    @torch.no_grad()
    def load(self, averages: dict[str, torch.Tensor]) -> None:
        """Sets the averages. Under ZeRO, DeepSpeed saves partitions without their padding."""
        for name, average in self.averages.items():
            average[: len(averages[name])].copy_(averages[name])


def _to_host(weight: torch.Tensor) -> torch.Tensor:
    """Returns a float32 copy in host memory."""
    return weight.detach().to("cpu", torch.float32, copy=True)


def make_average(
    args: Args, accelerator: Accelerator, transformer: torch.nn.Module, model: Any
) -> WeightAverage | None:
    """Returns the average of the weights in training, or None without --ema_decay.

    Args:
        model: the prepared model; under DeepSpeed its engine.
    """
    if not args.training.ema_decay:
        return None
    if hasattr(model, "zero_optimization"):
        optimizer = model.optimizer
        partitions = zero_partitions(optimizer)
        named = {str(number): partition for number, partition in enumerate(partitions)}
        return WeightAverage(named, args.training.ema_decay, True, lambda: publish_partitions(optimizer))
    weights = {name: weight for name, weight in transformer.named_parameters() if weight.requires_grad}

    def send_weights() -> None:
        for weight in weights.values() if accelerator.num_processes > 1 else ():
            broadcast(weight.data, src=0)

    return WeightAverage(weights, args.training.ema_decay, accelerator.is_main_process, send_weights)


def zero_partitions(optimizer: Any) -> list[torch.Tensor]:
    """Returns the float32 weights that a process updates: one flat vector per group of DeepSpeed's ZeRO optimizers."""
    is_stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    return optimizer.fp32_partitioned_groups_flat if is_stage_3 else optimizer.single_partition_of_fp32_groups


def publish_partitions(optimizer: Any) -> None:
    """Copies the float32 weights of all processes to the model, as DeepSpeed does at the end of an update."""
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.update_lp_params()
        return
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    optimizer._post_step(set())
