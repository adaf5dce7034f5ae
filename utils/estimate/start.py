"""Predicts the peak of the start: loading weights, DeepSpeed's initialization, creating or resuming optimizer states.

The start ends before the first batch. Its peak can exceed that of an update, which holds activations but no copies.
"""

from __future__ import annotations

from typing import Any

import torch

from utils.config.deepspeed_config import get_key
from utils.estimate.context import RunContext
from utils.estimate.memory_tracker import HOST_PLACEHOLDER, simulate, storage_size
from utils.estimate.simulated_run import UpdateProfile, empty_transformer
from utils.memory.quantized_linear import encode
from utils.training.trainable import compute_dtype


def start_peak(context: RunContext, updates: UpdateProfile) -> int:
    """Returns the peak in GPU bytes of one process. Resumed runs load optimizer states; new ones create them later.

    Weights go to the GPU one at a time, from memory-mapped files. Optimizer states do too.
    """
    if context.zero is not None:
        itemsize = compute_dtype(context.args).itemsize
        sizes = block_sizes(context)
        return zero_start_peak(updates.weights, updates.trained, sizes, context.zero, itemsize, context.num_processes)
    terms = updates.terms
    buckets = terms["gradients"] if context.num_processes > 1 else 0  # DDP allocates them at the start
    states = terms["optimizer"] + buckets
    return terms["weights"] + terms.get("adapters", 0) + max(states, quantization_peak(context))


def zero_start_peak(
    weights: int, trained: int, block_sizes: list[int], zero: dict[str, Any], itemsize: int, num_processes: int
) -> int:
    """Returns the peak in GPU bytes of one process under DeepSpeed.

    Stage 3 divides the weights block by block, and gathers each once while it creates hooks. Stages 1 and 2 move all
    weights to the GPU and copy the share of this process for the float32 masters. They also flatten the trained
    weights, on the host if GPU memory is short. A resumed run holds masters and Adam's states before the first batch.

    Args:
        weights, trained: numbers of weights.
        block_sizes: number of weights of each parameter of a block.
        itemsize: bytes of a weight.
    """
    section = zero["zero_optimization"]
    offloads = {name: get_key(section, f"offload_{name}.device") == "cpu" for name in ("optimizer", "param")}
    share = trained // num_processes
    masters, states = (0 if offloads["optimizer"] else size * share for size in (4, 12))
    if section["stage"] < 3:
        return itemsize * weights + max(itemsize * share, states)
    gradients = 0 if offloads["optimizer"] else itemsize * share
    buffers = itemsize * section.get("reduce_bucket_size", 500_000_000)
    partition = 0 if offloads["param"] else itemsize * weights // num_processes
    hooks = masters + itemsize * max(block_sizes)
    return partition + max(itemsize * sum(block_sizes), gradients + buffers + max(states, hooks))


def block_sizes(context: RunContext) -> list[int]:
    """Returns the number of weights of each parameter of a block, adapters included."""
    block = empty_transformer(context.with_num_layers(1)).transformer_blocks[0]
    return [weight.numel() for weight in block.parameters()]


def quantization_peak(context: RunContext) -> int:
    """Returns the GPU bytes of quantizing the largest layer of a block; 0 without a quantized base."""
    scheme = context.args.memory.quantize_base
    if scheme == "none":
        return 0
    block = empty_transformer(context.with_num_layers(1).with_memory(quantize_base="none")).transformer_blocks[0]
    weights = [layer.weight for layer in block.modules() if isinstance(layer, torch.nn.Linear)]
    largest = max(weights, key=torch.Tensor.numel)
    with simulate() as tracker:
        on_host = torch.empty(largest.shape, dtype=largest.dtype, device=HOST_PLACEHOLDER)
        tracker.watch_peak()
        codes = encode(on_host.to("cpu"), scheme)
        return tracker.peak - sum(storage_size(tensor) for tensor in codes if tensor is not None)
