"""The benchmarks on a GPU: a rehearsal on a CPU, failures and time limits, constants and tables from results."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from benchmarks import decide, gpu_environment, on_gpu, real_size, tables
from benchmarks.gpu_rows import LEVER_ROWS, LORA_LEVERS, SFT_LEVERS
from benchmarks.on_gpu import Group
from benchmarks.rows import ROWS
from tests.conftest import ROOT, succeed

# A program in place of `benchmarks.measure`.
ITEMS = """
import json, subprocess, sys, time
subprocess.Popen(["sleep", "60"])  # a compiler process that outlives the items
for name in sys.argv[1:]:
    if name == "crash":
        sys.exit("the GPU has fallen off the bus")
    if name == "hang":
        time.sleep(60)
    print("a library prints")
    print(json.dumps({"item": name, "seconds": 1}), flush=True)
"""


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """All code but CUDA's runs: tests, rows, attention, encoders."""
    succeed("benchmarks/on_gpu.sh", "--rehearse", "--results", str(tmp_path))
    measured = {line["item"]: line for line in on_gpu.read_lines(tmp_path / "results.jsonl")}
    items = [item for group in on_gpu.groups(rehearse=True) for item in group.items]
    assert set(items) <= measured.keys() and not [line for line in measured.values() if "error" in line]
    assert measured["tests"]["passed"] == 2 and measured["tests"]["failed"] == []
    assert all(line["gpu"] == "CPU" and line["commit"] and line["versions"]["torch"] for line in measured.values())
    assert measured["row/tiny-lora"]["seconds"] > 0 and len(measured["row/tiny-lora/kernels"]["kernels"]) == 21
    assert list(decide.decide(decide.read_results(tmp_path), {}))


def run(monkeypatch, folder: Path, groups: list[Group], *options: str) -> dict[str, dict[str, Any]]:
    """Runs `on_gpu` with other groups and returns the last line of each item."""
    monkeypatch.setattr(on_gpu, "groups", lambda rehearse: iter(groups))
    monkeypatch.setattr(on_gpu, "prepare", list)  # would change the environment of other tests
    monkeypatch.setattr("sys.argv", ["on_gpu", "--rehearse", "--results", str(folder), *options])
    on_gpu.main()
    return {line["item"]: line for line in on_gpu.read_lines(folder / "results.jsonl")}


def test_bare_machine_is_prepared_and_what_it_lacks_is_named(monkeypatch, tmp_path):
    installed = {"protobuf": "6.33.6", "torch": "2.11.0+cu130"}

    def version(name: str) -> str:
        if name in ("decord", "ruff"):
            raise PackageNotFoundError
        return installed.get(name) or metadata.version(name)

    monkeypatch.setattr(gpu_environment, "version", version)
    monkeypatch.setenv("TEMPORARILY_DISABLE_PROTOBUF_VERSION_CHECK", "")
    monkeypatch.setenv("PATH", str(tmp_path))  # no `python`
    sentences = list(gpu_environment.prepare())
    assert sentences[0].startswith("protobuf 6.33.6 is installed, but requirements.txt requires protobuf>=")
    assert sentences[2].startswith("decord is not installed; requirements.txt requires") and len(sentences) == 3
    program = "import os, sys; print(sys.prefix, os.environ['TEMPORARILY_DISABLE_PROTOBUF_VERSION_CHECK'])"
    printed = subprocess.run(["python", "-c", program], env=os.environ, text=True, capture_output=True, check=True)
    assert printed.stdout == f"{sys.prefix} true\n"
    # -S hides all packages; of the modules that are imported, only this one needs PyTorch
    program = "import sys; sys.modules['utils.common.torchvision_cpu'] = sys; import benchmarks.on_gpu"
    exported = re.findall(r"^export (MISSING\w+)=(\w+)", (ROOT / "benchmarks/on_gpu.sh").read_text(), re.MULTILINE)
    subprocess.run([sys.executable, "-S", "-c", program], cwd=ROOT, env=dict(exported), check=True)


def test_failures_are_recorded_and_do_not_stop_other_items(monkeypatch, tmp_path):
    monkeypatch.setenv("COMMIT", "one")
    groups = [Group(("a", "crash", "b"), 30, ("-c", ITEMS)), Group(("hang",), 1, ("-c", ITEMS))]
    groups.append(Group(("c",), 30, ("-c", ITEMS)))
    start = time.monotonic()
    lines = run(monkeypatch, tmp_path, groups)
    assert time.monotonic() - start < 20
    assert {name: "error" in line for name, line in lines.items()} == {
        **{"a": False, "crash": True, "b": False, "hang": True, "c": False}
    }
    assert "the GPU has fallen off the bus" in lines["crash"]["error"] and "exit code 1" in lines["crash"]["error"]
    assert lines["hang"]["error"] == "not finished in 1 s"
    count = len(on_gpu.read_lines(tmp_path / "results.jsonl"))
    run(monkeypatch, tmp_path, groups)  # nothing is left
    assert len(on_gpu.read_lines(tmp_path / "results.jsonl")) == count == 5
    monkeypatch.setenv("COMMIT", "two")  # only failed items are repeated
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"item": "a", "er')  # a line that a kill has cut short
    file_lines = run(monkeypatch, tmp_path, groups)
    assert {name for name, line in file_lines.items() if line["commit"] == "two"} == {"crash", "hang"}


def test_time_limit_leaves_the_rest_to_the_next_call(monkeypatch, tmp_path):
    monkeypatch.setattr(on_gpu, "MIN_SHARE", 0.02)
    groups = [Group((name,), 30, ("-c", ITEMS)) for name in ("a", "hang", "b")]
    start = time.monotonic()
    lines = run(monkeypatch, tmp_path, groups, "--minutes", "0.05")
    assert lines.keys() == {"a"} and time.monotonic() - start < 6  # `hang` is not to blame for the limit
    lines = run(monkeypatch, tmp_path, groups, "b")
    assert lines.keys() == {"a", "b"}


def test_failing_test_is_named_and_its_traceback_is_kept(monkeypatch, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text("def test_good(): pass\ndef test_bad(): assert 1 + 1 == 3\n")
    monkeypatch.setattr(on_gpu, "ROOT", tmp_path)
    command = ("-m", "pytest", "-vv", "-p", "no:cacheprovider", "tests/test_x.py")
    lines = run(monkeypatch, tmp_path, [Group(("tests",), 60, command)])
    assert lines["tests"]["passed"] == 1 and lines["tests"]["failed"] == ["tests/test_x.py::test_bad"]
    assert "assert (1 + 1) == 3" in lines["tests"]["error"]
    assert "assert (1 + 1) == 3" in (tmp_path / "tests.log").read_text()


def results(gpu: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields results of a made-up GPU: each row takes 10 % more memory than predicted, or 20 % for 5b-lora."""
    facts = {"gpu": gpu, "commit": "abc1234", "versions": {"torch": "2.11.0"}, "cuda": "13.0"}
    for name, row in json.loads((ROOT / "benchmarks" / "results" / "predicted.json").read_text()).items():
        ratio = 1.2 if name == "5b-lora" else 1.1
        seconds = row["tflop"] / (0.4 * 989)
        figures = {"reserved_gib": ratio * row["peak_gib"], "context_gib": 0.55, "seconds": seconds, "utilization": 0.3}
        yield f"row/{name}", facts | figures
    for number, name in enumerate([*LORA_LEVERS, *SFT_LEVERS]):
        yield f"lever/{name}", facts | {"seconds": 1 + number / 10, "reserved_gib": 20 - number, "first_s": 40.0}
    yield "lever/fp8", facts | {"seconds": 3.0, "reserved_gib": 30.0, "first_s": 40.0}
    for kernel, seconds in (("flash", 0.02), ("cudnn", 0.01)):
        yield f"attention/5b/{kernel}", facts | {"forward_seconds": seconds, "backward_seconds": 2 * seconds}
    yield "vae/5b/tiles", facts | {"clips_per_minute": 20.0, "reserved_gib": 3.0}


def test_constants_follow_from_results():
    predicted = json.loads((ROOT / "benchmarks" / "results" / "predicted.json").read_text())
    text = "\n".join(decide.decide(dict(results("NVIDIA H100 80GB HBM3")), predicted))
    assert "MARGIN = 1.2\nCONTEXT_GIB = 0.6\nUTILIZATION = (0.40, 0.40)" in text
    assert text.count("off by more than 10 %") >= 1
    assert "relative to none: selective +0.30, selective-offload +0.40, full +0.10" in text
    assert "2b-lora, from fastest to slowest" in text and "5b-sft, from" in text and "GiB: missed" in text
    [fp8] = [line for line in text.splitlines() if line.startswith("  fp8 ")]
    assert "useless: none is faster" in fp8 and text.count("useless") == 1
    assert "--attention_kernel, 5b: cudnn 30.0 ms, flash 60.0 ms" in text and "20.00 clips_per_minute" in text


@pytest.mark.parametrize("page", tables.PAGES)
def test_tables_are_current(page):
    assert tables.render_page(page) == (ROOT / page).read_text(), "run python -m benchmarks.tables"


def test_tables_tell_measured_from_predicted_figures():
    predicted = {"train_ddp_t2v.sh": {"peak_gib": 19.21}, "5b-lora-smallest": {"peak_gib": 7.5}}
    measured = {name: line for name, line in results("NVIDIA H100") if name == "row/5b-lora-smallest"}
    page = "<!-- table: models -->\nold\n<!-- end of table -->\n"
    text = tables.render(page, predicted, [measured], tables.ENGLISH)
    [row] = [line for line in text.splitlines() if "`THUDM/CogVideoX-5b`" in line]
    figure = f"{measured['row/5b-lora-smallest']['reserved_gib']:.1f}"
    assert row.endswith(f"| bf16 | 19.2 predicted | {figure} measured [1] |") and "old" not in text
    assert "\n[1] measured on an NVIDIA H100 at commit abc1234, with torch 2.11.0, CUDA 13.0.\n" in text
    assert text.startswith("<!-- table: models -->\n") and text.endswith("\n<!-- end of table -->\n")


def test_every_row_is_measured():
    for row in LEVER_ROWS:  # their flags fit together
        real_size.context_of(row)
    items = {item for group in on_gpu.groups(rehearse=False) for item in group.items}
    assert {f"row/{row.name}" for row in ROWS if row.zero is None and "i2v" not in row.name} <= items
