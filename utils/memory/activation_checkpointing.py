"""What a transformer block keeps from the forward pass for the backward pass, and where it is kept.

Gradient checkpointing keeps a block's inputs and computes everything else anew (arXiv:1604.06174). Of that, attention
is most of the work and its outputs are a small part of the memory, so they may be kept too (selective checkpointing,
arXiv:2205.05198, section 5). What is kept may wait in host memory. None of it changes a single number.
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
# What F.scaled_dot_product_attention becomes; its unfused form is no single operation, and is computed anew.
ATTENTION = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def checkpoint_blocks(
    transformer: CogVideoXTransformer3DModel, save_attention: bool, offload: bool, compiled: bool
) -> None:
    """Makes each block keep its inputs alone.

    Args:
        save_attention: and the outputs of its attention.
        offload: let all of that wait in host memory.
        compiled: compile the block with its checkpointing, all blocks from one graph; what is computed anew is then
            fused into the backward pass.
    """
    memory = ActivationOffloader() if offload else None
    keep = partial(checkpoint, use_reentrant=False, preserve_rng_state=transformer.config.dropout > 0)
    run_compiled = None
    if compiled:
        run_compiled = torch.compile(partial(_in_graph, keep, save_attention), fullgraph=True)
        # it warns of operations in place, of which a block has none
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)

    def run(block: torch.nn.Module, *inputs: Any) -> Any:
        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            if not save_attention:
                return nullcontext(), nullcontext()
            kept: deque[Any] = deque()
            return SaveAttention(kept, memory), ReuseAttention(kept, memory)

        # of the block only what it keeps goes through these hooks; checkpointing has its own for all that is inside
        elsewhere = memory.of_block(block, inputs) if memory else nullcontext()
        with elsewhere:
            if run_compiled is not None:
                return run_compiled(block, *inputs)
            return keep(block, *inputs, context_fn=contexts)

    transformer.enable_gradient_checkpointing(run)


def _in_graph(keep: Callable[..., Any], save_attention: bool, block: torch.nn.Module, *inputs: Any) -> Any:
    """Within a graph it is the compiler that keeps and computes anew; it does not see `SaveAttention`."""
    options = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if save_attention else {}
    return keep(block, *inputs, **options)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


class SaveAttention(TorchDispatchMode):
    """In the forward pass: puts what attention returns aside."""

    def __init__(self, kept: deque[Any], memory: ActivationOffloader | None) -> None:
        super().__init__()
        self.kept, self.memory = kept, memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if func in ATTENTION:
            # without the graph that autograd is about to hang on them
            aside = tree_map_only(torch.Tensor, torch.Tensor.detach, result)
            self.kept.append(tree_map_only(torch.Tensor, self.memory.send, aside) if self.memory else aside)
        return result


class ReuseAttention(TorchDispatchMode):
    """In the backward pass: gives it back in place of computing it."""

    def __init__(self, kept: deque[Any], memory: ActivationOffloader | None) -> None:
        super().__init__()
        self.kept, self.memory = kept, memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in ATTENTION:
            return func(*args, **kwargs or {})
        kept = self.kept.popleft()
        return tree_map_only(OffloadedTensor, self.memory.fetch, kept) if self.memory else kept
