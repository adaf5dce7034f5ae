"""Decoding where the decoder hangs, crashes or is killed."""

from __future__ import annotations

import faulthandler
import os
import signal
import time

import psutil
import pytest

from dataset.video import ClipError
from dataset.worker_pool import JOBS_PER_WORKER, Failure, run_in_workers


def odd(job: str, buffer) -> str:
    """Does to its process what its name says."""
    if job == "hangs":
        time.sleep(1000)
    if job == "aborts":
        faulthandler.disable()  # pytest's, which would print where
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
def test_what_goes_wrong_costs_nothing_but_itself(num_workers, encoding_s):
    odd_ones = ["hangs", "aborts", "is killed", "is unfit", "fails"]
    jobs = [name for number, one in enumerate(odd_ones) for name in (f"a{number}", one, f"b{number}")]
    outcomes = {}
    for done in run_in_workers(odd, jobs, num_workers, timeout=2.0, buffer_bytes=100):
        outcomes[done.job] = done.outcome
        time.sleep(encoding_s)  # a worker crashes while nobody looks
        if not isinstance(done.outcome, Failure):
            assert bytes(done.buffer[: len(done.job)].tolist()).decode() == done.job
    assert outcomes.keys() == set(jobs)
    assert all(outcomes[job] == job.upper() for job in jobs if job not in odd_ones)
    reasons = {job: outcomes[job].reason for job in odd_ones}
    assert "was not decoded within 2 s" in reasons["hangs"]
    assert "crashed (SIGABRT)" in reasons["aborts"]
    assert "host memory" in reasons["is killed"]
    assert reasons["is unfit"] == "is too short"
    assert "KeyError" in reasons["fails"]
    assert not psutil.Process().children()


def test_jobs_are_taken_only_as_fast_as_results_are():
    taken = []

    def jobs():
        for number in range(50):
            taken.append(number)
            yield f"job {number}"

    results = run_in_workers(odd, jobs(), 2, timeout=10, buffer_bytes=100)
    for count in range(1, 20):
        done = next(results)
        kept = bytes(done.buffer.tolist())
        time.sleep(0.01)  # whoever encodes is slow; the workers are not
        assert bytes(done.buffer.tolist()) == kept  # and do not write to what is in use
        assert len(taken) <= count + 2 * JOBS_PER_WORKER
    results.close()
    assert not psutil.Process().children()


def test_a_slow_encoder_is_not_taken_for_a_slow_decoder():
    outcomes = []
    for done in run_in_workers(odd, [f"job {number}" for number in range(6)], 1, timeout=0.5, buffer_bytes=100):
        outcomes.append(done.outcome)
        time.sleep(0.7)
    assert outcomes == [f"JOB {number}" for number in range(6)]
