"""Runs the launch scripts with the real launcher, but in processes that have imported their modules already.

Importing torch, diffusers and DeepSpeed takes 5 CPU seconds per process and would be most of the suite's time. A server
(`multiprocessing`'s "forkserver") imports them once; the launcher of each run is forked from it, and the launcher forks
its ranks. The quick start and the test that kills a whole run start programs as a user does.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch

import psutil

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.warm_modules"])
# Stands for `python` in a launch script, and writes down how it is called.
RECORD_ARGUMENTS = '#!/bin/sh\nprintf "%s\\0" "$@" > "$RECORDED"\n'


def run_warm(
    command: Sequence[str], environment: Mapping[str, str], cwd: str, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Does what `subprocess.run` does with `bash SCRIPT ...` or `python SCRIPT ...`, without the time for imports.

    Raises:
        TimeoutError: the program ran for longer than `timeout` seconds; the message has its output and the stacks of
            its processes.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder, "stdout"), Path(folder, "stderr")
        process = start_warm(command, environment, cwd, *map(str, outputs))
        process.join(timeout)
        if process.exitcode is None:
            end_with_stacks(process.pid)
            output = "".join(path.read_text() for path in outputs)
            raise TimeoutError(f"{' '.join(command)} did not end within {timeout:g} s:\n{output}")
        return subprocess.CompletedProcess(command, process.exitcode, *(path.read_text() for path in outputs))


def start_warm(
    command: Sequence[str], environment: Mapping[str, str], cwd: str, stdout: str, stderr: str
) -> multiprocessing.process.BaseProcess:
    """Does what `subprocess.Popen` does, with paths for the outputs."""
    argv = record_python(command, environment) if command[0] == "bash" else list(command[1:])
    umask = os.umask(0o077)
    os.umask(umask)
    process = CONTEXT.Process(target=_start, args=(argv, dict(environment), cwd, umask, stdout, stderr))
    process.start()
    return process


def end_with_stacks(pid: int | None) -> None:
    """Ends a program after each of its processes has written the stacks of its threads to standard error."""
    program = psutil.Process(pid)
    processes = [*program.children(recursive=True), program]
    for process in processes:
        process.send_signal(signal.SIGUSR1)
    time.sleep(1)  # a handler writes at once, also in a process that waits in native code
    for process in processes:
        process.kill()


def record_python(command: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Runs a bash script and returns the arguments with which it calls `python`."""
    with tempfile.TemporaryDirectory() as folder:
        python, recorded = Path(folder, "python"), Path(folder, "recorded")
        python.write_text(RECORD_ARGUMENTS)
        python.chmod(0o755)
        path = os.pathsep.join([folder, environment["PATH"]])
        subprocess.run(command, env={**environment, "PATH": path, "RECORDED": str(recorded)}, check=True)
        return recorded.read_text().split("\0")[:-1]


class ForkedRank:
    """A rank that the launcher forks in place of starting it; the part of `subprocess.Popen` that torchrun uses.

    A rank runs after the first `poll`, when all ranks are forked. A thread of the launcher holds a lock of the resolver
    while it accepts the connection of a rank, and a rank forked at that moment would wait for the lock forever.
    """

    def __init__(self, args: Sequence[str], env: dict[str, str]):
        self.args = args
        self.returncode: int | None = None
        gate, self.gate = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.gate)
            if not os.read(gate, 1):  # the launcher has ended
                os._exit(1)
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT):  # torchrun handles these
                signal.signal(number, signal.SIG_DFL)
            _run_script(args[args.index("-u") + 1 :], env)
        os.close(gate)

    def poll(self) -> int | None:
        if self.gate:
            with suppress(BrokenPipeError):  # the rank was killed
                os.write(self.gate, b"1")
            os.close(self.gate)
            self.gate = 0
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (timeout or float("inf"))
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.01)
        return code


def _start(argv: list[str], environment: dict[str, str], cwd: str, umask: int, stdout: str, stderr: str) -> NoReturn:
    """Runs in a process of the server."""
    os.umask(umask)
    for descriptor, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    faulthandler.register(signal.SIGUSR1)
    os.chdir(cwd)
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    for folder in environment.get("PYTHONPATH", "").split(os.pathsep):
        if Path(folder, "sitecustomize.py").exists():
            runpy.run_path(str(Path(folder, "sitecustomize.py")))
    with patch.object(SubprocessHandler, "_popen", lambda _, args, env: ForkedRank(args, env)):
        _run_script(argv, environment)


def _run_script(argv: Sequence[str], environment: dict[str, str]) -> NoReturn:
    """Runs `SCRIPT ...` or `-m MODULE ...` as Python would, and ends the process with its exit code."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    is_module = argv[0] == "-m"
    sys.argv, sys.path[0] = list(argv[is_module:]), str(Path.cwd() if is_module else Path(argv[0]).parent)
    code = 0
    try:
        if is_module:  # the types of dataclasses are looked up in sys.modules["__main__"]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        time.sleep(2)  # Python takes time to end, in which the launcher sees that another rank was killed
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
