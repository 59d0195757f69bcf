"""What a run shows while it goes: the progress bar, the table, TensorBoard scalars."""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from ups_fast import terminal
from ups_fast.files import make_folder, writing
from ups_fast.state import Checkpoint, Row, headline_of

REFRESH_SECONDS = 0.3  # the progress bar reads the loss, and so waits for the device, no oftener than this
LOG_SECONDS = 60.0  # likewise, a line where there is no terminal for a bar


def say(console: Console, line: str) -> None:
    """One line as it is, on any console: names may look like markup, and a table must not be wrapped."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM ended the run, and everything is saved. The message says where it stands."""


class Watch:
    """What a run shows while it goes, how long it takes, and whether somebody has asked it to stop."""

    def __init__(self, console: Console, state: Checkpoint, stop: threading.Event) -> None:
        self.console, self.state, self.stop = console, state, stop
        self.clock = self.saved_at = self.shown_at = time.monotonic()
        self.ending = False  # somebody has, and all processes of the run know
        self.unreadable = self.reported = 0  # files: found to be gone, and said so
        self.progress = progress_bar(console)

    def say(self, line: str) -> None:
        say(self.console, line)

    @contextmanager
    def overhead(self) -> Iterator[None]:
        """Counts what is done in it as neither training nor labeling: it keeps a GPU waiting."""
        start = time.monotonic()
        yield
        self.state.outside += time.monotonic() - start

    def lap(self) -> float:
        """Seconds spent on this round so far, by all processes that worked on it."""
        now = time.monotonic()
        self.state.seconds += now - self.clock
        self.clock = now
        return self.state.seconds

    def bar(self, what: str, images: int, done: int = 0) -> TaskID:
        name = f"round {self.state.round}: {what}"
        return self.progress.add_task(name, total=images, completed=done, now="")

    def show(self, bar: TaskID, images: int, epochs: int, lr: float, read_loss: Callable[[], float]) -> None:
        """The step's place, if the last look was long ago."""
        now, state = time.monotonic(), self.state
        if now - self.shown_at < (LOG_SECONDS if self.progress.disable else REFRESH_SECONDS):
            return
        self.shown_at = now
        seen = f"loss {read_loss() / state.step:.3f}  lr {lr:.4f}"
        self.progress.update(bar, completed=images, now=seen)
        if self.progress.disable:
            self.say(f"round {state.round}: epoch {state.epoch + 1} of {epochs}, {seen}")

    def end_if_asked(self, saved: str) -> None:
        if self.ending:
            raise Interrupted(f"stopped in round {self.state.round}, epoch {self.state.epoch}; {saved}")


@contextmanager
def stop_signal(console: Console, patience: float = 0.0) -> Iterator[threading.Event]:
    """Set by the first SIGINT or SIGTERM, so that the step ends and is saved; the second kills at once.

    patience  seconds in which a second one is no impatience: torchrun passes on what its processes got themselves
    """
    stop = threading.Event()
    first = 0.0
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal first
        again = stop.is_set()
        if again and time.monotonic() - first < patience:
            return
        if again or not patience:
            for each in signals:
                signal.signal(each, signal.SIG_DFL)
        if again:
            os.kill(os.getpid(), number)
        first = time.monotonic()
        stop.set()
        console.show_cursor()  # the progress bar hides it, and a killed process cannot bring it back

    # What the parent has ignored, as nohup and some shells do for background jobs, stays ignored.
    signals = [
        each for each in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(each) is not signal.SIG_IGN
    ]
    before = {each: signal.signal(each, ask) for each in signals}
    try:
        yield stop
    finally:
        for each, handler in before.items():
            if signal.getsignal(each) is not signal.SIG_IGN:  # as `World` has it when another process is lost
                signal.signal(each, handler)


class TensorBoard:
    """TensorBoard scalars: epochs/ over the epochs done since the run began, rounds/ over the rounds."""

    def __init__(self, folder: Path, epochs_done: int, rounds_done: int) -> None:
        self.folder = folder
        for each in (folder, folder / "epochs", folder / "rounds"):
            make_folder(each)
        # TensorBoard opens its file through links: it gets a name that nobody can have put there.
        name = f".{secrets.token_hex(8)}"
        with writing(folder):
            _wait_for_a_later_name(folder)
            # What a killed process logged after its last checkpoint is logged again: hide the first copy.
            self.epochs = SummaryWriter(folder / "epochs", purge_step=epochs_done + 1, filename_suffix=name)
            self.rounds = SummaryWriter(folder / "rounds", purge_step=rounds_done, filename_suffix=name)

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *error: object) -> None:
        with writing(self.folder):
            self.epochs.close()
            self.rounds.close()

    def add_epoch(self, epochs_done: int, values: Mapping[str, float]) -> None:
        with writing(self.folder):
            for name, value in values.items():
                self.epochs.add_scalar(name, value, epochs_done)

    def add_round(self, row: Row) -> None:
        with writing(self.folder):
            for name, value in row.items():
                parts = value if isinstance(value, list) else [value]
                for c, part in enumerate(parts):
                    if isinstance(part, (int, float)) and name != "round":  # no None, no table
                        tag = f"{name}/{c}" if isinstance(value, list) else name
                        self.rounds.add_scalar(tag, part, row["round"])

    def flush(self) -> None:
        with writing(self.folder):
            self.epochs.flush()
            self.rounds.flush()


def _wait_for_a_later_name(folder: Path) -> None:
    """TensorBoard reads files in the order of their names: of the second they began in, host, process.

    Of two in one second the earlier process may come last, and hide what the later one wrote.
    """
    end = time.monotonic() + 3  # names of the future, from a clock that was wrong, are not waited for
    while any(folder.glob(f"*/events.out.tfevents.{int(time.time())}.*")) and time.monotonic() < end:
        time.sleep(0.02)


class _Console(Console):
    """One whose lines hold no commands to the terminal but its own."""

    def print(self, *objects: Any, **how: Any) -> None:
        super().print(*(terminal.printable(x) if isinstance(x, str) else x for x in objects), **how)


def open_console(*, error: bool = False) -> Console:
    """Standard output, or standard error, for lines and bars. Nothing that becomes of it can end a run.

    Each string is one line: a line break within it, as in a file's name, is shown as an escape.
    """
    stream: Any = terminal.standard(error=error)
    return _Console(file=stream, highlight=False, markup=False, soft_wrap=True)


def progress_bar(console: Console) -> Progress:
    """A bar with loss, learning rate, images/s and time left; nothing where there is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[now]}"),
        _ImagesPerSecond(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class _ImagesPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} images/s" if task.speed else "")


HEADER = "round  test acc  positives   right   negatives   right    ECE  ECE pos.  seconds"


def table_line(row: Row) -> str:
    """A row under HEADER; "-" where not defined. `right` is accuracy, `ECE pos.` that error of the positives."""

    def percent(key: str) -> str:
        value: Any = headline_of(row) if key == "test" else row[key]  # type: ignore[literal-required]
        return "-" if value is None else f"{100 * value:.1f}%"

    return (
        f"{row['round']:>5}  {percent('test'):>8}  {row['positives']:>9,}  {percent('positive_acc'):>6}  "
        f"{row['negatives']:>10,}  {percent('negative_acc'):>6}  {percent('ece'):>5}  "
        f"{percent('ece_selected'):>8}  {row['seconds']:>7.1f}"
    )
