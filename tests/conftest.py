"""Shared fixtures: tiny checkpoints, data folders, and helpers that run the scripts as a user does."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from huggingface_hub import constants
from peft import get_peft_model_state_dict

import cli_demo
from tests.fake_hub import fake_hub
from tests.tiny_models import build
from tests.warm_start import run_warm
from utils.checkpoint.lora_files import lora_paths, save_lora
from utils.common.filesystem import ROOT
from utils.config.args import parse_args
from utils.model import loading
from utils.model.spec import read_spec
from utils.run.preflight import fill_in_defaults
from utils.training.trainable import lora_config, make_trainable

# Metrics of throughput and GPU memory; they are allowed to differ between equal runs.
TIMINGS = (
    *("step_s", "data_s", "forward_backward_s", "optimizer_s", "tokens_per_s", "tflops", "utilization"),
    "reserved_gib",
)
# The content of a file that was cloned without Git LFS.
LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * 'a'}\nsize 791656\n"
FIRST_FRAME = ROOT / "tests" / "first_frame.png"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*.json")
    parser.addoption("--rehearse", action="store_true", help="run the tests marked gpu on a CPU too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the tests marked gpu on a machine without a GPU, and starts the longest test first."""
    may_run = torch.cuda.is_available() or config.getoption("--rehearse")
    needs_gpu = [] if may_run else [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu:
        config.hook.pytest_deselected(items=needs_gpu)
        items[:] = [item for item in items if item not in needs_gpu]
    items.sort(key=lambda item: item.name != "test_quick_start_teaches_the_concept")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns a function: variant -> folder of a tiny checkpoint. Each checkpoint is written once per session."""
    folder = tmp_path_factory.mktemp("models")

    def get(variant: str, sample: tuple[int, int, int] = (9, 64, 64)) -> Path:
        path = folder / f"{variant}-{'x'.join(map(str, sample))}"
        return path if path.exists() else build(variant, path, sample)

    return get


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Returns a data folder of eight clips that a test may modify."""
    return shutil.copytree(ROOT / "examples" / "dataset", tmp_path / "data", ignore=shutil.ignore_patterns("latent"))


@pytest.fixture
def validation(tmp_path: Path) -> Path:
    """Returns a validation folder of two clips that a test may modify."""
    return shutil.copytree(
        ROOT / "examples" / "validation", tmp_path / "validation", ignore=shutil.ignore_patterns("latent")
    )


@pytest.fixture
def hub(monkeypatch):
    """Returns a server that stands for the model hub, which this process then uses with a token."""
    with fake_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_token")
        yield server


@pytest.fixture
def trained(tiny, data, tmp_path):
    """Returns a function: (variant, alpha, options) -> base folder, spec, transformer with adapters, LoRA folder."""

    def train(variant: str, alpha: float, *options: object):
        model_dir = tiny(variant)
        spec = read_spec(model_dir)
        argv = arguments(model_dir, data, tmp_path, "--rank", 8, "--lora_alpha", alpha, *options, task=spec.task)
        args = fill_in_defaults(parse_args(argv), spec)
        transformer = loading.load_transformer(model_dir / "transformer", torch.float32)
        make_trainable(transformer, args)
        with torch.no_grad():
            for name, weight in transformer.named_parameters():
                if ".lora_B." in name:
                    weight.normal_(std=0.5)
        folder = tmp_path / "lora"
        folder.mkdir()
        paths = lora_paths(folder, args.checkpoint.lora_format, "run-checkpoint-1")
        save_lora(get_peft_model_state_dict(transformer), lora_config(args), paths, {})
        return model_dir, spec, transformer.eval(), folder

    return train


def arguments(model: Path, data: Path, output: Path, *more: object, task: str = "t2v") -> list[str]:
    """Returns the flags of a float32 LoRA run on tiny clips. Flags in `more` override them."""
    return [
        *("--model_path", str(model), "--model_type", task, "--data_root", str(data), "--output_dir", str(output)),
        *("--train_resolution", "9x64x64", "--mixed_precision", "no", "--rank", "8", "--num_workers", "1"),
        *("--lr_warmup_steps", "2", "--learning_rate", "1e-3", "--report_to", "none"),
        *map(str, more),
    ]


def run(script: str, *args: str, processes: int | None = None, **variables: object) -> subprocess.CompletedProcess[str]:
    """Runs a script of the project from another folder and returns the finished process with its output.

    Without a GPU, training and the demo start with finished imports, see tests/warm_start.py.
    """
    argv, env = command(script, *args), environment(processes, **variables)
    if Path(script).name.startswith(("train", "cli_demo")) and not torch.cuda.is_available():  # forks cannot use CUDA
        return run_warm(argv, env, cwd="/", timeout=600)
    return subprocess.run(argv, env=env, cwd="/", text=True, capture_output=True, timeout=600)


def patch_programs(folder: Path, module: str, code: str) -> dict[str, str]:
    """Returns environment variables that make started programs execute `code` in `module` after its import.

    A program that starts with finished imports executes it at its start. The code then must not replace a name that
    another module has imported.
    """
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE.format(module=module, code=code))
    inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return {"PYTHONPATH": os.pathsep.join([str(folder), *map(os.path.abspath, inherited)])}  # programs run elsewhere


SITECUSTOMIZE = """
import importlib.util, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != {module!r}:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            exec({code!r}, vars(module))
        spec.loader.exec_module = exec_module
        return spec

if {module!r} in sys.modules:
    exec({code!r}, vars(sys.modules[{module!r}]))
else:
    sys.meta_path.insert(0, Finder())
"""


def command(script: str, *args: str) -> list[str]:
    return ["bash" if script.endswith(".sh") else sys.executable, str(ROOT / script), *args]


def environment(processes: int | None, **variables: object) -> dict[str, str]:
    """Returns the environment of a script. `variables` are settings such as ZERO."""
    if processes:
        variables |= {"NUM_PROCESSES": processes, "OMP_NUM_THREADS": 1}
    return os.environ | {name: str(value) for name, value in variables.items()}


def succeed(script: str, *args: str, processes: int | None = None, **variables: object) -> str:
    """Runs a script, asserts that it succeeds, and returns its standard output."""
    result = run(script, *args, processes=processes, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def generate(*args: object) -> str:
    """Runs cli_demo.py in this process, which saves its imports, and returns what it prints."""
    with (
        patch.object(sys, "argv", ["cli_demo.py", *map(str, args)]),
        contextlib.redirect_stdout(io.StringIO()) as output,
    ):
        cli_demo.main()
    return output.getvalue()


def read_metrics(output: Path, timings: bool = False) -> list[dict]:
    """Returns the lines of metrics.jsonl, by default without timings, which differ between runs."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    dropped = () if timings else TIMINGS
    return [{name: value for name, value in line.items() if name not in dropped} for line in lines]
