"""Waiting for processes that work for hours on shares of their own.

A collective call ends a run when a process comes to it later than --nccl_timeout, however hard it works. Here each
process gives signs of life, and one that waits gives up only when those of another have been missing for that long.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta

from accelerate import PartialState
from torch.distributed import TCPStore

from utils.common.errors import UserError

# Seconds between two looks.
_EVERY = 0.5


class HeartbeatBarrier:
    """Signs of life in the store through which the processes have found each other."""

    def __init__(self, processes: PartialState, timeout: float) -> None:
        self.rank, self.everyone, self.timeout = processes.process_index, range(processes.num_processes), timeout
        self.store: TCPStore | None = None
        self.last_sign = 0.0
        if len(self.everyone) > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self.store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout))

    def beat(self) -> None:
        """May be called as often as there is something to do."""
        if self.store is not None and time.monotonic() - self.last_sign > 1:
            self.store.add(f"alive/{self.rank}", 1)
            self.last_sign = time.monotonic()

    def done(self, stage: str) -> None:
        if self.store is not None:
            self.store.set(f"done/{stage}/{self.rank}", "")

    def wait_for_main(self, stage: str) -> None:
        """Until the main process is done with a stage, however long that takes; all processes end with it."""
        while self.store is not None and not self.store.check([f"done/{stage}/0"]):
            time.sleep(_EVERY)

    def wait_for_everyone(self, stage: str) -> None:
        """Until all processes are done with a stage.

        Raises:
            UserError: one of them has given no sign of life for the timeout.
        """
        for rank in self.everyone if self.store is not None else []:
            assert self.store is not None
            signs, since = -1, time.monotonic()
            while not self.store.check([f"done/{stage}/{rank}"]):
                if (now := self.store.add(f"alive/{rank}", 0)) != signs:
                    signs, since = now, time.monotonic()
                if time.monotonic() - since > self.timeout:
                    raise UserError(
                        f"Process {rank} has given no sign of life for {self.timeout:g} s (--nccl_timeout) while "
                        "others wait for it; what is encoded is kept.",
                        on_every_rank=False,
                    )
                time.sleep(_EVERY)
