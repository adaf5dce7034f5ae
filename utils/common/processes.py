"""What processes owe to one another."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent: int, how: signal.Signals) -> None:
    """This process gets a signal when its parent ends, however that ends. Of no effect outside of Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, how)
        if os.getppid() != parent:  # it ended before that
            os.kill(os.getpid(), how)


@contextmanager
def ends_the_process() -> Iterator[None]:
    """Ends the process with the block: what is registered for the exit runs, but the interpreter is not torn down.

    A thread of gloo's that lets go of a tensor during the teardown aborts the process (pytorch issues 38228, 190489): a
    run whose work is done and written would now and then be reported as failed. Exceptions pass through.
    """
    code = 0
    try:
        yield
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
