"""Gradient checkpointing, activation offloading and compiled blocks give the gradients of a plain run."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.gradients import compute_gradients, prepare_model
from tests.tiny_models import build
from utils.memory import activation_offloading, cpu_offload_adam, pinned_memory
from utils.training.trainable import trained_parameters

CPU_ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize("training_type", ["lora", "sft"])
@pytest.mark.parametrize("variant", ["2b", "5b-i2v", "1.5-i2v"])
def test_checkpointing_and_offloading_are_bit_exact(tiny, tmp_path, monkeypatch, variant, training_type):
    monkeypatch.setattr(activation_offloading, "MIN_OFFLOAD_BYTES", 1)
    plain = prepare_model(tiny(variant), tmp_path, "--training_type", training_type)
    expected = compute_gradients(plain)
    blocks = len(plain.transformer.transformer_blocks)
    assert expected.attention_calls == 2 * blocks
    selective, offload = ["--gradient_checkpointing", "selective"], ["--offload_activations"]
    for options in (selective, offload, [*selective, *offload, "--autocast", "false"]):
        model = prepare_model(tiny(variant), tmp_path, "--training_type", training_type, *options)
        for _ in range(2):  # the second pass reuses buffers of the first
            for parameter in trained_parameters(model.transformer):
                parameter.grad = None
            actual = compute_gradients(model)
            assert torch.equal(actual.prediction, expected.prediction), options
            assert all(map(torch.equal, actual.gradients, expected.gradients)), options
        assert actual.attention_calls == (1 if "selective" in options else 2) * blocks


class LateCopyStream(pinned_memory.CopyStream):
    """Copies as late as a GPU may: when `wait` is called. Until then, the target is NaN."""

    def __init__(self):
        self.pending = []

    def copy(self, source, target):
        self.pending.append((source, target.fill_(torch.nan)))
        return self.pending[-1]

    def wait(self, copied):
        while any(copied is item for item in self.pending):
            source, target = self.pending.pop(0)
            target.copy_(source)

    wait_on_host = wait

    def synchronize(self):
        while self.pending:
            self.wait(self.pending[-1])


def test_asynchronous_copies_are_awaited(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(activation_offloading, "MIN_OFFLOAD_BYTES", 1)
    monkeypatch.setattr(activation_offloading, "CopyStream", LateCopyStream)
    monkeypatch.setattr(cpu_offload_adam, "CopyStream", LateCopyStream)
    monkeypatch.setattr(cpu_offload_adam, "MAX_PENDING_OFFLOADS", 1000)  # as if no copy of a pass ended before the next
    options = ["--training_type", "sft"]
    expected = compute_gradients(prepare_model(tiny("5b-i2v"), tmp_path, *options))
    options += ["--gradient_checkpointing", "selective", "--offload_activations"]
    model = prepare_model(tiny("5b-i2v"), tmp_path, *options)
    parameters = trained_parameters(model.transformer)
    references = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    # with so large an epsilon, updates depend on the size of a gradient
    optimizer = cpu_offload_adam.CPUOffloadAdam(parameters, lr=1e-3, eps=1.0, decoupled_weight_decay=True)
    for _ in range(2):  # gradients accumulate
        actual = compute_gradients(model)
        assert torch.equal(actual.prediction, expected.prediction)
        assert actual.gradients == [None] * len(parameters)
    for reference, gradient in zip(references, expected.gradients, strict=True):
        reference.grad = 2 * gradient
    torch.optim.AdamW(references, lr=1e-3, eps=1.0, weight_decay=0, fused=True).step()
    optimizer.step()
    for parameter, reference in zip(parameters, references, strict=True):
        assert torch.equal(parameter, reference)


@pytest.mark.parametrize("compiled", ["false", pytest.param("true", marks=pytest.mark.slow)])
@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_only_fetches_of_the_last_block_wait_for_a_copy(tmp_path, monkeypatch, checkpointing, compiled):
    """All other copies start one block before their fetch. The second pass accumulates gradients."""
    monkeypatch.setattr(activation_offloading, "MIN_OFFLOAD_BYTES", 1)
    options = ["--gradient_checkpointing", checkpointing, "--offload_activations", "--compile_blocks", compiled]
    model = prepare_model(build("5b", tmp_path, layers=4), tmp_path, *options)
    original_copy, original_fetch = pinned_memory.CopyStream.copy, activation_offloading.ActivationOffloader.fetch
    targets, exposed = [], []

    def copy(stream, source, target):
        targets.append(target)
        return original_copy(stream, source, target)

    def fetch(offloader, offloaded):
        started = len(targets)
        tensor = original_fetch(offloader, offloaded)
        if isinstance(offloaded, activation_offloading.OffloadedTensor):
            exposed.append(any(tensor is target for target in targets[started:]))
        return tensor

    monkeypatch.setattr(pinned_memory.CopyStream, "copy", copy)
    monkeypatch.setattr(activation_offloading.ActivationOffloader, "fetch", fetch)
    for _ in range(2):
        targets.clear()
        exposed.clear()
        compute_gradients(model, count_attention=False)
        # per block at least three inputs; selective checkpointing adds the attention output and its log-sum-exp
        assert len(exposed) >= 4 * (5 if checkpointing == "selective" else 3)
        assert exposed[0] and not any(exposed[1:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "options", "attention_calls", "offloaded"),
    [
        ("2b", ["--gradient_checkpointing", "false", "--training_type", "sft"], 1, 0),
        ("5b", [], 2, 0),
        # per block: three inputs, the attention output and its log-sum-exp; no weights and no codes
        (
            "1.5-i2v",
            ["--gradient_checkpointing", "selective", "--offload_activations", "--quantize_base", "int8"],
            1,
            5,
        ),
    ],
)
def test_compiled_blocks_match_and_save_the_same_tensors(
    tiny, tmp_path, monkeypatch, variant, options, attention_calls, offloaded
):
    monkeypatch.setattr(activation_offloading, "MIN_OFFLOAD_BYTES", 1)
    monkeypatch.setattr(activation_offloading, "MAX_PENDING_OFFLOADS", 0)  # every tensor is offloaded and fetched once
    expected = compute_gradients(prepare_model(tiny(variant), tmp_path, *options))
    compiled = prepare_model(tiny(variant), tmp_path, *options, "--compile_blocks")
    torch._dynamo.reset()  # forgets graphs of other tests
    torch._dynamo.utils.counters.clear()
    actual = compute_gradients(compiled, count_attention=False)
    torch.testing.assert_close(actual[:2], expected[:2], rtol=1e-4, atol=1e-6)
    # under LoRA, the input of the first block needs no gradient; all other blocks share a graph
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2

    copies = []
    original_copy = pinned_memory.CopyStream.copy

    def copy(*args):
        copies.append(args)
        return original_copy(*args)

    monkeypatch.setattr(pinned_memory.CopyStream, "copy", copy)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        compute_gradients(compiled, count_attention=False)
    calls = [event for event in profiler.events() if event.name == CPU_ATTENTION]
    blocks = len(compiled.transformer.transformer_blocks)
    assert len(calls) == attention_calls * blocks and len(copies) == 2 * offloaded * blocks
