"""The import order of the packages (docs/architecture.md), and names that are no longer used."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

ORDER = [
    ("common",),
    ("memory", "dataset"),
    ("model", "config"),
    ("training",),
    ("checkpoint", "estimate"),
    ("run", "generation"),
    ("commands", "train", "cli_demo"),
]
RANK = {package: rank for rank, packages in enumerate(ORDER) for package in packages}
MODULES = [
    path.relative_to(ROOT)
    for pattern in ("utils/**/*.py", "dataset/*.py", "train.py", "cli_demo.py")
    for path in sorted(ROOT.glob(pattern))
]
RETIRED = (
    *("Beside", "Excerpt", "HostMemory", "LiveBytes", "ModelForm", "PageLocked", "Parked", "RollCall", "SideStream"),
    *("is_zero", "keep_attention", "on_the_line", "put_together", "release_gradients", "round_at_random"),
    *("told_to_the_user", "under_zero", "component_files", "fake_parts", "fake_run", "host_adam", "model_form"),
    *("quantized_adam", "roll_call", "zero_config", "written_whole", "remove_leftovers", "set_nanoseconds"),
    *("look_at_data", "model_faults", "machine_faults", "tracker_faults", "compile_fault", "loss_of"),
)
# files that tell users what became of an old name
MAY_NAME_RETIRED = ("CHANGELOG.md", "utils/config/options.py", "tests/test_layout.py", "tests/test_preflight.py")


def package_of(parts: list[str]) -> str | None:
    """Returns the package in ORDER that a dotted name belongs to, or None for other modules."""
    name = parts[1] if parts[0] == "utils" and len(parts) > 1 else parts[0]
    return name if name in RANK else None


def imported_packages(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for name in names:
            if package := package_of((prefix + name).split(".")):
                yield package


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_follow_the_order(path):
    package = package_of(list(path.with_suffix("").parts))
    for imported in imported_packages(path):
        if package is None:  # utils/__init__.py
            assert imported == "common"
        elif package == "dataset":
            assert imported in ("dataset", "common")
        else:
            assert imported == package or RANK[imported] < RANK[package]


@pytest.mark.parametrize("path", [path for path in MODULES if path.name == "__init__.py"], ids=str)
def test_packages_reexport_no_names(path):
    """They may import what must run before any other import."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert [alias.name for alias in node.names] in (["torchvision_cpu"], ["check_requirements"])


def test_retired_names_are_not_used():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    patterns = [option for name in RETIRED for option in ("-e", name)]
    files = ["*.py", "*.sh", "*.md", "*.yaml", "*.json", *(f":!{path}" for path in MAY_NAME_RETIRED)]
    found = subprocess.run(["git", "grep", "-nw", *patterns, "--", *files], cwd=ROOT, text=True, capture_output=True)
    assert found.returncode == 1, found.stdout + found.stderr
