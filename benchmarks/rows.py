"""Rows of `real_size`: recipes, their flags, and the peak memory that they must not exceed."""

from __future__ import annotations

from dataclasses import dataclass

SMALLEST_LORA = (
    "--gradient_checkpointing selective --offload_activations true --quantize_base int4 --autocast false "
    "--compile_blocks true"
)
SMALLEST_SFT = "--gradient_checkpointing selective --offload_activations true --offload_optimizer true --autocast false"
SFT = "--training_type sft --mixed_precision bf16"
SFT_8BIT = f"{SFT} --quantize_optimizer 8bit --optimizer_in_backward true --max_grad_norm 0 --autocast false"
SFT_4BIT = SFT_8BIT.replace("8bit", "4bit")
NO_CHECKPOINTING = "--gradient_checkpointing none --autocast false --compile_blocks true"
SELECTIVE = "--gradient_checkpointing selective --autocast false --compile_blocks true"
NATIVE_1_5 = "--train_resolution 81x768x1360"


@dataclass(frozen=True)
class Row:
    """A recipe at full size.

    Attributes:
        flags: of train.py. Predictions ignore --compile_blocks.
        goal: largest peak in GiB; None for recipes that are chosen for speed.
        zero: DeepSpeed template and number of processes. These rows are only predicted.
    """

    name: str
    model: str
    flags: str
    goal: float | None = None
    zero: tuple[str, int] | None = None


ROWS = [
    # what each script runs without further flags; the goal leaves the margin of a prediction on a card of 24 GB
    Row("train_ddp_t2v.sh", "CogVideoX-5b", "", 18.5),
    Row("train_ddp_i2v.sh", "CogVideoX-5b-I2V", ""),
    Row("train_zero_t2v.sh", "CogVideoX-5b", "--training_type sft", zero=("zero2", 8)),
    Row("train_zero_i2v.sh", "CogVideoX-5b-I2V", "--training_type sft", zero=("zero2", 8)),
    Row("2b-lora", "CogVideoX-2b", "--mixed_precision bf16", 7.8),
    Row("2b-lora-smallest", "CogVideoX-2b", f"--mixed_precision bf16 {SMALLEST_LORA}", 5.5),
    Row("2b-lora-fastest", "CogVideoX-2b", f"--mixed_precision bf16 {NO_CHECKPOINTING}"),
    Row("5b-lora", "CogVideoX-5b", "--offload_activations true --autocast false", 15.6),
    Row("5b-lora-smallest", "CogVideoX-5b", SMALLEST_LORA, 10.5),
    Row("5b-lora-fastest", "CogVideoX-5b", NO_CHECKPOINTING),
    Row("5b-lora-selective", "CogVideoX-5b", SELECTIVE),
    Row("5b-i2v-lora-smallest", "CogVideoX-5b-I2V", SMALLEST_LORA),
    Row("1.5-lora-default", "CogVideoX1.5-5B", NATIVE_1_5),
    Row("1.5-lora", "CogVideoX1.5-5B", f"{NATIVE_1_5} --offload_activations true --autocast false", 20.8),
    Row("1.5-lora-smallest", "CogVideoX1.5-5B", f"{NATIVE_1_5} {SMALLEST_LORA}", 14.5),
    Row("1.5-lora-fastest", "CogVideoX1.5-5B", f"{NATIVE_1_5} {SELECTIVE}"),
    Row("1.5-i2v-lora-default", "CogVideoX1.5-5B-I2V", NATIVE_1_5),
    Row("1.5-i2v-lora-smallest", "CogVideoX1.5-5B-I2V", f"{NATIVE_1_5} {SMALLEST_LORA}"),
    Row("2b-sft", "CogVideoX-2b", SFT_8BIT, 14.4),
    Row("2b-sft-smallest", "CogVideoX-2b", f"{SFT} {SMALLEST_SFT}", 8),
    Row("5b-sft", "CogVideoX-5b", SFT_4BIT, 26),
    Row("5b-sft-smallest", "CogVideoX-5b", f"{SFT} {SMALLEST_SFT}", 17),
    Row("1.5-sft", "CogVideoX1.5-5B", f"{NATIVE_1_5} {SFT_8BIT} --offload_activations true", 30),
    Row("1.5-sft-smallest", "CogVideoX1.5-5B", f"{NATIVE_1_5} {SFT} {SMALLEST_SFT}", 22),
    *(
        Row(f"{short}-sft-{template}-{count}", model, f"{SFT} {flags}", goal, (template, count))
        for short, model, flags, goals in (
            ("2b", "CogVideoX-2b", "", (None, None, None, None)),
            ("5b", "CogVideoX-5b", "", (19, 31, 23, 11)),
            ("1.5", "CogVideoX1.5-5B", NATIVE_1_5, (30, 42, 34, 22)),
        )
        for (template, count), goal in zip(
            (("zero2_offload", 1), ("zero2", 8), ("zero3", 8), ("zero3_offload", 8)), goals, strict=True
        )
    ),
]
