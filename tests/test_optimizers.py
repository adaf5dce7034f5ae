"""Fused Adam, and optimizers with states in 8 or 4 bits, states on the host, or updates during the backward pass."""

from __future__ import annotations

import copy
import json
import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.scheduler import Scheduler
from torch._inductor.virtualized import V

from tests.conftest import arguments, patch_programs, read_metrics, succeed
from tests.gradients import flatten
from utils.checkpoint.manager import PROGRESS_FILE
from utils.config.args import parse_args
from utils.memory import cpu_offload_adam, low_bit_adam, low_bit_states, pinned_memory
from utils.memory.cpu_offload_adam import CPUOffloadAdam
from utils.memory.low_bit_adam import LowBitAdam
from utils.memory.low_bit_states import BLOCK
from utils.model.loading import load_transformer
from utils.training.optimizer import LossScale, make_optimizer


def test_pinned_arena_allocates_without_gaps(monkeypatch):
    monkeypatch.setattr(pinned_memory, "CHUNK_BYTES", 4096)
    arena = pinned_memory.PinnedArena()
    tensors: list[torch.Tensor] = []
    for count, dtype in ((100, torch.float32), (700, torch.bfloat16), (900, torch.int8), (3000, torch.int32)):
        tensors.append(arena.allocate(count, dtype).fill_(len(tensors)))
        assert tensors[-1].shape == (count,) and tensors[-1].dtype == dtype
    assert all((values == index).all() for index, values in enumerate(tensors))
    chunks = [values.untyped_storage().data_ptr() for values in tensors]
    assert chunks[0] == chunks[1] == chunks[2] != chunks[3] and tensors[2].storage_offset() == 512 + 1536


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.AdamW])
def test_cpu_offload_adam_equals_fused_adam(tmp_path, monkeypatch, dtype, optimizer_class):
    """Bit for bit: accumulated, scaled and clipped gradients, and a resume from a mapped file."""
    monkeypatch.setattr(cpu_offload_adam, "CHUNK", 256)
    torch.manual_seed(0)
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 1e-2}
    decoupled = optimizer_class is torch.optim.AdamW

    def make(weights):
        return CPUOffloadAdam(weights, **settings, decoupled_weight_decay=decoupled)

    weights = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((33, 47), (5,), (1000,))]
    expected = [torch.nn.Parameter(weight.detach().float().clone()) for weight in weights]
    optimizer, reference = make(weights), optimizer_class(expected, **settings, fused=True)
    for passes, scale, max_norm in ((1, 1.0, math.inf), (3, 8.0, 0.5), (2, 8.0, math.inf)):
        for _ in range(passes):
            for weight, master in zip(weights, expected, strict=True):
                gradient = torch.randn_like(weight)
                (scale * gradient * weight).sum().backward()
                master.grad = gradient.float() + (0 if master.grad is None else master.grad)
        assert all(weight.grad is None for weight in weights)
        assert optimizer.clip(max_norm, scale) == torch.nn.utils.clip_grad_norm_(expected, max_norm)
        for one in (optimizer, reference):
            one.step()
            one.zero_grad()
        assert all(torch.equal(master, weight) for master, weight in zip(optimizer.masters, expected, strict=True))
        assert all(torch.equal(weight, master.to(dtype)) for weight, master in zip(weights, expected, strict=True))
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.bin")
        weights = [torch.nn.Parameter(torch.zeros_like(weight)) for weight in weights]
        optimizer = make(weights)
        stored = torch.load(tmp_path / "optimizer.bin", mmap=True)
        optimizer.load_state_dict(stored)
        mapped = {value.data_ptr() for state in stored["state"].values() for value in state.values()}
        assert not any(value.data_ptr() in mapped for state in optimizer.state.values() for value in state.values())


@pytest.mark.slow
def test_cpu_offload_adam_trains_the_same_weights_and_resumes(tiny, data, tmp_path):
    """Four updates of four samples, in one run without offload and in two runs with it."""
    common = ["--training_type", "sft", "--batch_size", 2, "--gradient_accumulation_steps", 2, "--max_grad_norm", 0.5]
    common += ["--lr_warmup_steps", 0, "--resume_from_checkpoint", "latest"]
    offload = ["--offload_optimizer"]
    for name, steps, options in (("plain", 4, []), ("host", 2, offload), ("host", 4, offload)):
        argv = arguments(tiny("1.5"), data, tmp_path / name, *common, "--train_steps", steps, *options)
        succeed("train_ddp_t2v.sh", *argv, processes=1)
    expected, actual = (
        load_transformer(tmp_path / name / "checkpoint-4" / "transformer").state_dict() for name in ("plain", "host")
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    expected_norms, norms = (
        [line["grad_norm"] for line in read_metrics(tmp_path / name)] for name in ("plain", "host")
    )
    assert norms == pytest.approx(expected_norms, rel=1e-6)
    base = load_transformer(tiny("1.5") / "transformer").state_dict()
    assert max((expected[name] - base[name]).abs().max() for name in base) > 1e-3


OPTIONS: dict[str, Any] = {"decoupled_weight_decay": True, "seed": 0, "in_backward": False, "compiled": False}


# tolerance: deviation of the weights, relative to their change in float32
@pytest.mark.parametrize(("bits", "min_size", "tolerance"), [(8, 2**20, 1e-5), (8, 1, 0.06), (4, 1, 0.2)])
def test_low_bit_adam_approximates_adam(monkeypatch, bits, min_size, tolerance):
    monkeypatch.setattr(low_bit_adam, "MIN_QUANTIZED_SIZE", min_size)
    torch.manual_seed(0)
    before = torch.randn(64, 256)
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 1e-2}
    weight, expected = (torch.nn.Parameter(before.clone()) for _ in range(2))
    optimizer = LowBitAdam([weight], **settings, **OPTIONS, mean_bits=bits)
    reference = torch.optim.AdamW([expected], **settings)
    for _ in range(100):
        noise = torch.randn_like(before) * torch.logspace(-3, 0, 256)  # small and large gradients in each block
        for parameter in (weight, expected):
            parameter.grad = noise + 0.3 * parameter.detach()
        optimizer.step()
        reference.step()
    assert float((weight - expected).detach().norm() / (expected.detach() - before).norm()) < tolerance
    state_bytes = sum(value.nbytes for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor))
    bytes_per_weight = 8 if min_size > 1 else (bits + 8) / 8 + 2 * 4 / BLOCK
    assert state_bytes == before.numel() * bytes_per_weight


@pytest.mark.slow
def test_compiled_update_equals_the_eager_one_and_shares_its_graphs(monkeypatch):
    """One graph serves all quantized pieces, another one all small weights. The states have equal bits on a CPU.

    float32 weights could differ in the last bit, because PyTorch's own square root is not exact on a CPU.
    """
    monkeypatch.setattr(low_bit_adam, "CHUNK", 32 * BLOCK)
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    shapes = (64, 256), (12288,), (300, 256), (64, 16, 2, 16), (100, 3), (7,)
    before = [torch.randn(shape).bfloat16() for shape in shapes]
    gradients = [[10.0**-update * torch.randn(shape).bfloat16() for shape in shapes] for update in range(3)]
    trained, states = [], []
    for compiled in (False, True):
        weights = [torch.nn.Parameter(weight.clone()) for weight in before]
        options = OPTIONS | {"compiled": compiled}
        optimizer = LowBitAdam(weights, 1e-3, (0.9, 0.95), 1e-8, 1e-2, mean_bits=4, **options)
        for update in gradients:
            for weight, gradient in zip(weights, update, strict=True):
                weight.grad = gradient.clone()
            optimizer.clip(0.5, scale=1.0)
            optimizer.step()
        trained.append(weights)
        states.append([value for weight in weights for value in optimizer.state[weight].values()])
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    torch.testing.assert_close(trained[1], trained[0], rtol=0, atol=0)
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    assert all((weight != start).any() for weight, start in zip(trained[1], before, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "kernels", "bytes_per_weight"), [(8, 1, 14.1), (4, 5, 24.6)])
def test_compiler_fuses_the_update_into_few_kernels(bits, kernels, bytes_per_weight):
    """Applies the fusion rules of GPUs, counts, and stops before code is generated.

    With 8 bits, the figures are those of an H100. With 4 bits, they are 2 kernels and 19.1 bytes there: for a CPU, the
    compiler leaves the concatenation of codes to PyTorch.
    """
    torch._dynamo.reset()
    weight = torch.nn.Parameter(torch.randn(4096, 256).bfloat16())
    weight.grad = torch.randn(4096, 256).bfloat16()
    optimizer = LowBitAdam([weight], 1e-3, (0.9, 0.95), 1e-8, 1e-2, mean_bits=bits, **OPTIONS | {"compiled": True})

    def stop(scheduler):
        raise RuntimeError(f"{len(scheduler.nodes)} kernels, {V.graph.count_bytes()[0] / weight.numel():.1f} bytes")

    with (
        inductor_config.patch(cpu_backend="triton", force_disable_caches=True),
        patch.object(Scheduler, "codegen", stop),
        pytest.raises(Exception, match=f"{kernels} kernels, {bytes_per_weight} bytes"),
    ):
        optimizer.step()


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "kernels", "bytes_per_weight"), [(8, 1, 14.1), (4, 2, 19.1)])
def test_compiled_update_is_a_few_kernels(bits, kernels, bytes_per_weight):
    """The figures are those of the code that the compiler generates for an H100. Random numbers are drawn before."""
    from torch._inductor import metrics
    from torch._inductor.compile_fx import inductor_metrics_log
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    metrics.reset()
    before, gradient = (torch.randn(4096, 256, device="cuda").bfloat16() for _ in range(2))
    trained = []
    for compiled in (False, True):
        weight = torch.nn.Parameter(before.clone())
        weight.grad = gradient.clone()
        options = OPTIONS | {"compiled": compiled}
        optimizer = LowBitAdam([weight], 1e-3, (0.9, 0.95), 1e-8, 1e-2, mean_bits=bits, **options)
        with patch.object(inductor_metrics_log, "isEnabledFor", lambda _: True), fresh_cache():
            optimizer.step()
        trained.append(weight)
    assert metrics.generated_kernel_count == kernels
    assert metrics.num_bytes_accessed / before.numel() == pytest.approx(bytes_per_weight, abs=0.1)
    differs = trained[0] != trained[1]  # float32 rounding differs, which rarely changes the stochastic rounding
    assert differs.float().mean() < 1e-3
    torch.testing.assert_close(trained[1], trained[0])


def test_stochastic_rounding_is_exact_in_expectation():
    third = torch.full((2**20,), 1 + 2**-7 / 3)  # between two neighbours in bfloat16
    # the last case is subnormal in fp16 and has fewer digits: the smallest step is 2^-24
    for dtype, factor in ((torch.bfloat16, 1.0), (torch.float16, 2.0**-3), (torch.float16, 2.0**-17)):
        values = factor * torch.cat([third, -third])
        noise = low_bit_states.rounding_noise(values, dtype, torch.Generator().manual_seed(0))
        rounded = low_bit_states.stochastic_round(values, dtype, noise).float() / factor
        if factor != 2.0**-3:
            assert rounded.abs().unique().tolist() == [1, 1 + 2**-7]
        for half, value in zip(rounded.chunk(2), (third[0], -third[0]), strict=True):
            assert float(half.mean()) == pytest.approx(float(value), abs=2e-5)
    extremes = torch.tensor([0.0, 2.0**-24, 2.0**-14, 65504.0, -65504.0])
    noise = low_bit_states.rounding_noise(extremes, torch.float16, torch.Generator())
    assert torch.equal(low_bit_states.stochastic_round(extremes, torch.float16, noise).float(), extremes)


def test_4bit_codes_are_exact_in_expectation():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(4096, BLOCK, generator=generator) - 0.5
    values[:, 0] = 1  # gives all blocks the same scale
    codebook = low_bit_states.make_codebook(4, True, torch.device("cpu"))
    encoded = low_bit_states.encode(values, codebook, torch.rand(values.shape, generator=generator))
    decoded = low_bit_states.decode(*encoded, codebook)
    assert len(decoded.unique()) <= 16
    assert float((decoded - values).abs().max()) < 0.225  # the widest step
    assert float((decoded - values).mean()) == pytest.approx(0, abs=2e-4)


def test_fused_adam_leaves_overflow_to_the_loss_scale(tmp_path):
    """The loop must notice an overflowing update, also after a resume. It changes neither weights nor states."""
    args = parse_args(arguments(tmp_path, tmp_path, tmp_path, "--mixed_precision", "fp16"))
    torch.manual_seed(0)
    weight, expected = (torch.nn.Parameter(torch.ones(64, 64)) for _ in range(2))
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler = LossScale("cpu", init_scale=2.0**10)
    optimizer = accelerator.prepare(make_optimizer([weight], args, uses_deepspeed=False))
    assert optimizer.param_groups[0]["fused"]
    settings = {name: value for name, value in optimizer.defaults.items() if name != "fused"}
    reference = torch.optim.Adam([expected], **settings, fused=False)
    for update in range(6):
        gradient, overflows = torch.randn_like(weight), update in (0, 3)
        weight.grad = gradient * scaler.get_scale()
        if overflows:
            weight.grad[0, 0] = torch.inf
        else:
            expected.grad = gradient
            reference.step()
        optimizer.step()
        assert accelerator.optimizer_step_was_skipped == overflows
        torch.testing.assert_close(weight, expected)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.state[weight]["step"] == 4 and scaler.get_scale() == 2.0**8


@pytest.mark.slow
def test_optimizers_support_fp16(tiny, data, tmp_path):
    """CPUs compute fp16 slowly. An update that overflows is skipped and not counted."""
    options = ["--training_type", "sft", "--train_steps", 4, "--lr_warmup_steps", 2, "--max_grad_norm", 0.5]

    def train(name, precision, scale, processes=1, *more):
        patch = "import functools, utils.training.optimizer as o; machine_errors = lambda *_: []; "
        patch += (
            f"o.LossScale.__init__ = functools.partialmethod(o.LossScale.__init__, init_scale={scale}); "
            "from accelerate import Accelerator; "
        )
        # accelerate has no fp16 autocast on a CPU
        patch += "Accelerator.native_amp = property(lambda self: self.mixed_precision == 'fp16', lambda *_: None)"
        out = tmp_path / name
        argv = arguments(tiny("2b"), data, out, *options, "--mixed_precision", precision, *more)
        variables = patch_programs(tmp_path, "utils.run.preflight", patch)
        succeed("train_ddp_t2v.sh", *argv, "--batch_size", str(2 // processes), processes=processes, **variables)
        seen = json.loads((out / "checkpoint-4" / PROGRESS_FILE).read_text())["samples_seen"]
        return load_transformer(out / "checkpoint-4" / "transformer").state_dict(), seen // 2 - 4, read_metrics(out)

    base = load_transformer(tiny("2b") / "transformer").state_dict()
    expected, _, expected_lines = train("plain", "no", 1.0)
    change = flatten([expected[name] - base[name] for name in base])
    for folder, processes, more, dtype in (
        ("fused", 1, [], torch.float32),
        ("host", 1, ["--offload_optimizer", "--autocast", "false"], torch.float16),
        ("8bit", 2, ["--quantize_optimizer", "8bit", "--autocast", "false"], torch.float16),
    ):
        actual, skipped, lines = train(folder, "fp16", 2.0**10, processes, *more)
        deviation = flatten([actual[name] - expected[name] for name in base])
        assert {weight.dtype for weight in actual.values()} == {dtype} and skipped == 0
        assert float(deviation.norm() / change.norm()) < 0.05
        for line, expected_line in zip(lines, expected_lines, strict=True):
            assert line["grad_norm"] == pytest.approx(expected_line["grad_norm"], rel=1e-3)
        _, skipped, lines = train(f"{folder}-high", "fp16", 2.0**30, processes, *more)
        assert skipped >= 5 and [line["learning_rate"] for line in lines] == [0.0, 5e-4, 1e-3, 1e-3]


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_optimizer_in_backward_trains_the_same_weights_and_resumes(tiny, data, tmp_path, bits):
    options = ["--training_type", "sft", "--mixed_precision", "bf16", "--quantize_optimizer", bits]
    options += ["--max_grad_norm", 0, "--autocast", "false", "--learning_rate", 1e-3, "--lr_warmup_steps", 0]
    options += ["--resume_from_checkpoint", "latest"]
    in_backward = ["--optimizer_in_backward"]
    # a GPU with 50 GiB, so that the start predicts the memory of the run
    patch = "from utils.estimate.context import Machine; this_machine = lambda: Machine(50.0)"
    gpu = patch_programs(tmp_path, "utils.run.preflight", patch)
    for name, steps, more in (("plain", 4, []), ("resumed", 2, in_backward), ("resumed", 4, in_backward)):
        argv = arguments(tiny("1.5"), data, tmp_path / name, *options, "--train_steps", steps, *more)
        succeed("train_ddp_t2v.sh", *argv, processes=1, **(gpu if steps == 2 else {}))
    expected, actual = (
        load_transformer(tmp_path / name / "checkpoint-4" / "transformer").state_dict() for name in ("plain", "resumed")
    )
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    expected_norms, norms = (
        [line["grad_norm"] for line in read_metrics(tmp_path / name)] for name in ("plain", "resumed")
    )
    assert norms == pytest.approx(expected_norms, rel=0.01)  # one is computed in bf16, the other in float32
    base = load_transformer(tiny("1.5") / "transformer").state_dict()
    assert max((expected[name].float() - base[name].float()).abs().max() for name in base) > 1e-3
