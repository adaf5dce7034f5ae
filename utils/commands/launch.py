"""`accelerate launch`, told by the environment on how many machines and processes, and ending as the training did.

    NUM_PROCESSES      processes, of all machines together; default: one a visible GPU
    NUM_MACHINES       machines; each runs the same script, with the same files under the same paths
    MACHINE_RANK       0 on the first machine, then 1, 2, ...
    MAIN_PROCESS_IP    address of the first machine
    MAIN_PROCESS_PORT  a port of the first machine that all can reach; default 29500
    ZERO               template in place of the one that accelerate_config.yaml names: zero2, zero3_offload or another
                       in configs/, or the path of a .json file

A mistake in the command line is told by `train.py` in a sentence; below it, accelerate's launcher would print forty
lines about a child process that failed, and exit with 1.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MACHINE_SETTINGS = ("NUM_PROCESSES", "NUM_MACHINES", "MACHINE_RANK", "MAIN_PROCESS_IP", "MAIN_PROCESS_PORT")


def from_environment() -> Iterator[str]:
    """The launcher's flags that environment variables stand for. Exits where a template does not exist."""
    for name in MACHINE_SETTINGS:
        if os.environ.get(name):
            yield f"--{name.lower()}={os.environ[name]}"
    if zero := os.environ.get("ZERO"):
        template = Path(zero) if zero.endswith(".json") else CONFIGS / f"{zero}.json"
        if not template.is_file():
            names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.json")))
            end(f"ZERO={zero}: there is no {template}; {CONFIGS} has {names}.")
        yield f"--deepspeed_config_file={template}"


def complete(args: argparse.Namespace) -> None:
    """Fills in what depends on this machine. Exits where the numbers of machines and processes do not go together."""
    defaults = load_config_from_file(args.config_file)
    if args.num_machines is None:  # then the rank and address in the file are meant as well
        for name in ("num_machines", "machine_rank", "main_process_ip", "main_process_port"):
            setattr(args, name, getattr(defaults, name) if getattr(args, name) is None else getattr(args, name))
    machines = args.num_machines
    if args.num_processes is None:  # -1: not in the file
        args.num_processes = max(defaults.num_processes, 0) or max(torch.cuda.device_count(), 1) * machines
    if machines > 1:
        missing = [name for name in ("MACHINE_RANK", "MAIN_PROCESS_IP") if getattr(args, name.lower()) is None]
        if missing:
            end(f"NUM_MACHINES={machines} needs {' and '.join(missing)} as well.")
        if not 0 <= args.machine_rank < machines:
            end(f"MACHINE_RANK={args.machine_rank}: with NUM_MACHINES={machines} it is 0 to {machines - 1}.")
        args.main_process_port = args.main_process_port or 29500
    if args.num_processes < 1 or args.num_processes % machines:
        end(
            f"NUM_PROCESSES={args.num_processes} counts the processes of all machines; for {machines} of them use "
            f"{machines}, {2 * machines} or another multiple."
        )
    # accelerate would give each process one thread; clips are encoded on the CPU where there is no GPU
    cores, here = len(os.sched_getaffinity(0)), args.num_processes // machines
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores // here, 1)))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    grow_segments()


def grow_segments() -> None:
    """Lets torch's allocator grow its pieces of GPU memory in the processes to come, unless the user has set it up.

    Pieces of fixed sizes break up as tensors of many sizes come and go, and gigabytes can lie idle in them.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def end(fault: str) -> NoReturn:
    print(f"error: {fault}", file=sys.stderr)
    sys.exit(2)


def main() -> int:
    args = launch_command_parser().parse_args([*from_environment(), *sys.argv[1:]])
    complete(args)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(args)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    except subprocess.CalledProcessError as error:
        code = error.returncode
    except ConnectionError:
        end(f"MAIN_PROCESS_PORT={args.main_process_port} is in use here; choose another, the same on all machines.")
    except SignalException as error:  # Ctrl-C, or the scheduler of a cluster
        code = -error.sigval
    else:
        return 0
    return code if code > 0 else 128 - code  # negative: ended by that signal


if __name__ == "__main__":
    sys.exit(main())
