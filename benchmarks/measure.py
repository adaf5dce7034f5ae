"""Measures updates, attention kernels and encoders on this machine, with random weights of full size.

    python -m benchmarks.measure row/5b-lora attention/5b/flash

Prints one line of JSON per result as soon as it is there. `benchmarks.on_gpu` runs these items and keeps the results.
Without a GPU, the items of tiny models show that everything works.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import T5Config, T5EncoderModel

from benchmarks.gpu_rows import LEVER_ROWS, NUM_LAYERS, TINY_ROWS
from benchmarks.real_size import context_of
from benchmarks.rows import ROWS
from utils.commands.estimate_memory import load_spec
from utils.common.gpus import peak_tflops
from utils.common.units import GIB
from utils.estimate.context import RunContext
from utils.estimate.simulated_run import autocast_forward, empty_batch, fake_objective
from utils.model.encoders import encode_video, to_model_range
from utils.training.optimizer import clip, make_optimizer
from utils.training.profiling import kernel_table
from utils.training.throughput import work_per_update
from utils.training.trainable import make_trainable, trained_parameters, weight_dtype

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# of attention and encoders; convolutions in bfloat16 take minutes on a CPU
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
MODELS = {"2b": "CogVideoX-2b", "5b": "CogVideoX-5b", "1.5": "CogVideoX1.5-5B", "tiny": "examples/tiny/t2v"}
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
Result = dict[str, Any]


def main() -> None:
    for name in sys.argv[1:]:
        kind, _, rest = name.partition("/")
        item = name
        try:
            for result in ITEMS[kind](rest):
                print(json.dumps({"item": item, **result}), flush=True)
                item = f"{name}/kernels"
        except Exception:
            print(json.dumps({"item": item, "error": traceback.format_exc()}), flush=True)
            synchronize()  # ends the process if the error has broken the CUDA context
        gc.collect()  # after the exception and its frames are gone
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


def measure_row(name: str) -> Iterator[Result]:
    [row] = [row for row in [*ROWS, *TINY_ROWS] if row.name == name]
    yield from measure_updates(context_of(row))


def measure_lever(name: str) -> Iterator[Result]:
    [row] = [row for row in [*LEVER_ROWS, *TINY_ROWS] if row.name == name]
    yield next(measure_updates(context_of(row).with_num_layers(NUM_LAYERS)))


def measure_updates(context: RunContext) -> Iterator[Result]:
    """Yields time and memory of updates, and then a kernel table of one more update.

    An update is that of the training loop, with its reads of losses and norm. Utilization is that of `train.py`.
    """
    if context.args.memory.compile_blocks is None:  # preflight's choice
        context = context.with_memory(compile_blocks=DEVICE.type == "cuda")
    args = context.args
    torch._dynamo.reset()  # forgets the graphs of other rows
    dtype = weight_dtype(args, uses_deepspeed=False)
    with random_weights(dtype):
        transformer = CogVideoXTransformer3DModel.from_config(context.spec.transformer)
    torch.nn.Module.to(transformer, dtype)  # positions, which are created in float32
    make_trainable(transformer, args, DEVICE)
    kernel = KERNELS.get(args.memory.attention_kernel)
    parameters = trained_parameters(transformer)
    optimizer = make_optimizer(parameters, args, uses_deepspeed=False)
    objective, model = fake_objective(context, DEVICE), autocast_forward(transformer, context)
    batch = {name: torch.randn_like(value, device=DEVICE) for name, value in empty_batch(context, 1).items()}
    reset_memory()

    def update() -> None:
        with nullcontext() if kernel is None else sdpa_kernel(kernel):
            losses, _ = objective(model, batch, [0])
            losses.tolist()
            losses.mean().backward()
        float(clip(optimizer, args.training.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad()

    # the first update compiles, chooses kernels and creates the optimizer states
    first, *seconds = timed(update)
    num_trained = sum(parameter.numel() for parameter in parameters)
    work = work_per_update(args, context.spec, num_trained, 1, context.resolution)
    result = {"seconds": statistics.median(seconds), "all_seconds": seconds, "first_s": first, **memory()}
    yield result | rates(work.flop, result["seconds"]) | {"tokens_per_s": work.tokens / result["seconds"]}
    activity = ProfilerActivity.CUDA if DEVICE.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        update()
        synchronize()
    yield {"kernels": kernel_table(profiler)}


def measure_attention(name: str) -> Iterator[Result]:
    """Yields seconds and TFLOP/s of a forward and a backward pass of one attention layer.

    The forward pass has two matrix products, the backward pass five, since kernels recompute the scores.
    """
    model, kernel = name.split("/")
    spec, _ = load_spec(MODELS[model])
    tokens, heads = sum(spec.tokens(spec.native)), spec.transformer["num_attention_heads"]
    shape = (1, heads, tokens, spec.transformer["attention_head_dim"])
    query, key, value = (torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=True) for _ in range(3))
    gradient = torch.randn_like(query)
    product = 2 * tokens**2 * spec.width
    with sdpa_kernel(KERNELS[kernel]):
        _, *forward = timed(lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value))
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        _, *backward = timed(lambda: torch.autograd.grad(output, (query, key, value), gradient, retain_graph=True))
    result: Result = {}
    for direction, seconds, products in (("forward", forward, 2), ("backward", backward, 5)):
        median = statistics.median(seconds)
        speed = {"seconds": median, **rates(products * product, median)}
        result |= {f"{direction}_{name}": value for name, value in speed.items()}
    yield result


def measure_vae(name: str) -> Iterator[Result]:
    """Yields clips per minute, from pixels on the host to moments on the host.

    The modes are `tiles`; `whole` pictures; whole pictures in a `batch` of two clips, in the layout `channels_last` or
    with a `compiled` encoder; and whole pictures with `overlap` of copies, as when the latent cache is filled.
    """
    model, mode = name.split("/")
    spec, _ = load_spec(MODELS[model])
    layout = torch.channels_last_3d if mode == "channels_last" else torch.contiguous_format
    with random_weights(DTYPE):
        vae = AutoencoderKLCogVideoX.from_config(spec.vae).eval().requires_grad_(False)
    for weight in vae.parameters():
        if weight.dim() == 5:
            weight.data = weight.data.contiguous(memory_format=layout)
    if mode == "tiles":
        vae.enable_tiling()
    if mode == "compiled":
        vae.encoder.compile()
    size, count = spec.native, {"batch": 2, "overlap": 4}.get(mode, 1)
    clips = torch.randint(256, (count, size.frames, size.height, size.width, 3), dtype=torch.uint8)
    stream = torch.cuda.Stream() if DEVICE.type == "cuda" else None

    @torch.no_grad()
    def encode() -> None:
        if mode == "overlap":
            moments = [encode_video(vae, clip, stream) for clip in clips]
            synchronize()
            assert len(moments) == count
        else:
            frames = to_model_range(clips.to(DEVICE)).to(DTYPE).movedim(-1, 1)  # [B, 3, F, H, W]
            vae.encode(frames.contiguous(memory_format=layout)).latent_dist.parameters.cpu()

    reset_memory()
    first, *seconds = timed(encode)
    median = statistics.median(seconds)
    yield {"clips_per_minute": 60 * count / median, "seconds": median, "first_s": first, **memory()}


def measure_t5(name: str) -> Iterator[Result]:
    """Yields prompts per second of the text encoder, without the tokenizer."""
    model, batch_size = name.split("/")
    spec, config = load_spec(MODELS[model])
    with random_weights(DTYPE):
        encoder = T5EncoderModel(T5Config(**config)).eval().requires_grad_(False)
    tokens = torch.randint(1, config["vocab_size"], (int(batch_size), spec.max_text_seq_length), device=DEVICE)
    reset_memory()
    with torch.no_grad():
        _, *seconds = timed(lambda: encoder(tokens)[0].cpu())
    median = statistics.median(seconds)
    yield {"prompts_per_s": int(batch_size) / median, "seconds": median, **memory()}


ITEMS: dict[str, Callable[[str], Iterator[Result]]] = {
    "row": measure_row,
    "lever": measure_lever,
    "attention": measure_attention,
    "vae": measure_vae,
    "t5": measure_t5,
}


def timed(run: Callable[[], object], max_calls: int = 6) -> list[float]:
    """Returns the seconds of repeated calls, the first of which warms up.

    Stops when two calls in a row agree within 2 %; calls of less than three seconds are repeated at least three times.
    """
    seconds: list[float] = []
    while len(seconds) < max_calls:
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        seconds.append(time.perf_counter() - start)
        enough = 3 if seconds[-1] > 3 else 4
        if len(seconds) >= enough and abs(seconds[-1] - seconds[-2]) <= 0.02 * seconds[-1]:
            break
    return seconds


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def random_weights(dtype: torch.dtype) -> Iterator[None]:
    """Creates modules with weights in `dtype` on the device."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with DEVICE:
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def reset_memory() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory() -> Result:
    """Returns peaks of GPU memory in GiB, and the memory of this process outside of PyTorch's allocator."""
    if DEVICE.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "context_gib": (total - free - torch.cuda.memory_reserved()) / GIB,
    }


def rates(flop: float, seconds: float) -> Result:
    """Returns TFLOP/s, and their share of the GPU's peak if that is known."""
    tflops = flop / seconds / 1e12
    peak = peak_tflops(torch.cuda.get_device_name()) if DEVICE.type == "cuda" else None
    return {"tflops": tflops} | ({"utilization": tflops / peak} if peak else {})


if __name__ == "__main__":
    main()
