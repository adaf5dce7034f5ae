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
from utils.checkpoint.resume import read_progress
from utils.commands import average, push_to_hub
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


COMFYUI = "run-{}-comfyui.safetensors"


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ((), [WEIGHTS_FILE]),
        (("--lora_format", "both"), [WEIGHTS_FILE, COMFYUI]),
        (("--lora_format", "comfyui"), [COMFYUI]),
        (("--training_type", "sft"), ["transformer/diffusion_pytorch_model.safetensors"]),
    ],
)
def test_mean_of_checkpoints_loads_and_is_published_as_a_checkpoint(
    tiny, run, hub, average_of, monkeypatch, capsys, options, files
):
    out = run(*options)
    lines = [(1, 0.5), (2, 0.25), (4, 0.1)]
    (out / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "loss": v, "held_out_loss": v}) + "\n" for s, v in lines)
    )
    (out / "validation" / "step-2").mkdir(parents=True)  # made by a checkpoint, and not by the mean
    (out / "validation" / "step-2" / "prompts.json").write_text('{"000.mp4": "x"}')
    (out / "validation" / "step-2" / "000.mp4").touch()
    chosen = [out / f"checkpoint-{step}" for step in (10, 1, 2)]
    average_of(*chosen, "--dtype", "fp32")
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[1:] for line in table if "checkpoint-" in line] == [
        ["10", "no", "validation"],
        ["1", "0.50000"],
        ["2", "0.25000", "best"],
    ]
    folder = out / "average-1-2-10"
    assert {file.name for file in folder.glob("*.safetensors")} == {
        file.format(folder.name) for file in files if "/" not in file
    }
    for file in files:
        originals = [load_file(checkpoint / file.format(checkpoint.name)) for checkpoint in chosen]
        mean = load_file(folder / file.format(folder.name))
        assert mean.keys() == originals[0].keys()
        for name, tensor in mean.items():
            torch.testing.assert_close(tensor, torch.stack([weights[name] for weights in originals]).mean(0))
    if "sft" in options:
        loading.load_transformer(find_transformer(folder), torch.float32)
    else:
        transformer = loading.load_transformer(tiny("5b") / "transformer", torch.float32)
        lora = read_lora(folder, "--lora_path", dict(transformer.config))
        assert len(lora.adapters) == len(mean) // 2 and not lora.notes

    monkeypatch.setattr("sys.argv", ["push_to_hub", "--checkpoint", str(folder), "--name", "kitten"])
    push_to_hub.main()
    published = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix == ".safetensors"}
    assert published <= hub.files.keys() and "samples/000.mp4" not in hub.files
    card, curves = hub.files["README.md"].decode(), hub.files["loss.svg"]
    assert "The weights are the mean of those after 1, 2 and 10 updates." in card and "\n10 updates on" in card
    assert ("ComfyUI/models/loras" in card) == (COMFYUI in files)
    moved = folder.rename(folder.parent.parent / "mean")  # another run's losses are beside it
    (moved.parent / "metrics.jsonl").write_text('{"step": 1, "loss": 9}\n')
    monkeypatch.setattr("sys.argv", ["push_to_hub", "--checkpoint", str(moved), "--name", "kitten"])
    push_to_hub.main()
    assert hub.files["loss.svg"] == curves
    weights = next(moved.rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(UserError, match=f"--checkpoint {weights} cannot be read as safetensors .* is it complete"):
        push_to_hub.main()


def test_checkpoints_that_cannot_be_averaged_are_refused(tiny, data, run, average_of, capsys):
    out = run()
    one, two, ten = (out / f"checkpoint-{step}" for step in (1, 2, 10))
    average_of(out)
    assert "no validation" in capsys.readouterr().out and not list(out.glob("average*"))
    average_of(one, two, "--output_path", out / "mean")
    with pytest.raises(UserError, match="mean is a mean, which has no optimizer states; use a checkpoint"):
        read_progress(parse_args(arguments(tiny("5b"), data, out)), out / "mean", Progress("base"))
    for arguments_, message in (
        ([one], "at least two"),
        ([one, one], "given twice"),
        ([one, out], "is not the folder checkpoint-N"),
        ([out / "logs"], "holds no checkpoint-N"),
        ([one, two, "--output_path", ten], "already exists"),
        ([one, two, "--output_path", out / "checkpoint-99"], "is the name of a checkpoint"),
        ([one, out / "mean"], "mean is the mean of the checkpoints 1, 2; give those"),
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
    with pytest.raises(UserError, match=r"checkpoint-10.* is it complete"):
        average_of(one, ten)
    assert not list(out.glob("*average*"))
