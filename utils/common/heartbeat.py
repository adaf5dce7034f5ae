"""A barrier for ranks that work independently for a long time.

A collective call fails when one rank arrives later than --nccl_timeout, even if that rank is still working. With this
barrier each rank sends heartbeats, and a waiting rank gives up only if another rank has sent none for that long.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta

from accelerate import PartialState
from torch.distributed import TCPStore

from utils.common.errors import UserError

_POLL_INTERVAL_S = 0.5
_BEAT_INTERVAL_S = 1


class HeartbeatBarrier:
    """Exchanges heartbeats through the TCP store of the process group. Does nothing with a single process.

    Args:
        timeout: seconds without a heartbeat after which a rank counts as lost.
    """

    def __init__(self, processes: PartialState, timeout: float) -> None:
        self.rank, self.ranks, self.timeout = processes.process_index, range(processes.num_processes), timeout
        self.store: TCPStore | None = None
        self.last_beat = 0.0
        if len(self.ranks) > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self.store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout))

    def beat(self) -> None:
        """Sends a heartbeat, at most one per second; cheap enough to call for every item."""
        if self.store is not None and time.monotonic() - self.last_beat > _BEAT_INTERVAL_S:
            self.store.add(f"alive/{self.rank}", 1)
            self.last_beat = time.monotonic()

    def done(self, stage: str) -> None:
        """Marks a stage as finished on this rank."""
        if self.store is not None:
            self.store.set(f"done/{stage}/{self.rank}", "")

    def wait_for_main(self, stage: str) -> None:
        """Waits without a timeout until the main process has finished a stage.

        No timeout is needed: the launcher ends all processes if the main process ends.
        """
        while self.store is not None and not self.store.check([f"done/{stage}/0"]):
            time.sleep(_POLL_INTERVAL_S)

    def wait_for_everyone(self, stage: str) -> None:
        """Waits until all ranks have finished a stage.

        Raises:
            UserError: a rank has sent no heartbeat for the timeout.
        """
        for rank in self.ranks if self.store is not None else []:
            assert self.store is not None
            num_beats, last_change = -1, time.monotonic()
            while not self.store.check([f"done/{stage}/{rank}"]):
                if (current := self.store.add(f"alive/{rank}", 0)) != num_beats:
                    num_beats, last_change = current, time.monotonic()
                if time.monotonic() - last_change > self.timeout:
                    raise UserError(
                        f"Process {rank} has sent no heartbeat for {self.timeout:g} s (--nccl_timeout) while other "
                        "processes wait for it. Entries already encoded are kept.",
                        on_every_rank=False,
                    )
                time.sleep(_POLL_INTERVAL_S)
