"""Options that save memory or time at some cost in the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from utils.config.options import Budget, option, require_positive


@dataclass(frozen=True)
class MemoryArgs:
    gradient_checkpointing: Literal["full", "selective", "none"] = option(
        "full",
        help="full: recompute each block in the backward pass, which saves most memory; selective: keep the attention "
        "outputs, which recomputes less and uses more memory; true and false mean full and none",
        aliases={"true": "full", "false": "none"},
    )
    offload_activations: bool = option(
        False, help="with --gradient_checkpointing: keep checkpointed tensors in host memory; slightly slower"
    )
    offload_optimizer: bool = option(
        False,
        help="sft on one GPU: keep gradients, float32 weights and Adam states in host memory, 14 bytes per weight",
    )
    quantize_optimizer: Literal["none", "8bit", "4bit"] = option(
        "none",
        help="8bit: Adam states in 8 bits; 4bit: first moment in 4 bits, second in 8; sft: also keeps the weights in "
        "half precision with stochastic rounding",
    )
    optimizer_in_backward: bool = option(
        False,
        help="with --quantize_optimizer on one GPU: update during the backward pass; no clipping, no accumulation",
    )
    quantize_base: Literal["none", "int8", "fp8", "int4"] = option(
        "none", help="lora: store the frozen weights of the transformer blocks in 8 or 4 bits"
    )
    offload_text_encoder: bool = option(False, help="keep T5 in host memory and copy one layer at a time to the GPU")
    autocast: bool | None = option(
        None,
        help="true: norms compute in float32; false: everything computes in half precision, as in sampling, which is "
        "faster and uses less memory; default: true only for float32 weights, which sft has without "
        "--quantize_optimizer and --offload_optimizer; not for DeepSpeed",
    )
    compile_blocks: bool | None = option(
        None,
        help="compile each transformer block; the first update takes minutes longer, all others are faster; not for "
        "DeepSpeed; default: true on a GPU where torch.compile works",
    )
    attention_kernel: Literal["auto", "flash", "cudnn", "efficient", "math"] = option(
        "auto", help="attention kernel; auto: PyTorch chooses, and uses cuDNN on Hopper"
    )
    vram_budget_gib: Budget | None = option(
        None,
        help="choose the fastest of the settings above that is predicted to fit this memory; auto: the free GPU memory",
    )

    def errors(self) -> Iterator[str]:
        if self.vram_budget_gib != "auto":
            yield from require_positive(self, "vram_budget_gib")
        if self.offload_activations and self.gradient_checkpointing == "none":
            yield (
                "--offload_activations true needs --gradient_checkpointing full or selective; with none, there are no "
                "checkpointed tensors to offload."
            )
        if self.quantize_optimizer != "none" and self.offload_optimizer:
            yield (
                "--quantize_optimizer cannot be combined with --offload_optimizer, which keeps float32 states on the "
                "host."
            )
        if self.optimizer_in_backward and self.quantize_optimizer == "none":
            yield "--optimizer_in_backward true needs --quantize_optimizer 8bit or 4bit."
