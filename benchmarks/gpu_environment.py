"""Prepares the environment of `on_gpu` on a machine that was not set up for this project.

At its start, `on_gpu` imports no package but PyTorch, so that it can name the packages that are missing.
"""

from __future__ import annotations

import atexit
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def prepare() -> Iterator[str]:
    """Sets the variables of the programs that the items start. Yields sentences about what is missing."""
    provide_python()
    for name, sentence in unmet_requirements():
        yield sentence
        if name == "protobuf":
            # the generated code of sentencepiece checks the version, but uses nothing that is new in it
            os.environ["TEMPORARILY_DISABLE_PROTOBUF_VERSION_CHECK"] = "true"
            yield "protobuf: the version check of sentencepiece is off, so that tokenizers can be read."


def provide_python() -> None:
    """Puts this interpreter on the PATH as `python`, which the launch scripts call, and the folder of its programs."""
    folder = Path(tempfile.mkdtemp(prefix="python-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')  # a link would leave the environment
    python.chmod(0o755)
    os.environ["PATH"] = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])


def unmet_requirements() -> Iterator[tuple[str, str]]:
    """Yields the name of each package that is missing or has another version than required, and a sentence on it."""
    for file, pattern in (("requirements.txt", r"^\w.*"), ("requirements-dev.txt", r"^pytest.*")):  # no item needs ruff
        for requirement in re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE):
            name, allowed = re.fullmatch(r"([\w.-]+)(.*)", requirement).groups()  # type: ignore[union-attr]
            try:
                installed = version(name)
            except PackageNotFoundError:
                yield name, f"{name} is not installed; {file} requires {requirement}. Items that need it fail."
                continue
            from packaging.specifiers import SpecifierSet  # installed with the first package

            if not SpecifierSet(allowed).contains(installed, prereleases=True):
                yield name, f"{name} {installed} is installed, but {file} requires {requirement}."
