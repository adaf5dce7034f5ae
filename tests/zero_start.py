"""Measures the start of a run under ZeRO-3 as one of eight processes would see it.

    python -m tests.zero_start MODEL TEMPLATE

Collectives do nothing, and the CPU stands for the GPU. All tensors that DeepSpeed creates are counted, but not the
float32 weights on the host, which are cast to bf16 on their way to the GPU.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from torch.testing._internal.distributed.fake_pg import FakeStore

from utils.commands.estimate_memory import make_context
from utils.estimate import memory_tracker
from utils.estimate.start import block_sizes, zero_start_peak
from utils.training.optimizer import make_optimizer
from utils.training.strategy import make_strategy
from utils.training.trainable import make_trainable, trained_parameters

PROCESSES = 8


def main(model: str, template: str) -> dict[str, int]:
    """Returns numbers of weights, of the transformer and its largest matrix, and the peak in bytes."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "localhost"}
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    torch.distributed.init_process_group("fake", rank=0, world_size=PROCESSES, store=FakeStore())
    PartialState(cpu=True)
    options = ["--model_path", model, "--training_type", "sft", "--mixed_precision", "bf16"]
    context = make_context([*options, "--train_resolution", "9x64x64"], template, PROCESSES)
    assert context.zero is not None
    strategy = make_strategy(context.args, context.zero)
    memory_tracker.ALLOCATION_UNIT = 1
    transformer = strategy.load_transformer(Path(model), None)
    gc.freeze()  # the tracker collects garbage at each new peak
    with memory_tracker.MemoryTracker() as tracker:
        tracker.watch_peak()
        make_trainable(transformer, context.args)
        parameters = trained_parameters(transformer)
        count = sum(parameter.numel() for parameter in parameters)
        strategy.prepare(transformer, make_optimizer(parameters, context.args, uses_deepspeed=True))
    sizes = block_sizes(context)
    predicted = zero_start_peak(count, count, sizes, context.zero, torch.bfloat16.itemsize, PROCESSES)
    return {"weights": count, "largest": max(sizes), "measured": tracker.peak, "predicted": predicted}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
