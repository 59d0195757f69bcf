"""Words on their way to a terminal, a pipe or a log: none of them can end a run, and none of them can command it."""

from __future__ import annotations

import errno
import os
import signal
import sys
import unicodedata
from typing import Any, TextIO

_JOINERS = "\u200c\u200d"  # of Persian words and of emoji: they command nothing


def printable(text: str) -> str:
    r"""The text with all that a terminal would obey, or could not show, as an escape such as \x1b or \u202e.

    That is: control characters (line breaks too), marks of writing direction, and what stands for bytes that are no
    text in a file's name.
    """
    return "".join(map(_escaped, text)) if not (text.isascii() and text.isprintable()) else text


def _escaped(character: str) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS
    return character.encode("unicode_escape").decode() if hidden else character


class Stream:
    """A text stream that never raises: what cannot be written is lost, and the program goes on.

    Characters that its encoding lacks are written as escapes. A reader that is gone, as in `| head -1`, is not spoken
    of; any other reason, such as a full disk, is said once on standard error.

    stream  None where the program was started without it
    """

    def __init__(self, stream: TextIO | None, name: str) -> None:
        self.stream, self.name = stream, name
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def isatty(self) -> bool:
        try:
            return self.stream is not None and self.stream.isatty()
        except ValueError:  # it was closed
            return False

    def fileno(self) -> int:
        if self.stream is None:
            raise OSError(errno.EBADF, f"{self.name} is closed")
        return self.stream.fileno()

    def _try(self, method: str, *words: str) -> None:
        if self.stream is None:
            return
        try:
            getattr(self.stream, method)(*words)
        except ValueError:  # it was closed
            self.stream = None
        except OSError as error:
            swallow(self.stream)
            if error.errno != errno.EPIPE and self.stream is not sys.stderr:
                complain(f"{self.name} could not be written ({error.strerror}): the rest of it is missing")
            self.stream = None


class Shown:
    """A stream to a terminal for text of others, such as a table: all but line breaks goes through `printable`."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write("\n".join(map(printable, text.split("\n"))))


def standard(*, error: bool = False) -> Stream:
    """Standard output, or standard error, as it is now."""
    return Stream(*((sys.stderr, "standard error") if error else (sys.stdout, "standard output")))


def complain(sentence: str) -> None:
    """One line on standard error, whatever is in the sentence and whoever reads it."""
    stream = standard(error=True)
    stream.write(f"{printable(sentence)}\n")
    stream.flush()


def swallow(stream: Any) -> None:
    """What the stream still holds, and all that follows, goes nowhere: else Python ends with status 120 for it."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)
        stream.flush()
    except (OSError, ValueError, AttributeError):  # it has no descriptor: nothing is flushed at the end
        pass


def hold_the_first_three() -> None:
    """Opens standard input, output and error that are closed on nothing, so that no file of the run takes their place.

    Else what a library prints would be written into that file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


COMMANDS = {
    f"ups_fast.{name}" for name in ("train", "predict", "export", "label_studio", "study", "sweep", "info")
}


def stop_at_ctrl_c() -> None:
    """Until `ctrl_c_raises`, Ctrl-C ends the process by itself: amid imports a KeyboardInterrupt may be swallowed, and
    leave half a library behind. One that the parent has ignored, as nohup does, stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stopped)


def ctrl_c_raises() -> None:
    """All is imported: Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _stopped:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def ended(status: int) -> int:
    """The exit status, which a late Ctrl-C changes no more: nothing is left to be stopped."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return status


def _stopped(*_: object) -> None:
    os.write(2, b"stopped\n")
    os._exit(130)
