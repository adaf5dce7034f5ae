"""Divides the videos of a command among several processes, one per GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TypeVar

import torch

from dataset.precompute import RankShard
from utils.common.errors import UserError
from utils.common.filesystem import ROOT

Item = TypeVar("Item")
# Environment variable of a started process: its number and the number of processes.
_SHARD = "CLI_DEMO_SHARD"


def num_processes() -> int:
    """Returns NUM_PROCESSES, by default 1. Raises UserError if it is no number, or there are fewer GPUs."""
    text = os.environ.get("NUM_PROCESSES") or "1"
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"NUM_PROCESSES={text} is not a valid number.")
    if 0 < torch.cuda.device_count() < int(text):
        raise UserError(f"NUM_PROCESSES={text}: only {torch.cuda.device_count()} GPUs are visible.")
    return int(text)


def own_shard() -> RankShard | None:
    """Returns the part of this process if `start_processes` has started it, else None."""
    shard = os.environ.get(_SHARD)
    return None if shard is None else RankShard(*map(int, shard.split("/")))


def start_processes(argv: list[str], count: int) -> list[str]:
    """Runs the command in several processes, each with its own GPU if there are any.

    Returns:
        a sentence for each process that failed. A failure does not end the others.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    started = []
    for number in range(count):
        variables = {_SHARD: f"{number}/{count}"}
        if gpus:
            variables["CUDA_VISIBLE_DEVICES"] = gpus[number]
        command = [sys.executable, str(ROOT / "cli_demo.py"), *argv]
        started.append(subprocess.Popen(command, env=os.environ | variables))
    try:
        ends = [_describe_end(process.wait()) for process in started]
    finally:  # of an interruption too
        for process in started:
            process.terminate()
            process.wait()
    return [f"Process {number} {end}." for number, end in enumerate(ends) if end]


def _describe_end(exit_code: int) -> str:
    """Returns how a process has failed; empty if it has not."""
    if exit_code == -signal.SIGKILL:
        return "was killed, as the system does when the host memory does not suffice"
    if exit_code < 0:
        return f"was ended by signal {-exit_code}"
    return f"ended with exit code {exit_code}" if exit_code else ""
