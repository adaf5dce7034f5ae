"""Whole runs through the launch scripts: every variant, one and two processes, killed and resumed."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from dataset.video import Resolution
from examples.tiny_configs import VARIANTS, task_of
from tests.conftest import (
    FIRST_FRAME,
    ROOT,
    arguments,
    environment,
    generate,
    patch_programs,
    read_metrics,
    run,
    succeed,
)
from tests.golden_losses import compare_with_golden
from utils.checkpoint.lora_reader import WEIGHTS_FILE
from utils.checkpoint.manager import PROGRESS_FILE
from utils.checkpoint.saved_weights import ADAPTERS_AS_TRAINED, TRAINING_STATE
from utils.common.units import GIB
from utils.model.spec import ModelSpec, read_spec
from utils.training.throughput import DATA, MODEL, OPTIMIZER, StepTimer, Work


def adapters(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / TRAINING_STATE / ADAPTERS_AS_TRAINED)


def assert_equal(actual, expected) -> None:
    """Asserts that nested dicts and lists of tensors are equal bit for bit."""
    if torch.is_tensor(expected):
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for name in expected:
            assert_equal(actual[name], expected[name])
    elif isinstance(expected, list | tuple):
        for actual_item, expected_item in zip(actual, expected, strict=True):
            assert_equal(actual_item, expected_item)
    else:
        assert actual == expected


def assert_same_run(actual: Path, expected: Path, step: int) -> None:
    """Asserts that adapters, optimizer, schedule, progress and metrics are equal bit for bit."""
    checkpoints = [folder / f"checkpoint-{step}" for folder in (actual, expected)]
    assert_equal(*map(adapters, checkpoints))
    assert_equal(*[load_file(path / WEIGHTS_FILE) for path in checkpoints])
    assert_equal(*[torch.load(path / TRAINING_STATE / "optimizer.bin", weights_only=True) for path in checkpoints])
    assert_equal(*[(path / PROGRESS_FILE).read_text() for path in checkpoints])
    assert read_metrics(actual) == read_metrics(expected)


@pytest.mark.slow
def test_compiled_blocks_without_checkpointing_train_the_same_losses_under_ddp(tiny, data, tmp_path):
    options = ["--train_steps", 3, "--gradient_checkpointing", "none", "--learning_rate", 1e-3, "--lr_warmup_steps", 0]
    # torch's DDPOptimizer would cut the graphs of larger blocks
    fail = "def fail(*args, **kwargs): raise AssertionError('the graph is cut')\nDDPOptimizer.compile_fn = fail"
    variables = patch_programs(tmp_path, "torch._dynamo.backends.distributed", fail)
    losses = []
    for name in ("false", "true"):
        argv = arguments(tiny("5b"), data, tmp_path / name, *options, "--compile_blocks", name)
        succeed("train_ddp_t2v.sh", *argv, processes=2, **variables)
        losses.append([line["loss"] for line in read_metrics(tmp_path / name)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def assert_throughput_is_recorded(out: Path, printed: str, samples_per_step: int, spec: ModelSpec) -> None:
    """Asserts that the metrics relate time and work, and that the fourth update was profiled."""
    lines = [line for line in read_metrics(out, timings=True) if "loss" in line]
    parts = ("data_s", "forward_backward_s", "optimizer_s")
    assert not any(part in lines[0] for part in parts)  # a line holds the parts of the update before
    for previous, line in pairwise(lines):
        assert all(line[part] > 0 for part in parts) and sum(line[part] for part in parts) < previous["step_s"]
    tokens = samples_per_step * sum(spec.tokens(Resolution(9, 64, 64)))
    assert lines[1]["tokens_per_s"] * lines[1]["step_s"] == pytest.approx(tokens)
    assert "4 updates in this run" in printed and "tokens/s" in printed and "TFLOP/s per process, peak" in printed
    trace = json.loads(gzip.decompress((out / "profile" / "trace.json.gz").read_bytes()))
    assert {event["name"] for event in trace["traceEvents"] if "ProfilerStep" in event["name"]} == {"ProfilerStep#3"}
    title, *rows = (out / "profile" / "kernels.txt").read_text().splitlines()
    assert title.split() == ["share", "ms", "calls", "name"] and 10 < len(rows) <= 20
    assert any("aten::addmm" in row for row in rows)


def test_parts_of_an_update_are_read_one_update_later(monkeypatch):
    """On a GPU, only events of the previous update are waited for and read."""
    waited_for: list[int] = []
    updates: list[None] = []

    class Event:
        def __init__(self, enable_timing):
            self.update = len(updates)

        def record(self):
            pass

        def synchronize(self):
            waited_for.append(self.update)

        def elapsed_time(self, end):
            assert self.update == end.update == len(updates) - 1  # the GPU has not reached later events
            return 500.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 3 * GIB)
    timer, lines = StepTimer(torch.device("cuda")), []
    for _ in range(3):
        for part in (DATA, MODEL, OPTIMIZER, DATA, MODEL, OPTIMIZER):  # two micro-batches
            timer.mark(part)
        lines.append(timer.lap(Work(tokens=100, flop=1e12)))
        updates.append(None)
        timer.start()
    assert waited_for == [0, 1] and not {DATA, MODEL, OPTIMIZER} & lines[0].keys()
    assert [line[DATA] for line in lines[1:]] == [1.0, 1.0] and lines[0]["reserved_gib"] == 3
    assert lines[0]["utilization"] == pytest.approx(1 / lines[0]["step_s"] / 989)
    assert "3 updates in this run" in timer.summary() and "% of the GPU's peak" in timer.summary()


@pytest.mark.golden
@pytest.mark.parametrize(
    "variant", [name if name == "2b" else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_every_variant_trains_validates_and_generates(tiny, data, validation, tmp_path, pytestconfig, variant):
    """Runs the launch script of the task with two processes, and then the demo."""
    task = task_of(variant)
    out = tmp_path / "out"
    steps = ["--train_steps", 4, "--checkpointing_steps", 2, "--checkpointing_limit", 1]
    checks = ["--do_validation", "--validation_dir", validation, "--validation_steps", 3, "--num_inference_steps", 2]
    if variant == "5b-i2v":  # separate images; the other i2v variant uses the first frames of the clips
        for folder, count in ((data, 8), (validation, 2)):
            shutil.copy(FIRST_FRAME, folder / "image.png")
            (folder / "images.txt").write_text("image.png\n" * count)
        checks += ["--image_column", "images.txt", "--validation_images", "images.txt", "--image_dropout", 0.2]
    more = [*steps, *checks, "--report_to", "tensorboard", "--id_token", "SKS", "--caption_dropout", 0.5]
    more += ["--profile", 1]
    output = succeed(f"train_ddp_{task}.sh", *arguments(tiny(variant), data, out, *more, task=task), processes=2)

    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-4"]  # --checkpointing_limit
    assert any(weight.abs().max() > 0 for name, weight in adapters(out / "checkpoint-4").items() if "lora_B" in name)
    videos = sorted(str(path.relative_to(out / "validation")) for path in out.glob("validation/*/*.mp4"))
    assert videos == [f"step-{step}/{number:03d}.mp4" for step in (0, 3, 4) for number in (0, 1)]
    compare_with_golden(f"lora-ddp-{variant}", out, pytestconfig)
    log = read_metrics(out)
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in log if "held_out_loss" in line] == [0, 3, 4]
    assert all(f"held_out_loss_quarter_{q}" in log[0] for q in (1, 2, 3, 4))
    assert all(any(name.startswith("loss_quarter_") for name in line) for line in log if "loss" in line)
    assert list(out.glob("logs/*/events.out.tfevents.*"))
    assert_throughput_is_recorded(out, output, samples_per_step=2, spec=read_spec(tiny(variant)))

    image = [] if task == "t2v" else ["--image_or_video_path", str(FIRST_FRAME)]
    options = ["--prompt", "SKS a red circle", "--num_inference_steps", "2"]
    options += ["--output_path", str(tmp_path / "demo.mp4")]
    lora = ["--lora_path", str(out / "checkpoint-4")]
    output = generate("--model_path", str(tiny(variant)), *options, *lora, *image)
    assert "8 adapter modules matched" in output and f"Generating {task}, 9x64x64" in output
    assert (tmp_path / "demo.mp4").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_resuming_is_bit_exact(tiny, data, tmp_path, processes):
    """Resumes in a new process in the middle of an epoch, with shuffling, accumulation and caption dropout."""

    def train(out: Path, steps: int, *more: str) -> None:
        options = ["--train_steps", steps, "--checkpointing_steps", 3, "--gradient_accumulation_steps", 2]
        options += ["--caption_dropout", 0.3, *more]
        succeed("train_ddp_t2v.sh", *arguments(tiny("5b"), data, out, *options), processes=processes)

    train(tmp_path / "uninterrupted", 6)
    train(tmp_path / "resumed", 3)
    train(tmp_path / "resumed", 6, "--resume_from_checkpoint", str(tmp_path / "resumed" / "checkpoint-3"))
    assert_same_run(tmp_path / "resumed", tmp_path / "uninterrupted", 6)


@pytest.mark.slow
def test_killed_run_resumes_bit_exact(tiny, data, tmp_path):
    options = ["--train_steps", 60, "--checkpointing_steps", 1, "--gradient_accumulation_steps", 2]

    def command(out: Path) -> list[str]:
        return arguments(tiny("2b"), data, out, *options)

    succeed("train_ddp_t2v.sh", *command(tmp_path / "uninterrupted"), processes=1)
    killed = tmp_path / "killed"
    with subprocess.Popen(
        ["bash", str(ROOT / "train_ddp_t2v.sh"), *command(killed)],
        env=environment(1),
        stderr=subprocess.DEVNULL,
    ) as process:
        while not (killed / "checkpoint-5").exists() and process.poll() is None:
            time.sleep(0.01)
        processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in processes:
            member.kill()
        psutil.wait_procs(processes)
    last = max(int(path.name.rpartition("-")[2]) for path in killed.glob("checkpoint-*"))
    assert 5 <= last < 60
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # an incomplete line
    succeed("train_ddp_t2v.sh", *command(killed), processes=1)
    assert_same_run(killed, tmp_path / "uninterrupted", 60)


@pytest.mark.slow
def test_two_processes_match_one_with_accumulation(tiny, data, tmp_path):
    """Samples, noise and learning rates are the same. Gradients differ by the order of summation."""
    for processes, accumulation in ((1, 2), (2, 1)):
        options = ["--train_steps", 4, "--gradient_accumulation_steps", accumulation, "--lr_scheduler", "cosine"]
        out = tmp_path / str(processes)
        succeed("train_ddp_i2v.sh", *arguments(tiny("1.5-i2v"), data, out, *options, task="i2v"), processes=processes)
    one, two = read_metrics(tmp_path / "1"), read_metrics(tmp_path / "2")
    assert [line["learning_rate"] for line in one] == [line["learning_rate"] for line in two]
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-5)
    expected = adapters(tmp_path / "1" / "checkpoint-4")
    for name, weight in adapters(tmp_path / "2" / "checkpoint-4").items():
        torch.testing.assert_close(
            weight, expected[name], rtol=0, atol=2e-5
        )  # four updates change weights by up to 1e-3 each


@pytest.mark.slow
def test_full_fine_tuning_resumes_and_its_transformer_loads(tiny, data, tmp_path):
    def train(out: Path, steps: int, *more: str) -> None:
        options = ["--training_type", "sft", "--train_steps", steps, "--checkpointing_steps", 2, *more]
        succeed("train_ddp_t2v.sh", *arguments(tiny("1.5"), data, out, *options), processes=1)

    train(tmp_path / "uninterrupted", 4)
    train(tmp_path / "resumed", 2)
    train(tmp_path / "resumed", 4, "--resume_from_checkpoint", "latest")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    one, other = (load_file(tmp_path / run / "checkpoint-4" / weights) for run in ("uninterrupted", "resumed"))
    assert_equal(one, other)
    assert not torch.equal(one["proj_out.weight"], load_file(tiny("1.5") / weights)["proj_out.weight"])
    options = ["--prompt", "a square", "--num_inference_steps", "2", "--output_path", str(tmp_path / "demo.mp4")]
    transformer = ["--transformer_path", str(tmp_path / "resumed" / "checkpoint-4")]
    generate("--model_path", str(tiny("1.5")), *options, *transformer)


@pytest.mark.slow
def test_run_does_not_overwrite_or_resume_another_run(tiny, data, tmp_path):
    out, first = tmp_path / "out", ["--train_steps", 2, "--seed", 1]
    succeed("train.py", *arguments(tiny("5b"), data, out, *first))
    again = run("train.py", *arguments(tiny("5b"), data, out, *first))
    assert again.returncode == 2 and "already holds checkpoint-2" in again.stderr
    latest = [*first, "--resume_from_checkpoint", "latest"]
    other = run("train.py", *arguments(tiny("2b"), data, out, *latest, "--rank", 4, "--quantize_optimizer", "4bit"))
    assert other.returncode == 2 and "--rank is 4, but" in other.stderr and "is not the base that" in other.stderr
    assert "--quantize_optimizer is 4bit, but" in other.stderr
    assert "nothing is left to do" in succeed("train.py", *arguments(tiny("5b"), data, out, *latest))
    (out / "checkpoint-7").mkdir()
    back = ["--resume_from_checkpoint", out / "checkpoint-2", "--train_steps", 3]
    branch = run("train.py", *arguments(tiny("5b"), data, out, *back))
    assert branch.returncode == 2 and "later checkpoints: checkpoint-7" in branch.stderr
    (out / "checkpoint-7").rmdir()
    (out / "checkpoint-2" / TRAINING_STATE / "optimizer.bin").write_bytes(b"damaged")
    damaged = run("train.py", *arguments(tiny("5b"), data, out, *back))
    assert damaged.returncode == 2 and "is damaged" in damaged.stderr and "Traceback" not in damaged.stderr


@pytest.mark.slow
def test_resumed_run_follows_its_command_line(tiny, data, tmp_path):
    """Changes the learning rate, the number of processes and the accumulation at once."""
    out = tmp_path / "out"
    options = ["--train_steps", 2, "--gradient_accumulation_steps", 2, "--lr_scheduler", "cosine"]
    environment_of_another_tool = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": 5}
    argv = arguments(tiny("5b"), data, out, *options)
    succeed("train_ddp_t2v.sh", *argv, processes=1, **environment_of_another_tool)
    options = ["--train_steps", 4, "--gradient_accumulation_steps", 3, "--lr_scheduler", "constant"]
    options += ["--learning_rate", 5e-6, "--weight_decay", 0.5, "--beta2", 0.9]
    succeed("train_ddp_t2v.sh", *arguments(tiny("5b"), data, out, *options), processes=2)
    assert [line["learning_rate"] for line in read_metrics(out)][2:] == [5e-6, 5e-6]
    group = torch.load(out / "checkpoint-4" / TRAINING_STATE / "optimizer.bin")["param_groups"][0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (5e-6, 0.5, (0.9, 0.9))
    progress = json.loads((out / "checkpoint-4" / PROGRESS_FILE).read_text())
    assert (progress["step"], progress["samples_seen"]) == (4, 2 * 2 + 2 * 6)


@pytest.mark.slow
def test_bad_clips_stop_the_run_and_changed_clips_are_encoded_again(tiny, data, tmp_path):
    clip = data / "videos" / "blue_circle_up_white.mp4"
    content = clip.read_bytes()
    clip.write_bytes(content[: len(content) * 2 // 3])
    options = arguments(tiny("5b"), data, tmp_path / "out", "--precompute_only")
    failed = run("train_ddp_t2v.sh", *options, processes=2)
    assert failed.returncode == 2 and f"{clip} (line 3)" in failed.stderr and "Traceback" not in failed.stderr
    clip.write_bytes(content)
    succeed("train_ddp_t2v.sh", *options, processes=2)
    assert len(list((data / "videos" / "latent").glob("video-*"))) == 8
    shutil.copy(data / "videos" / "red_square_left_white.mp4", clip)
    succeed("train_ddp_t2v.sh", *options, processes=1)
    assert len(list((data / "videos" / "latent").glob("video-*"))) == 8  # an entry for this content exists already


def test_nonfinite_loss_names_sample_and_timestep(tiny, data, tmp_path):
    result = run("train.py", *arguments(tiny("5b"), data, tmp_path, "--train_steps", 30, "--learning_rate", 1e30))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "The loss is nan at step" in result.stderr and "timestep" in result.stderr and ".mp4" in result.stderr
