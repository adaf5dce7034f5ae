"""Simulates the parts of a run that determine its memory on fake tensors: updates, a validation video, both encoders.

Each part uses the same code, objective and optimizer as a real run. The simulation leaves fake tensors in caches, so a
real run must simulate in a separate process (`run_in_subprocess`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map_only
from transformers import T5Config, T5EncoderModel

from dataset.video import Resolution
from utils.estimate.context import RunContext
from utils.estimate.memory_tracker import (
    HOST_PLACEHOLDER,
    MemoryTracker,
    give_fake_weights,
    simulate,
    storage_size,
)
from utils.model.conditioning import rotary_table
from utils.model.encoders import IMAGE_NOISE_DRAWS, PROMPTS_PER_BATCH, PROMPTS_PER_PASS, encode_by_layers
from utils.model.positions import set_learned_positions
from utils.training.optimizer import clip, make_optimizer
from utils.training.step import DenoisingObjective
from utils.training.trainable import compute_dtype, make_trainable, trained_parameters, uses_autocast, weight_dtype

NUM_TIMESTEPS = 1000
# Frames that the VAE encodes at a time: `num_sample_frames_batch_size` of diffusers, and the first one with them.
VAE_FRAMES = 9


@dataclass(frozen=True)
class UpdateProfile:
    """Memory and work of updates, as seen by one process; sizes in bytes.

    Attributes:
        phases: parts of the peak in each phase of an update, by name.
        weights, trained: numbers of weights.
        flop: floating-point operations of one forward and backward pass.
        host: tensors in host memory.
        traffic: bytes that an update reads from and writes to GPU memory, by kind of operation. DeepSpeed's own
            operations are not simulated, and have none.
    """

    phases: dict[str, dict[str, int]]
    weights: int
    trained: int
    flop: int
    host: int
    traffic: dict[str, int]

    @property
    def terms(self) -> dict[str, int]:
        """Parts of the peak of an update."""
        return max(self.phases.values(), key=lambda terms: sum(terms.values()))


@contextmanager
def simulation(context: RunContext) -> Iterator[MemoryTracker]:
    """Like `simulate`, but with the attention kernel of the run, and without rotary tables of other simulations.

    Fake tensors are valid only within the block that made them. All kernels but `math` keep the same tensors, so the
    CPU's stands for those of CUDA.
    """
    is_math = context.args.memory.attention_kernel == "math"
    rotary_table.cache_clear()
    try:
        with simulate() as tracker, sdpa_kernel(SDPBackend.MATH) if is_math else nullcontext():
            yield tracker
    finally:
        rotary_table.cache_clear()


def simulate_updates(context: RunContext) -> UpdateProfile:
    """Profiles an update that starts with existing optimizer states.

    Under DeepSpeed there are no gradients and no optimizer: `zero_terms` adds them, divided among the processes. The
    loss scale of fp16, which changes gradients in place, is left out.
    """
    args, uses_deepspeed = context.args, context.uses_deepspeed
    transformer = empty_transformer(context)
    with simulation(context) as tracker:
        give_fake_weights(transformer)
        parameters = trained_parameters(transformer)
        terms = {"weights": tracker.now}
        if args.model.training_type == "lora":
            adapters = sum(storage_size(parameter) for parameter in parameters)
            terms = {"weights": tracker.now - adapters, "adapters": adapters}
        not_compiled = context.with_memory(compile_blocks=False).args  # fake tensors cannot measure compiled code
        optimizer = None if uses_deepspeed else make_optimizer(parameters, not_compiled, uses_deepspeed)
        if uses_deepspeed:
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        objective, batch = fake_objective(context), empty_batch(context, args.training.batch_size)
        model = autocast_forward(transformer, context)
        peaks: dict[str, tuple[int, int]] = {}

        def end_phase(name: str) -> None:
            peaks[name] = tracker.peak, tracker.gradients
            tracker.watch_peak(parameters)

        def update_weights() -> None:
            if optimizer is None:
                return
            clip(optimizer, args.training.max_grad_norm)
            if not args.memory.offload_optimizer:  # an offloaded optimizer updates on the host
                optimizer.step()
            end_phase("optimizer")
            # DDP keeps gradients in its buckets, and accumulation keeps them between micro-batches
            keeps_none = context.num_processes == args.training.gradient_accumulation_steps == 1
            optimizer.zero_grad(set_to_none=keeps_none)

        # the first update creates the gradients and the optimizer states; it needs no activations
        torch.stack([parameter.sum().float() for parameter in parameters]).sum().backward()
        update_weights()
        tracker.restart_counts()
        tracker.watch_peak(parameters)
        split_backward(transformer, end_phase)
        before_forward = tracker.now
        losses, _ = objective(model, batch, list(range(args.training.batch_size)))
        saved = tracker.now - before_forward
        end_phase("forward")
        losses.mean().backward()
        end_phase("backward, first blocks")
        forward_and_backward = tracker.traffic.copy()
        update_weights()
        if optimizer is not None:
            states = [state for states in optimizer.state.values() for state in states.values()]
            terms["optimizer"] = sum(storage_size(state) for state in states if isinstance(state, torch.Tensor))
    phases = {
        name: _terms_of_phase(name, peak, terms if uses_deepspeed else terms | {"gradients": gradients}, saved)
        for name, (peak, gradients) in peaks.items()
    }
    weights, trained = (sum(map(torch.Tensor.numel, group)) for group in (transformer.parameters(), parameters))
    host = tracker.host
    if args.memory.offload_optimizer:  # Adam's two states, and gradients of earlier micro-batches
        host += (8 if args.training.gradient_accumulation_steps == 1 else 12) * trained
    traffic = forward_and_backward | {"optimizer": (tracker.traffic - forward_and_backward).total()}
    return UpdateProfile(phases, weights, trained, tracker.flop, host, traffic)


def _terms_of_phase(name: str, peak: int, terms: dict[str, int], saved: int) -> dict[str, int]:
    """Returns the terms of the peak of a phase; `saved` is the size of the activations after the forward pass."""
    rest = peak - sum(terms.values())
    kept = 0 if name == "optimizer" else min(saved, rest)  # fewer may remain when the peak is reached
    return terms | {"saved activations": kept, "working set": rest - kept}


def split_backward(transformer: CogVideoXTransformer3DModel, end_phase: Callable[[str], None]) -> None:
    """Makes the next backward pass call `end_phase` once it is done with the last two blocks, and with all but two.

    From block to block, memory falls by the saved activations and grows by the gradients of one block. The maximum is
    therefore at one end of the pass, and the number of blocks decides at which.
    """

    def watch_input(block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handles.pop(block).remove()  # checkpointing runs the block again
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if hidden_states.requires_grad:
            hidden_states.register_hook(lambda gradient: end_phase(names[block]))

    blocks = transformer.transformer_blocks
    names = {blocks[2]: "backward, middle blocks"} if len(blocks) > 4 else {}
    names[blocks[-2:][0]] = "backward, last blocks"
    handles = {block: block.register_forward_pre_hook(watch_input, with_kwargs=True) for block in names}


@dataclass(frozen=True)
class GenerationProfile:
    """Memory of generating a video, in bytes.

    Attributes:
        transformer, vae: weights.
        denoising: peak of a denoising step with guidance, without weights.
        decoding: peak of decoding the latent, without weights.
    """

    transformer: int
    vae: int
    denoising: int
    decoding: int


def profile_generation(context: RunContext) -> GenerationProfile:
    transformer = empty_transformer(context)
    with simulation(context) as tracker, torch.no_grad():
        give_fake_weights(transformer)
        transformer_bytes = tracker.now
        tracker.watch_peak()
        # classifier-free guidance doubles the batch
        fake_objective(context)(autocast_forward(transformer, context), empty_batch(context, batch_size=2), [0, 1])
        denoising = tracker.peak - transformer_bytes
    vae = empty_vae(context, context.args.system.uses_tiles)
    with simulation(context) as tracker, torch.no_grad():
        give_fake_weights(vae)
        vae_bytes = tracker.now
        tracker.watch_peak()
        reuse_equal_calls(vae.decoder, tracker)
        frames, height, width = context.spec.latent_size(context.resolution)
        vae.decode(torch.empty(1, context.spec.latent_channels, frames, height, width, dtype=vae.dtype))
        return GenerationProfile(transformer_bytes, vae_bytes, denoising, tracker.peak - vae_bytes)


def clip_encoding_peak(context: RunContext, tiling: bool) -> int:
    """Peak bytes of encoding one clip with the VAE, in tiles or as whole pictures."""
    # the VAE encodes few frames at a time, so the size of a picture decides and not the number of tokens
    largest_picture = max(
        context.args.data.train_resolution,
        key=lambda size: min(size.frames, VAE_FRAMES) * size.height * size.width,
    )
    return max(_encoding_peak(context, size, tiling) for size in {context.resolution, largest_picture})


def _encoding_peak(context: RunContext, resolution: Resolution, tiling: bool) -> int:
    vae = empty_vae(context, tiling)
    with simulation(context) as tracker, torch.no_grad():
        give_fake_weights(vae)
        tracker.watch_peak()
        reuse_equal_calls(vae.encoder, tracker)
        vae.encode(torch.empty(1, 3, resolution.frames, resolution.height, resolution.width, dtype=vae.dtype))
        return tracker.peak


def reuse_equal_calls(module: torch.nn.Module, tracker: MemoryTracker) -> None:
    """Computes a module once per shape of its inputs. Later calls count the memory of the first.

    The VAE calls its encoder and its decoder for each tile and each few frames, and most of these calls are equal.
    """
    forward: Callable[..., Any] = module.forward
    known: dict[tuple[Any, ...], tuple[int, Any]] = {}

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        key = (structure, *(leaf.shape if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves))
        if key in known:
            rise, outputs = known[key]
            tracker.peak = max(tracker.peak, tracker.now + rise)
            return tree_map_only(torch.Tensor, partial(torch.empty_like, device="cpu"), outputs)
        before, peak = tracker.now, tracker.peak
        tracker.watch_peak()
        outputs = forward(*args, **kwargs)
        known[key] = tracker.peak - before, tree_map_only(torch.Tensor, lambda x: x.to(HOST_PLACEHOLDER), outputs)
        tracker.peak = max(tracker.peak, peak)
        return outputs

    module.forward = call  # type: ignore[method-assign]


def prompt_encoding_peak(context: RunContext) -> int:
    """Peak bytes of encoding prompts with T5: a batch on the GPU, or many of them offloaded layer by layer."""
    if not context.args.memory.offload_text_encoder:
        encoder = empty_text_encoder(context)
        with simulation(context) as tracker, torch.no_grad():
            give_fake_weights(encoder)
            tracker.watch_peak()
            encoder(torch.zeros(PROMPTS_PER_BATCH, context.spec.max_text_seq_length, dtype=torch.int64))
            return tracker.peak
    one, two = (_offloaded_encoding_peak(context, prompts) for prompts in (1, 2))
    return one + (PROMPTS_PER_PASS - 1) * (two - one)


def _offloaded_encoding_peak(context: RunContext, num_prompts: int) -> int:
    few_layers = context.text_encoder | {"num_layers": 3}  # two of them are on the GPU at a time
    encoder = empty_text_encoder(replace(context, text_encoder=few_layers))
    with simulation(context) as tracker:
        tracker.watch_peak()
        ids = torch.zeros(1, context.spec.max_text_seq_length, dtype=torch.int64, device=HOST_PLACEHOLDER)
        encode_by_layers(encoder, [ids] * num_prompts, torch.device("cpu"), lambda: None)
        return tracker.peak


def empty_transformer(context: RunContext) -> CogVideoXTransformer3DModel:
    """The transformer in training, on the meta device. Not compiled: fake tensors cannot measure compiled code."""
    with init_empty_weights(include_buffers=True):
        transformer = CogVideoXTransformer3DModel.from_config(context.spec.transformer)
    set_learned_positions(transformer, context.spec)
    torch.nn.Module.to(transformer, weight_dtype(context.args, context.uses_deepspeed))
    make_trainable(transformer, context.with_memory(compile_blocks=False).args)
    return transformer


def empty_vae(context: RunContext, tiling: bool) -> AutoencoderKLCogVideoX:
    """The VAE on the meta device, as `loading.load_vae` loads it for a GPU from half-precision files."""
    with init_empty_weights(include_buffers=True):
        vae = AutoencoderKLCogVideoX.from_config(context.spec.vae).eval()
    torch.nn.Module.to(vae, torch.bfloat16)
    if context.args.system.enable_slicing:
        vae.enable_slicing()
    if tiling:
        vae.enable_tiling()
        vae.blend_v = vae.blend_h = lambda _, tile, extent: tile  # takes the memory of a row, and half of the time
    return vae


def empty_text_encoder(context: RunContext) -> T5EncoderModel:
    """The text encoder on the meta device, in the dtypes in which `loading.load_text_encoder` loads it."""
    config = T5Config(**context.text_encoder)
    with init_empty_weights(include_buffers=True):
        encoder = T5EncoderModel(config).to(config.dtype or torch.bfloat16).eval()
    if config.dtype == torch.float16:  # transformers loads these layers in float32 then
        for name, module in encoder.named_modules():
            if name.rpartition(".")[2] in encoder._keep_in_fp32_modules:
                module.float()
    return encoder


def empty_batch(context: RunContext, batch_size: int) -> dict[str, torch.Tensor]:
    """A batch as the data loader yields it, uninitialized: moments and prompt embeddings in the encoders' bfloat16."""
    spec, (frames, height, width) = context.spec, context.spec.latent_size(context.resolution)
    channels = 2 * spec.latent_channels
    shapes = {
        "video": (batch_size, channels, frames, height, width),
        "prompt": (batch_size, spec.max_text_seq_length, spec.transformer["text_embed_dim"]),
    }
    if spec.task == "i2v":
        shapes["image"] = (batch_size, IMAGE_NOISE_DRAWS, channels, 1, height, width)
    return {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}


def fake_objective(context: RunContext, device: torch.device | str = "cpu") -> DenoisingObjective:
    """The objective of the run with a constant noise schedule, whose values do not matter."""
    alphas_cumprod = torch.full((NUM_TIMESTEPS,), 0.5, device=device)
    return DenoisingObjective(context.spec, alphas_cumprod, compute_dtype(context.args))


def autocast_forward(transformer: CogVideoXTransformer3DModel, context: RunContext) -> Callable[..., Any]:
    """The transformer's forward pass under autocast with float32 outputs, as accelerate's `prepare` wraps it."""
    enabled, dtype = uses_autocast(context.args, context.uses_deepspeed), compute_dtype(context.args)

    def forward(hidden_states: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor]:
        with torch.autocast(hidden_states.device.type, dtype, enabled=enabled):
            return (transformer(hidden_states, **inputs)[0].float(),)

    return forward


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None
