"""Permissions, locks, full disks, and terminals of another encoding."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from dataset.latent_cache import LatentCache
from tests.conftest import ROOT, arguments, succeed
from utils.checkpoint.lora_reader import read_lora
from utils.common import filesystem
from utils.common.errors import UserError, exit_on_user_error
from utils.common.filesystem import flags_in_errors, lock_folder, unreadable
from utils.config.args import parse_args
from utils.run.preflight import preflight

NOBODY = 65534


@contextmanager
def another_user(*folders: Path) -> Iterator[None]:
    """Runs the block as a user who may read what all users may. `folders` are made accessible with their parents."""
    if os.geteuid() != 0:
        yield
        return
    for folder in folders:
        for parent in (folder, *folder.parents[:3]):
            parent.chmod(parent.stat().st_mode | 0o055)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.slow
def test_files_of_a_run_have_the_permissions_of_new_files(tiny, data, tmp_path):
    """Also in a folder whose files belong to the group of the folder."""
    out = tmp_path / "out"
    out.mkdir()
    if os.geteuid() == 0:
        os.chown(out, 0, NOBODY)
    out.chmod(0o2775)
    umask = os.umask(0o027)
    try:
        succeed("train.py", *arguments(tiny("5b"), data, out, "--train_steps", 1))
    finally:
        os.umask(umask)
    files = [path for folder in (out, data / "videos" / "latent") for path in folder.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in files) > 2
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}
    assert {path.stat().st_gid for path in out.rglob("*")} == {out.stat().st_gid}


def test_missing_permission_is_called_that(tiny, data, tmp_path):
    model, out = shutil.copytree(tiny("2b"), tmp_path / "model"), tmp_path / "out"
    for weights in model.rglob("*.safetensors"):
        weights.chmod(0o644)
    out.mkdir()
    out.chmod(0o777)

    args = parse_args(arguments(model, data, out, "--cache_dir", out / "cache", "--dry_run"))
    preflight(args, 1)  # imports what the other user might not be able to import

    def errors() -> str:
        with another_user(tmp_path, data, data / "videos", model), pytest.raises(UserError) as caught:
            preflight(args, 1)
        return "\n".join(caught.value.errors)

    for path in (
        model / "transformer" / "diffusion_pytorch_model.safetensors",
        model / "vae" / "config.json",
        data / "prompts.txt",
    ):
        path.chmod(0)
        assert f"this user has no permission to read {path}" in errors()
        path.chmod(0o644)
    clip = data / (data / "videos.txt").read_text().split()[0]
    clip.chmod(0)
    assert f"{clip} (line 1) cannot be read: this user has no permission" in errors()
    clip.chmod(0o644)
    (model / "text_encoder").chmod(0)
    assert f"this user may not enter the folder {model / 'text_encoder'}" in errors()


def test_lora_file_of_another_user_is_called_that(tmp_path):
    file = tmp_path / "lora.safetensors"
    file.write_bytes(b"x")
    file.chmod(0)
    with another_user(tmp_path), pytest.raises(UserError, match=f"this user has no permission to read {file}"):
        read_lora(file, "--lora_path")


def test_unreadable_cache_entry_counts_as_missing(tmp_path):
    cache = LatentCache(tmp_path)
    cache.write("prompt-0", torch.zeros(2))
    with another_user(tmp_path):
        assert cache.verify("prompt-0")
    cache.path("prompt-0").chmod(0)
    with another_user(tmp_path):
        assert not cache.verify("prompt-0")


def test_missing_file_is_not_called_unreadable(tmp_path):
    assert unreadable(tmp_path / "a" / "b") is None and unreadable(tmp_path) is None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "/a/b"), "/a/b: this user has no permission."),
        (OSError(36, "File name too long", "/a"), "/a: the name is too long."),
        (OSError(28, "No space left on device"), "No space is left on the disk; free some, "),
    ],
)
def test_errors_of_the_system_are_sentences(capsys, error, message):
    with pytest.raises(SystemExit) as stopped, exit_on_user_error():
        raise error
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith(f"error: {message}")


def test_errors_of_the_system_name_the_flag_of_the_folder(tmp_path, monkeypatch):
    folders = {"--output_dir": tmp_path, "--cache_dir": tmp_path / "cache"}
    folders["--cache_dir"].mkdir()
    monkeypatch.setattr(filesystem, "disk_is_full", lambda folder: folder == folders["--cache_dir"])
    for error, message in (
        (OSError(28, "full", str(tmp_path / "x")), f"--output_dir {tmp_path}: {tmp_path}/x: no space is left"),
        (OSError(28, "full"), f"--cache_dir {tmp_path}/cache: no space is left"),  # a write does not know its file
        (OSError(28, "full", f"{tmp_path}/cache/x"), f"--cache_dir {tmp_path}/cache: {tmp_path}/cache/x: no space"),
        (OSError(12, "memory"), "The host memory does not suffice"),
        (PermissionError(13, "denied", "/x"), "/x: this user has no permission."),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(message)}"), flags_in_errors(folders):
            raise error
    hidden = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with (
        pytest.raises(UserError, match=r"^--output_path /x: no space is left"),
        flags_in_errors({"--output_path": Path("/x")}),
    ):
        raise hidden
    with pytest.raises(SafetensorError), flags_in_errors(folders):
        raise SafetensorError("header too large")
    with pytest.raises(FileNotFoundError), flags_in_errors(folders):
        raise FileNotFoundError(2, "not there", str(tmp_path / "x"))


def test_errors_of_the_system_in_threads_are_sentences(capsys):
    def write() -> None:
        raise OSError(28, "full", "/x")

    with exit_on_user_error():
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    assert capsys.readouterr().err == (
        "error: /x: no space is left on the disk; free some, or give a folder on another disk.\n"
    )


def test_text_that_the_terminal_cannot_show_is_escaped(monkeypatch):
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii"))
    with exit_on_user_error():
        print("a 红 circle", flush=True)
    assert terminal.getvalue() == b"a \\u7ea2 circle\n"


def test_folder_is_locked_until_its_process_is_gone(tmp_path):
    program = "import sys, time; from pathlib import Path; from utils.common.filesystem import lock_folder; "
    program += "lock_folder(Path(sys.argv[1]), '--x'); print('locked', flush=True); time.sleep(600)"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout and other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"--output_dir {tmp_path} is in use by process {other.pid} on "):
            lock_folder(tmp_path, "--output_dir")
        other.kill()
        other.wait()
    lock_folder(tmp_path, "--output_dir")
