"""Worker processes in which a decoder may hang or crash: the job is lost, the worker is replaced, the rest goes on.

A decoder is native code that reads files from anywhere: it aborts, overruns its memory or waits for ever, and a pool of
the standard library ends with the first of its processes that does. Here every worker has a pipe of its own, so none
can leave a lock behind, and a deadline.
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

from dataset.video import ClipError
from utils.common.processes import end_with_parent

Job = TypeVar("Job")
# Jobs that a worker has at a time: it begins the second while the first one's result waits to be taken.
JOBS_A_WORKER = 2
# Anonymous memory reaches a worker by forking, without a name that a killed run would leave behind and without the
# few megabytes to which containers limit /dev/shm.
_CONTEXT = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Failure:
    """Why a job has no result; continues a sentence that began with the name of a file."""

    reason: str


@dataclass(frozen=True)
class Done(Generic[Job]):
    """A job and what came of it.

    Attributes:
        buffer: the memory that the job wrote to, uint8; it is the next job's as soon as the next result is asked for.
    """

    job: Job
    outcome: Any
    buffer: torch.Tensor


class _Worker:
    def __init__(self, function: Callable[..., Any], buffers: list[torch.Tensor], timeout: float) -> None:
        self.connection, theirs = _CONTEXT.Pipe()
        args = (os.getpid(), self.connection, theirs, function, buffers)
        self.process = _CONTEXT.Process(target=_serve, args=args, daemon=True)
        self.process.start()
        theirs.close()
        self.timeout = timeout
        self.jobs: deque[tuple[Any, int]] = deque()  # with the number of their buffer
        self.deadline = math.inf

    def assign(self, job: Any, buffer: int) -> None:
        self.jobs.append((job, buffer))
        with suppress(OSError):  # it has crashed; `outcome` will find that
            self.connection.send((job, buffer))
        if len(self.jobs) == 1:
            self.deadline = time.monotonic() + self.timeout

    def outcome(self) -> Any:
        """Of the current job, if it is over; None if not. Ends the process where it was lost."""
        if self.connection.poll():  # before the deadline is asked: whoever takes the results may have been away
            try:
                outcome = self.connection.recv()
            except (EOFError, OSError):
                outcome = _crash(self.end())
        elif time.monotonic() > self.deadline:
            self.end()
            outcome = Failure(f"was not read within {self.timeout:g} s (--clip_timeout)")
        else:
            return None
        self.deadline = time.monotonic() + self.timeout if len(self.jobs) > 1 else math.inf
        return outcome

    def end(self) -> int | None:
        """Ends the process; gives its exit code if it had ended by itself, negative for a signal."""
        self.process.join(0.1)
        code = self.process.exitcode
        self.process.kill()
        self.process.join(1)  # one that waits for a dead disk does not end
        self.connection.close()
        return code


def run_in_workers(
    function: Callable[[Job, torch.Tensor], Any],
    jobs: Iterable[Job],
    num_workers: int,
    timeout: float,
    buffer_bytes: int = 1,
) -> Iterator[Done[Job]]:
    """Runs a function on every job in worker processes. Yields the jobs as they are done, in any order.

    At most `JOBS_A_WORKER` jobs a worker are taken from `jobs` ahead of the results.

    Args:
        function: (job, buffer uint8 [buffer_bytes]) -> result, not None and small, since it comes through a pipe; what
            is large it writes to the buffer. A ClipError that it raises becomes a `Failure`, as does its end.
        timeout: seconds a job.
    """
    todo, again = iter(jobs), deque[Job]()
    buffers = [
        torch.frombuffer(mmap.mmap(-1, buffer_bytes), dtype=torch.uint8) for _ in range(num_workers * JOBS_A_WORKER)
    ]
    free = deque(range(len(buffers)))
    workers: list[_Worker] = []
    try:
        while True:
            while free and (again or (again := deque(itertools.islice(todo, 1)))):
                if len(workers) < num_workers:
                    workers.append(_Worker(function, buffers, timeout))
                min(workers, key=lambda worker: len(worker.jobs)).assign(again.popleft(), free.popleft())
            if not (busy := [worker for worker in workers if worker.jobs]):
                return
            patience = min(worker.deadline for worker in busy) - time.monotonic()
            wait([worker.connection for worker in busy], max(patience, 0))
            for worker in busy:
                if (outcome := worker.outcome()) is None:
                    continue
                job, number = worker.jobs.popleft()
                if worker.connection.closed:
                    again.extend(job for job, _ in worker.jobs)
                    free.extend(number for _, number in worker.jobs)
                    workers.remove(worker)
                yield Done(job, outcome, buffers[number])
                free.append(number)
    finally:
        for worker in workers:
            worker.end()


def _serve(
    parent: int,
    parents: Connection,
    connection: Connection,
    function: Callable[..., Any],
    buffers: list[torch.Tensor],
) -> None:
    parents.close()
    end_with_parent(parent, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the parent decides
    torch.set_num_threads(1)
    while True:
        try:
            job, number = connection.recv()
        except EOFError:
            return
        try:
            outcome = function(job, buffers[number])
        except ClipError as error:
            outcome = Failure(str(error))
        except Exception as error:
            outcome = Failure(f"cannot be used ({type(error).__name__}: {error})")
        connection.send(outcome)


def _crash(exit_code: int | None) -> Failure:
    if exit_code == -signal.SIGKILL:
        return Failure("was being decoded when its process was killed; is host memory enough? Try fewer --num_workers")
    name = signal.Signals(-exit_code).name if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
    return Failure(f"is damaged: it made the decoder crash ({name})")
