"""Validation matches the demo, changes no training state, and cannot stop a run."""

from __future__ import annotations

from pathlib import Path

import decord
import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.tiny_configs import task_of
from tests.conftest import arguments, read_metrics, succeed
from utils.common.heartbeat import HeartbeatBarrier
from utils.config.args import parse_args
from utils.model import loading
from utils.run.fill_cache import fill_cache
from utils.run.preflight import preflight
from utils.run.validation import validate
from utils.training.metrics import Metrics
from utils.training.step import DenoisingObjective
from utils.training.trainable import compute_dtype, make_trainable

pytestmark = pytest.mark.slow


def pixels(path: Path) -> np.ndarray:
    reader = decord.VideoReader(str(path))
    return reader.get_batch(range(len(reader))).asnumpy()


@pytest.mark.parametrize(("variant", "training_type"), [("1.5-i2v", "lora"), ("2b", "sft")])
def test_validation_changes_no_weight_and_no_random_state(tiny, data, validation, tmp_path, variant, training_type):
    options = ["--do_validation", "--validation_dir", validation, "--num_inference_steps", 2]
    args = arguments(tiny(variant), data, tmp_path, "--training_type", training_type, *options, task=task_of(variant))
    plan = preflight(parse_args(args), 1)
    processes = PartialState(cpu=True)
    fill_cache(processes, HeartbeatBarrier(processes, 60), plan)
    accelerator = Accelerator(cpu=True)
    transformer = loading.load_transformer(plan.model_dir / "transformer", torch.float32)
    make_trainable(transformer, plan.args)
    model = accelerator.prepare(transformer)
    alphas_cumprod = loading.load_scheduler(plan.model_dir).alphas_cumprod
    objective = DenoisingObjective(plan.spec, alphas_cumprod, compute_dtype(plan.args))

    def state() -> tuple[dict[str, torch.Tensor], list, bool, torch.Tensor, list]:
        weights = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
        flags = [(name, p.requires_grad) for name, p in transformer.named_parameters()]
        random_numbers = np.random.get_state(legacy=True)
        assert isinstance(random_numbers, tuple)
        return weights, flags, transformer.training, torch.get_rng_state(), random_numbers[1].tolist()

    before = state()
    validate(accelerator, transformer, objective, plan, 5, Metrics(accelerator, tmp_path, {}, 0, 1), None)
    after = state()
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:3] == after[1:3] and torch.equal(before[3], after[3]) and before[4] == after[4]
    assert len(list(tmp_path.glob("validation/step-5/*.mp4"))) == 2
    assert model is not None and "held_out_loss" in read_metrics(tmp_path)[0]


def test_demo_reproduces_the_validation_video(tiny, data, validation, tmp_path):
    out, seed = tmp_path / "out", ["--seed", "11"]
    checks = ["--do_validation", "--validation_dir", validation, "--num_inference_steps", 4, "--id_token", "SKS"]
    options = ["--train_steps", 20, "--learning_rate", 0.05, "--lora_alpha", 16, *seed, *checks]
    succeed("train_ddp_t2v.sh", *arguments(tiny("1.5"), data, out, *options), processes=1)
    prompt = "SKS " + (validation / "prompts.txt").read_text().splitlines()[1]
    demo = ["--model_path", str(tiny("1.5")), "--prompt", prompt, "--num_inference_steps", "4", *seed]
    for name, more in (("tuned", ["--lora_path", str(out / "checkpoint-20")]), ("base", [])):
        succeed("cli_demo.py", *demo, *more, "--output_path", str(tmp_path / f"{name}.mp4"))
    tuned, base = pixels(out / "validation/step-20/001.mp4"), pixels(out / "validation/step-0/001.mp4")
    assert np.abs(tuned.astype(int) - base).max() > 30  # the training has an effect
    assert np.array_equal(pixels(tmp_path / "base.mp4"), base)
    assert (
        np.abs(pixels(tmp_path / "tuned.mp4").astype(int) - tuned).max() <= 3
    )  # the file has the strength multiplied into B


def test_failing_validation_does_not_stop_the_run(tiny, data, validation, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "validation").write_text("in the way")
    options = ["--train_steps", 3, "--do_validation", "--validation_dir", validation, "--validation_steps", 2]
    output = succeed("train_ddp_t2v.sh", *arguments(tiny("5b"), data, tmp_path / "out", *options), processes=2)
    assert "Validation failed at step 2; training continues." in output and "NotADirectoryError" in output
    assert (tmp_path / "out" / "checkpoint-3").is_dir()
    assert [line["step"] for line in read_metrics(tmp_path / "out") if "held_out_loss" in line] == [0, 2, 3]


def test_trackers_receive_metrics_and_videos(tiny, data, validation, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = ["--train_steps", 2, "--do_validation", "--validation_dir", validation, "--num_inference_steps", 2]
    out = tmp_path / "out"
    succeed("train_ddp_t2v.sh", *arguments(tiny("2b"), data, out, *options, "--report_to", "all"), processes=1)
    board = EventAccumulator(str(next(out.glob("logs/*/events.*")).parent))
    board.Reload()
    assert {"loss", "held_out_loss", "learning_rate", "grad_norm"} <= set(board.Tags()["scalars"])
    assert board.Tags()["images"] == ["validation/000", "validation/001"]
    assert [event.step for event in board.Images("validation/000")] == [0, 2]
    assert board.Images("validation/000")[0].encoded_image_string.startswith(b"GIF")
    assert list(out.glob("wandb/offline-run-*/*.wandb"))
    assert len(list(out.glob("wandb/offline-run-*/files/media/videos/**/*.mp4"))) == 4
