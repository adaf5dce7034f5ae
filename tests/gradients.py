"""Gradients of one batch on a tiny model, for comparisons between memory settings."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import arguments
from utils.config.args import parse_args
from utils.estimate import simulated_run
from utils.estimate.context import RunContext
from utils.memory import activation_checkpointing
from utils.model.conditioning import predict_velocity
from utils.model.loading import load_transformer
from utils.model.spec import read_spec
from utils.run.preflight import fill_in_defaults
from utils.training.loss import sample_inputs
from utils.training.trainable import make_trainable, trained_parameters, uses_autocast


class Model(NamedTuple):
    transformer: Any
    context: RunContext


class BatchResult(NamedTuple):
    """The outcome of one forward and backward pass.

    Attributes:
        gradients: one per trained parameter; None where an optimizer has taken the gradient already.
        attention_calls: number of attention operations in the forward and the backward pass.
    """

    prediction: torch.Tensor
    gradients: list[Any]
    attention_calls: int


class CountAttention(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func in activation_checkpointing.ATTENTION
        return func(*args, **kwargs or {})


def prepare_model(
    model_dir: Path, folder: Path, *options: object, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Model:
    """Loads a transformer and makes it trainable as a run with the given flags does. Equal on every device."""
    spec = read_spec(model_dir)
    args = fill_in_defaults(parse_args(arguments(model_dir, folder, folder, *options, task=spec.task)), spec)
    transformer = load_transformer(model_dir / "transformer", dtype, device)
    make_trainable(transformer, args, device)
    torch.manual_seed(1)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:  # initialized to zero, which would make the gradients of lora_A zero
            parameter.data.copy_(torch.randn(parameter.shape) * 0.02)
    return Model(transformer, RunContext(args, spec, {}))


def compute_gradients(model: Model, dtype: torch.dtype = torch.float32, count_attention: bool = True) -> BatchResult:
    """Runs one forward and backward pass on a random batch of two, on the device of the transformer.

    Args:
        count_attention: count attention operations with a dispatch mode. `torch.compile` does not work within one.
    """
    transformer, context = model
    torch.manual_seed(2)
    batch = {name: torch.randn(value.shape) for name, value in simulated_run.empty_batch(context, 2).items()}
    inputs = sample_inputs(context.spec, batch["video"], batch.get("image"), [3, 4], 1000)
    device = next(transformer.parameters()).device
    latents, prompt = inputs.latents.to(device), batch["prompt"].to(device, dtype)
    image_latents = None if inputs.image_latents is None else inputs.image_latents.to(device)
    counter = CountAttention()
    with counter if count_attention else nullcontext():
        enabled = dtype != torch.float32 and uses_autocast(context.args, False)
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            timesteps = torch.tensor([700, 20], device=device)
            prediction = predict_velocity(
                transformer, context.spec, latents, timesteps, prompt, image_latents, dtype
            ).float()
        (prediction - latents.flip(0)).square().mean().backward()
    gradients = [parameter.grad for parameter in trained_parameters(transformer)]
    return BatchResult(prediction.detach(), gradients, counter.calls)


def flatten(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Returns all values as one float32 vector."""
    return torch.cat([tensor.float().flatten() for tensor in tensors])
