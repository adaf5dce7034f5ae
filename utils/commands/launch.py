"""Starts train.py with `accelerate launch`, configured by environment variables. Exits with the code of train.py.

    NUM_PROCESSES      total number of processes over all machines; default: one per visible GPU
    NUM_MACHINES       number of machines; each runs the same script, with the same files under the same paths
    MACHINE_RANK       0 on the first machine, then 1, 2, ...
    MAIN_PROCESS_IP    address of the first machine
    MAIN_PROCESS_PORT  a port of the first machine that all machines can reach; default 29500
    ZERO               DeepSpeed template instead of the one in accelerate_config.yaml: zero2, zero3_offload or another
                       name in configs/, or the path of a .json file

train.py reports a user error in one sentence. accelerate's launcher would add forty lines about a failed child process
and exit with code 1.

A single process runs in the launcher itself, in the environment that accelerate prepares: importing torch twice would
take seconds. Heavy imports are therefore inside the functions. This file imports nothing of the project; it only runs
utils/common/encoding.py, which may restart Python, and utils/common/requirements.py.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
COMMON = CONFIGS.parent / "utils" / "common"
MACHINE_SETTINGS = ("NUM_PROCESSES", "NUM_MACHINES", "MACHINE_RANK", "MAIN_PROCESS_IP", "MAIN_PROCESS_PORT")
LOCAL_FILE_SYSTEMS = ("ext4", "xfs", "btrfs", "zfs", "tmpfs", "f2fs", "ext3")
# The namespace of a machine, whose processes see those of all containers (linux/proc_ns.h).
INITIAL_PID_NAMESPACE = f"pid:[{0xEFFFFFFC}]"
# Variables of accelerate that do not change the training.
ACCELERATE_LOGGING = ("ACCELERATE_LOG_LEVEL", "ACCELERATE_DEBUG_MODE")
# The variables that torchrun sets for a single process. Port 0 picks a free one.
SINGLE_PROCESS = {
    **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
}


def check_requirements(*needed: str) -> None:
    runpy.run_path(str(COMMON / "requirements.py"))["check_requirements"](*needed)


def main() -> int:
    runpy.run_path(str(COMMON / "encoding.py"))["use_utf8"]()
    check_requirements()
    ignore_accelerate_variables()
    flags = [*flags_from_environment(), *sys.argv[1:]]
    num_cores, user_threads = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault("OMP_NUM_THREADS", str(num_cores))  # torch reads it when it is imported
    grow_segments()
    gc.disable()  # imports create a million objects and hardly any garbage
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = launch_command_parser().parse_args(flags)
    complete(args)
    gc.freeze()
    gc.enable()
    # accelerate's default is one thread per process, but without a GPU clips are encoded on the CPU
    threads_per_process = max(num_cores * args.num_machines // args.num_processes, 1)
    os.environ["OMP_NUM_THREADS"] = user_threads or str(threads_per_process)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    environment: dict[str, str] = {}
    try:
        if args.num_processes > 1:
            launch_command(args)
        else:
            environment = single_process_environment(args)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    except subprocess.CalledProcessError as error:
        code = error.returncode
    except ConnectionError:
        fail(f"MAIN_PROCESS_PORT={args.main_process_port} is in use here; choose another, the same on all machines.")
    except SignalException as error:  # Ctrl-C, or a cluster's scheduler
        code = -error.sigval
    else:
        if environment:
            run_here(args.training_script, args.training_script_args, environment)
        return 0
    return code if code > 0 else 128 - code  # a negative code is the signal that ended the process


def ignore_accelerate_variables() -> None:
    """Removes environment variables by which accelerate would train otherwise than the command line says."""
    names = [name for name in os.environ if name.startswith("ACCELERATE_") and name not in ACCELERATE_LOGGING]
    for name in names:
        del os.environ[name]
    if names:
        print(f"Note: ignoring {', '.join(sorted(names))}; flags and configs/*.yaml set this.", file=sys.stderr)


def flags_from_environment() -> Iterator[str]:
    """Translates environment variables to flags of the launcher. Exits with an error if a value is not a number."""
    for name in ("OMP_NUM_THREADS", *MACHINE_SETTINGS):
        value = os.environ.get(name) or "1"
        if name != "MAIN_PROCESS_IP" and not (value.isdecimal() and (int(value) < 2**16 or name[-4:] != "PORT")):
            fail(f"{name}={value} is not a valid number.")
    for name in MACHINE_SETTINGS:
        if os.environ.get(name):
            yield f"--{name.lower()}={os.environ[name]}"
    if zero := os.environ.get("ZERO"):
        yield f"--deepspeed_config_file={template_path(zero, flag='ZERO=')}"


def template_path(name: str, flag: str) -> Path:
    """Returns the path of a DeepSpeed template, given by its name in configs/ or its path. Exits if it is missing."""
    path = os.path.expanduser(name)  # noqa: PTH111 - the method of Path raises an error for an unknown user
    template = Path(path) if name.endswith(".json") else CONFIGS / f"{name}.json"
    if not template.is_file():
        names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.json")))
        fail(f"{flag}{name}: there is no {template}; {CONFIGS} has {names}.")
    return template


def complete(args: argparse.Namespace) -> None:
    """Fills in the settings that depend on this machine. Exits if the numbers of machines and processes conflict."""
    import torch
    from accelerate.commands.config.config_args import load_config_from_file

    defaults = load_config_from_file(args.config_file)
    if os.environ.get("ZERO") and defaults.distributed_type != "DEEPSPEED":
        fail(f"ZERO={os.environ['ZERO']} is for train_zero_t2v.sh and train_zero_i2v.sh; this script trains with DDP.")
    if args.num_machines is None:  # then rank and address come from the file as well
        for name in ("num_machines", "machine_rank", "main_process_ip", "main_process_port"):
            setattr(args, name, getattr(defaults, name) if getattr(args, name) is None else getattr(args, name))
    if defaults.distributed_type == "DEEPSPEED":
        check_requirements("deepspeed")
        check_extensions(offloads="offload" in str(args.deepspeed_config_file or defaults.deepspeed_config))
    machines = args.num_machines
    if args.num_processes is None:  # a file without the number gives -1
        args.num_processes = max(defaults.num_processes, 0) or max(torch.cuda.device_count(), 1) * machines
    if machines > 1:
        missing = [name for name in ("MACHINE_RANK", "MAIN_PROCESS_IP") if getattr(args, name.lower()) is None]
        if missing:
            fail(f"NUM_MACHINES={machines} needs {' and '.join(missing)} as well.")
        if not 0 <= args.machine_rank < machines:
            fail(f"MACHINE_RANK={args.machine_rank}: with NUM_MACHINES={machines} it is 0 to {machines - 1}.")
        args.main_process_port = args.main_process_port or 29500
    if args.num_processes < 1 or args.num_processes % machines:
        fail(
            f"NUM_PROCESSES={args.num_processes} counts the processes of all machines; for {machines} machines use "
            f"{machines}, {2 * machines} or another multiple."
        )
    if torch.cuda.device_count() == 0:  # is_available() would fix the GPUs that this process sees
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def check_extensions(offloads: bool) -> None:
    """Removes the locks of processes that were killed while DeepSpeed compiled; DeepSpeed would wait for them forever.

    torch's `FileBaton` keeps the lock file open while it compiles, and writes nothing into it. A lock that no process
    has open is stale, but processes of other users, machines and containers are not visible here. If one of them may
    hold the lock, this prints the command that removes it.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        what = f"DeepSpeed's {lock.parent.name} is being compiled"
        if owner := process_that_opened(lock):
            print(f"{what} by process {owner}; this run waits for it, a few minutes at most.", file=sys.stderr)
        elif is_visible_here_only(lock) and os.access(lock.parent, os.W_OK):
            lock.unlink(missing_ok=True)  # it may have been released in the meantime
            print(f"Removed {lock}; the process that compiled there was killed.", file=sys.stderr)
        else:
            print(
                f"{what}, perhaps by another machine, container or user; this run waits for it. If none of them "
                f"compiles, remove the lock: rm {lock}",
                file=sys.stderr,
            )
    if offloads and not any(root.rglob("cpu_adam.so")):
        print("DeepSpeed compiles its CPU Adam at the first start, which takes a minute or more.", file=sys.stderr)


def process_that_opened(lock: Path) -> str | None:
    """Returns the id of a process that has a file open, or None. Containers may show the file under another path."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # closed in the meantime, or of another user
            if link.readlink().name == lock.name and link.samefile(lock):
                return link.parts[2]
    return None


def is_visible_here_only(lock: Path) -> bool:
    """Whether every process that may have opened a lock is visible in /proc.

    This holds if this user made the lock on a local disk, unless this is a container, which may share the disk with
    others. A container shares its root ("overlay") with none.
    """
    kind = file_system(lock)
    try:
        is_own = lock.stat().st_uid == os.geteuid()
        sees_all = str(Path("/proc/self/ns/pid").readlink()) == INITIAL_PID_NAMESPACE
    except OSError:  # released in the meantime
        return False
    return is_own and (kind == "overlay" or (sees_all and kind in LOCAL_FILE_SYSTEMS))


def file_system(path: Path) -> str:
    """Returns the type of the file system that holds a file, as in /proc/mounts."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(len(folder), kind) for folder, kind in mounts if path.resolve().is_relative_to(folder)]
    return [kind for length, kind in above if length == max(above)[0]][-1]  # a later mount hides an earlier one


def grow_segments() -> None:
    """Lets torch's allocator grow its segments of GPU memory, unless the user has configured it.

    Segments of fixed size fragment as tensors of many sizes come and go, and gigabytes can stay unused.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the variable
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def single_process_environment(args: argparse.Namespace) -> dict[str, str]:
    """Returns the environment in which `launch_command` would start the script as a single process.

    Empty if the config makes accelerate start the script without torchrun; then the script has already run.
    """
    import torch.distributed.run
    from accelerate.commands.launch import launch_command

    environment: dict[str, str] = {}
    with patch.object(torch.distributed.run, "run", lambda _: environment.update(os.environ | SINGLE_PROCESS)):
        launch_command(args)
    return environment


def run_here(script: str, arguments: list[str], environment: dict[str, str]) -> None:
    """Runs a script as the main module of this process."""
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


def fail(message: str) -> NoReturn:
    """Prints an error and exits with code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    sys.exit(main())
