"""Every way to save memory or work leaves the mathematics as it is: against the plain run, gradient by gradient."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import arguments
from utils import activations, fake_parts, quantized
from utils.args import parse_args
from utils.components import load_transformer
from utils.conditioning import predict_velocity
from utils.model_form import read_form
from utils.preflight import resolve
from utils.trainable import make_trainable, trained_parameters

FORMS = ("2b", "5b-i2v", "1.5-i2v")


class CountAttention(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func in activations.ATTENTION
        return func(*args, **kwargs or {})


def prepared(model, tmp_path, *options):
    form = read_form(model)
    args = resolve(parse_args(arguments(model, tmp_path, tmp_path, *options, task=form.task)), form)
    transformer = load_transformer(model / "transformer", torch.float32)
    make_trainable(transformer, args)
    torch.manual_seed(1)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide half of the gradients
            parameter.data.normal_(std=0.02)
    return transformer, args, form


def gradients(transformer, args, form):
    """Prediction and gradients of a batch of two, and how often attention was computed."""
    torch.manual_seed(2)
    batch = fake_parts.fake_batch(args, form, args.data.train_resolution[0], 2)
    latents, image_latents, prompts = (None if t is None else torch.randn_like(t) for t in batch.values())
    with CountAttention() as attention:
        predicted = predict_velocity(
            transformer, form, latents, torch.tensor([700, 20]), prompts, image_latents, torch.float32
        )
        (predicted - latents.flip(0)).square().mean().backward()
    return predicted.detach(), [parameter.grad for parameter in trained_parameters(transformer)], attention.calls


@pytest.mark.parametrize("training_type", ["lora", "sft"])
@pytest.mark.parametrize("form", FORMS)
def test_what_blocks_keep_and_where_changes_no_bit(tiny, tmp_path, monkeypatch, form, training_type):
    monkeypatch.setattr(activations, "SMALLEST", 1)
    plain = prepared(tiny(form), tmp_path, "--training_type", training_type)
    predicted, expected, calls = gradients(*plain)
    assert calls == 2 * len(plain[0].transformer_blocks)
    for options in (["--keep_attention"], ["--offload_activations"], ["--keep_attention", "--offload_activations"]):
        tried = prepared(tiny(form), tmp_path, "--training_type", training_type, *options)
        for _ in range(2):  # the second finds what the first has left
            for parameter in trained_parameters(tried[0]):
                parameter.grad = None
            again, found, calls = gradients(*tried)
            assert torch.equal(again, predicted) and all(map(torch.equal, found, expected)), options
        assert calls == (1 if "--keep_attention" in options else 2) * len(plain[0].transformer_blocks)


@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.01), ("fp8", 0.05), ("int4", 0.15)])
@pytest.mark.parametrize("form", FORMS)
def test_a_quantized_base_is_the_base_it_stands_for(tiny, tmp_path, form, kind, tolerance):
    plain = prepared(tiny(form), tmp_path)
    predicted, expected, _ = gradients(*plain)
    coded = prepared(tiny(form), tmp_path, "--quantize_base", kind)
    found_prediction, found, _ = gradients(*coded)
    near, exact = (torch.cat([gradient.flatten() for gradient in all_]) for all_ in (found, expected))
    assert (near - exact).norm() <= tolerance * exact.norm()
    assert (found_prediction - predicted).norm() <= 0.01 * predicted.norm()

    # to the last digits it is the plain run on the weights that the codes stand for
    layers = dict(coded[0].named_modules())
    assert any(isinstance(layer, quantized.QuantizedLinear) for layer in layers.values())
    for name, layer in plain[0].named_modules():
        if isinstance(layers[name], quantized.QuantizedLinear):
            codes = layers[name]
            layer.weight.data = quantized.decode(codes.codes, codes.scale, codes.offset, torch.float32)
            layer.weight.grad = None
    for parameter in trained_parameters(plain[0]):
        parameter.grad = None
    predicted, expected, _ = gradients(*plain)
    torch.testing.assert_close([found_prediction, *found], [predicted, *expected], rtol=1e-4, atol=1e-6)
