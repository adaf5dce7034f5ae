"""LoRA training on a quantized base model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import arguments, succeed
from tests.gradients import compute_gradients, flatten, prepare_model
from utils.checkpoint.lora_reader import WEIGHTS_FILE
from utils.memory.quantized_linear import QuantizedLinear, decode, encode
from utils.training.trainable import trained_parameters


@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.01), ("fp8", 0.05), ("int4", 0.15)])
@pytest.mark.parametrize("variant", ["2b", "5b-i2v", "1.5-i2v"])
def test_gradients_on_a_quantized_base(tiny, tmp_path, variant, kind, tolerance):
    """They are close to those of the base, and match those of the decoded weights up to float32 rounding."""
    plain = prepare_model(tiny(variant), tmp_path)
    expected = compute_gradients(plain)
    quantized = prepare_model(tiny(variant), tmp_path, "--quantize_base", kind)
    actual = compute_gradients(quantized)
    gradients, expected_gradients = flatten(actual.gradients), flatten(expected.gradients)
    assert (gradients - expected_gradients).norm() <= tolerance * expected_gradients.norm()
    assert (actual.prediction - expected.prediction).norm() <= 0.01 * expected.prediction.norm()

    layers = dict(quantized.transformer.named_modules())
    assert any(isinstance(layer, QuantizedLinear) for layer in layers.values())
    for name, layer in plain.transformer.named_modules():
        if isinstance(layers[name], QuantizedLinear):
            codes = layers[name]
            layer.weight.data = decode(codes.codes, codes.scale, codes.offset, torch.float32)
            layer.weight.grad = None
    for parameter in trained_parameters(plain.transformer):
        parameter.grad = None
    decoded = compute_gradients(plain)
    torch.testing.assert_close(actual[:2], decoded[:2], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "fp8", "int4"])
def test_compiled_decoding_gives_equal_bits(scheme):
    """Compiled blocks decode in one kernel, which rounds to half precision once."""
    torch._dynamo.reset()
    encoded = encode(torch.randn(96, 256, generator=torch.Generator().manual_seed(0)), scheme)
    compiled = torch.compile(decode, fullgraph=True)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(compiled(*encoded, dtype), decode(*encoded, dtype))


@pytest.mark.slow
def test_quantized_base_trains_the_same_on_two_processes(tiny, data, tmp_path):
    adapters = []
    for processes in (1, 2):  # fp8, because the collectives do not support its dtype
        out = tmp_path / str(processes)
        options = ["--quantize_base", "fp8", "--train_steps", 2, "--batch_size", 2 // processes]
        succeed("train_ddp_t2v.sh", *arguments(tiny("2b"), data, out, *options), processes=processes)
        adapters.append(load_file(out / "checkpoint-2" / WEIGHTS_FILE))
    torch.testing.assert_close(adapters[1], adapters[0], rtol=0, atol=1e-6)
    assert any(tensor.any() for name, tensor in adapters[0].items() if "lora_B" in name)
