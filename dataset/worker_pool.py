"""A pool of worker processes that survives decoders that hang or crash.

A decoder is native code that reads untrusted files. It may abort, exhaust memory or never return, and one such worker
breaks the pools of the standard library. Here every worker has a deadline and its own pipe, so it cannot leave a shared
lock behind. A failed job is reported, its worker is replaced, and all other jobs continue.
"""

from __future__ import annotations

import itertools
import math
import mmap
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

import torch

from dataset.containers import ClipError
from utils.common.processes import end_with_parent

Job = TypeVar("Job")
# With two jobs, a worker starts the second one while the result of the first one is being processed.
JOBS_PER_WORKER = 2
# Forked workers inherit anonymous shared memory. Unlike /dev/shm, it leaves no file behind if a run is killed, and
# containers do not limit it to a few megabytes.
_CONTEXT = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Failure:
    """A failed job. The reason continues a sentence that starts with the name of a file."""

    reason: str


@dataclass(frozen=True)
class JobResult(Generic[Job]):
    """A job and its outcome.

    Attributes:
        outcome: return value of the function, or a `Failure`.
        buffer: uint8 memory that the job wrote to; valid until the next result is requested.
    """

    job: Job
    outcome: Any
    buffer: torch.Tensor


class _Worker:
    """One worker process, its pipe and its queue of assigned jobs."""

    def __init__(self, function: Callable[..., Any], buffers: list[torch.Tensor], timeout: float) -> None:
        self.connection, worker_connection = _CONTEXT.Pipe()
        args = (os.getpid(), self.connection, worker_connection, function, buffers)
        self.process = _CONTEXT.Process(target=_serve, args=args, daemon=True)
        self.process.start()
        worker_connection.close()
        self.timeout = timeout
        self.jobs: deque[tuple[Any, int]] = deque()  # (job, buffer index)
        self.deadline = math.inf

    def assign(self, job: Any, buffer_index: int) -> None:
        self.jobs.append((job, buffer_index))
        with suppress(OSError):  # the worker has crashed; `poll` reports it
            self.connection.send((job, buffer_index))
        if len(self.jobs) == 1:
            self.deadline = time.monotonic() + self.timeout

    def poll(self) -> Any:
        """Returns the outcome of the current job, or None if it is still running. Ends a crashed or late process."""
        if self.connection.poll():  # before the deadline check, since the result may have waited for the caller
            try:
                outcome = self.connection.recv()
            except (EOFError, OSError):
                outcome = _crash_failure(self.end())
        elif time.monotonic() > self.deadline:
            self.end()
            outcome = Failure(f"was not decoded within {self.timeout:g} s (--clip_timeout)")
        else:
            return None
        self.deadline = time.monotonic() + self.timeout if len(self.jobs) > 1 else math.inf
        return outcome

    def end(self) -> int | None:
        """Ends the process. Returns its exit code if it had already exited (negative: signal number), else None."""
        self.process.join(0.1)
        code = self.process.exitcode
        self.process.kill()
        self.process.join(1)  # a process blocked on a dead disk does not exit
        self.connection.close()
        return code


def run_in_workers(
    function: Callable[[Job, torch.Tensor], Any],
    jobs: Iterable[Job],
    num_workers: int,
    timeout: float,
    buffer_bytes: int = 1,
) -> Iterator[JobResult[Job]]:
    """Runs a function on every job in worker processes. Yields results as they finish, in any order.

    At most `JOBS_PER_WORKER` jobs per worker are taken from `jobs` ahead of the results.

    Args:
        function: (job, buffer uint8 [buffer_bytes]) -> result. The result is sent through a pipe, so it must be small
            and not None; large data goes to the buffer. An exception or a crash becomes a `Failure`.
        timeout: maximum number of seconds per job.
    """
    remaining, queue = iter(jobs), deque[Job]()
    buffers = [
        torch.frombuffer(mmap.mmap(-1, buffer_bytes), dtype=torch.uint8) for _ in range(num_workers * JOBS_PER_WORKER)
    ]
    free = deque(range(len(buffers)))
    workers: list[_Worker] = []
    try:
        while True:
            while free and (queue or (queue := deque(itertools.islice(remaining, 1)))):
                if len(workers) < num_workers:
                    workers.append(_Worker(function, buffers, timeout))
                min(workers, key=lambda worker: len(worker.jobs)).assign(queue.popleft(), free.popleft())
            if not (busy := [worker for worker in workers if worker.jobs]):
                return
            until_deadline = min(worker.deadline for worker in busy) - time.monotonic()
            wait([worker.connection for worker in busy], max(until_deadline, 0))
            for worker in busy:
                if (outcome := worker.poll()) is None:
                    continue
                job, buffer_index = worker.jobs.popleft()
                if worker.connection.closed:  # the process has ended; its other jobs go to another worker
                    queue.extend(job for job, _ in worker.jobs)
                    free.extend(buffer_index for _, buffer_index in worker.jobs)
                    workers.remove(worker)
                yield JobResult(job, outcome, buffers[buffer_index])
                free.append(buffer_index)
    finally:
        for worker in workers:
            worker.end()


def _serve(
    parent_pid: int,
    parent_connection: Connection,
    connection: Connection,
    function: Callable[..., Any],
    buffers: list[torch.Tensor],
) -> None:
    """Main loop of a worker process."""
    parent_connection.close()
    end_with_parent(parent_pid, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent ends its workers
    torch.set_num_threads(1)
    while True:
        try:
            job, buffer_index = connection.recv()
        except EOFError:
            return
        try:
            outcome = function(job, buffers[buffer_index])
        except ClipError as error:
            outcome = Failure(str(error))
        except Exception as error:
            outcome = Failure(f"cannot be used ({type(error).__name__}: {error})")
        connection.send(outcome)


def _crash_failure(exit_code: int | None) -> Failure:
    """Returns the failure of a job whose process ended."""
    if exit_code == -signal.SIGKILL:
        return Failure(
            "was being decoded when its process was killed, probably for lack of host memory; try fewer --num_workers"
        )
    name = signal.Signals(-exit_code).name if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
    return Failure(f"is damaged: the decoder crashed ({name})")
