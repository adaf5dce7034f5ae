"""Computes the next items of an iterable in a thread.

Batches are read in a thread and not in worker processes, which would send them through /dev/shm. Docker limits that
folder to 64 MiB, less than a few batches, and a write beyond the limit ends in a bus error.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(items: Iterable[Item], count: int) -> Generator[Item, None, None]:
    """Yields the items, which a thread computes up to `count` items ahead.

    An exception that ends the thread is raised after the items that precede it. The thread ends with the generator; it
    never delays the exit of the process.
    """
    results: SimpleQueue[tuple[Item] | BaseException | None] = SimpleQueue()
    free, is_closed = threading.Semaphore(count - 1), threading.Event()

    def compute() -> None:
        end = None
        try:
            for item in items:
                results.put((item,))
                free.acquire()
                if is_closed.is_set():
                    return
        except BaseException as error:  # whatever ends the thread must end the loop that waits for its items
            end = error
        results.put(end)

    thread = threading.Thread(target=compute, name="prefetch", daemon=True)
    thread.start()
    try:
        while isinstance(result := results.get(), tuple):
            free.release()
            yield result[0]
        if result is not None:
            raise result
    finally:
        is_closed.set()
        free.release()
        thread.join(1)  # a thread blocked on a dead disk does not end
