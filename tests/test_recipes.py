"""Every command of the README's table of recipes runs as it stands there, on tiny checkpoints and two processes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from diffusers import CogVideoXTransformer3DModel

from tests.conftest import ROOT, run
from utils.checkpoint.lora_files import WEIGHTS_FILE

FORM_OF = {
    "CogVideoX-2b": "2b",
    "CogVideoX-5b": "5b",
    "CogVideoX-5b-I2V": "5b-i2v",
    "CogVideoX1.5-5B": "1.5",
    "CogVideoX1.5-5B-I2V": "1.5-i2v",
}
README = (ROOT / "README.md").read_text()
RECIPES = [
    pytest.param(command, id=f"{name}-{'i2v' if '_i2v' in command else 't2v'}")
    for name, commands in re.findall(r"^\| ([\w.-]+) \| (`.*?`) \|", README, re.MULTILINE)
    for command in re.findall(r"`(.*?)`", commands)
    if "bash train_" in command
]


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory) -> Path:
    """Clips whose latents one recipe encodes and the others find."""
    return shutil.copytree(ROOT / "examples" / "dataset", tmp_path_factory.mktemp("recipes") / "data")


def test_the_table_has_every_row():
    assert len(RECIPES) == 26 and len({param.id[:-4] for param in RECIPES}) == 16


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(tiny, shared_data, tmp_path, recipe):
    settings, script, flags = re.fullmatch(r"((?:\w+=\w+ )*)bash (\S+) (.*)", recipe).groups()
    environment = dict(setting.split("=") for setting in settings.split())
    processes = min(int(environment.pop("NUM_PROCESSES", 2)), 2)
    model = re.search(r"--model_path THUDM/(\S+)", flags)[1]
    smaller = ["--model_path", tiny(FORM_OF[model]), "--data_root", shared_data, "--output_dir", tmp_path]
    smaller += ["--train_resolution", "9x64x64", "--train_steps", 1, "--num_workers", 0, "--report_to", "none"]
    done = run(script, *flags.split(), *map(str, smaller), processes=processes, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    result = tmp_path / "checkpoint-1"
    if "Training: lora" in done.stdout:
        assert (result / WEIGHTS_FILE).is_file()
    else:
        CogVideoXTransformer3DModel.from_pretrained(result / "transformer")
