"""Every command in the README's table of recipes runs unchanged on tiny checkpoints and two processes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from diffusers import CogVideoXTransformer3DModel

from examples.tiny_configs import VARIANTS
from tests.conftest import ROOT, run
from utils.checkpoint.lora_reader import WEIGHTS_FILE

pytestmark = pytest.mark.slow

VARIANT_OF = {model: variant for variant, model in VARIANTS.items()}
README = (ROOT / "README.md").read_text()
RECIPES = {
    f"{name}-{'i2v' if '_i2v' in command else 't2v'}": command
    for name, commands in re.findall(r"^\| ([\w.-]+) \| (`.*?`) \|", README, re.MULTILINE)
    for command in re.findall(r"`(.*?)`", commands)
    if "bash train_" in command
}


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory) -> Path:
    """Returns a data folder that all recipes share, so that only one has to encode it."""
    return shutil.copytree(ROOT / "examples" / "dataset", tmp_path_factory.mktemp("recipes") / "data")


def test_table_has_every_row():
    assert len(RECIPES) == 26 and len({name[:-4] for name in RECIPES}) == 16


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipe(tiny, shared_data, tmp_path, recipe):
    parts, model = re.fullmatch(r"((?:\w+=\w+ )*)bash (\S+) (.*)", recipe), re.search(r"THUDM/(\S+)", recipe)
    assert parts and model
    settings, script, flags = parts.groups()
    environment = dict(setting.split("=") for setting in settings.split())
    processes = min(int(environment.pop("NUM_PROCESSES", 1)), 2)  # without a GPU, one process is the default
    smaller = ["--model_path", tiny(VARIANT_OF[model[1]]), "--data_root", shared_data, "--output_dir", tmp_path]
    smaller += ["--train_resolution", "9x64x64", "--train_steps", 1, "--num_workers", 1, "--report_to", "none"]
    result = run(script, *flags.split(), *map(str, smaller), processes=processes, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    checkpoint = tmp_path / "checkpoint-1"
    if "Training: lora" in result.stdout:
        assert (checkpoint / WEIGHTS_FILE).is_file()
    else:
        CogVideoXTransformer3DModel.from_pretrained(checkpoint / "transformer")
