"""Runs the tests that need a GPU and all measurements, within a time limit. `on_gpu.sh` describes it.

This process never uses the GPU itself, since it would hold memory while the items measure. Items of a group share a
process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu_environment import ROOT, prepare
from benchmarks.gpu_rows import LORA_LEVERS, SFT_LEVERS, TINY_ROWS
from benchmarks.rows import ROWS
from utils.commands.launch import grow_segments
from utils.common.processes import end_with_parent

RESULTS = Path(__file__).parent / "results"
RESULTS_FILE, TESTS_LOG = "results.jsonl", "tests.log"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "deepspeed")
# No group is started with less than this share of its time limit left.
MIN_SHARE = 0.25
DESCRIBE_GPU = (
    "import json, torch; gpu = torch.cuda.get_device_properties(0); "
    "print(json.dumps([gpu.name, gpu.total_memory / 2**30, torch.version.cuda]))"
)


@dataclass(frozen=True)
class Group:
    """Items that are measured one after another in one process.

    Attributes:
        seconds: time limit of the group.
        command: what to run; the names of the items are appended unless it is pytest.
    """

    items: tuple[str, ...]
    seconds: float
    command: tuple[str, ...] = ("-m", "benchmarks.measure")


def groups(rehearse: bool) -> Iterator[Group]:
    """Yields everything there is to run, in the order of its worth."""
    parallel = ("-n", "4", "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
    pytest = ("-m", "pytest", "-vv", "--tb=short", "-m", "gpu", "tests/test_gpu.py")
    if rehearse:
        yield Group(("tests",), 150, (*pytest, "--rehearse", "-k", "slow_streams"))
        rows = [f"row/{row.name}" for row in TINY_ROWS]
        vae = [f"vae/tiny/{mode}" for mode in ("tiles", "batch", "channels_last", "overlap")]
        yield Group((*rows, "lever/tiny-lora", "attention/tiny/flash", *vae, "t5/tiny/1"), 150)
        return
    yield Group(("tests",), 100, (*pytest, *parallel))
    measured = [row.name for row in ROWS if row.zero is None]
    for recipe in ("train_ddp_t2v", "5b-lora", "2b-lora", "1.5-lora", "sft"):
        if recipe == "sft":
            yield Group(tuple(f"lever/{name}" for name in LORA_LEVERS), 200)
        names = [name for name in measured if recipe in name]
        # the smallest SFT rows come last: pinning their host memory takes long
        order = {"fastest": 0, "smallest": 3 if recipe == "sft" else 1}
        names.sort(key=lambda name: order.get(name.rpartition("-")[2], 2))
        yield from (Group((f"row/{name}",), 200) for name in names)
    # one process each: optimizers with hooks are not freed before their process ends
    yield from (Group((f"lever/{name}",), 60) for name in SFT_LEVERS)
    kernels = [f"attention/{model}/{name}" for model in ("5b", "1.5", "2b") for name in ("cudnn", "flash", "efficient")]
    yield Group(tuple(kernels), 60)
    yield Group(tuple(f"vae/5b/{mode}" for mode in ("tiles", "whole", "overlap", "batch", "channels_last")), 90)
    yield Group(("vae/1.5/tiles", "vae/1.5/whole", "t5/5b/1", "t5/5b/8"), 90)
    yield Group(("vae/5b/compiled",), 180)


class Results:
    """The file of results. The last line of an item counts.

    Args:
        facts: what every line records: GPU, commit, versions.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder, self.facts = folder, facts
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / RESULTS_FILE
        self.last = {line["item"]: line for line in read_lines(self.path)}
        if self.path.is_file() and not self.path.read_text().endswith("\n"):  # a kill has cut the last line short
            with self.path.open("a") as file:
                file.write("\n")

    def has(self, item: str) -> bool:
        """Whether an item is finished; a failed one is, until the commit changes."""
        line = self.last.get(item)
        return line is not None and ("error" not in line or line["commit"] == self.facts["commit"])

    def add(self, line: dict[str, Any]) -> None:
        """Appends a line and prints it."""
        line = line | self.facts | {"time": datetime.now(UTC).isoformat(timespec="seconds")}
        self.last[line["item"]] = line
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shown = {name: value for name, value in line.items() if name not in (*self.facts, "time", "kernels")}
        print(json.dumps(shown)[:300], flush=True)
        print("\n".join(line.get("kernels", [])), end="\n" if "kernels" in line else "", flush=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a results file; a line that a kill has cut short is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("items", nargs="?", default="", help="part of the names of the items; default: all")
    parser.add_argument("--again", action="store_true", help="repeat items that are in the results already")
    parser.add_argument("--minutes", type=float, default=8, help="time limit")
    parser.add_argument("--results", type=Path, help="folder of the results; default: benchmarks/results/<GPU>")
    parser.add_argument("--rehearse", action="store_true", help="run on a CPU, with tiny models")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    for sentence in prepare():
        print(sentence, flush=True)
    gpu, gib, cuda = ("CPU", None, None) if options.rehearse else describe_gpu()
    versions = {name: version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    facts = {"gpu": gpu, "commit": commit(), "versions": versions, "cuda": cuda}
    folder = options.results or RESULTS / gpu.replace(" ", "-")
    results = Results(folder, facts)
    for group in groups(options.rehearse):
        selected = [item for item in group.items if options.items in item and fits(item, gib)]
        items = [item for item in selected if options.again or not results.has(item)]
        if items and not run_group(group, items, results, deadline):
            print("The time limit is reached. The same command continues from here.")
            return
    print(f"All items are in {results.path}.")


def fits(item: str, gib: float | None) -> bool:
    """Whether a row is predicted to fit the GPU and the host. Other items always fit."""
    import psutil  # a bare machine lacks it; `prepare` has named it then

    predicted = json.loads((RESULTS / "predicted.json").read_text()).get(item.removeprefix("row/"))
    if gib is None or predicted is None:
        return True
    available = {"peak_gib": gib, "host_gib": psutil.virtual_memory().available / 2**30}
    for name, limit in available.items():
        if predicted[name] > limit:
            print(f"{item}: skipped, predicted {name} {predicted[name]}, available {limit:.1f}")
            return False
    return True


def run_group(group: Group, items: list[str], results: Results, deadline: float) -> bool:
    """Measures items. After a crash, the item that was running is recorded and the others follow in a new process.

    Returns:
        Whether the time sufficed.
    """
    while items:
        time_left = deadline - time.monotonic()
        if time_left < MIN_SHARE * group.seconds:
            return False
        run = run_tests if items == ["tests"] else run_items
        seconds = min(group.seconds, time_left)
        done, error = run(group, items, results, seconds)
        items = [item for item in items if item not in done]
        if items and error is None and seconds < group.seconds:  # earlier groups left too little time
            return False
        if items and not (done and error):  # a crash after finished items may have been caused by the last of them
            results.add({"item": items.pop(0), "error": error or f"not finished in {seconds:.0f} s"})
    return True


def run_items(group: Group, items: list[str], results: Results, seconds: float) -> tuple[set[str], str | None]:
    """Runs items in one process and saves each result as it is printed.

    Returns:
        The finished items, and what the process wrote to stderr if it ended; None after a timeout.
    """
    done: set[str] = set()
    with tempfile.NamedTemporaryFile("w+") as stdout, tempfile.NamedTemporaryFile("w+") as stderr:
        process = start(group, items, stdout, stderr)
        with Path(stdout.name).open() as printed:

            def save_results() -> None:
                position = printed.tell()
                while (text := printed.readline()).endswith("\n"):
                    position = printed.tell()
                    if text.startswith('{"item"'):  # libraries print too
                        results.add(json.loads(text))
                        done.add(json.loads(text)["item"])
                printed.seek(position)  # the rest of this line follows

            is_in_time = wait(process, seconds, save_results)
        message = f"exit code {process.returncode}\n{Path(stderr.name).read_text()[-4000:]}"
    return done, message if is_in_time else None


def run_tests(group: Group, items: list[str], results: Results, seconds: float) -> tuple[set[str], str | None]:
    """Runs pytest. Its output, with all tracebacks, is in TESTS_LOG even if the time does not suffice."""
    log, started = results.folder / TESTS_LOG, time.monotonic()
    with log.open("w") as output:
        process = start(group, [], output, output)
        is_in_time = wait(process, seconds, lambda: None)
    text = log.read_text()
    passed, failed = (
        {before or after for before, after in re.findall(rf"(?:{word}) (tests/\S+)|(tests/\S+) (?:{word})", text)}
        for word in ("PASSED", "FAILED|ERROR")
    )
    line: dict[str, Any] = {
        "item": "tests",
        "passed": len(passed),
        "failed": sorted(failed),
        "seconds": round(time.monotonic() - started, 1),
    }
    if not is_in_time:
        line["error"] = f"not finished in {seconds:.0f} s; see {TESTS_LOG}"
    elif process.returncode:
        line["error"] = f"see {TESTS_LOG}\n{text[-4000:]}"
    results.add(line)
    return {"tests"}, None


def start(group: Group, items: list[str], stdout: IO[str], stderr: IO[str]) -> subprocess.Popen[bytes]:
    """Starts the process of a group as the leader of its own process group. It ends if this process is killed."""
    command = [sys.executable, "-u", *group.command, *items]
    die = partial(end_with_parent, os.getpid(), signal.SIGKILL)
    return subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=stderr, start_new_session=True, preexec_fn=die)


def wait(process: subprocess.Popen[bytes], seconds: float, poll: Callable[[], None]) -> bool:
    """Waits until a process ends, and then ends its children, such as compiler processes.

    Args:
        seconds: time limit, after which the process is ended.
        poll: called repeatedly, and once more at the end.

    Returns:
        Whether the process ended in time.
    """
    end = time.monotonic() + seconds
    try:
        while process.poll() is None and time.monotonic() < end:
            poll()
            time.sleep(0.1)
        is_in_time = process.poll() is not None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    poll()
    return is_in_time


def describe_gpu() -> tuple[str, float, str]:
    """Returns name, memory in GiB and CUDA version, as another process sees them. Exits without a GPU."""
    described = subprocess.run([sys.executable, "-c", DESCRIBE_GPU], capture_output=True, text=True)
    if described.returncode:
        sys.exit(f"This needs an NVIDIA GPU; --rehearse does not.\n{described.stderr.strip()[-500:]}")
    return json.loads(described.stdout)


def commit() -> str:
    """Returns the commit of the working tree; "+" marks changes."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    if shutil.which("git") is None:
        return "unknown"
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return (head or "unknown") + ("+" if changes else "")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, which ends the processes of the items
    grow_segments()  # in the processes of the items, as in training
    main()
