"""What a transformer block keeps from the forward pass for the backward pass, and where it is kept.

Gradient checkpointing keeps a block's inputs and computes everything else anew (arXiv:1604.06174). Of that, attention
is most of the work and its outputs are a small part of the memory, so they may be kept too (selective checkpointing,
arXiv:2205.05198, section 5). What is kept may wait in host memory. None of it changes a single number.
"""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from utils import host
from utils.host import SideStream

aten = torch.ops.aten
# What F.scaled_dot_product_attention becomes; its unfused form is no single operation, and is computed anew.
ATTENTION = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
)
# The smallest tensors that are sent to host memory, in bytes: below, copying costs more than it saves.
SMALLEST = 2**20
# Copies under way: tensors that are leaving while the next block computes, and that come back before they are needed.
LEAVING, AHEAD = 2, 4


def checkpoint_blocks(
    transformer: CogVideoXTransformer3DModel, keep_attention: bool, offload: bool, compiled: bool
) -> None:
    """Makes each block keep its inputs alone.

    Args:
        keep_attention: and the outputs of its attention.
        offload: let all of that wait in host memory.
        compiled: compile the block with its checkpointing, all blocks from one graph; what is computed anew is then
            fused into the backward pass.
    """
    memory = HostMemory() if offload else None
    keep = partial(checkpoint, use_reentrant=False, preserve_rng_state=transformer.config.dropout > 0)
    run_compiled = None
    if compiled:
        run_compiled = torch.compile(partial(_in_graph, keep, keep_attention), fullgraph=True)
        # it warns of operations in place, of which a block has none
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)

    def run(block: torch.nn.Module, *inputs: Any) -> Any:
        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            if not keep_attention:
                return nullcontext(), nullcontext()
            kept: deque[Any] = deque()
            return KeepAttention(kept, memory), ReuseAttention(kept, memory)

        # of the block only what it keeps goes through these hooks; checkpointing has its own for all that is inside
        elsewhere = memory.of_block(block, inputs) if memory else nullcontext()
        with elsewhere:
            if run_compiled is not None:
                return run_compiled(block, *inputs)
            return keep(block, *inputs, context_fn=contexts)

    transformer.enable_gradient_checkpointing(run)


def _in_graph(keep: Callable[..., Any], keep_attention: bool, block: torch.nn.Module, *inputs: Any) -> Any:
    """Within a graph it is the compiler that keeps and computes anew; it does not see `KeepAttention`."""
    options = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if keep_attention else {}
    return keep(block, *inputs, **options)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


class KeepAttention(TorchDispatchMode):
    """In the forward pass: puts what attention returns aside."""

    def __init__(self, kept: deque[Any], memory: HostMemory | None) -> None:
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

    def __init__(self, kept: deque[Any], memory: HostMemory | None) -> None:
        super().__init__()
        self.kept, self.memory = kept, memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in ATTENTION:
            return func(*args, **kwargs or {})
        kept = self.kept.popleft()
        return tree_map_only(Parked, self.memory.fetch, kept) if self.memory else kept


class Parked:
    """A tensor that waits in host memory.

    Attributes:
        here: the tensor on its device, before it has left and after it has come back.
        copied: when it has left, or has come back.
        was_fetched: whether it has been asked for.
    """

    def __init__(self, tensor: torch.Tensor, away: torch.Tensor, index: int) -> None:
        self.here: torch.Tensor | None = tensor
        self.away, self.index, self.device, self.stride = away, index, tensor.device, tensor.stride()
        self.copied: torch.cuda.Event | None = None
        self.was_fetched = False


class HostMemory:
    """Sends tensors to host memory and fetches them, beside the computation.

    They are fetched in the reverse order of sending, as a backward pass needs them, and some ahead of being asked for.
    """

    def __init__(self) -> None:
        self.order: list[tuple[weakref.ref[Parked], torch.Tensor, Any]] = []
        self.memory = host.PageLocked()
        # Memory of tensors that are no longer needed. All copies are on one stream, so that one that still reads it
        # is over when the next writes.
        self.spare: defaultdict[Any, list[torch.Tensor]] = defaultdict(list)
        self.leaving: deque[Parked] = deque()
        self.copies = SideStream()

    def of_block(self, block: torch.nn.Module, inputs: tuple[Any, ...]) -> AbstractContextManager:
        """Sends what autograd keeps within, but for what is on the device anyway.

        That is the block's weights, which a compiled block keeps too, and what all blocks share: inputs in a tuple.
        """
        shared = tree_leaves([value for value in inputs if not isinstance(value, torch.Tensor)])
        stays = {_storage(tensor) for tensor in (*block.parameters(), *block.buffers(), *shared) if tensor is not None}

        def send(tensor: torch.Tensor) -> Parked | torch.Tensor:
            return tensor if _storage(tensor) in stays else self.send(tensor)

        return torch.autograd.graph.saved_tensors_hooks(send, self.fetch)

    def send(self, tensor: torch.Tensor) -> Parked | torch.Tensor:
        if tensor.nbytes < SMALLEST:
            return tensor
        while self.order and self.order[-1][0]() is None:  # of a backward pass that is over
            _, away, form = self.order.pop()
            self.spare[form].append(away)
        form = tensor.shape, tensor.stride(), tensor.dtype
        spare = self.spare[form]
        parked = Parked(tensor, spare.pop() if spare else self.memory.empty_like(tensor), len(self.order))
        parked.copied = self.copies.copy(tensor, parked.away)
        self.order.append((weakref.ref(parked), parked.away, form))
        self.leaving.append(parked)
        if len(self.leaving) > LEAVING:
            left = self.leaving.popleft()
            self.copies.wait(left.copied)
            left.here = None
        return parked

    def fetch(self, parked: Parked | torch.Tensor) -> torch.Tensor:
        if isinstance(parked, torch.Tensor):
            return parked
        for index in range(parked.index, max(parked.index - AHEAD, -1), -1):
            wanted = self.order[index][0]()
            if wanted is not None and wanted.here is None and (wanted is parked or not wanted.was_fetched):
                # with the strides it had, on which a compiled backward pass insists
                wanted.here = torch.empty_strided(
                    wanted.away.shape, wanted.stride, dtype=wanted.away.dtype, device=wanted.device
                )
                wanted.copied = self.copies.copy(wanted.away, wanted.here)
        if parked in self.leaving:
            self.leaving.remove(parked)
        self.copies.wait(parked.copied)
        tensor, parked.here, parked.was_fetched = parked.here, None, True
        assert tensor is not None
        return tensor


def _storage(tensor: torch.Tensor) -> int:
    """Names the memory that a tensor is in, a fake one's too."""
    return tensor.untyped_storage()._cdata
