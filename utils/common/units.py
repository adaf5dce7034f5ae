"""Units of memory."""

from __future__ import annotations

GIB = 2**30


def format_size(num_bytes: float) -> str:
    """Returns a size in MiB, or in GiB if it is at least one."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"
