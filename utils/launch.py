"""`accelerate launch`, ending as the training did: its exit code, and no stack trace of the launcher's own.

A mistake in the command line is told by `train.py` in a sentence; below it, accelerate's launcher would print forty
lines about a child process that failed, and exit with 1.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> int:
    args = launch_command_parser().parse_args()
    args.num_processes = args.num_processes or max(torch.cuda.device_count(), 1)
    # accelerate would give each process one thread; clips are encoded on the CPU where there is no GPU
    os.environ.setdefault("OMP_NUM_THREADS", str(max(len(os.sched_getaffinity(0)) // args.num_processes, 1)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(args)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    except subprocess.CalledProcessError as error:
        code = error.returncode
    else:
        return 0
    return code if code > 0 else 128 - code  # negative: ended by that signal


if __name__ == "__main__":
    sys.exit(main())
