"""The memory that all decoding of images may take together, whatever the number of threads and the size of files."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from ups_fast.machine import memory_bytes

SHARE = 4  # decoding takes at most memory / SHARE
MOST = 4 << 30  # bytes, on any machine


class Budget:
    """A number of bytes that threads share. Whoever asks for more than is left waits for its turn."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._held = 0
        # In the order of asking, so that a large image is not passed for ever.
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Holds `size` bytes. A thread must not ask while it holds some: two of them would wait for each other.

        Raises ValueError where `size` is more than there is in all.
        """
        if size > self.total:
            raise ValueError(
                f"it takes {_gib(size)} of memory, and decoding may take {_gib(self.total)}: make it smaller"
            )
        turn = object()
        with self._changed:
            self._waiting.append(turn)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is turn and self._held + size <= self.total)
                self._held += size
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._held -= size
                self._changed.notify_all()


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 1 << 29 else f"{size / 2**20:,.1f} MiB"


def decoding_bytes() -> int:
    """What all decoding in this process may take."""
    return min(memory_bytes() // SHARE, MOST)


budget = Budget(decoding_bytes())
