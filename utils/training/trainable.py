"""What of the transformer is trained, and in which dtype."""

from __future__ import annotations

import subprocess
import sys
from functools import cache, partial

import torch
from accelerate import init_empty_weights
from diffusers import CogVideoXTransformer3DModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from utils.config.args import Args
from utils.memory.activation_checkpointing import checkpoint_blocks
from utils.memory.quantized_linear import quantize_blocks
from utils.model.loading import DTYPES


def compute_dtype(args: Args) -> torch.dtype:
    """Of the transformer's inputs and matrix products."""
    assert args.training.mixed_precision is not None  # resolved by preflight
    return DTYPES[args.training.mixed_precision]


def weight_dtype(args: Args, uses_deepspeed: bool) -> torch.dtype:
    """The dtype of the transformer's weights on the device.

    Half precision under adapters, float32 where they are trained themselves, unless the optimizer has float32 copies
    of its own, DeepSpeed's, cut among the processes, or the one in host memory; or can do without.
    """
    can_be_half = uses_deepspeed or args.memory.offload_optimizer or args.memory.quantize_optimizer != "none"
    return torch.float32 if args.model.training_type == "sft" and not can_be_half else compute_dtype(args)


def uses_autocast(args: Args, uses_deepspeed: bool) -> bool:
    """Whether the transformer runs under torch's autocast; DeepSpeed has the weights in half precision instead."""
    return compute_dtype(args) != torch.float32 and args.memory.autocast and not uses_deepspeed


def make_trainable(
    transformer: CogVideoXTransformer3DModel, args: Args, device: torch.device | str | None = None
) -> None:
    """Freezes or frees weights in place. Adapters are float32 whatever the dtype of the frozen base.

    Args:
        device: where a quantized base goes, whose weights may still be on the host; default: where they are.
    """
    if args.model.training_type == "lora":
        transformer.requires_grad_(False)
        torch.manual_seed(args.training.seed)  # the same adapters on every rank
        transformer.add_adapter(lora_config(args))
        cast_training_params(transformer, torch.float32)
        if not args.memory.autocast:
            compute_in_dtype_of_inputs(transformer)
        if args.memory.quantize_base != "none":
            quantize_blocks(transformer, args.memory.quantize_base, device)
    memory = args.memory
    if memory.gradient_checkpointing != "none":
        selective = memory.gradient_checkpointing == "selective"
        checkpoint_blocks(transformer, selective, memory.offload_activations, memory.compile_blocks)
    elif memory.compile_blocks:
        for block in transformer.transformer_blocks:  # all from one graph
            block.compile(fullgraph=True)
    transformer.train()


def use_attention_kernel(name: str) -> None:
    """Leaves torch one kernel for `scaled_dot_product_attention`, in the whole process; "auto" changes nothing."""
    backends = torch.backends.cuda
    switches = {
        "flash": backends.enable_flash_sdp,
        "cudnn": backends.enable_cudnn_sdp,
        "efficient": backends.enable_mem_efficient_sdp,
        "math": backends.enable_math_sdp,
    }
    for kernel, switch in switches.items() if name != "auto" else ():
        switch(kernel == name)


@cache
def compile_error() -> str | None:
    """Why torch cannot compile on this machine, for want of a C compiler perhaps; None where it can.

    Tried in a process of its own: the compiler starts threads, and from this one processes that decode are forked.
    """
    script = (
        "import torch; device = 'cuda' if torch.cuda.is_available() else 'cpu'; "
        "torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.zeros(8, device=device))"
    )
    tried = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    errors = [line for line in tried.stderr.splitlines() if "Error" in line]
    return (errors or ["it ended with a failure"])[-1] if tried.returncode else None


def compute_in_dtype_of_inputs(transformer: torch.nn.Module) -> None:
    """Lets adapters compute as autocast would: peft, left alone, casts their inputs to the dtype of their weights."""
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for linear in (*layer.lora_A.values(), *layer.lora_B.values()):
                linear.forward = partial(_linear, linear)


def _linear(layer: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(inputs, layer.weight.to(inputs.dtype))


def lora_config(args: Args) -> LoraConfig:
    return LoraConfig(
        r=args.lora.rank,
        lora_alpha=args.lora.alpha,
        target_modules=list(args.lora.target_modules),
        init_lora_weights=True,
    )


def trained_parameters(transformer: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def unfit_targets(config: dict, target_modules: tuple[str, ...]) -> list[str]:
    """Those of `target_modules` that do not name linear layers, and only such. Needs no weights.

    peft would put adapters on the convolution `patch_embed.proj` too, which LoRA loaders do not know.
    """
    with init_empty_weights(include_buffers=True):
        transformer = CogVideoXTransformer3DModel.from_config(config)

    def fits(target: str) -> bool:
        named = [m for name, m in transformer.named_modules() if name == target or name.endswith(f".{target}")]
        return bool(named) and all(isinstance(module, torch.nn.Linear) for module in named)

    return [target for target in target_modules if not fits(target)]
