"""The worker pool when a decoder hangs, crashes or is killed."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Generator

import psutil
import pytest

from dataset.containers import ClipError
from dataset.worker_pool import JOBS_PER_WORKER, Failure, run_in_workers


def misbehave(job: str, buffer) -> str:
    """Does what the name of the job says, and otherwise copies the name into the buffer."""
    if job == "hangs":
        time.sleep(1000)
    if job == "aborts":
        faulthandler.disable()  # suppresses the report of pytest's fault handler
        os.abort()
    if job == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if job == "is unfit":
        raise ClipError("is too short")
    if job == "fails":
        raise KeyError("x")
    buffer[: len(job)] = buffer.new_tensor(list(job.encode()))
    return job.upper()


@pytest.mark.parametrize(("num_workers", "encoding_s"), [(1, 0), (3, 0), (1, 0.2)])
def test_failed_jobs_do_not_affect_others(num_workers, encoding_s):
    other_children = psutil.Process().children()
    failing = ["hangs", "aborts", "is killed", "is unfit", "fails"]
    jobs = [name for number, job in enumerate(failing) for name in (f"a{number}", job, f"b{number}")]
    outcomes = {}
    for done in run_in_workers(misbehave, jobs, num_workers, timeout=2.0, buffer_bytes=100):
        outcomes[done.job] = done.outcome
        time.sleep(encoding_s)  # a worker crashes while the main process is busy
        if not isinstance(done.outcome, Failure):
            assert bytes(done.buffer[: len(done.job)].tolist()).decode() == done.job
    assert outcomes.keys() == set(jobs)
    assert all(outcomes[job] == job.upper() for job in jobs if job not in failing)
    reasons = {job: outcomes[job].reason for job in failing}
    assert "was not decoded within 2 s" in reasons["hangs"]
    assert "crashed (SIGABRT)" in reasons["aborts"]
    assert "host memory" in reasons["is killed"]
    assert reasons["is unfit"] == "is too short"
    assert "KeyError" in reasons["fails"]
    assert psutil.Process().children() == other_children


def test_jobs_are_consumed_only_as_fast_as_results():
    taken, other_children = [], psutil.Process().children()

    def jobs():
        for number in range(50):
            taken.append(number)
            yield f"job {number}"

    results = run_in_workers(misbehave, jobs(), 2, timeout=10, buffer_bytes=100)
    for count in range(1, 20):
        done = next(results)
        content = bytes(done.buffer.tolist())
        time.sleep(0.01)  # a slow consumer: workers must not overwrite a buffer in use
        assert bytes(done.buffer.tolist()) == content
        assert len(taken) <= count + 2 * JOBS_PER_WORKER
    assert isinstance(results, Generator)
    results.close()
    assert psutil.Process().children() == other_children


def test_slow_encoder_does_not_trigger_the_decoding_timeout():
    outcomes = []
    for done in run_in_workers(misbehave, [f"job {number}" for number in range(6)], 1, timeout=0.5, buffer_bytes=100):
        outcomes.append(done.outcome)
        time.sleep(0.7)
    assert outcomes == [f"JOB {number}" for number in range(6)]
