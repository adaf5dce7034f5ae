"""Precision and attention kernels of the trained transformer."""

from __future__ import annotations

import torch

from tests.gradients import compute_gradients, flatten, prepare_model
from utils.training.trainable import use_attention_kernel


def test_bf16_without_autocast_is_as_close_to_float32(tiny, tmp_path):
    exact = prepare_model(tiny("1.5-i2v"), tmp_path)
    for parameter in exact.transformer.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16().float()
    expected = flatten(compute_gradients(exact).gradients)
    errors = []
    for autocast in ("true", "false"):
        options = ["--autocast", autocast, "--mixed_precision", "bf16"]
        model = prepare_model(tiny("1.5-i2v"), tmp_path, *options, dtype=torch.bfloat16)
        actual = flatten(compute_gradients(model, torch.bfloat16).gradients)
        errors.append(float((actual - expected).norm() / expected.norm()))
    assert errors[1] < 1.1 * errors[0] and errors[0] < 0.02


def test_attention_kernels_agree(tiny, tmp_path):
    expected = compute_gradients(prepare_model(tiny("5b"), tmp_path))
    try:
        use_attention_kernel("math")
        actual = compute_gradients(prepare_model(tiny("5b"), tmp_path))
    finally:
        for kernel in ("flash", "cudnn", "mem_efficient", "math"):
            getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(True)
    assert expected.attention_calls and not actual.attention_calls  # the math backend is not one operation
    torch.testing.assert_close(actual[:2], expected[:2], rtol=1e-4, atol=1e-6)
