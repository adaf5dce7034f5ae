"""Selects trainable parameters and their dtypes."""

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
    """Returns the dtype of the transformer's inputs and matrix products."""
    assert args.training.mixed_precision is not None  # resolved by preflight
    return DTYPES[args.training.mixed_precision]


def weight_dtype(args: Args, uses_deepspeed: bool) -> torch.dtype:
    """Returns the dtype of the transformer's weights on the device.

    LoRA uses the compute dtype, since the base is frozen. Full fine-tuning uses float32, with three exceptions that use
    the compute dtype: DeepSpeed, which keeps its own float32 copies divided among the processes; the offloaded
    optimizer, which keeps float32 copies in host memory; and the quantized optimizer, which rounds stochastically.
    """
    can_be_half = uses_deepspeed or args.memory.offload_optimizer or args.memory.quantize_optimizer != "none"
    return torch.float32 if args.model.training_type == "sft" and not can_be_half else compute_dtype(args)


def needs_autocast(args: Args, uses_deepspeed: bool) -> bool:
    """The default of `--autocast`: weights in half precision need none, float32 weights need it for fast products.

    True under DeepSpeed, where the option has no effect.
    """
    return uses_deepspeed or weight_dtype(args, uses_deepspeed) == torch.float32


def uses_autocast(args: Args, uses_deepspeed: bool) -> bool:
    """Whether the transformer runs under torch's autocast. DeepSpeed needs none: its weights are in half precision."""
    return compute_dtype(args) != torch.float32 and bool(args.memory.autocast) and not uses_deepspeed


def make_trainable(
    transformer: CogVideoXTransformer3DModel, args: Args, device: torch.device | str | None = None
) -> None:
    """Prepares a transformer for training, in place: adapters, quantized base, checkpointing, compilation.

    Adapters are float32, whatever the dtype of the frozen base.

    Args:
        device: device of a quantized base, whose weights may still be on the host; defaults to the weights' device.
    """
    if args.model.training_type == "lora":
        transformer.requires_grad_(False)
        torch.manual_seed(args.training.seed)  # equal adapters on every rank
        transformer.add_adapter(lora_config(args))
        cast_training_params(transformer, torch.float32)
        if not args.memory.autocast:
            run_adapters_in_input_dtype(transformer)
        if args.memory.quantize_base != "none":
            quantize_blocks(transformer, args.memory.quantize_base, device)
    memory = args.memory
    if memory.compile_blocks:
        # By default, DDPOptimizer cuts the graph of a block where a bucket of DDP ends. DDP can send gradients between
        # the blocks anyway.
        torch._dynamo.config.optimize_ddp = False
    if memory.gradient_checkpointing != "none":
        selective = memory.gradient_checkpointing == "selective"
        checkpoint_blocks(transformer, selective, memory.offload_activations, bool(memory.compile_blocks))
    elif memory.compile_blocks:
        for block in transformer.transformer_blocks:  # all blocks share one graph
            block.compile(fullgraph=True)
    transformer.train()


def use_attention_kernel(name: str) -> None:
    """Restricts `scaled_dot_product_attention` to one kernel in the whole process; "auto" changes nothing."""
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
    """Returns why torch.compile fails on this machine, such as a missing C compiler; None if it works.

    Compiles a small function in a separate process, because the compiler starts threads and this process is forked to
    decode clips.
    """
    script = (
        "import torch; device = 'cuda' if torch.cuda.is_available() else 'cpu'; "
        "torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.zeros(8, device=device))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    errors = [line for line in result.stderr.splitlines() if "Error" in line]
    return (errors or [f"exit code {result.returncode}"])[-1] if result.returncode else None


def run_adapters_in_input_dtype(transformer: torch.nn.Module) -> None:
    """Makes adapters compute in the dtype of their inputs, as under autocast.

    By default, peft casts the inputs to the dtype of the adapter weights.
    """
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for linear in (*layer.lora_A.values(), *layer.lora_B.values()):
                linear.forward = partial(_linear, linear)


def _linear(layer: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    """Applies a linear layer without bias in the dtype of its inputs."""
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


def count_trained(config: dict, args: Args) -> int:
    """Returns the number of weights that a run trains. Reads no weights."""
    if args.model.training_type == "sft":
        return sum(parameter.numel() for parameter in _without_weights(config).parameters())
    layers = linear_layers(config)
    return sum(
        args.lora.rank * (layers[name].in_features + layers[name].out_features)
        for name in target_layers(config, args.lora.target_modules)
    )


def linear_layers(config: dict) -> dict[str, torch.nn.Linear]:
    """Returns name -> layer for the linear layers of a transformer, which can have adapters. Reads no weights."""
    modules = _without_weights(config).named_modules()
    return {name: module for name, module in modules if isinstance(module, torch.nn.Linear)}


def target_layers(config: dict, target_modules: tuple[str, ...]) -> set[str]:
    """Returns the names of the linear layers that get adapters. Reads no weights."""
    return {name for name in linear_layers(config) if any(_is_target(name, target) for target in target_modules)}


def invalid_target_modules(config: dict, target_modules: tuple[str, ...]) -> list[str]:
    """Returns the target modules that match no layer, or match a layer that is not linear. Reads no weights.

    peft would also adapt the convolution `patch_embed.proj`, which LoRA loaders do not support.
    """
    modules = dict(_without_weights(config).named_modules())

    def is_valid(target: str) -> bool:
        matches = [module for name, module in modules.items() if _is_target(name, target)]
        return bool(matches) and all(isinstance(module, torch.nn.Linear) for module in matches)

    return [target for target in target_modules if not is_valid(target)]


def _without_weights(config: dict) -> CogVideoXTransformer3DModel:
    with init_empty_weights(include_buffers=True):
        return CogVideoXTransformer3DModel.from_config(config)


def _is_target(name: str, target: str) -> bool:
    """Whether peft adapts a module for a target."""
    return f".{name}".endswith(f".{target}")
