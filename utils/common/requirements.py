"""Names requirements that are not installed. Imports only the standard library, so that it can run first."""

from __future__ import annotations

import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"
# Package -> its module, if the names differ.
_MODULES = {"Pillow": "PIL", "protobuf": "google.protobuf", "imageio-ffmpeg": "imageio_ffmpeg"} | {
    "scenedetect-headless": "scenedetect",
    "ImageHash": "imagehash",
}
# DDP runs without the first, --report_to checks the second, and only prepare_dataset needs the others.
_OPTIONAL = {"deepspeed", "tensorboard", "scenedetect-headless", "ImageHash"}
_EXIT_CODE = 2  # of a user error


def check_requirements(*needed: str) -> None:
    """Exits with a sentence if a package in requirements.txt is not installed. Imports none of them.

    Does nothing if the variable MISSING_REQUIREMENTS_NAMED is set, as `benchmarks/on_gpu.sh` does.

    Args:
        needed: packages to check that not every run needs.
    """
    if os.environ.get("MISSING_REQUIREMENTS_NAMED"):
        return
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    packages = {re.split(r"[<>=]", line)[0] for line in lines if line and line[0] != "#"}
    missing = [name for name in sorted(packages - _OPTIONAL | {*needed}) if not _is_installed(_MODULES.get(name, name))]
    if missing:
        # uv makes environments without pip
        install = f"{sys.executable} -m pip" if _is_installed("pip") else "uv pip"
        print(
            f"error: {', '.join(missing)} cannot be imported by {sys.executable}. Activate the environment of this "
            f"project, or install what is missing: {install} install -r {REQUIREMENTS}",
            file=sys.stderr,
        )
        sys.exit(_EXIT_CODE)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the parent of google.protobuf
        return False
