"""Training on a GPU equals training on a CPU: gradients, asynchronous copies, optimizers, whole runs.

Tiny models run through the real code. With --rehearse, the tests run on a CPU, without those that need CUDA.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.nn.attention import SDPBackend, sdpa_kernel

import train
from dataset.latent_cache import LatentCache
from tests.conftest import ROOT, arguments, command, environment, generate, patch_programs, read_metrics
from tests.golden_losses import FOLDER as GOLDEN
from tests.gradients import Model, compute_gradients, flatten, prepare_model
from tests.test_deepspeed import tiny_template
from tests.test_latent_cache import fill, keys_of, scan
from utils.checkpoint.manager import PROGRESS_FILE
from utils.estimate.context import Machine
from utils.memory import activation_offloading, cpu_offload_adam, pinned_memory
from utils.model import encoders
from utils.model.loading import load_transformer
from utils.run import preflight
from utils.training import loss as loss_module
from utils.training import strategy as strategy_module
from utils.training.optimizer import LossScale
from utils.training.trainable import trained_parameters

pytestmark = pytest.mark.gpu
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
needs_cuda = pytest.mark.skipif(not HAS_GPU, reason="needs CUDA")
SELECTIVE, OFFLOAD = ["--gradient_checkpointing", "selective"], ["--offload_activations"]
SFT = ["--training_type", "sft"]
# GPU cycles for which a slow stream waits: about 5 ms. An operation of a tiny model takes microseconds.
SLEEP_CYCLES = 10**7
# Runs that train draw noise from a generator on their device. For comparisons, this code draws it on the CPU.
NOISE_ON_CPU = """
def _sample_one(spec, video, image, generator, *args, sample=_sample_one):
    on_cpu = None if image is None else image.cpu(), torch.Generator().manual_seed(generator.initial_seed())
    inputs = sample(spec, video.cpu(), *on_cpu, *args)
    return StepInputs(*(None if value is None else value.to(video.device) for value in vars(inputs).values()))
"""


def deviation(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Returns the norm of the difference, relative to the norm of the expected tensors."""
    vector, reference = (flatten(tensor.detach().cpu() for tensor in tensors) for tensors in (actual, expected))
    return float((vector - reference).norm() / reference.norm())


def eager_model(model_dir: Path, folder: Path, *options: object, **settings: Any) -> Model:
    return prepare_model(model_dir, folder, "--compile_blocks", "false", *options, **settings)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        *((variant, SFT) for variant in ("2b", "5b", "5b-i2v", "1.5", "1.5-i2v")),
        ("5b", []),
        ("5b-i2v", [*SFT, *OFFLOAD]),
        ("1.5-i2v", [*SELECTIVE, *OFFLOAD]),
        *(("5b", ["--quantize_base", scheme, *SELECTIVE]) for scheme in ("int8", "fp8", "int4")),
    ],
)
def test_gradients_equal_those_of_the_cpu(tiny, tmp_path, monkeypatch, variant, options):
    """In float32; convolutions on a GPU round to TF32."""
    monkeypatch.setattr(activation_offloading, "MIN_OFFLOAD_BYTES", 1)
    expected = compute_gradients(eager_model(tiny(variant), tmp_path, *options), count_attention=False)
    model = eager_model(tiny(variant), tmp_path, *options, device=DEVICE)
    for _ in range(2):  # the second pass reuses buffers of the first
        for parameter in trained_parameters(model.transformer):
            parameter.grad = None
        actual = compute_gradients(model, count_attention=False)
        assert deviation([actual.prediction], [expected.prediction]) < 3e-3
        assert deviation(actual.gradients, expected.gradients) < 5e-3


@pytest.mark.parametrize(
    "kernel",
    ["FLASH_ATTENTION", *(pytest.param(f"{name}_ATTENTION", marks=needs_cuda) for name in ("CUDNN", "EFFICIENT"))],
)
def test_attention_kernels_agree(tiny, tmp_path, kernel):
    """In bfloat16 and under selective checkpointing, which must know the operation of each kernel."""
    options = [*SELECTIVE, "--mixed_precision", "bf16", "--autocast", "false"]
    models = [
        eager_model(tiny("5b"), tmp_path, *options, dtype=torch.bfloat16, device=device) for device in ("cpu", DEVICE)
    ]
    expected = compute_gradients(models[0], torch.bfloat16)
    with sdpa_kernel(getattr(SDPBackend, kernel)):
        actual = compute_gradients(models[1], torch.bfloat16)
    blocks = len(models[1].transformer.transformer_blocks)
    assert actual.attention_calls == blocks  # none is recomputed
    assert deviation([actual.prediction], [expected.prediction]) < 0.03
    assert deviation(actual.gradients, expected.gradients) < 0.1


@needs_cuda
@pytest.mark.parametrize("options", [["--gradient_checkpointing", "none"], [*SELECTIVE, *OFFLOAD]])
def test_compiled_blocks_match(tiny, tmp_path, monkeypatch, options):
    monkeypatch.setattr(activation_offloading, "MIN_OFFLOAD_BYTES", 1)
    expected = compute_gradients(eager_model(tiny("5b"), tmp_path, *options, device=DEVICE), count_attention=False)
    model = eager_model(tiny("5b"), tmp_path, *options, "--compile_blocks", device=DEVICE)
    for _ in range(2):
        for parameter in trained_parameters(model.transformer):
            parameter.grad = None
        actual = compute_gradients(model, count_attention=False)
        assert deviation([actual.prediction], [expected.prediction]) < 3e-3
        assert deviation(actual.gradients, expected.gradients) < 5e-3


def pause() -> None:
    """Delays later operations on the current stream."""
    if HAS_GPU:
        torch.cuda._sleep(SLEEP_CYCLES)


class SlowCopies(pinned_memory.CopyStream):
    """Copies that end late: whoever does not wait reads old values."""

    def copy(self, source, target):
        with torch.cuda.stream(self.stream):
            pause()
        return super().copy(source, target)


class SlowComputation(pinned_memory.CopyStream):
    """Computation that is late: a copy that does not wait for it reads values that are not written yet."""

    def copy(self, source, target):
        pause()
        if source.is_cuda:  # write the source again, after another pause; `data` hides this from autograd
            values = source.data.clone()
            source.data.fill_(torch.nan)
            pause()
            source.data.copy_(values)
        return super().copy(source, target)


@pytest.mark.parametrize("stream", [SlowCopies, SlowComputation])
def test_copies_on_slow_streams(tiny, tmp_path, monkeypatch, stream):
    """Activations and gradients are offloaded, and gradients accumulate."""
    monkeypatch.setattr(activation_offloading, "MIN_OFFLOAD_BYTES", 1)
    expected = compute_gradients(eager_model(tiny("5b-i2v"), tmp_path, *SFT, device=DEVICE), count_attention=False)
    monkeypatch.setattr(activation_offloading, "CopyStream", stream)
    monkeypatch.setattr(cpu_offload_adam, "CopyStream", stream)
    model = eager_model(tiny("5b-i2v"), tmp_path, *SFT, *SELECTIVE, *OFFLOAD, device=DEVICE)
    parameters = trained_parameters(model.transformer)
    before = [parameter.detach().clone() for parameter in parameters]
    settings: dict[str, Any] = {
        "lr": 1.0,
        "eps": 1.0,
    }  # with so large an epsilon, updates depend on the size of a gradient
    optimizer = cpu_offload_adam.CPUOffloadAdam(parameters, **settings, decoupled_weight_decay=True)
    for _ in range(2):
        actual = compute_gradients(model, count_attention=False)
        assert deviation([actual.prediction], [expected.prediction]) < 1e-5
    references = [torch.nn.Parameter(weight.clone()) for weight in before]
    for reference, gradient in zip(references, expected.gradients, strict=True):
        reference.grad = 2 * gradient
    torch.optim.AdamW(references, **settings, weight_decay=0).step()
    optimizer.step()
    changes = [
        [after - weight for after, weight in zip(group, before, strict=True)] for group in (parameters, references)
    ]
    assert deviation(*changes) < 1e-3


def test_entries_with_slow_copies_are_those_of_the_cpu(tiny, data, tmp_path, monkeypatch):
    """Moments are copied to the host while the next clip is encoded, and clips to the GPU meanwhile."""
    scanned = scan(data)
    keys, model = keys_of(scanned), tiny("5b-i2v")
    to_device, to_host = encoders.to_device, encoders.to_host

    def slow_to_device(values, device, stream):
        with torch.cuda.stream(stream):
            pause()
        return to_device(values, device, stream)

    def slow_to_host(moments, stream):
        pause()
        return to_host(moments, stream)

    entries: list[list[torch.Tensor]] = []
    for device in ("cpu", DEVICE):
        cache = LatentCache(tmp_path / device / str(len(entries)))
        load = partial(encoders.pixel_encoders, model, torch.device(device), True, True)
        assert fill(cache, scanned.samples, keys, load) == {}
        entries.append([cache.read(name) for names in keys for name in names.pixels])
        monkeypatch.setattr(encoders, "to_device", slow_to_device)
        monkeypatch.setattr(encoders, "to_host", slow_to_host)
    for expected, actual in zip(*entries, strict=True):
        assert deviation([actual], [expected]) < 5e-3


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory) -> Path:
    """Returns a data folder whose cache the runs of `train_here` share."""
    folder = tmp_path_factory.mktemp("shared") / "data"
    return shutil.copytree(ROOT / "examples" / "dataset", folder, ignore=shutil.ignore_patterns("latent"))


@pytest.fixture
def train_here(tiny, shared_data, tmp_path, monkeypatch):
    """Returns a function that runs train.py in this process, with noise from the CPU, and returns its metrics."""
    namespace = vars(loss_module) | {}
    exec(NOISE_ON_CPU, namespace)
    monkeypatch.setattr(loss_module, "_sample_one", namespace["_sample_one"])
    # the real one starts a program that predicts the memory of the run
    monkeypatch.setattr(preflight, "this_machine", lambda *args, **options: Machine())

    def run(variant: str, name: str, *options: object) -> list[dict]:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        # a compiler would take half a minute per run; `test_compiled_blocks_match` has it
        common = ["--batch_size", 2, "--compile_blocks", "false"]
        argv = arguments(tiny(variant), shared_data, tmp_path / name, *common, *options)
        with patch.object(sys, "argv", ["train.py", *argv]):
            train.main()
        return [line for line in read_metrics(tmp_path / name) if "loss" in line]

    return run


def assert_matches(lines: list[dict], golden: str) -> None:
    """Compares losses and gradient norms with those of two CPU processes in float32 on the same samples."""
    recorded = [line for line in json.loads((GOLDEN / f"{golden}.json").read_text()) if "loss" in line]
    for name, tolerance in (("loss", 2e-3), ("grad_norm", 0.03)):
        expected = [line[name] for line in recorded]
        assert [line[name] for line in lines if name in line] == pytest.approx(expected, rel=tolerance), name


# the options of the golden runs, and those of these runs
LORA_RUN = ["--train_steps", 4, "--id_token", "SKS", "--caption_dropout", 0.5]
SFT_RUN = [*SFT, "--train_steps", 4, "--epsilon", 1e-5]
BF16, FP16 = (["--mixed_precision", precision] for precision in ("bf16", "fp16"))
AUTOCAST, HALF = ["--autocast", "true"], ["--autocast", "false"]


@pytest.mark.parametrize(
    "options",
    [
        ["--offload_text_encoder"],
        [*BF16, *AUTOCAST],
        [*BF16, *HALF, *SELECTIVE, *OFFLOAD],
        [*BF16, "--quantize_base", "int8"],
        [*BF16, "--quantize_base", "fp8"],
        [*BF16, *HALF, "--quantize_base", "int4"],
    ],
)
def test_lora_trains_as_on_a_cpu(train_here, options):
    assert_matches(train_here("5b", "out", *LORA_RUN, *options), "lora-ddp-5b")


OFFLOADED, EIGHT_BIT = ["--offload_optimizer", *HALF], ["--quantize_optimizer", "8bit", *HALF]
IN_BACKWARD = ["--quantize_optimizer", "4bit", "--optimizer_in_backward", "--max_grad_norm", 0, *HALF]


@pytest.mark.parametrize(
    "options",
    [
        [],
        *([*BF16, *options] for options in (AUTOCAST, OFFLOADED, EIGHT_BIT, IN_BACKWARD)),
        *(pytest.param([*FP16, *options], marks=needs_cuda) for options in (AUTOCAST, OFFLOADED, EIGHT_BIT)),
    ],
)
def test_optimizers_train_as_on_a_cpu_and_resume(train_here, tmp_path, monkeypatch, options):
    monkeypatch.setattr(strategy_module, "LossScale", partial(LossScale, init_scale=2.0**10))  # nothing overflows
    run = [*SFT_RUN, "--checkpointing_steps", 2, *options]
    lines = train_here("2b", "one", *run)
    assert_matches(lines, "sft-zero2-2b")
    train_here("2b", "two", *run, "--train_steps", 2)
    resumed = train_here("2b", "two", *run, "--resume_from_checkpoint", "latest")
    assert [line["loss"] for line in resumed] == pytest.approx([line["loss"] for line in lines], rel=1e-3)
    one, two = (load_transformer(tmp_path / name / "checkpoint-4" / "transformer") for name in ("one", "two"))
    assert deviation(list(two.parameters()), list(one.parameters())) < 1e-2


@needs_cuda
@pytest.mark.parametrize("options", [AUTOCAST, OFFLOADED, EIGHT_BIT])
def test_fp16_skips_updates_that_overflow(train_here, tmp_path, monkeypatch, options):
    monkeypatch.setattr(strategy_module, "LossScale", partial(LossScale, init_scale=2.0**30))
    lines = train_here("2b", "out", *SFT_RUN, *FP16, *options)
    progress = json.loads((tmp_path / "out" / "checkpoint-4" / PROGRESS_FILE).read_text())
    assert len(lines) == 4 and progress["samples_seen"] > 2 * 4


def succeed(folder: Path, script: str, *args: str, **variables: object) -> str:
    """Runs a script with noise from the CPU, asserts that it succeeds, and returns its standard output.

    It starts as a program: a process that is forked after the imports may be unable to use the GPU.
    """
    variables |= patch_programs(folder, "utils.training.loss", NOISE_ON_CPU)
    result = subprocess.run(
        command(script, *args), env=environment(1, **variables), cwd="/", text=True, capture_output=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_script_trains_validates_and_generates(tiny, data, validation, tmp_path):
    """The launch script with its real start, prediction included; then the demo."""
    out = tmp_path / "out"
    checks = ["--do_validation", "--validation_dir", validation, "--validation_steps", 3, "--num_inference_steps", 2]
    argv = arguments(tiny("5b"), data, out, *LORA_RUN, "--batch_size", 2, *checks, "--profile", 1)
    printed = succeed(tmp_path, "train_ddp_t2v.sh", *argv)
    lines = read_metrics(out, timings=True)
    assert_matches(lines, "lora-ddp-5b")
    held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    golden = json.loads((GOLDEN / "lora-ddp-5b.json").read_text())
    expected = [line["held_out_loss"] for line in golden if "held_out_loss" in line]
    assert held_out == pytest.approx(expected, rel=2e-3)
    assert len(list(out.glob("validation/*/*.mp4"))) == 6
    kernels = (out / "profile" / "kernels.txt").read_text()
    assert ("aten::" in kernels) != HAS_GPU  # kernels, not operations
    if HAS_GPU:
        assert "GiB (GPU)" in printed and all(line["reserved_gib"] > 0 for line in lines if "loss" in line)
    demo = ["--model_path", tiny("5b"), "--lora_path", out / "checkpoint-4", "--prompt", "a red circle"]
    printed = generate(*demo, "--num_inference_steps", 2, "--output_path", tmp_path / "demo.mp4")
    assert "adapter modules matched" in printed and (tmp_path / "demo.mp4").stat().st_size > 0


@pytest.mark.parametrize("template", ["zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_zero_trains_as_on_a_cpu(tiny, data, tmp_path, template):
    """The first start compiles DeepSpeed's Adam kernels."""
    argv = arguments(tiny("2b"), data, tmp_path / "out", *SFT_RUN, *BF16, "--batch_size", 2)
    succeed(tmp_path, "train_zero_t2v.sh", *argv, ZERO=tiny_template(template, tmp_path))
    assert_matches(read_metrics(tmp_path / "out"), "sft-zero2-2b")
