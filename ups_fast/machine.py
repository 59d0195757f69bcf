"""What this machine has, asked in one way on every system that runs Python."""

from __future__ import annotations

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
    """Bytes of main memory; 2**63 - 1 where the system does not say, so that nobody's images are refused for it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 2**63 - 1
