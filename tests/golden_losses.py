"""Compares short runs with recorded losses, so that any change of a number is noticed.

python -m pytest -m golden --update-golden     # rewrites tests/golden/*.json
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import read_metrics

FOLDER = Path(__file__).parent / "golden"
RECORDED = ("loss", "grad_norm", "held_out_loss")


def compare_with_golden(name: str, output: Path, config: pytest.Config) -> None:
    """Compares the metrics of a run in `output` with `tests/golden/NAME.json`, within 1e-5 relative.

    With `--update-golden`, rewrites the file first.
    """
    measured = [{key: line[key] for key in ("step", *RECORDED) if key in line} for line in read_metrics(output)]
    path = FOLDER / f"{name}.json"
    if config.getoption("--update-golden"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(json.dumps(measured, indent=1) + "\n")
    expected = json.loads(path.read_text())
    assert len(measured) == len(expected)
    for line, golden in zip(measured, expected, strict=True):
        assert line == pytest.approx(golden, rel=1e-5)
