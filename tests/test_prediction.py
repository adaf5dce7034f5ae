"""Predicted memory and work, compared with real runs and with published figures."""

from __future__ import annotations

import gc
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only
from transformers import T5EncoderModel

from benchmarks import real_size
from benchmarks.real_size import FULL_DEPTH, PREDICTED
from benchmarks.rows import ROWS
from examples.tiny_configs import task_of
from tests.conftest import ROOT, arguments
from tests.warm_start import record_python, run_warm
from utils.commands import estimate_memory
from utils.common.errors import UserError
from utils.common.gpus import peak_tflops
from utils.common.units import GIB
from utils.config.args import parse_args
from utils.estimate import memory_tracker, prediction, simulated_run, start
from utils.estimate.context import RunContext
from utils.memory.quantized_linear import quantize_blocks
from utils.model.encoders import PROMPTS_PER_PASS
from utils.model.loading import load_text_encoder, load_transformer
from utils.model.spec import read_spec
from utils.run.preflight import fill_in_defaults
from utils.training.optimizer import make_optimizer
from utils.training.throughput import model_flop
from utils.training.trainable import make_trainable, trained_parameters


def real_peak(model, context) -> int:
    """Returns the peak in bytes, without weights, that the profiler sees in two real updates."""
    args = context.args
    transformer = load_transformer(model / "transformer", torch.float32)
    make_trainable(transformer, args)
    parameters = trained_parameters(transformer)
    optimizer = make_optimizer(parameters, args, uses_deepspeed=False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        objective, batch = simulated_run.fake_objective(context), simulated_run.empty_batch(context, 1)
        for _ in range(2):
            for _ in range(args.training.gradient_accumulation_steps):
                losses, _ = objective(transformer, batch, [0])
                losses.mean().backward()
                del losses
            optimizer.step()
            optimizer.zero_grad()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


SFT = ["--training_type", "sft"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [[], ["--gradient_checkpointing", "false"], SFT, [*SFT, "--gradient_accumulation_steps", "2"]]
)
@pytest.mark.parametrize("variant", ["5b-i2v", "1.5"])
def test_predicted_peak_matches_a_real_run(tiny, tmp_path, monkeypatch, variant, options):
    monkeypatch.setattr(memory_tracker, "ALLOCATION_UNIT", 1)  # the CPU allocator does not round sizes up
    model = tiny(variant)
    argv = arguments(model, tmp_path, tmp_path, *options, task=task_of(variant))
    spec = read_spec(model)
    context = RunContext(fill_in_defaults(parse_args(argv), spec), spec, {})
    terms = simulated_run.simulate_updates(context).terms
    static = terms["weights"] + terms.get("adapters", 0)
    assert sum(terms.values()) - static == pytest.approx(real_peak(model, context), rel=0.03)


def test_average_of_the_weights_is_in_host_memory(tiny, tmp_path):
    spec, hosts = read_spec(tiny("5b")), []
    updates = None
    for options in ([], ["--ema_decay", "0.9"], ["--ema_decay", "0.9", "--validate_ema"]):
        args = fill_in_defaults(parse_args(arguments(tiny("5b"), tmp_path, tmp_path, *options)), spec)
        context = RunContext(args, spec, {})
        updates = updates or simulated_run.simulate_updates(context)
        hosts.append(prediction.combine(context, updates, prediction.NonTrainingPeaks(0, 0)).host)
    assert updates and hosts == [0, 4 * updates.trained, 8 * updates.trained]


def test_peak_is_known_only_for_the_cards_of_the_table():
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090")
    assert [peak_tflops(name) for name in names] == [989, 312, 165]
    for name in ("NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "T4"):
        assert peak_tflops(name) is None


@pytest.mark.parametrize(("variant", "options"), [("2b", []), ("1.5-i2v", SFT)])
def test_model_flop_matches_the_counter(tiny, tmp_path, variant, options):
    """The counter of torch includes the recomputed scores in the backward pass of attention; `model_flop` does not."""
    flags = ["--gradient_checkpointing", "none", *options]
    argv, spec = arguments(tiny(variant), tmp_path, tmp_path, *flags, task=task_of(variant)), read_spec(tiny(variant))
    context = RunContext(fill_in_defaults(parse_args(argv), spec), spec, {})
    updates = simulated_run.simulate_updates(context)
    scores = 2 * sum(spec.tokens(context.resolution)) ** 2 * spec.width * spec.transformer["num_layers"]
    adapter_weights = 0 if options else updates.trained
    assert model_flop(spec, context.resolution, adapter_weights) == pytest.approx(updates.flop - scores, rel=0.02)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_prediction_does_not_affect_a_later_run(tiny, tmp_path, bits):
    argv = arguments(tiny("5b"), tmp_path, tmp_path, *SFT, "--quantize_optimizer", bits, "--weight_decay", 0)
    spec = read_spec(tiny("5b"))
    args = fill_in_defaults(parse_args(argv), spec)
    context = RunContext(args, spec, {})
    simulated_run.simulate_updates(context)
    transformer = load_transformer(tiny("5b") / "transformer", torch.float32)
    make_trainable(transformer, args)
    before = {name: weight.detach().clone() for name, weight in transformer.named_parameters()}
    optimizer = make_optimizer(trained_parameters(transformer), args, uses_deepspeed=False)
    batch = {name: torch.randn_like(value) for name, value in simulated_run.empty_batch(context, 1).items()}
    losses, _ = simulated_run.fake_objective(context)(transformer, batch, [0])
    losses.mean().backward()
    optimizer.step()
    trained = dict(transformer.named_parameters())
    assert all((trained[name] != before[name])[trained[name].grad != 0].all() for name in before)


@pytest.mark.slow
def test_estimate_memory_needs_no_weights_of_a_published_model():
    command = [sys.executable, "-m", "utils.commands.estimate_memory"]
    command += ["--model_path", "THUDM/CogVideoX-2b", "--mixed_precision", "fp16"]
    output = run_warm(command, os.environ, cwd=str(ROOT), timeout=300).stdout
    peak = re.search(r"GPU memory of an update: ([\d.]+) GiB", output)
    tflop = re.search(r"Work per update: (\d+) TFLOP", output)
    assert peak and float(peak[1]) == pytest.approx(7.2, rel=0.02)
    assert tflop and float(tflop[1]) == pytest.approx(477, rel=0.02)
    traffic = re.search(r"without fused kernels: ([\d.]+) TB \(.*products 0.19 TB", output)
    assert traffic and float(traffic[1]) == pytest.approx(0.63, rel=0.02)
    assert "17550 video and 226 text tokens" in output and "fits cards of 16, 24" in output
    generation = re.search(r"([\d.]+) GiB with --offload none, ([\d.]+) GiB with --offload model", output)
    # half precision: the transformer is in memory in both cases, and the VAE is not beside it in the second
    assert generation and 1.69e9 * 2 / GIB < float(generation[2]) < float(generation[1])


def assert_published_peak(row, updates):
    """With the buffer sizes of DeepSpeed, the peak matches the figure in `rows.py`; the template needs less."""
    config = real_size.context_of(row).zero
    assert config is not None

    def peak() -> float:
        return sum(prediction.zero_terms(updates, config, 2, row.zero[1])[0].values()) / GIB

    assert peak() < row.goal
    section = config["zero_optimization"]
    for key in [key for key in section if "bucket" in key or key.startswith("stage3_")]:
        del section[key]
    assert peak() == pytest.approx(row.goal, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("rows", real_size.groups(ROWS), ids=lambda rows: rows[0].name)
def test_predicted_recipes_match_the_record_and_their_goals(rows):
    updates, record = prediction.extrapolated_updates(real_size.context_of(rows[0])), real_size.read(PREDICTED)
    for row in rows:
        actual, recorded = real_size.predict_row(row, updates), record[row.name]
        assert all(actual[name] == pytest.approx(recorded[name], rel=0.01) for name in ("peak_gib", "start_gib"))
        assert all(actual[name] == recorded[name] for name in ("tflop", "model_tflop", "flags"))
        assert actual["traffic_tb"] == pytest.approx(recorded["traffic_tb"], rel=0.01, abs=0.001)
        if row.goal and row.zero:
            assert_published_peak(row, updates)
        elif row.goal:
            assert actual["peak_gib"] <= row.goal


def test_predictions_match_simulations_of_all_blocks():
    """On record. After a change of memory: python -m benchmarks.real_size --full_depth --again."""
    predicted, full = (real_size.read(file) for file in (PREDICTED, FULL_DEPTH))
    assert full.keys() == predicted.keys() == {row.name for row in ROWS}
    for name, row in full.items():
        for figure, unit in (("peak_gib", 0.01), ("start_gib", 0.01), ("tflop", 1), ("host_gib", 0.1)):
            assert predicted[name][figure] == pytest.approx(row[figure], rel=0.01, abs=unit), (name, figure)
        # docs/memory_and_speed.md names the exception
        assert row["start_gib"] <= row["peak_gib"] or name.endswith("zero2_offload-1"), name


@pytest.mark.parametrize("row", [row for row in ROWS if row.name.endswith(".sh")], ids=lambda row: row.name)
def test_rows_named_after_scripts_have_their_settings(row):
    command = record_python(["bash", str(ROOT / row.name)], os.environ)
    context = real_size.context_of(row)
    config = load_config_from_file(command[command.index("--config_file") + 1])
    template = getattr(config, "deepspeed_config", {}).get("deepspeed_config_file", "")
    assert Path(template).stem == (row.zero[0] if row.zero else "")
    argv = command[command.index(str(ROOT / "train.py")) + 1 :]
    args = fill_in_defaults(parse_args(argv), context.spec, context.uses_deepspeed)
    assert (
        args.model.model_path == f"THUDM/{row.model}" and args.model.training_type == context.args.model.training_type
    )
    assert args.data.train_resolution == context.args.data.train_resolution
    assert (args.memory, args.lora, args.system.enable_tiling) == (
        context.args.memory,
        context.args.lora,
        context.args.system.enable_tiling,
    )
    for name in ("mixed_precision", "batch_size", "gradient_accumulation_steps", "optimizer", "max_grad_norm"):
        assert getattr(args.training, name) == getattr(context.args.training, name)


def test_offloaded_text_encoder_needs_memory_for_two_layers_and_the_prompts_of_a_pass():
    context = estimate_memory.make_context(["--model_path", "THUDM/CogVideoX-5b"], None, 1)
    on_gpu, offloaded = (
        simulated_run.prompt_encoding_peak(context.with_memory(offload_text_encoder=offload))
        for offload in (False, True)
    )
    assert on_gpu == pytest.approx(4.76e9 * 2 + 2**28, rel=0.05)  # encoder of T5-XXL in bf16, and activations
    layer, prompt = 2 * (4 * 4096 * 4096 + 3 * 4096 * 10240), 2 * 226 * 4096
    assert offloaded == pytest.approx(2 * layer + PROMPTS_PER_PASS * prompt, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_predicted_text_encoder_has_the_dtypes_of_the_loaded_one(tiny, tmp_path, dtype):
    model = shutil.copytree(tiny("2b"), tmp_path / "model")
    T5EncoderModel.from_pretrained(model / "text_encoder").to(dtype).save_pretrained(model / "text_encoder")
    context = estimate_memory.make_context(["--model_path", str(model)], None, 1)
    predicted, loaded = simulated_run.empty_text_encoder(context), load_text_encoder(model, torch.device("cpu"))
    actual, expected = (
        {name: weight.dtype for name, weight in encoder.state_dict().items()} for encoder in (predicted, loaded)
    )
    assert actual == expected
    assert set(actual.values()) == ({dtype, torch.float32} if dtype == torch.float16 else {dtype})


def test_text_encoder_in_fp16_needs_more_memory():
    """Only 2b is published in fp16. transformers then keeps an output layer of each block in float32."""
    fp16, bf16 = (
        simulated_run.prompt_encoding_peak(estimate_memory.make_context(["--model_path", name], None, 1))
        for name in ("THUDM/CogVideoX-2b", "THUDM/CogVideoX-5b")
    )
    assert fp16 - bf16 == pytest.approx(24 * 4096 * 10240 * 2, rel=0.1)


def test_zero_terms_are_divided_among_processes():
    phases = {"forward": {"saved activations": 10, "working set": 10}}
    updates = simulated_run.UpdateProfile(phases, weights=1000, trained=1000, flop=0, host=0, traffic={})
    section: dict[str, Any]
    section = {"stage": 3, "reduce_bucket_size": 5, "stage3_max_live_parameters": 50, "stage3_prefetch_bucket_size": 0}
    one, _ = prediction.zero_terms(updates, {"zero_optimization": section}, 2, 1)
    eight, host = prediction.zero_terms(updates, {"zero_optimization": section}, 2, 8)
    assert [one[name] for name in ("weights", "optimizer", "gradients")] == [2000, 12000, 2000]
    assert [eight[name] for name in ("weights", "optimizer", "gradients")] == [250, 1500, 250] and host == 0
    section |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    offloaded, host = prediction.zero_terms(updates, {"zero_optimization": section}, 2, 8)
    assert sum(offloaded.values()) == 10 + 10 + 2 * 2 * 5 + 2 * 50 and host == 18_000 + 2000


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", ["--quantize_base int4", "--training_type sft", "--training_type sft --quantize_optimizer 8bit"]
)
def test_predicted_start_matches_loading_and_resuming(tiny, monkeypatch, flags):
    """Runs the steps of a start on fake tensors. Weights and states come from the host, as from a mapped file."""
    monkeypatch.setattr(memory_tracker, "ALLOCATION_UNIT", 1)
    options = ["--model_path", str(tiny("5b")), "--mixed_precision", "bf16", "--train_resolution", "9x64x64"]
    context = estimate_memory.make_context([*options, *flags.split()], None, 1)
    args, host = context.args, memory_tracker.HOST_PLACEHOLDER
    predicted = start.start_peak(context, simulated_run.simulate_updates(context))
    transformer = simulated_run.empty_transformer(context.with_memory(quantize_base="none"))

    def move(device):
        """Moves the weights one at a time, as Module.to does, which refuses to replace fake tensors."""
        for module in transformer.modules():
            for name, weight in list(module._parameters.items()):
                if weight is not None:
                    moved = torch.empty_like(weight, device=device)
                    module._parameters[name] = torch.nn.Parameter(moved, weight.requires_grad)

    with memory_tracker.simulate() as tracker:
        move(host)
        tracker.watch_peak()
        if args.memory.quantize_base != "none":
            quantize_blocks(transformer, args.memory.quantize_base, "cpu")
        move("cpu")
        parameters = trained_parameters(transformer)
        optimizer = make_optimizer(parameters, args, uses_deepspeed=False)
        peaks = [tracker.peak]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        stored = optimizer.state_dict()
        stored = tree_map_only(torch.Tensor, lambda value: torch.empty_like(value, device=host), stored)
        optimizer.state.clear()
        gc.collect()
        tracker.watch_peak()
        optimizer.load_state_dict(stored)
        peaks.append(tracker.peak)
    assert max(peaks) == pytest.approx(predicted, rel=0.01)


@pytest.mark.parametrize(
    ("flags", "message"),
    [("--num_processes 0", "--num_processes is 0"), ("--num_processes x --zero zero2", "argument --num_processes")],
)
def test_estimate_memory_reports_user_errors(monkeypatch, flags, message):
    monkeypatch.setattr("sys.argv", ["estimate_memory", "--model_path", "THUDM/CogVideoX-5b", *flags.split()])
    with pytest.raises(UserError, match=message):
        estimate_memory.main()


def test_unknown_model_name_is_refused():
    with pytest.raises(UserError, match=r"THUDM/CogVideoX-3b: .* it is none of CogVideoX-2b, CogVideoX-5b"):
        estimate_memory.load_spec("THUDM/CogVideoX-3b")
