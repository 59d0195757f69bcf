"""Counts, values and errors as they stand in sentences."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

MOST = 100  # characters of a value


def many(n: int, what: str) -> str:
    """Such as "1 file" or "2,000 files"."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def are(n: int) -> str:
    """What follows `many`: is or are."""
    return "is" if n == 1 else "are"


def did_you_mean(name: str, valid: Iterable[str], say: Callable[[str], str] = str, most: int = 1) -> str:
    """ " (did you mean a or b?)" for the nearest of the valid names, each as `say` writes it; "" where none is near."""
    near = difflib.get_close_matches(name[:MOST], list(valid), n=most)
    return f" (did you mean {' or '.join(map(say, near))}?)" if near else ""


def said(value: Any) -> str:
    """A value as Python writes it, text in quotes; of a long one the beginning, and nothing that moves a cursor."""
    return _cut(ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value))


def shown(value: Any) -> str:
    """Likewise, text without quotes."""
    text = str(value)
    return _cut(text if text.isprintable() else ascii(text)[1:-1])


def line_of(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _cut(text: str) -> str:
    return text if len(text) <= MOST else f"{text[: MOST - 3]}..."
