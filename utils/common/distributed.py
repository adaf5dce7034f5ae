"""Runs a function on the main process for all processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from utils.common.errors import UserError
from utils.common.heartbeat import HeartbeatBarrier

Result = TypeVar("Result")


def on_main_process(
    processes: PartialState, heartbeat: HeartbeatBarrier, function: Callable[..., Result], *args: Any
) -> Result:
    """Calls a function on the main process and returns its result on every process.

    Raises:
        UserError: on every process, if the function raised it.
    """
    outcome: list[Any] = [None]
    if processes.is_main_process:
        try:
            outcome = [function(*args)]
        except UserError as error:
            outcome = [error]
        heartbeat.done(function.__name__)
    heartbeat.wait_for_main(function.__name__)
    broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        with suppress(RuntimeError):  # a process that exits while another still reads would break its connection
            processes.wait_for_everyone()
        processes.destroy_process_group()
        raise outcome[0]
    return outcome[0]
