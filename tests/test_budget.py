"""Settings chosen for the memory that there is, and runs that are stopped because they cannot fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.conftest import arguments, run, succeed
from utils.common.errors import UserError
from utils.config.args import parse_args
from utils.estimate import prediction, settings_search
from utils.estimate.simulated_run import run_updates
from utils.memory import activation_offloading, low_bit_adam
from utils.model.spec import read_spec
from utils.run.checks import model_errors
from utils.run.preflight import preflight, resolve


@pytest.fixture
def exact(monkeypatch):
    """No margin, which would be most of what a tiny model takes; its tensors are worth sending away, and cutting up."""
    monkeypatch.setattr(low_bit_adam, "CHUNK", 16 * low_bit_adam.BLOCK)
    monkeypatch.setattr(prediction, "BESIDE", 0.0)
    monkeypatch.setattr(prediction, "MARGIN", 1.0)
    monkeypatch.setattr(activation_offloading, "MIN_OFFLOAD_BYTES", 1)


def setting(model, folder, *options):
    form = read_spec(model)
    args = parse_args(arguments(model, folder, folder, "--mixed_precision", "bf16", *options, task=form.task))
    return resolve(args, form), form


@pytest.mark.parametrize("options", [[], ["--gradient_checkpointing", "false"], ["--offload_activations"]])
def test_few_blocks_tell_of_many(tiny, tmp_path, exact, options):
    args, form = setting(tiny("5b"), tmp_path, *options)
    form = replace(form, transformer=form.transformer | {"num_layers": 12})
    found = prediction.extrapolated_updates(args, form, False, 1)
    expected = run_updates(args, form, args.data.train_resolution[0], False, 1)
    assert sum(found.terms.values()) == pytest.approx(sum(expected.terms.values()), rel=0.01)
    assert (found.weights, found.trained, found.flop) == (expected.weights, expected.trained, expected.flop)
    assert found.host == pytest.approx(expected.host, rel=0.01)


@pytest.mark.parametrize("options", [[], ["--training_type", "sft"]])
def test_the_fastest_settings_that_fit_are_chosen(tiny, tmp_path, exact, monkeypatch, options):
    args, form = setting(tiny("5b"), tmp_path, *options)
    form = replace(form, transformer=form.transformer | {"num_layers": 4})
    monkeypatch.setattr(settings_search, "non_training_peaks", lambda *_: prediction.NonTrainingPeaks(0, 0))
    known = {}

    def predicted(args, *others):
        if args.memory not in known:
            known[args.memory] = prediction.extrapolated_updates(args, *others)
        return known[args.memory]

    monkeypatch.setattr(settings_search, "extrapolated_updates", predicted)
    tried = []
    for cost, kept in settings_search.ACTIVATIONS:
        for more, held in settings_search.weights_and_states(args, None, 1):
            memory = replace(args.memory, **kept, **held)
            found = replace(args, memory=memory)
            assert not [*found.errors(), *model_errors(found, form, False, 1)]
            updates = predicted(found, form, False, 1)
            tried.append((cost + more, sum(updates.terms.values()) / prediction.GIB, memory))
    assert set(kept | held) | {"offload_text_encoder"} == set(settings_search.CHOSEN)
    needs = [need for _, need, _ in tried]
    for gib in (min(needs), (min(needs) + max(needs)) / 2, sorted(needs)[len(needs) // 2], max(needs)):
        _, _, expected = min((some for some in tried if some[1] <= 1.001 * gib), key=lambda some: some[0])
        found = settings_search.fastest_that_fits(args, form, {}, None, 1, 1.001 * gib, {})
        assert isinstance(found, type(args)) and found.memory == expected
    smallest = settings_search.fastest_that_fits(args, form, {}, None, 1, 1.001 * min(needs), {})
    monkeypatch.setattr(settings_search, "free_host_memory", lambda: 0)  # then nothing can be offloaded
    found = settings_search.fastest_that_fits(args, form, {}, None, 1, 1.001 * max(needs), {})
    assert found.memory == tried[0][2] and smallest.memory.offload_activations
    on_gpu = [some for some in tried if not (some[2].offload_activations or some[2].offload_optimizer)]
    needed = 1.001 * min(need for _, need, _ in on_gpu)
    found = settings_search.fastest_that_fits(args, form, {}, None, 1, needed, {})
    assert found.memory == min((some for some in on_gpu if some[1] <= needed), key=lambda some: some[0])[2]
    if args.model.training_type == "sft":
        dictated = {"quantize_optimizer": "4bit", "offload_optimizer": False}
        found = settings_search.fastest_that_fits(args, form, {}, None, 1, 1.001 * max(needs), dictated)
        assert found.memory.quantize_optimizer == "4bit" and found.memory.gradient_checkpointing == "none"
    none = settings_search.fastest_that_fits(args, form, {}, None, 1, 0.999 * min(needs), {})
    assert isinstance(none, prediction.Prediction) and none.peak / prediction.GIB == pytest.approx(min(needs))


def test_the_text_encoder_gives_way_where_it_alone_is_too_large(tiny, tmp_path, exact, monkeypatch):
    def beside(args, *_):
        return prediction.NonTrainingPeaks(0 if args.memory.offload_text_encoder else 10 * prediction.GIB, 0)

    monkeypatch.setattr(settings_search, "non_training_peaks", beside)
    args, form = setting(tiny("5b"), tmp_path, "--offload_text_encoder")
    for gib, offloaded in ((9.9, True), (10.1, False)):
        found = settings_search.fastest_that_fits(args, form, {}, None, 1, gib, {})
        assert isinstance(found, type(args)) and found.memory.offload_text_encoder == offloaded
        assert f"--offload_text_encoder {str(offloaded).lower()}" in settings_search.flags(found)


def test_a_run_that_cannot_fit_is_stopped_with_what_would(tiny, data, tmp_path, exact, monkeypatch):
    monkeypatch.setattr(settings_search, "non_training_peaks", lambda *_: prediction.NonTrainingPeaks(0, 0))
    plain = ("--gradient_checkpointing", "false", "--autocast", "false")
    args, form = setting(tiny("5b"), tmp_path, *plain)
    needed = sum(prediction.extrapolated_updates(args, form, False, 1).terms.values()) / prediction.GIB
    argv = arguments(tiny("5b"), data, tmp_path / "run", "--mixed_precision", "bf16", *plain)

    def preflight_with(free):
        monkeypatch.setattr(settings_search, "free_gpu_memory", lambda: free)
        return preflight(parse_args(argv), 1)

    with pytest.raises(UserError, match=r"are free\. These flags would fit: .*--quantize_base int8"):
        preflight_with(0.99 * needed)
    with pytest.raises(UserError, match="No settings would fit"):
        preflight_with(0.01 * needed)
    assert not [note for note in preflight_with(1.01 * needed).notes if "GiB" in note]
    argv += ["--gradient_checkpointing", "true", "--offload_activations"]
    assert not [note for note in preflight_with(1.01 * needed).notes if "GiB" in note]
    monkeypatch.setattr(settings_search, "free_host_memory", lambda: 0.0)
    assert [note for note in preflight_with(1.01 * needed).notes if "GiB of host memory are needed" in note]


def test_a_budget_goes_on_with_the_optimizer_of_the_checkpoint(tiny, data, tmp_path):
    argv = arguments(tiny("2b"), data, tmp_path / "run", "--training_type", "sft", "--mixed_precision", "bf16")
    succeed("train_ddp_t2v.sh", *argv, "--quantize_optimizer", "8bit", "--train_steps", "1", processes=1)
    more = ["--train_steps", "2", "--resume_from_checkpoint", "latest", "--vram_budget_gib", "2"]
    printed = succeed("train_ddp_t2v.sh", *argv, *more, "--dry_run", processes=1)
    assert "--quantize_base none --quantize_optimizer 8bit" in printed and "checkpoint-1, at step 1" in printed


def test_a_budget_is_kept_or_refused_by_the_script(tiny, data, tmp_path):
    argv = arguments(tiny("2b"), data, tmp_path / "run", "--dry_run", "--vram_budget_gib")
    done = run("train_ddp_t2v.sh", *argv, "2", processes=1)
    assert done.returncode == 0, done.stderr
    assert "settings that fit 2 GiB: --gradient_checkpointing none" in done.stdout
    done = run("train_ddp_t2v.sh", *argv, "auto", processes=1)
    assert done.returncode == 2 and "--vram_budget_gib auto needs a GPU" in done.stderr
