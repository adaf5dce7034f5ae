"""The mean of checkpoints of one run."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from tests.conftest import arguments
from utils.checkpoint.finetuned import find_transformer
from utils.checkpoint.lora_reader import WEIGHTS_FILE, read_lora
from utils.checkpoint.manager import Checkpoints, Progress
from utils.commands import average
from utils.common.errors import UserError
from utils.config.args import parse_args
from utils.model import loading
from utils.training.trainable import make_trainable, trained_parameters


@pytest.fixture
def run(tiny, data, tmp_path):
    """Returns a function: training options -> output folder with the checkpoints 1, 2 and 10 of random weights."""

    def save(*options: str):
        args = parse_args(arguments(tiny("5b"), data, tmp_path / "run", *options))
        accelerator = Accelerator(cpu=True)
        transformer = loading.load_transformer(tiny("5b") / "transformer", torch.float32)
        make_trainable(transformer, args)
        accelerator.prepare(transformer)
        checkpoints = Checkpoints(accelerator, transformer, args)
        for step in (1, 2, 10):
            with torch.no_grad():
                for parameter in trained_parameters(transformer):
                    parameter.normal_()
            checkpoints.save(Progress("base", step), is_last=False)
        return tmp_path / "run"

    return save


@pytest.fixture
def average_of(monkeypatch):
    """Returns a function that runs the command with the given arguments."""

    def call(*arguments: object) -> None:
        monkeypatch.setattr("sys.argv", ["average", *map(str, arguments)])
        average.main()

    return call


@pytest.mark.parametrize(
    ("options", "file"),
    [((), WEIGHTS_FILE), (("--training_type", "sft"), "transformer/diffusion_pytorch_model.safetensors")],
)
def test_mean_of_checkpoints_loads_as_a_checkpoint(tiny, run, average_of, capsys, options, file):
    out = run(*options)
    lines = [(1, 0.5), (2, 0.25), (4, 0.1)]
    (out / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "held_out_loss": v}) + "\n" for s, v in lines))
    chosen = [out / f"checkpoint-{step}" for step in (1, 2, 10)]
    average_of(*chosen, "--dtype", "fp32")
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[1:] for line in table if "checkpoint-" in line] == [
        ["1", "0.50000"],
        ["2", "0.25000", "best"],
        ["10", "no", "validation"],
    ]
    folder = out / "average-1-2-10"
    originals, mean = [load_file(folder / file) for folder in chosen], load_file(folder / file)
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, torch.stack([weights[name] for weights in originals]).mean(0))
    if options:
        loading.load_transformer(find_transformer(folder), torch.float32)
    else:
        transformer = loading.load_transformer(tiny("5b") / "transformer", torch.float32)
        lora = read_lora(folder, "--lora_path", dict(transformer.config))
        assert len(lora.adapters) == len(mean) // 2 and not lora.notes


def test_checkpoints_that_cannot_be_averaged_are_refused(run, average_of, capsys):
    out = run()
    one, two, ten = (out / f"checkpoint-{step}" for step in (1, 2, 10))
    average_of(out)
    assert "no validation" in capsys.readouterr().out and not list(out.glob("average*"))
    for arguments_, message in (
        ([one], "at least two"),
        ([one, one], "given twice"),
        ([one, out], "is not the folder checkpoint-N"),
        ([out / "logs"], "holds no checkpoint-N"),
        ([one, two, "--output_path", ten], "already exists"),
    ):
        with pytest.raises(UserError, match=message):
            average_of(*arguments_)
    args = json.loads((two / "args.json").read_text())
    args["lora"]["rank"], args["training"]["seed"] = 4, 7
    (two / "args.json").write_text(json.dumps(args))
    with pytest.raises(
        UserError, match=r"checkpoint-2 is of another run than .*: it has --rank 4 and not 8, --seed 7 and"
    ):
        average_of(one, two)
    (ten / WEIGHTS_FILE).write_bytes((ten / WEIGHTS_FILE).read_bytes()[:-100])
    with pytest.raises(UserError, match=r"checkpoint-10.* is damaged"):
        average_of(one, ten)
    assert not list(out.glob("*average*"))
