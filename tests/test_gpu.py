"""Whole runs on a GPU, through the launch scripts."""

from __future__ import annotations

import math

import pytest

from tests.conftest import arguments, generate, read_metrics, succeed


@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], ["--gradient_checkpointing", "selective", "--offload_activations"]])
def test_lora_trains_and_generates(tiny, data, tmp_path, options):
    out = tmp_path / "out"
    options = ["--mixed_precision", "bf16", "--train_steps", 4, *options]
    output = succeed("train_ddp_t2v.sh", *arguments(tiny("5b"), data, out, *options), processes=1)
    assert "GiB (GPU)" in output
    assert all(math.isfinite(line["loss"]) for line in read_metrics(out)) and len(read_metrics(out)) == 4
    demo = ["--model_path", tiny("5b"), "--lora_path", out / "checkpoint-4", "--prompt", "a red circle"]
    printed = generate(*demo, "--num_inference_steps", 2, "--output_path", tmp_path / "demo.mp4")
    assert "adapter modules matched" in printed and (tmp_path / "demo.mp4").stat().st_size > 0
