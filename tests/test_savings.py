"""Every way to save memory or work leaves the mathematics as it is: against the plain run, gradient by gradient."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import arguments, read_metrics, succeed
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


def weights_after(model, data, output, *options):
    """All weights and gradient norms of four updates of four samples, through the script."""
    options = ["--training_type", "sft", "--batch_size", 2, "--gradient_accumulation_steps", 2, *options]
    options += ["--max_grad_norm", 0.5, "--lr_warmup_steps", 0, "--resume_from_checkpoint", "latest"]
    succeed("train_ddp_t2v.sh", *arguments(model, data, output, *options), processes=1)
    transformer = load_transformer(output / "checkpoint-4" / "transformer")
    return transformer.state_dict(), [line["grad_norm"] for line in read_metrics(output)]


def test_an_optimizer_on_the_host_trains_the_same_weights(tiny, data, tmp_path):
    expected, norms = weights_after(tiny("1.5"), data, tmp_path / "plain", "--train_steps", 4)
    halfway = ["--training_type", "sft", "--batch_size", 2, "--gradient_accumulation_steps", 2, "--train_steps", 2]
    halfway += ["--max_grad_norm", 0.5, "--lr_warmup_steps", 0, "--offload_optimizer"]
    succeed("train_ddp_t2v.sh", *arguments(tiny("1.5"), data, tmp_path / "host", *halfway), processes=1)
    found, again = weights_after(tiny("1.5"), data, tmp_path / "host", "--train_steps", 4, "--offload_optimizer")
    assert again == pytest.approx(norms, rel=1e-6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    base = load_transformer(tiny("1.5") / "transformer").state_dict()
    assert max((expected[name] - base[name]).abs().max() for name in base) > 1e-3
