"""Process lifetime helpers."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent_pid: int, signal_number: signal.Signals) -> None:
    """Sends a signal to this process when its parent ends for any reason. Has no effect outside of Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal_number)
        if os.getppid() != parent_pid:  # the parent ended before the call
            os.kill(os.getpid(), signal_number)


@contextmanager
def exit_without_teardown() -> Iterator[None]:
    """Exits the process at the end of the block: runs the atexit handlers, but skips the interpreter's teardown.

    A gloo thread that releases a tensor during the teardown aborts the process (pytorch issues 38228 and 190489), so a
    run that has finished its work would sometimes be reported as failed. Exceptions other than SystemExit propagate.
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
