"""The launcher: locks of killed compilers. Programs: locales of another encoding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from utils.commands import launch
from utils.common import requirements
from utils.common.errors import exit_on_user_error

ENCODING = ROOT / "utils" / "common" / "encoding.py"


@pytest.mark.parametrize(
    ("name", "value"), [("NUM_PROCESSES", "two"), ("OMP_NUM_THREADS", "4,2"), ("MAIN_PROCESS_PORT", "65536")]
)
def test_variables_that_are_no_numbers_are_named(monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        list(launch.flags_from_environment())
    assert capsys.readouterr().err == f"error: {name}={value} is not a valid number.\n"


@pytest.fixture
def lock(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / "cpu_adam" / "lock"
    path.parent.mkdir()
    path.touch()
    return path


@pytest.mark.parametrize(
    ("kind", "in_container", "is_removed"),
    [
        ("ext4", False, True),
        ("ext4", True, False),  # a volume, which another container may share
        ("overlay", True, True),  # the root of this container
        ("nfs4", False, False),
    ],
)
def test_lock_without_an_owner_is_removed_only_if_all_owners_are_visible(
    lock, monkeypatch, capsys, kind, in_container, is_removed
):
    own = str(Path("/proc/self/ns/pid").readlink())
    monkeypatch.setattr(launch, "INITIAL_PID_NAMESPACE", "pid:[0]" if in_container else own)
    monkeypatch.setattr(launch, "file_system", lambda path: kind)
    launch.check_extensions(offloads=False)
    assert lock.exists() is not is_removed
    assert (f"Removed {lock}" if is_removed else f"remove the lock: rm {lock}") in capsys.readouterr().err


def test_lock_that_a_process_has_open_is_kept(lock, capsys):
    with (lock.parent / "lock").open():
        launch.check_extensions(offloads=False)
    assert lock.exists() and f"is being compiled by process {os.getpid()}; " in capsys.readouterr().err


def test_programs_read_utf8_in_any_locale(tmp_path):
    program = tmp_path / "program.py"
    code = f"import runpy, sys; runpy.run_path({str(ENCODING)!r})['use_utf8']()\n"
    program.write_text(code + "print(ascii(sys.argv[1]), sys.getfilesystemencoding(), open(0).encoding)")
    variables = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    argv = [sys.executable, str(program), "a 红 circle"]
    output = subprocess.run(argv, env=os.environ | variables, check=True, capture_output=True, text=True)
    assert output.stdout == "'a \\u7ea2 circle' utf-8 utf-8\n"


def test_programs_start_again_in_another_locale(monkeypatch):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "utils.commands.export", "--dtype", "bf16"])
    monkeypatch.setenv("PYTHONUTF8", "0")
    started = []
    monkeypatch.setattr(os, "execv", lambda *command: started.append(command))
    with exit_on_user_error():
        pass
    argv = [sys.executable, "-X", "utf8", "-m", "utils.commands.export", "--dtype", "bf16"]
    assert started == [(sys.executable, argv)] and os.environ["PYTHONUTF8"] == "1"


MISSING = ("decord", "PIL", "deepspeed")


def test_missing_requirements_are_named(monkeypatch, capsys):
    requirements.check_requirements()
    monkeypatch.setattr(requirements, "find_spec", lambda module: None if module in MISSING else module)
    with pytest.raises(SystemExit) as stopped:
        requirements.check_requirements()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith(f"error: Pillow, decord cannot be imported by {sys.executable}")
    assert error.endswith(f"pip install -r {ROOT / 'requirements.txt'}\n")
    with pytest.raises(SystemExit):
        requirements.check_requirements("deepspeed")
    assert "error: Pillow, decord, deepspeed cannot" in capsys.readouterr().err


@pytest.mark.parametrize(
    "program", [("train.py",), ("cli_demo.py",), ("utils/commands/launch.py",), ("-m", "utils.commands.export")]
)
def test_programs_name_missing_requirements(program):
    """Without site packages, nothing is installed."""
    result = subprocess.run([sys.executable, "-S", *program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: Pillow, accelerate, av, decord, diff")
