"""Updates simulated on fake tensors: memory traffic, and the branches that CUDA takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from benchmarks import real_size
from benchmarks.rows import Row
from utils.estimate import memory_tracker, simulated_run


def test_traffic_counts_each_tensor_that_a_kernel_reads_or_writes():
    with memory_tracker.simulate() as tracker:
        half, weight = (torch.empty(100, 100, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
        size = half.nbytes

        def traffic(run):
            tracker.traffic.clear()
            run()
            return dict(+tracker.traffic)

        assert traffic(lambda: half @ half) == {"products": 2 * size}  # one input, and the output
        assert traffic(lambda: half[:, :1].expand(100, 100) + half) == {"other": size / 100 + 2 * size}
        assert traffic(lambda: half.add_(1)) == {"other": 2 * size}
        assert traffic(lambda: half.copy_(weight)) == {"other": 3 * size}
        assert traffic(lambda: (half.view(-1), torch.empty_like(half), half.detach())) == {}
        heads = half.view(1, 10, 10, 100)
        attention = traffic(lambda: functional.scaled_dot_product_attention(heads, heads, heads))
        assert attention == {"attention": 2 * size + 10 * 10 * 4}  # log-sum-exp in float32
        parameter = torch.nn.Parameter(weight)
        parameter.grad = torch.empty_like(weight)
        for fused, num_bytes in ((True, 28), (False, 28 + 4 * 4)):
            optimizer = torch.optim.AdamW([parameter], fused=fused)
            optimizer.step()
            adam = traffic(optimizer.step)["other"] / parameter.numel()
            assert adam == pytest.approx(num_bytes, abs=0.01) if fused else adam > num_bytes


def test_simulation_takes_the_branches_of_cuda():
    """By default, torch's Adam makes temporary copies of all weights at once on CUDA, and of one at a time on a CPU."""
    with memory_tracker.simulate() as tracker:
        parameters = [torch.nn.Parameter(torch.empty(1000, 1000)) for _ in range(10)]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer = torch.optim.AdamW(parameters)
        optimizer.step()
        before = tracker.now
        tracker.watch_peak()
        optimizer.step()
        assert tracker.peak - before > 0.9 * sum(parameter.nbytes for parameter in parameters)


def test_simulated_autocast_has_the_dtypes_of_cuda(monkeypatch):
    """Compares the functions that the transformer calls with torch's own list of functions in float32."""
    header = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()
    lists = dict(re.findall(r"#define AT_FORALL_(\w+)\(_\)(.*?)\n\n", header, re.DOTALL))
    in_float32, widest = (
        {name for key in keys for name in re.findall(r"_\((?:ADD_NS\()?(\w+)", lists[key])}
        for keys in (("FP32", "FP32_SET_OPT_DTYPE", "DIFFERENT_REDISPATCH_SIGNATURE"), ("PROMOTE",))
    )
    patched = set(memory_tracker.AUTOCAST_FLOAT32)
    assert patched | {"exp", "norm"} <= in_float32 and "addcmul" in widest
    monkeypatch.setattr(memory_tracker, "AUTOCAST_FLOAT32", ())  # the patches would hide their functions
    called = set()

    class Record(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if any(isinstance(leaf, torch.Tensor) and leaf.itemsize == 2 for leaf in tree_leaves((args, kwargs))):
                called.add(func.__name__)
            return func(*args, **kwargs or {})

    flags = "--training_type sft --mixed_precision bf16 --gradient_checkpointing none"
    context = real_size.context_of(Row("", "CogVideoX1.5-5B-I2V", flags)).with_num_layers(1)
    transformer = simulated_run.empty_transformer(context)
    with simulated_run.simulation(context):
        memory_tracker.give_fake_weights(transformer)
        objective, batch = simulated_run.fake_objective(context), simulated_run.empty_batch(context, 1)
        with Record():
            objective(simulated_run.autocast_forward(transformer, context), batch, [0])
    assert "layer_norm" in called and called & in_float32 <= patched
    assert not called & widest


def test_math_attention_is_predicted_as_such():
    context = real_size.context_of(Row("", "CogVideoX-5b", "--attention_kernel math")).with_num_layers(1)
    updates = simulated_run.simulate_updates(context)
    scores = 48 * (17550 + 226) ** 2 * 2  # one score per head and pair of tokens
    assert sum(updates.terms.values()) > scores and "attention" not in updates.traffic
