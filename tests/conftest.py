"""What the tests share: tiny checkpoints of all forms, a data folder, and a way to run the scripts as a user does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny_models import build

ROOT = Path(__file__).resolve().parents[1]
FIRST_FRAME = ROOT / "tests" / "first_frame.png"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*.json")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """form -> folder of a tiny checkpoint, made once."""
    folder = tmp_path_factory.mktemp("models")

    def get(form: str, sample: tuple[int, int, int] = (9, 64, 64)) -> Path:
        path = folder / f"{form}-{'x'.join(map(str, sample))}"
        return path if path.exists() else build(form, path, sample)

    return get


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder of eight clips, free to be changed."""
    return shutil.copytree(ROOT / "examples" / "dataset", tmp_path / "data", ignore=shutil.ignore_patterns("latent"))


@pytest.fixture
def validation(tmp_path: Path) -> Path:
    """A validation folder of two clips, free to be changed."""
    return shutil.copytree(
        ROOT / "examples" / "validation", tmp_path / "validation", ignore=shutil.ignore_patterns("latent")
    )


def arguments(model: Path, data: Path, output: Path, *more: object, task: str = "t2v") -> list[str]:
    """A short float32 LoRA run; `more` wins."""
    return [
        *("--model_path", str(model), "--model_type", task, "--data_root", str(data), "--output_dir", str(output)),
        *("--train_resolution", "9x64x64", "--mixed_precision", "no", "--rank", "8", "--num_workers", "1"),
        *("--lr_warmup_steps", "2", "--learning_rate", "1e-3", "--report_to", "none"),
        *map(str, more),
    ]


def run(script: str, *args: str, processes: int | None = None, **settings: object) -> subprocess.CompletedProcess:
    """Runs a script of the project from elsewhere, as a user would, and returns what it printed."""
    return subprocess.run(command(script, *args), env=environment(processes, **settings), timeout=600, **AS_A_USER)


def patch_programs(folder: Path, module: str, code: str) -> dict[str, Path]:
    """Variables with which the programs that are started execute `code` in a module once it is imported."""
    (folder / "sitecustomize.py").write_text(PATCH.format(module=module, code=code))
    return {"PYTHONPATH": folder}


PATCH = """
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

sys.meta_path.insert(0, Finder())
"""

AS_A_USER = {"cwd": "/", "text": True, "capture_output": True}


def command(script: str, *args: str) -> list[str]:
    return ["bash" if script.endswith(".sh") else "python", str(ROOT / script), *args]


def environment(processes: int | None, **settings: object) -> dict[str, str]:
    """The environment of a script; `settings` are variables such as ZERO."""
    if processes:
        settings |= {"NUM_PROCESSES": processes, "OMP_NUM_THREADS": 1}
    return os.environ | {name: str(value) for name, value in settings.items()}


def succeed(script: str, *args: str, processes: int | None = None, **settings: object) -> str:
    """Runs a script and returns its output; a failure shows all of it."""
    done = run(script, *args, processes=processes, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read_metrics(output: Path) -> list[dict]:
    """The lines of a run's log without its timings, which no two runs share."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "step_s"} for line in lines]
