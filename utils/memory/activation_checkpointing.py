"""Gradient checkpointing of the transformer blocks, optionally with attention outputs and offloading.

Plain checkpointing saves the inputs of each block and recomputes the rest in the backward pass (arXiv:1604.06174).
Attention accounts for most of the recomputation, but its outputs take little memory. Selective checkpointing saves them
too (arXiv:2205.05198, section 5). Saved tensors can be offloaded to host memory. Results stay bit-identical unless the
blocks are compiled.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from utils.memory.activation_offloading import ActivationOffloader, OffloadedTensor

aten = torch.ops.aten
# The fused kernels of F.scaled_dot_product_attention. Its math backend is not a single operation and is recomputed.
ATTENTION = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def checkpoint_blocks(
    transformer: CogVideoXTransformer3DModel, save_attention: bool, offload: bool, compiled: bool
) -> None:
    """Enables gradient checkpointing for each transformer block.

    Args:
        save_attention: save the attention outputs of each block in addition to its inputs.
        offload: keep saved tensors in host memory until the backward pass.
        compiled: compile the block together with its checkpointing. All blocks share one graph, and the compiler fuses
            the recomputation into the backward pass.
    """
    offloader = ActivationOffloader() if offload else None
    checkpointed = partial(checkpoint, use_reentrant=False, preserve_rng_state=transformer.config.dropout > 0)
    run_compiled = None
    if compiled:
        run_compiled = torch.compile(partial(_compilable, checkpointed, save_attention), fullgraph=True)
        # torch warns about in-place operations under selective checkpointing. A block has some (the rotary embedding
        # writes into the query), but the compiler makes them functional.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)

    def run(block: torch.nn.Module, *inputs: Any) -> Any:
        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            if not save_attention:
                return nullcontext(), nullcontext()
            saved: deque[Any] = deque()
            return SaveAttention(saved, offloader), ReuseAttention(saved, offloader)

        # These hooks see only the checkpointed inputs; inside the block, the hooks of `checkpoint` replace them.
        offloading = offloader.saved_tensors_hooks(block, inputs) if offloader else nullcontext()
        with offloading:
            if run_compiled is not None:
                return run_compiled(block, *inputs)
            return checkpointed(block, *inputs, context_fn=contexts)

    transformer.enable_gradient_checkpointing(run)


def _compilable(checkpointed: Callable[..., Any], save_attention: bool, block: torch.nn.Module, *inputs: Any) -> Any:
    """Runs a checkpointed block inside a compiled graph, where dispatch modes such as `SaveAttention` have no effect.

    The compiler decides what to save and follows the policy of torch's own selective checkpointing.
    """
    options = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if save_attention else {}
    return checkpointed(block, *inputs, **options)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


class SaveAttention(TorchDispatchMode):
    """Saves the outputs of attention operations during the forward pass.

    Args:
        saved: queue that `ReuseAttention` of the same block reads.
        offloader: moves the outputs to host memory; None leaves them on the device.
    """

    def __init__(self, saved: deque[Any], offloader: ActivationOffloader | None) -> None:
        super().__init__()
        self.saved, self.offloader = saved, offloader

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **kwargs or {})
        if func in ATTENTION:
            # autograd attaches its graph to the outputs after this returns; detached copies do not hold on to it
            detached = tree_map_only(torch.Tensor, torch.Tensor.detach, outputs)
            self.saved.append(
                tree_map_only(torch.Tensor, self.offloader.offload, detached) if self.offloader else detached
            )
        return outputs


class ReuseAttention(TorchDispatchMode):
    """Returns the saved outputs of attention operations during recomputation; arguments as for `SaveAttention`."""

    def __init__(self, saved: deque[Any], offloader: ActivationOffloader | None) -> None:
        super().__init__()
        self.saved, self.offloader = saved, offloader

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in ATTENTION:
            return func(*args, **kwargs or {})
        outputs = self.saved.popleft()
        return tree_map_only(OffloadedTensor, self.offloader.fetch, outputs) if self.offloader else outputs
