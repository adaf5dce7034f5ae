"""Full fine-tuning under DeepSpeed with two CPU processes, from the launch script to the video of the demo."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

from examples.tiny_configs import VARIANTS, task_of
from tests.conftest import (
    FIRST_FRAME,
    ROOT,
    arguments,
    command,
    environment,
    generate,
    patch_programs,
    read_metrics,
    run,
    succeed,
)
from tests.golden_losses import compare_with_golden
from tests.tiny_models import build
from tests.warm_start import run_warm, start_warm
from tests.zero_start import PROCESSES
from utils.checkpoint.finetuned import find_transformer
from utils.checkpoint.lora_reader import WEIGHTS_FILE
from utils.checkpoint.manager import PROGRESS_FILE
from utils.checkpoint.stored_weights import read_merged
from utils.commands import export
from utils.common.errors import UserError


def sft(model: Path, data: Path, output: Path, *more: object, variant: str) -> list[str]:
    """Returns the flags of four float32 updates of all weights, with a checkpoint after each.

    The bias of the keys of 2b does not affect the output, so its gradient is rounding noise. With a larger epsilon,
    Adam does not turn that noise into full steps.
    """
    steps = ["--training_type", "sft", "--train_steps", 4, "--checkpointing_steps", 1, "--epsilon", 1e-5]
    return arguments(model, data, output, *steps, *more, task=task_of(variant))


@pytest.fixture(scope="session")
def single_process(tiny, tmp_path_factory):
    """Returns a function: variant -> weights trained by one process without DeepSpeed, on the samples of two."""
    folder = tmp_path_factory.mktemp("single")
    data = shutil.copytree(ROOT / "examples" / "dataset", folder / "data", ignore=shutil.ignore_patterns("latent"))

    def train(variant: str) -> dict[str, torch.Tensor]:
        out = folder / variant
        if not out.exists():
            options = sft(tiny(variant), data, out, "--gradient_accumulation_steps", 2, variant=variant)
            succeed(f"train_ddp_{task_of(variant)}.sh", *options, processes=1)
        return load_file(out / "checkpoint-4" / "transformer" / "diffusion_pytorch_model.safetensors")

    return train


def kill_rank_during_save(script: str, options: list[str], out: Path, step: int, **variables: object) -> int | None:
    """Starts a run, kills rank 1 while checkpoint-`step` is being written, and returns the exit code."""
    process = start_warm(command(script, *options), environment(2, **variables), "/", os.devnull, os.devnull)

    def wait_for(path: Path) -> None:
        while not path.exists() and process.exitcode is None:
            time.sleep(0.001)

    # Find the process first: listing all processes takes longer than the save of a tiny model.
    wait_for(out / "checkpoint-1")
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    wait_for(out / f".checkpoint-{step}.tmp")
    max(ranks, key=lambda rank: rank.pid).kill()
    process.join(120)
    return process.exitcode


def tiny_template(template: str, folder: Path) -> Path:
    """Writes a shipped template with bucket sizes at which DeepSpeed partitions and prefetches a tiny model.

    With the shipped sizes, a tiny model fits one bucket and ZeRO-3 never partitions it.
    """
    sizes = {"reduce_bucket_size": 20_000, "sub_group_size": 5_000}
    sizes |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 3_000}
    sizes |= {"stage3_max_live_parameters": 30_000, "stage3_max_reuse_distance": 30_000}
    config = json.loads((ROOT / "configs" / f"{template}.json").read_text())
    config["zero_optimization"] |= sizes
    (folder / f"{template}.json").write_text(json.dumps(config))
    return folder / f"{template}.json"


@pytest.mark.slow
def test_zero3_start_needs_the_predicted_memory(tmp_path):
    """The GPU never holds the whole transformer.

    The prediction includes Adam's states of a resumed run, 8 bytes per weight. Before they are there, DeepSpeed gathers
    the largest matrix.
    """
    model, template = tmp_path / "model", tiny_template("zero3", tmp_path)
    config = json.loads(template.read_text())
    config["zero_optimization"] |= {"reduce_bucket_size": 100_000, "sub_group_size": 10**9}
    template.write_text(json.dumps(config))
    argv = [sys.executable, "-m", "tests.zero_start", str(build("5b", model, layers=4)), str(template)]
    start = json.loads(run_warm(argv, environment(None), cwd=str(ROOT), timeout=120).stdout.splitlines()[-1])
    expected = start["predicted"] - 8 * start["weights"] / PROCESSES + 2 * start["largest"]
    assert start["measured"] == pytest.approx(expected, rel=0.01)
    assert start["measured"] < 2 * start["weights"]  # the transformer in bf16


@pytest.mark.slow
@pytest.mark.golden
@pytest.mark.parametrize("variant", VARIANTS)
def test_zero2_losses_match_golden(tiny, data, tmp_path, pytestconfig, variant):
    options = ["--training_type", "sft", "--train_steps", 4, "--epsilon", 1e-5]
    argv = arguments(tiny(variant), data, tmp_path / "out", *options, task=task_of(variant))
    template = tiny_template("zero2", tmp_path)
    succeed(f"train_zero_{task_of(variant)}.sh", *argv, processes=2, ZERO=template)
    compare_with_golden(f"sft-zero2-{variant}", tmp_path / "out", pytestconfig)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "variant"),
    [("zero2", "5b"), ("zero2_offload", "5b-i2v"), ("zero3", "1.5-i2v"), ("zero3_offload", "2b")],
)
def test_train_kill_resume_merge_generate(tiny, data, tmp_path, monkeypatch, single_process, template, variant):
    script, out = f"train_zero_{task_of(variant)}.sh", tmp_path / "out"
    options = sft(tiny(variant), data, out, "--checkpointing_limit", 3, variant=variant)
    template = tiny_template(template, tmp_path)
    assert kill_rank_during_save(script, options, out, 3, ZERO=template) == 128 + 9
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    printed = succeed(script, *options, processes=2, ZERO=template)
    assert f"Resuming from {out / 'checkpoint-2'}" in printed
    assert not list(out.glob(".checkpoint-*")) and len(list(out.glob("checkpoint-*"))) == 3
    assert [line["step"] for line in read_metrics(out)] == [1, 2, 3, 4]

    # DeepSpeed's own merge script in the checkpoint, with shards in safetensors or .bin files
    last, merged = out / "checkpoint-4", tmp_path / "merged"
    kind = ["--safe_serialization"] if "offload" in template.name else []
    merge = [sys.executable, "zero_to_fp32.py", ".", str(merged), "--max_shard_size", "200KB", *kind]
    assert run_warm(merge, environment(None), cwd=str(last), timeout=120).returncode == 0
    assert len(list(merged.glob("*.index.json"))) == 1
    ours = {name: stored.read() for name, stored in read_merged(merged).items()}
    theirs = CogVideoXTransformer3DModel.from_pretrained(last / "transformer", dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    base = load_file(tiny(variant) / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, expected in single_process(variant).items():
        # the order of summation differs; the weights have changed by 3e-3
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=2e-6, msg=name)
    assert (ours["proj_out.weight"] - base["proj_out.weight"]).abs().max() > 1e-3

    image = ["--image_or_video_path", str(FIRST_FRAME)] if task_of(variant) == "i2v" else []
    demo = ["--model_path", str(tiny(variant)), "--prompt", "a square", "--num_inference_steps", "2", *image]
    generate(*demo, "--transformer_path", str(merged), "--output_path", str(tmp_path / "demo.mp4"))

    raw = out / "checkpoint-2"
    with pytest.raises(UserError, match=f"python {raw}/zero_to_fp32.py {raw} {raw}/merged"):
        find_transformer(raw)
    with pytest.raises(UserError, match="has not been merged"):
        find_transformer(raw / "pytorch_model")
    monkeypatch.setattr(sys, "argv", ["export", "--checkpoint", str(raw)])
    export.main()
    half = load_file(find_transformer(raw) / "diffusion_pytorch_model.safetensors")
    assert half.keys() == base.keys() and {weight.dtype for weight in half.values()} == {torch.bfloat16}


@pytest.mark.slow
def test_bf16_resumes_bit_exact_and_with_offload_switched_on(tiny, data, tmp_path):
    """bf16 and accumulation. The second half runs in a new process, with and without offload."""
    options = ["--mixed_precision", "bf16", "--gradient_accumulation_steps", 2, "--export_dtype", "fp32"]

    def train(out: Path, template: str, *more: object) -> dict[str, torch.Tensor]:
        args = sft(tiny("5b"), data, out, *options, *more, variant="5b")
        succeed("train_zero_t2v.sh", *args, processes=2, ZERO=template)
        return load_file(max(out.glob("checkpoint-*/transformer/*.safetensors"), key=os.path.getmtime))

    uninterrupted = train(tmp_path / "uninterrupted", "zero3")
    half = train(tmp_path / "resumed", "zero3", "--train_steps", 2)
    shutil.copytree(tmp_path / "resumed", tmp_path / "switched")
    resumed, switched = train(tmp_path / "resumed", "zero3"), train(tmp_path / "switched", "zero3_offload")
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)
    assert read_metrics(tmp_path / "uninterrupted") == read_metrics(tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4" / "transformer")  # as if killed between checkpoint and export
    again = train(tmp_path / "resumed", "zero3")
    assert all(torch.equal(uninterrupted[name], again[name]) for name in uninterrupted)
    # offload uses another implementation of Adam; the last two updates change weights by 1e-3 each
    assert all(torch.allclose(uninterrupted[name], switched[name], rtol=0, atol=2e-5) for name in uninterrupted)
    assert not torch.allclose(uninterrupted["proj_out.weight"], half["proj_out.weight"], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_lora_and_validation_under_zero3_match_ddp(tiny, data, validation, tmp_path):
    """Three prompts on two processes, so that one rank processes a padding item. The runs start from a LoRA."""
    for name in ("prompts.txt", "videos.txt"):
        lines = (validation / name).read_text().splitlines()
        (validation / name).write_text("\n".join([*lines, lines[0]]) + "\n")
    checks = ["--do_validation", "--validation_dir", validation, "--validation_steps", 2, "--num_inference_steps", 2]

    layers = [f"transformer_blocks.{n}.attn1.{name}" for n in (0, 1) for name in ("to_q", "to_k", "to_v", "to_out.0")]
    sides = {"A": (8, 64), "B": (64, 8)}
    start = {f"transformer.{x}.lora_{side}.weight": torch.randn(shape) for x in layers for side, shape in sides.items()}
    save_file(start, tmp_path / "start.safetensors")
    checks += ["--init_lora", tmp_path / "start.safetensors"]

    def train(out: Path, script: str, steps: int, **settings: object) -> None:
        options = ["--training_type", "lora", "--train_steps", steps, "--checkpointing_steps", 2, *checks]
        succeed(script, *arguments(tiny("5b-i2v"), data, out, *options, task="i2v"), processes=2, **settings)

    ddp, zero = tmp_path / "ddp", tmp_path / "zero"
    train(ddp, "train_ddp_i2v.sh", 4)
    for steps in (2, 4):
        train(zero, "train_zero_i2v.sh", steps, ZERO=tiny_template("zero3_offload", tmp_path))
        (tmp_path / "start.safetensors").unlink(missing_ok=True)  # resuming needs no LoRA
    ours, theirs = (load_file(out / "checkpoint-4" / WEIGHTS_FILE) for out in (zero, ddp))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-6) for name in ours)
    assert all(torch.allclose(ours[name], start[name], rtol=0, atol=5e-3) for name in ours)  # updates of at most 1e-3
    videos = [sorted(str(path.relative_to(out)) for path in out.glob("validation/*/*.mp4")) for out in (zero, ddp)]
    assert videos[0] == videos[1] and len(videos[0]) == 9
    for our_line, their_line in zip(read_metrics(zero), read_metrics(ddp), strict=True):
        assert our_line == pytest.approx(their_line, rel=1e-4)


@pytest.mark.slow
def test_fp16_overflow_skips_the_update_without_counting_it(tiny, data, tmp_path):
    """DeepSpeed refuses fp16 on CPUs without fp16 instructions, but PyTorch can compute it."""
    allowed = "CPU_Accelerator.is_fp16_supported = lambda self: True"
    settings = patch_programs(tmp_path, "deepspeed.accelerator.cpu_accelerator", allowed)
    template = json.loads((ROOT / "configs" / "zero2.json").read_text())
    template["fp16"]["initial_scale_power"] = 26
    (tmp_path / "high.json").write_text(json.dumps(template))
    out = tmp_path / "out"
    options = sft(tiny("2b"), data, out, "--mixed_precision", "fp16", "--checkpointing_steps", 4, variant="2b")
    succeed("train_zero_t2v.sh", *options, processes=2, ZERO=tmp_path / "high.json", **settings)
    progress = json.loads((out / "checkpoint-4" / PROGRESS_FILE).read_text())
    skipped = progress["samples_seen"] // 2 - 4
    assert progress["step"] == 4 and skipped >= 5
    assert [line["learning_rate"] for line in read_metrics(out)] == [0.0, 5e-4, 1e-3, 1e-3]
    weights = load_file(out / "checkpoint-4" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_zero_t2v.sh", "train_ddp_t2v.sh"])
def test_two_launchers_act_as_two_machines(tiny, data, tmp_path, single_process, script):
    out = tmp_path / "out"
    options = sft(tiny("5b"), data, out, variant="5b")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    machines = {"NUM_MACHINES": 2, "MAIN_PROCESS_IP": "127.0.0.1", "MAIN_PROCESS_PORT": port, "OMP_NUM_THREADS": 1}
    argv = command(script, *options)
    second = start_warm(argv, environment(None, MACHINE_RANK=1, **machines), "/", os.devnull, os.devnull)
    succeed(script, *options, MACHINE_RANK=0, **machines)
    second.join(60)
    assert second.exitcode == 0
    weights = load_file(out / "checkpoint-4" / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, expected in single_process("5b").items():
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ZERO": "zero4"}, "ZERO=zero4: there is no .*zero4.json; .* has zero2, zero2_offload, zero3"),
        ({"NUM_MACHINES": 2}, "NUM_MACHINES=2 needs MACHINE_RANK and MAIN_PROCESS_IP"),
        ({"NUM_MACHINES": 2, "MACHINE_RANK": 2, "MAIN_PROCESS_IP": "127.0.0.1"}, "MACHINE_RANK=2: .* 0 to 1"),
        ({"NUM_MACHINES": 2, "MACHINE_RANK": 0, "MAIN_PROCESS_IP": "x", "NUM_PROCESSES": 3}, "use 2, 4 or another"),
        ({"ZERO": "zero2"}, "ZERO=zero2 is for train_zero_t2v.sh and train_zero_i2v.sh; this script trains with DDP"),
    ],
)
def test_launcher_reports_contradictory_settings(settings, message):
    result = run("train_ddp_t2v.sh" if "DDP" in message else "train_zero_t2v.sh", **settings)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert re.search(message, result.stderr), result.stderr
