"""Calls a function in a fresh Python process."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from utils.common.errors import UserError
from utils.common.filesystem import ROOT

Result = TypeVar("Result")


def run_in_subprocess(function: Callable[..., Result], *args: Any) -> Result:
    """Calls a function in a new interpreter that sees no GPU, and returns its result.

    Use it for work whose traces must not stay in this process, such as fake tensors in caches. The function must be
    importable; it, its arguments and its result are pickled.

    Raises:
        UserError: raised by the function.
        RuntimeError: the process failed; the message holds its traceback.
    """
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=pickle.dumps((function, args)), capture_output=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{function.__name__} failed in its own process:\n{done.stderr.decode()}")
    result = pickle.loads(done.stdout)
    if isinstance(result, UserError):
        raise result
    return result


def _serve() -> None:
    """Reads a call from stdin and writes its result to stdout."""
    result_file = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries that print must not mix with the result
    function, args = pickle.load(sys.stdin.buffer)
    try:
        result = function(*args)
    except UserError as error:
        result = error
    with result_file:
        pickle.dump(result, result_file)


if __name__ == "__main__":
    _serve()
