"""Rows that only `on_gpu` measures: one for each memory setting, and rows of a tiny model for its rehearsal."""

from __future__ import annotations

from benchmarks.rows import SFT, Row

# The rows of memory settings have a few blocks of full size: a measurement takes seconds, and each setting fits.
NUM_LAYERS = 8
LORA = "--autocast false --compile_blocks false --gradient_checkpointing"
ADAM = f"{SFT} --gradient_checkpointing full --compile_blocks true"
HALF_ADAM = f"{ADAM} --autocast false"

LORA_LEVERS = {
    "none": f"{LORA} none",
    "full": f"{LORA} full",
    "full-offload": f"{LORA} full --offload_activations true",
    "selective": f"{LORA} selective",
    "selective-offload": f"{LORA} selective --offload_activations true",
    "int8": f"{LORA} none --quantize_base int8",
    "fp8": f"{LORA} none --quantize_base fp8",
    "int4": f"{LORA} none --quantize_base int4",
    "autocast": "--autocast true --compile_blocks false --gradient_checkpointing none",
    "flash": f"{LORA} none --attention_kernel flash",
    "compiled": "--autocast false --compile_blocks true --gradient_checkpointing none",
    "compiled-selective-offload": (
        "--autocast false --compile_blocks true --gradient_checkpointing selective --offload_activations true"
    ),
}
SFT_LEVERS = {
    "adam": f"{ADAM} --autocast true",
    "adam-8bit": f"{HALF_ADAM} --quantize_optimizer 8bit",
    "adam-8bit-in-backward": (f"{HALF_ADAM} --quantize_optimizer 8bit --optimizer_in_backward true --max_grad_norm 0"),
    "adam-4bit": f"{HALF_ADAM} --quantize_optimizer 4bit",
    "adam-offload": f"{HALF_ADAM} --offload_optimizer true",
}
LEVER_ROWS = [Row(name, "CogVideoX-5b", flags) for name, flags in (LORA_LEVERS | SFT_LEVERS).items()]
# in float32, since bfloat16 is slow on a CPU
TINY = "--train_resolution 9x64x64 --mixed_precision no --compile_blocks false"
TINY_ROWS = [
    Row("tiny-lora", "examples/tiny/t2v", f"{TINY} --offload_activations true --quantize_base int4 --autocast false"),
    Row("tiny-sft", "examples/tiny/t2v", f"{TINY} --training_type sft --offload_optimizer true"),
    Row(
        "tiny-sft-8bit",
        "examples/tiny/t2v",
        f"{TINY} --training_type sft --quantize_optimizer 8bit --optimizer_in_backward true --max_grad_norm 0 "
        "--autocast false",
    ),
]
