"""Search for memory settings that fit a budget, and refusal of runs that do not fit."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import arguments, succeed
from utils.common.errors import UserError
from utils.common.subprocesses import run_in_subprocess
from utils.common.units import GIB
from utils.config.args import Args, parse_args
from utils.estimate import prediction, settings_search, simulated_run
from utils.estimate.context import Machine, RunContext
from utils.estimate.prediction import NonTrainingPeaks, Prediction, extrapolated_updates
from utils.estimate.settings_search import check_fits, fit_to_budget
from utils.estimate.simulated_run import simulate_updates
from utils.memory import activation_offloading, low_bit_adam
from utils.memory.low_bit_states import BLOCK
from utils.model.spec import read_spec
from utils.run.checks import model_errors
from utils.run.preflight import fill_in_defaults


@pytest.fixture
def no_margin(monkeypatch):
    """Removes the safety margin, and lowers the sizes from which tensors are offloaded and chunked."""
    monkeypatch.setattr(low_bit_adam, "CHUNK", 16 * BLOCK)
    monkeypatch.setattr(prediction, "CONTEXT_GIB", 0.0)
    monkeypatch.setattr(prediction, "MARGIN", 1.0)
    monkeypatch.setattr(activation_offloading, "MIN_OFFLOAD_BYTES", 1)


@pytest.fixture
def training_only(monkeypatch):
    """Sets the memory of encoding and validation to zero."""
    monkeypatch.setattr(prediction, "non_training_peaks", lambda _: NonTrainingPeaks(0, 0))
    monkeypatch.setattr(settings_search, "non_training_peaks", lambda _: NonTrainingPeaks(0, 0))


def make_context(model, folder, *options, num_layers=2) -> RunContext:
    spec = read_spec(model)
    args = parse_args(arguments(model, folder, folder, "--mixed_precision", "bf16", *options, task=spec.task))
    return RunContext(fill_in_defaults(args, spec), spec, {}).with_num_layers(num_layers)


UNFUSED = ["--training_type", "sft", "--train_resolution", "9x160x160"]


def needed_gib(context) -> float:
    return sum(extrapolated_updates(context).terms.values()) / GIB


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--gradient_checkpointing", "none"], ["--offload_activations"], UNFUSED])
def test_two_depths_extrapolate_to_the_full_depth(tiny, tmp_path, no_margin, monkeypatch, options):
    if options is UNFUSED:  # temporary copies of all weights; the peak is in the update from 6 blocks on

        def unfused(parameters, args, uses_deepspeed):
            return torch.optim.AdamW(parameters)

        monkeypatch.setattr(simulated_run, "make_optimizer", unfused)
    context = make_context(tiny("5b"), tmp_path, *options, num_layers=12)
    actual, expected = extrapolated_updates(context), simulate_updates(context)
    assert sum(actual.terms.values()) == pytest.approx(sum(expected.terms.values()), rel=0.01)
    assert actual.traffic == expected.traffic
    assert (actual.weights, actual.trained, actual.flop) == (expected.weights, expected.trained, expected.flop)
    assert actual.host == pytest.approx(expected.host, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--training_type", "sft"]])
def test_search_returns_the_fastest_settings_that_fit(tiny, tmp_path, no_margin, training_only, monkeypatch, options):
    """Compares the search with an exhaustive one over all candidates."""
    context = make_context(tiny("5b"), tmp_path, *options, num_layers=4)
    cached = {}

    def cached_updates(candidate):
        if candidate.args.memory not in cached:
            cached[candidate.args.memory] = extrapolated_updates(candidate)
        return cached[candidate.args.memory]

    monkeypatch.setattr(settings_search, "extrapolated_updates", cached_updates)
    tried = []
    for slowdown, activations in settings_search.ACTIVATION_CANDIDATES:
        for more, settings in settings_search.optimizer_candidates(context):
            candidate = context.with_memory(**activations, **settings)
            assert not [*candidate.args.errors(), *model_errors(candidate.args, context.spec, False, 1)]
            gib = sum(cached_updates(candidate).terms.values()) / GIB
            tried.append((slowdown + more, gib, candidate.args.memory))
    assert set(activations | settings) | {"offload_text_encoder"} == set(settings_search.SEARCHED)

    def search(gib, machine=None, fixed=None):
        return settings_search.fastest_that_fits(context, machine or Machine(), gib, fixed or {})

    def fastest(candidates, gib):
        return min((candidate for candidate in candidates if candidate[1] <= gib), key=lambda item: item[0])[2]

    needs = [need for _, need, _ in tried]
    smallest, largest = 1.001 * min(needs), 1.001 * max(needs)
    for gib in (smallest, (smallest + largest) / 2, 1.001 * sorted(needs)[len(needs) // 2], largest):
        assert search(gib).memory == fastest(tried, gib)
    assert search(smallest).memory.offload_activations
    without_host = Machine(host_gib=0)  # nothing can be offloaded
    assert search(largest, without_host).memory == tried[0][2]
    on_gpu = [item for item in tried if not (item[2].offload_activations or item[2].offload_optimizer)]
    gib = 1.001 * min(need for _, need, _ in on_gpu)
    assert search(gib, without_host).memory == fastest(on_gpu, gib)
    if context.args.model.training_type == "sft":
        resumed = search(largest, fixed={"quantize_optimizer": "4bit", "offload_optimizer": False})
        assert resumed.memory.quantize_optimizer == "4bit" and resumed.memory.gradient_checkpointing == "none"
    nothing_fits = search(0.999 * min(needs))
    assert isinstance(nothing_fits, Prediction) and nothing_fits.peak / GIB == pytest.approx(min(needs))


def test_text_encoder_is_offloaded_if_it_alone_does_not_fit(tiny, tmp_path, no_margin, monkeypatch):
    def peaks(context):
        return NonTrainingPeaks(0 if context.args.memory.offload_text_encoder else 10 * GIB, 0)

    monkeypatch.setattr(settings_search, "non_training_peaks", peaks)
    context = make_context(tiny("5b"), tmp_path, "--offload_text_encoder")
    for gib, offloaded in ((9.9, True), (10.1, False)):
        args = settings_search.fastest_that_fits(context, Machine(), gib, {})
        assert isinstance(args, Args) and args.memory.offload_text_encoder == offloaded
        assert f"--offload_text_encoder {str(offloaded).lower()}" in settings_search.flags(args)


@pytest.mark.slow
def test_run_that_does_not_fit_is_refused_with_flags_that_fit(tiny, tmp_path, no_margin, training_only):
    context = make_context(tiny("5b"), tmp_path, "--gradient_checkpointing", "none", "--autocast", "false")
    needed = needed_gib(context)
    with pytest.raises(UserError, match=r"are free\. These flags would fit: .*--quantize_base int8"):
        check_fits(context, Machine(gpu_gib=0.99 * needed))
    with pytest.raises(UserError, match="No settings would fit"):
        check_fits(context, Machine(gpu_gib=0.01 * needed))
    assert check_fits(context, Machine()) == check_fits(context, Machine(gpu_gib=1.01 * needed)) == []
    offloaded = context.with_memory(gradient_checkpointing="full", offload_activations=True)
    assert check_fits(offloaded, Machine(gpu_gib=1.01 * needed)) == []
    (note,) = check_fits(offloaded, Machine(gpu_gib=1.01 * needed, host_gib=0.0))
    assert "GiB of host memory are needed" in note


@pytest.mark.slow
def test_script_applies_a_budget_and_keeps_the_optimizer_of_the_checkpoint(tiny, data, tmp_path):
    argv = arguments(tiny("2b"), data, tmp_path / "run", "--training_type", "sft", "--mixed_precision", "bf16")
    succeed("train_ddp_t2v.sh", *argv, "--quantize_optimizer", "8bit", "--train_steps", "1", processes=1)
    more = ["--train_steps", "2", "--resume_from_checkpoint", "latest", "--vram_budget_gib", "2"]
    output = succeed("train_ddp_t2v.sh", *argv, *more, "--dry_run", processes=1)
    assert "settings that fit 2 GiB: --gradient_checkpointing none" in output
    assert "--quantize_base none --quantize_optimizer 8bit" in output and "checkpoint-1, at step 1" in output


@pytest.mark.slow
def test_refusal_of_a_budget_leaves_the_process_of_the_search(tiny, tmp_path):
    context = make_context(tiny("2b"), tmp_path, "--vram_budget_gib", "auto")
    with pytest.raises(UserError, match="--vram_budget_gib auto needs a GPU"):
        run_in_subprocess(fit_to_budget, context, Machine(), {})
