"""What all command lines share: how they start, and the one sentence with which they end where a user can help."""

from __future__ import annotations

import argparse
import errno
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NoReturn

import torch

import ups_fast
from ups_fast.ops import has_kernels
from ups_fast.terminal import Stream, complain, ctrl_c_raises, hold_the_first_three, printable

# Packages of the extra `train`, as they are imported: what every run needs, and what only some data sets do.
ALWAYS = ("yaml", "rich", "tensorboard", "matplotlib", "PIL", "safetensors")
SOMETIMES = ("sklearn", "torchvision", "scipy")
_MEMORY = re.compile(
    r"out of memory|DefaultCPUAllocator|bad_alloc|ALLOC_FAILED|not enough memory|cannot allocate memory", re.I
)


class Parser(argparse.ArgumentParser):
    """One whose words arrive on every kind of terminal, and whose errors are one line."""

    def __init__(self, hint: str, **about: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **about)
        self.hint = hint

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {printable(message)}; {self.hint}\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        stream = Stream(file, "the text")
        stream.write(message)
        stream.flush()


def count(text: str) -> int:
    """The type of an argument that is a number from 1.

    >>> count("3")
    3
    """
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a number from 1, got {text}")
    return int(text)


@contextmanager
def told_warnings() -> Iterator[None]:
    """Says each warning once, as one line, without the line of code that Python would add."""
    with warnings.catch_warnings(record=True) as told:
        try:
            yield
        finally:
            for sentence in dict.fromkeys(str(each.message) for each in told):
                complain(f"warning: {sentence}")


def may_go_on(error: KeyboardInterrupt) -> None:
    """What a command that goes on by itself says after Ctrl-C."""
    complain(str(error) or "stopped")
    complain("to go on, give the same command again")


def interrupted_early(error: BaseException) -> int:
    """The exit status after a Ctrl-C or a missing package among the command's own imports; all else is raised."""
    if isinstance(error, KeyboardInterrupt):
        complain("stopped")
        return 130
    if sentence := mistake_of(error, ""):
        complain(f"error: {sentence}")
        return 2
    raise error


def status_of(
    work: Callable[[], object],
    remedy: str,
    stopped: Callable[[KeyboardInterrupt], object] = lambda _: complain("stopped"),
    say: Callable[[Exception, str], object] = lambda _, sentence: complain(f"error: {sentence}"),
) -> int:
    """Does a command's work, and returns its exit status: 0; 2 after one sentence on a mistake; 130 after Ctrl-C.

    remedy  as of `mistake_of`. An error that is no mistake is raised
    say     of an error, the sentence on it
    """
    hold_the_first_three()
    try:
        ctrl_c_raises()
        work()
    except KeyboardInterrupt as error:
        stopped(error)
        return 130
    except Exception as error:
        sentence = mistake_of(error, remedy)
        if sentence is None:
            raise
        say(error, sentence)
        return 2
    return 0


def mistake_of(error: BaseException, remedy: str) -> str | None:
    """One sentence on an error that the user can mend; None for what only a programmer can.

    remedy  what to do where memory is used up
    """
    text = " ".join(str(error).split())
    full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    full |= isinstance(error, OSError) and error.errno == errno.ENOMEM
    if full or (isinstance(error, RuntimeError) and _MEMORY.search(text)):
        return f"memory is used up: {remedy} ({text or 'no more is known'})"
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return f"the system gives this process no more threads ({text}): end other programs, or set threads=1"
    if isinstance(error, (ValueError, OSError)):
        return text or type(error).__name__
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] in ALWAYS + SOMETIMES:
        return lacking(str(error.name), text)
    return None


def lacking(name: str, why: str = "it is not installed") -> str:
    return f"{name.partition('.')[0]} cannot be imported ({why}): pip install 'ups_fast[train]'"


def check_packages() -> None:
    """ImportError, with a sentence, where a package is missing that a run would first need hours later."""
    for name in ALWAYS:
        if find_spec(name) is None:
            raise ImportError("it is not installed", name=name)


def check_kernels(device: torch.device) -> None:
    """ValueError where UPS_FAST_STRICT=1 forbids the only ops that there are for the device."""
    if os.environ.get("UPS_FAST_STRICT") == "1" and not has_kernels(device):
        why = ups_fast.backend().get(device.type, "no kernels are known for it")
        raise ValueError(
            f"UPS_FAST_STRICT=1 forbids to run without fused kernels, and {device.type} has {why}; "
            "or unset UPS_FAST_STRICT"
        )
