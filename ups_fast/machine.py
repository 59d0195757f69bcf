"""What this machine has, asked in one way on every system that runs Python."""

from __future__ import annotations

import contextlib
import os


def cores() -> int:
    """CPU cores that this process may use, at least 1. macOS and Windows cannot say which: there, all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load() -> float:
    """Mean number of processes that wanted a core in the last minute; 0 where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0


def memory_bytes() -> int:
    """Bytes of main memory for this process; 2**62 where the system does not say, so that nothing is refused for it.

    A container may have less than its machine.
    """
    found = [2**62]
    with contextlib.suppress(AttributeError, OSError, ValueError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(limit, "rb") as file:
                found.append(int(file.read(32)))
        except (OSError, ValueError):  # there is none, or it says "max"
            pass
    return min(size for size in found if size > 0)
