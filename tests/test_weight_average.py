"""`--ema_decay`: the moving average of the weights, in every format of a checkpoint, and after resuming."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from tests.conftest import arguments, generate, read_metrics, succeed
from tests.test_validation import pixels
from utils.checkpoint.average_files import EMA
from utils.checkpoint.finetuned import find_transformer
from utils.checkpoint.lora_reader import WEIGHTS_FILE
from utils.checkpoint.manager import Checkpoints, Progress
from utils.checkpoint.stored_weights import read_zero
from utils.config.args import parse_args
from utils.model import loading
from utils.training.trainable import make_trainable, trained_parameters
from utils.training.weight_average import make_average

DECAY = 0.25
Weights = dict[str, torch.Tensor]


def expected_average(steps: list[Weights]) -> Weights:
    """Returns the average after these weights by diffusers. The initial weights have no share in it."""
    parameters = [torch.nn.Parameter(weight.clone()) for weight in steps[0].values()]
    average = EMAModel(parameters, decay=DECAY)
    for weights in steps:
        for parameter, weight in zip(parameters, weights.values(), strict=True):
            parameter.data.copy_(weight)
        average.step(parameters)
    return dict(zip(steps[0], average.shadow_params, strict=True))


def assert_close(actual: Weights, expected: Weights, atol: float = 1e-6) -> None:
    assert actual.keys() == expected.keys()
    for name, weight in actual.items():
        torch.testing.assert_close(weight.float(), expected[name].float(), rtol=1e-5, atol=atol, msg=name)


def test_average_of_a_transformer_is_saved_and_takes_its_place(tiny, data, tmp_path):
    args = parse_args(arguments(tiny("5b"), data, tmp_path, "--training_type", "sft", "--ema_decay", DECAY))
    accelerator = Accelerator(cpu=True)
    transformer = loading.load_transformer(tiny("5b") / "transformer", torch.bfloat16)
    make_trainable(transformer, args)
    model = accelerator.prepare(transformer)
    average = make_average(args, accelerator, transformer, model)
    assert average is not None
    steps: list[Weights] = []
    for step in (1, 2, 3):
        with torch.no_grad():
            for parameter in trained_parameters(transformer):
                parameter.normal_()
        average.update(step)
        steps.append({name: weight.detach().clone() for name, weight in transformer.named_parameters()})
    expected = expected_average([{name: weight.float() for name, weight in weights.items()} for weights in steps])
    checkpoints = Checkpoints(accelerator, transformer, args)
    checkpoints.save(Progress("base", 3), is_last=True, average=average)
    saved = loading.load_transformer(find_transformer(tmp_path / "checkpoint-3" / EMA), torch.float32)
    assert_close(dict(saved.named_parameters()), expected)
    with average.applied():
        assert_close(dict(transformer.named_parameters()), expected, atol=0.02)  # bf16
    assert all(torch.equal(weight, steps[-1][name]) for name, weight in transformer.named_parameters())
    again = make_average(args, accelerator, transformer, model)
    assert again is not None
    checkpoints.load_average(again, tmp_path / "checkpoint-3")
    assert all(torch.equal(again.averages[name], average.averages[name]) for name in average.averages)


def lora_weights(folder: Path) -> Weights:
    return load_file(folder / WEIGHTS_FILE)


def zero_weights(folder: Path) -> Weights:
    return {name: stored.read() for name, stored in read_zero(folder).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "zero", "options", "read"),
    [
        ("train_ddp_t2v.sh", None, ["--lora_alpha", 3], lora_weights),
        ("train_zero_t2v.sh", "zero2", [], zero_weights),
        ("train_zero_t2v.sh", "zero3", ["--training_type", "lora"], lora_weights),
    ],
)
def test_runs_average_their_weights_and_resume(
    tiny, data, validation, tmp_path, script, zero, options, read: Callable[[Path], Weights]
):
    """The average follows from the weights of all checkpoints; a resumed run has the same."""
    out, variables = tmp_path / "out", {} if zero is None else {"ZERO": zero}
    flags = ["--train_steps", 4, "--checkpointing_steps", 1, "--ema_decay", DECAY, *options]
    flags += ["--do_validation", "--validation_dir", validation, "--validation_steps", 2, "--num_inference_steps", 1]
    flags += [
        "--validate_ema",
        "--learning_rate",
        0.05,
        "--resume_from_checkpoint",
        "latest",
        "--checkpointing_limit",
        9,
    ]
    argv = arguments(tiny("5b"), data, out, *flags)
    output = succeed(script, *argv, processes=2, **variables)
    assert "Validation failed" not in output
    checkpoints = [out / f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    average = read(checkpoints[3] / EMA)
    assert_close(average, expected_average([read(folder) for folder in checkpoints]))
    assert any((average[name] != weight).any() for name, weight in read(checkpoints[3]).items())
    if read is zero_weights:
        exported = loading.load_transformer(find_transformer(checkpoints[3] / EMA), torch.float32)
        assert_close(dict(exported.named_parameters()), {k: average[k] for k, _ in exported.named_parameters()})
    flag, video = ("--lora_path" if read is lora_weights else "--transformer_path"), tmp_path / "demo.mp4"
    prompt = (validation / "prompts.txt").read_text().splitlines()[0]
    frames = {}
    for name, folder in (("average", checkpoints[3] / EMA), ("weights", checkpoints[3])):
        demo = ["--model_path", tiny("5b"), flag, folder, "--prompt", prompt, "--num_inference_steps", 1]
        generate(*demo, "--dtype", "fp32", "--output_path", video)
        frames[name] = pixels(video).astype(int)
    validated = pixels(out / "validation" / "step-4" / "000.mp4")
    assert np.abs(frames["average"] - validated).max() <= 3 < np.abs(frames["weights"] - validated).max()
    held_out = [line["held_out_loss"] for line in read_metrics(out) if "held_out_loss" in line]
    for folder in checkpoints[2:]:
        shutil.move(folder, tmp_path / folder.name)
    succeed(script, *argv, processes=2, **variables)
    assert_close(read(checkpoints[3] / EMA), average, atol=0 if zero is None else 1e-7)
    assert [line["held_out_loss"] for line in read_metrics(out) if "held_out_loss" in line] == held_out
