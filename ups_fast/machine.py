"""What this machine has, asked in one way on every system that runs Python."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import socket
from functools import cache
from typing import TYPE_CHECKING

from ups_fast.words import said

if TYPE_CHECKING:
    import torch


def cores() -> int:
    """CPU cores that this process may use, at least 1. macOS and Windows cannot say which: there, all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def name() -> str:
    """This machine among all whose processes have numbers of their own: many are called localhost, or are containers.

    The host's name, and where the system says it, what tells its last start and its namespace of processes apart.
    """
    more = ""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        more = f"/{file.read(8)}-{os.stat('/proc/self/ns/pid').st_ino}"
    return f"{socket.gethostname()}{more}"


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


def cpu_name() -> str:
    """The model of the CPU as the system writes it, or its architecture where the system does not say."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def driver() -> str:
    """The version of NVIDIA's driver; "" where there is none, or the system does not say."""
    with contextlib.suppress(OSError), open("/proc/driver/nvidia/version", errors="replace") as file:
        found = re.search(r"\b\d{3,}(?:\.\d+)+\b", file.read(4096))
        return found[0] if found else ""
    return ""


def pick_device(name: str) -> torch.device:
    """The torch device for the value of `device`; ValueError where it is unknown or this machine lacks it."""
    import torch

    kind, index = device_parts(name)
    count = torch.cuda.device_count()
    if kind == "auto":
        return torch.device("cuda" if count else "cpu")
    if kind == "cuda" and not count:
        why = "sees no GPU" if torch.version.cuda else "was built without CUDA"
        raise ValueError(
            f"device={name} needs a GPU, but this PyTorch ({torch.__version__}) {why}: use device=cpu"
        )
    if index is not None and index >= count:
        raise ValueError(f"device={name} does not exist: this machine has cuda:0 to cuda:{count - 1}")
    return torch.device(name)


def device_parts(name: str) -> tuple[str, int | None]:
    kind, colon, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (colon and (kind != "cuda" or not index.isdecimal())):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {said(name)}")
    return kind, int(index) if colon else None
