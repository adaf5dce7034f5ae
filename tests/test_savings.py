"""Every way to save memory or work leaves the mathematics as it is: against the plain run, gradient by gradient."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import arguments, patch_programs, read_metrics, succeed
from utils.checkpoint.lora_files import WEIGHTS_FILE
from utils.checkpoint.manager import PROGRESS_FILE
from utils.config.args import parse_args
from utils.estimate import simulated_run
from utils.estimate.context import RunContext
from utils.memory import (
    activation_checkpointing,
    activation_offloading,
    cpu_offload_adam,
    low_bit_adam,
    pinned_memory,
    quantized_linear,
)
from utils.memory.low_bit_adam import LowBitAdam
from utils.model.conditioning import predict_velocity
from utils.model.loading import load_transformer
from utils.model.spec import read_spec
from utils.run.preflight import resolve
from utils.training.loss import sample_inputs
from utils.training.trainable import make_trainable, trained_parameters, use_attention_kernel, uses_autocast

FORMS = ("2b", "5b-i2v", "1.5-i2v")
ATTENTION_ON_CPU = "aten::_scaled_dot_product_flash_attention_for_cpu"


class CountAttention(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func in activation_checkpointing.ATTENTION
        return func(*args, **kwargs or {})


def prepared(model, tmp_path, *options, dtype=torch.float32):
    form = read_spec(model)
    args = resolve(parse_args(arguments(model, tmp_path, tmp_path, *options, task=form.task)), form)
    transformer = load_transformer(model / "transformer", dtype)
    make_trainable(transformer, args)
    torch.manual_seed(1)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide half of the gradients
            parameter.data.normal_(std=0.02)
    return transformer, RunContext(args, form, {})


def gradients(transformer, context, dtype=torch.float32, watch=None):
    """Prediction and gradients of a batch of two, and how often attention was computed, by `watch`."""
    torch.manual_seed(2)
    batch = {name: torch.randn(value.shape) for name, value in simulated_run.empty_batch(context, 2).items()}
    inputs = sample_inputs(context.spec, batch["video"], batch.get("image"), [3, 4], 1000)
    latents = inputs.latents
    with watch or CountAttention() as attention:
        enabled = dtype != torch.float32 and uses_autocast(context.args, False)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            timesteps = torch.tensor([700, 20])
            predicted = predict_velocity(
                transformer, context.spec, latents, timesteps, batch["prompt"].to(dtype), inputs.image_latents, dtype
            ).float()
        (predicted - latents.flip(0)).square().mean().backward()
    return predicted.detach(), [parameter.grad for parameter in trained_parameters(transformer)], attention.calls


@pytest.mark.parametrize("training_type", ["lora", "sft"])
@pytest.mark.parametrize("form", FORMS)
def test_what_blocks_keep_and_where_changes_no_bit(tiny, tmp_path, monkeypatch, form, training_type):
    monkeypatch.setattr(activation_offloading, "MIN_OFFLOAD_BYTES", 1)
    plain = prepared(tiny(form), tmp_path, "--training_type", training_type)
    predicted, expected, calls = gradients(*plain)
    assert calls == 2 * len(plain[0].transformer_blocks)
    selective = ["--gradient_checkpointing", "selective"]
    both = [*selective, "--offload_activations"]
    for options in (selective, ["--offload_activations"], [*both, "--autocast", "false"]):
        tried = prepared(tiny(form), tmp_path, "--training_type", training_type, *options)
        for _ in range(2):  # the second finds what the first has left
            for parameter in trained_parameters(tried[0]):
                parameter.grad = None
            again, found, calls = gradients(*tried)
            assert torch.equal(again, predicted) and all(map(torch.equal, found, expected)), options
        assert calls == (1 if "selective" in options else 2) * len(plain[0].transformer_blocks)


class Late(pinned_memory.CopyStream):
    """Copies as late as a GPU may: not before they are waited for. Until then a target holds no numbers."""

    def __init__(self):
        self.under_way = []

    def copy(self, source, target):
        self.under_way.append((source, target.fill_(torch.nan)))
        return self.under_way[-1]

    def wait(self, copied):
        while any(copied is one for one in self.under_way):
            source, target = self.under_way.pop(0)
            target.copy_(source)

    def synchronize(self):
        while self.under_way:
            self.wait(self.under_way[-1])


def test_what_is_copied_beside_the_computation_is_waited_for(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(activation_offloading, "MIN_OFFLOAD_BYTES", 1)
    monkeypatch.setattr(activation_offloading, "CopyStream", Late)
    monkeypatch.setattr(cpu_offload_adam, "CopyStream", Late)
    options = ["--training_type", "sft"]
    predicted, expected, _ = gradients(*prepared(tiny("5b-i2v"), tmp_path, *options))
    parked = prepared(
        tiny("5b-i2v"), tmp_path, *options, "--gradient_checkpointing", "selective", "--offload_activations"
    )
    optimizer = cpu_offload_adam.CPUOffloadAdam(trained_parameters(parked[0]), lr=1e-3, decoupled_weight_decay=True)
    for passes in (1, 2):  # several add up
        again, gone, _ = gradients(*parked)
        assert torch.equal(again, predicted) and gone == [None] * len(expected)
        for master, gradient in zip(optimizer.masters, expected, strict=True):
            assert torch.equal(master.grad, passes * gradient)


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
    assert any(isinstance(layer, quantized_linear.QuantizedLinear) for layer in layers.values())
    for name, layer in plain[0].named_modules():
        if isinstance(layers[name], quantized_linear.QuantizedLinear):
            codes = layers[name]
            layer.weight.data = quantized_linear.decode(codes.codes, codes.scale, codes.offset, torch.float32)
            layer.weight.grad = None
    for parameter in trained_parameters(plain[0]):
        parameter.grad = None
    predicted, expected, _ = gradients(*plain)
    torch.testing.assert_close([found_prediction, *found], [predicted, *expected], rtol=1e-4, atol=1e-6)


def test_a_quantized_base_trains_on_two_processes_as_on_one(tiny, data, tmp_path):
    adapters = []
    for processes in (1, 2):  # fp8: what moves between processes knows no such type
        out = tmp_path / str(processes)
        options = ["--quantize_base", "fp8", "--train_steps", 2, "--batch_size", 2 // processes]
        succeed("train_ddp_t2v.sh", *arguments(tiny("2b"), data, out, *options), processes=processes)
        adapters.append(load_file(out / "checkpoint-2" / WEIGHTS_FILE))
    torch.testing.assert_close(adapters[1], adapters[0], rtol=0, atol=1e-6)
    assert any(tensor.any() for name, tensor in adapters[0].items() if "lora_B" in name)


def test_page_locked_memory_is_cut_without_gaps(monkeypatch):
    monkeypatch.setattr(pinned_memory, "CHUNK_BYTES", 4096)
    memory, flat = pinned_memory.PinnedArena(), []
    for count, dtype in ((100, torch.float32), (700, torch.bfloat16), (900, torch.int8), (3000, torch.int32)):
        flat.append(memory.allocate(count, dtype).fill_(len(flat)))
        assert flat[-1].shape == (count,) and flat[-1].dtype == dtype
    assert all((values == index).all() for index, values in enumerate(flat))
    pieces = [values.untyped_storage().data_ptr() for values in flat]
    assert pieces[0] == pieces[1] == pieces[2] != pieces[3] and flat[2].storage_offset() == 512 + 1536


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


def flat(gradients):
    return torch.cat([gradient.float().flatten() for gradient in gradients])


def test_without_autocast_bf16_is_no_further_from_float32(tiny, tmp_path):
    exact = prepared(tiny("1.5-i2v"), tmp_path)
    for parameter in exact[0].parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16().float()
    expected = flat(gradients(*exact)[1])
    errors = []
    for autocast in ("true", "false"):
        options = ["--autocast", autocast, "--mixed_precision", "bf16"]
        tried = prepared(tiny("1.5-i2v"), tmp_path, *options, dtype=torch.bfloat16)
        found = flat(gradients(*tried, torch.bfloat16)[1])
        errors.append(float((found - expected).norm() / expected.norm()))
    assert errors[1] < 1.1 * errors[0] and errors[0] < 0.02


def test_kernels_compute_the_same(tiny, tmp_path):
    plain = prepared(tiny("5b"), tmp_path)
    predicted, expected, calls = gradients(*plain)
    try:
        use_attention_kernel("math")
        *found, none = gradients(*prepared(tiny("5b"), tmp_path))
    finally:
        for kernel in ("flash", "cudnn", "mem_efficient", "math"):
            getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(True)
    assert calls and not none
    torch.testing.assert_close(found, [predicted, expected], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("form", "options", "attention", "sent"),
    [
        ("2b", ["--gradient_checkpointing", "false", "--training_type", "sft"], 1, 0),
        ("5b", [], 2, 0),
        # of each block three inputs, and of attention the output and the logarithms of its sums: no weights, no codes
        (
            "1.5-i2v",
            ["--gradient_checkpointing", "selective", "--offload_activations", "--quantize_base", "int8"],
            1,
            5,
        ),
    ],
)
def test_compiled_blocks_compute_and_keep_the_same(tiny, tmp_path, monkeypatch, form, options, attention, sent):
    monkeypatch.setattr(activation_offloading, "MIN_OFFLOAD_BYTES", 1)
    monkeypatch.setattr(activation_offloading, "MAX_PENDING_OFFLOADS", 0)  # all go, and come back once
    predicted, expected, _ = gradients(*prepared(tiny(form), tmp_path, *options))
    compiled = prepared(tiny(form), tmp_path, *options, "--compile_blocks")
    torch._dynamo.utils.counters.clear()
    *found, _ = gradients(*compiled, watch=nullcontext(CountAttention))  # within a mode nothing is compiled
    torch.testing.assert_close(found, [predicted, expected], rtol=1e-4, atol=1e-6)
    # the first block of adapters has an input without gradient, all others share a graph
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2

    copies = []
    copy = pinned_memory.CopyStream.copy
    monkeypatch.setattr(pinned_memory.CopyStream, "copy", lambda *args: copies.append(args) or copy(*args))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        gradients(*compiled, watch=nullcontext(CountAttention))
    calls = [event for event in profiler.events() if event.name == ATTENTION_ON_CPU]
    blocks = len(compiled[0].transformer_blocks)
    assert len(calls) == attention * blocks and len(copies) == 2 * sent * blocks


# How far the weights may go astray, as a share of their way in float32.
@pytest.mark.parametrize(("bits", "smallest", "tolerance"), [(8, 2**20, 1e-5), (8, 1, 0.06), (4, 1, 0.2)])
def test_adam_in_few_bits_is_adam(monkeypatch, bits, smallest, tolerance):
    monkeypatch.setattr(low_bit_adam, "MIN_QUANTIZED_SIZE", smallest)
    torch.manual_seed(0)
    before = torch.randn(64, 256)
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 1e-2}
    ours, theirs = (torch.nn.Parameter(before.clone()) for _ in range(2))
    optimizers = [
        torch.optim.AdamW([theirs], **settings),
        LowBitAdam([ours], **settings, mean_bits=bits, decoupled_weight_decay=True, seed=0, in_backward=False),
    ]
    for _ in range(100):
        noise = torch.randn_like(before) * torch.logspace(-3, 0, 256)  # of small and large gradients in a block
        for parameter, optimizer in zip((theirs, ours), optimizers, strict=True):
            parameter.grad = noise + 0.3 * parameter.detach()
            optimizer.step()
    assert float((ours - theirs).detach().norm() / (theirs.detach() - before).norm()) < tolerance
    held = sum(slot.nbytes for slot in optimizers[1].state[ours].values() if isinstance(slot, torch.Tensor))
    assert held == before.numel() * (8 if smallest > 1 else (bits + 8) / 8 + 2 * 4 / low_bit_adam.BLOCK)


def test_rounding_at_random_is_exact_on_average():
    third = torch.full((2**20,), 1 + 2**-7 / 3)  # between two neighbours in bfloat16
    for dtype, factor in ((torch.bfloat16, 1.0), (torch.float16, 2.0**-3), (torch.float16, 2.0**-17)):
        # of fp16 the last has fewer digits: its smallest step is 2^-24
        values = factor * torch.cat([third, -third])
        rounded = low_bit_adam.stochastic_round(values, dtype, torch.Generator().manual_seed(0)).float() / factor
        if factor != 2.0**-3:
            assert rounded.abs().unique().tolist() == [1, 1 + 2**-7]
        for half, value in zip(rounded.chunk(2), (third[0], -third[0]), strict=True):
            assert float(half.mean()) == pytest.approx(float(value), abs=2e-5)
    extremes = torch.tensor([0.0, 2.0**-24, 2.0**-14, 65504.0, -65504.0])
    assert torch.equal(low_bit_adam.stochastic_round(extremes, torch.float16, torch.Generator()).float(), extremes)
    values = torch.rand(2**20) - 0.5
    values[:: low_bit_adam.BLOCK] = 1  # one scale for all
    code = low_bit_adam.make_codebook(4, True, torch.device("cpu"))
    coded = low_bit_adam.decode(*low_bit_adam.encode(values, code, torch.Generator().manual_seed(0)), code)
    assert len(coded.unique()) <= 16
    assert float((coded - values).abs().max()) < 0.225  # the widest step
    assert float((coded - values).mean()) == pytest.approx(0, abs=2e-4)


def test_optimizers_of_half_precision_know_fp16(tiny, data, tmp_path):
    """This CPU computes fp16, if slowly. An update that overflows is given up, and does not count."""
    options = ["--training_type", "sft", "--train_steps", 4, "--lr_warmup_steps", 2, "--max_grad_norm", 0.5]

    def train(name, precision, scale, processes=1, *more):
        patch = "import functools, utils.training.optimizer as o; machine_errors = lambda *_: []; "
        patch += f"o.LossScale = functools.partial(o.LossScale, init_scale={scale})"
        out = tmp_path / name
        argv = arguments(tiny("2b"), data, out, *options, "--mixed_precision", precision, *more)
        settings = patch_programs(tmp_path, "utils.run.preflight", patch)
        succeed("train_ddp_t2v.sh", *argv, "--batch_size", str(2 // processes), processes=processes, **settings)
        seen = json.loads((out / "checkpoint-4" / PROGRESS_FILE).read_text())["samples_seen"]
        return load_transformer(out / "checkpoint-4" / "transformer").state_dict(), seen // 2 - 4, read_metrics(out)

    base = load_transformer(tiny("2b") / "transformer").state_dict()
    expected, _, lines = train("plain", "no", 1.0)
    way = flat([expected[name] - base[name] for name in base])
    for name, processes, optimizer in (("host", 1, ["--offload_optimizer"]), ("8bit", 2, ["--quantize_optimizer"])):
        more = [*optimizer, *(["8bit"] if name == "8bit" else []), "--autocast", "false"]
        found, skipped, found_lines = train(name, "fp16", 2.0**10, processes, *more)
        astray = flat([found[name] - expected[name] for name in base])
        assert {weight.dtype for weight in found.values()} == {torch.float16} and skipped == 0
        assert float(astray.norm() / way.norm()) < 0.05
        for line, expected_line in zip(found_lines, lines, strict=True):
            assert line["grad_norm"] == pytest.approx(expected_line["grad_norm"], rel=1e-3)
        _, skipped, found_lines = train(f"{name}-high", "fp16", 2.0**30, processes, *more)
        assert skipped >= 5 and [line["learning_rate"] for line in found_lines] == [0.0, 5e-4, 1e-3, 1e-3]


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_released_gradients_train_the_same_weights_and_resume(tiny, data, tmp_path, bits):
    options = ["--training_type", "sft", "--mixed_precision", "bf16", "--quantize_optimizer", bits]
    options += ["--max_grad_norm", 0]
    options += ["--autocast", "false", "--learning_rate", 1e-3, "--lr_warmup_steps", 0]
    options += ["--resume_from_checkpoint", "latest"]
    runs = [("whole", 4, []), ("halves", 2, ["--optimizer_in_backward"]), ("halves", 4, ["--optimizer_in_backward"])]
    as_on_a_gpu = patch_programs(
        tmp_path, "utils.estimate.context", "this_machine = lambda try_compiler: Machine(50.0)"
    )  # each start predicts
    for name, steps, more in runs:
        argv = arguments(tiny("1.5"), data, tmp_path / name, *options, "--train_steps", steps, *more)
        succeed("train_ddp_t2v.sh", *argv, processes=1, **(as_on_a_gpu if name == "halves" else {}))
    weights = [
        load_transformer(tmp_path / name / "checkpoint-4/transformer").state_dict() for name in ("whole", "halves")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    norms = [[line["grad_norm"] for line in read_metrics(tmp_path / name)] for name in ("whole", "halves")]
    assert norms[1] == pytest.approx(norms[0], rel=0.01)  # the one in bf16, the other in float32
    base = load_transformer(tiny("1.5") / "transformer").state_dict()
    assert max((weights[0][name].float() - base[name].float()).abs().max() for name in base) > 1e-3
