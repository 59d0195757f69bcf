"""Trials in several processes at once. What a trial is, its caller knows; here are only processes, pipes and signals.

A process is started once and takes one trial after the other, so that its imports and data are paid for once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from rich.console import Console

from ups_fast.command import mistake_of
from ups_fast.display import Interrupted, stop_signal
from ups_fast.files import InUse
from ups_fast.words import line_of

TICK_SECONDS = 0.2
REMEDY = "fewer --workers need less"
State = Literal["begun", "says", "done", "failed", "held"]


class Named(Protocol):
    """A trial, which also must be something that pickle can send to another process."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)
RunOne = Callable[[Any, Callable[[str], None]], Any]


class News(NamedTuple):
    """What happened to a trial: it begins, says where it is, is done, failed, or is held by another process."""

    state: State
    text: str = ""  # of "says" and "failed" a sentence
    result: Any = None  # of "done" what `run_one` returned


class _Worker(NamedTuple):
    process: Any
    pipe: Connection


def run_trials(
    trials: Iterable[T],
    workers: int,
    run_one: RunOne,
    console: Console,
    told: Callable[[T, News], None] = lambda trial, news: None,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Gives each trial to the next of `workers` processes that is free, until all have ended.

    trials   asked for the next one only when a process is free, so that it may depend on what `told` has heard
    run_one  run_one(trial, tell) in the other process, a function of a module; `tell` takes a few words, and raises
             KeyboardInterrupt once the processes are to end
    told     hears, in this process, what happens to each trial
    tick     called a few times a second

    A trial that raises, or whose process dies, has failed; the others go on. Ctrl-C and SIGTERM end the trials as
    they end a run, which saves first; then Interrupted is raised. A second one stops at once.
    """
    todo = iter(trials)
    busy: dict[Connection, tuple[_Worker, T]] = {}
    free: list[_Worker] = []
    with stop_signal(console) as stop:
        try:
            while not stop.is_set():
                while len(busy) < workers and (trial := next(todo, None)) is not None:
                    worker = free.pop() if free else _started(run_one)
                    busy[worker.pipe] = worker, trial
                    told(trial, News("begun"))
                    _send(worker.pipe, trial)
                if not busy:
                    return
                for pipe in wait(list(busy), TICK_SECONDS):
                    worker, trial = busy[pipe]  # type: ignore[index]
                    news = _heard(worker)
                    if news.state != "says":
                        del busy[worker.pipe]
                        if worker.process.exitcode is None:
                            free.append(worker)
                    if not stop.is_set() or news.state in ("done", "says"):
                        told(trial, news)
                tick()
            console.print("stopping: the trials in progress are being saved")
        finally:
            _end([worker for worker, _ in busy.values()], free)
    raise Interrupted


def _started(run_one: RunOne) -> _Worker:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(run_one, there), daemon=True)
    with _deaf_to_ctrl_c():  # which reaches all processes of a terminal: this one passes it on as SIGTERM
        process.start()
    there.close()
    return _Worker(process, here)


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """What a process ignores, those that it starts ignore, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _send(pipe: Connection, trial: Any) -> None:
    with suppress(OSError):  # the process is dead, as its end of the pipe will say
        pipe.send(trial)


def _heard(worker: _Worker) -> News:
    try:
        news: News = worker.pipe.recv()
        return news
    except (EOFError, OSError):
        worker.process.join()
        worker.pipe.close()
        code = worker.process.exitcode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        more = ": memory may be used up, and fewer --workers need less" if code == -signal.SIGKILL else ""
        return News("failed", f"its process {how}{more}")


def _end(busy: list[_Worker], free: list[_Worker]) -> None:
    """Waits for all processes; those in a trial save it first."""
    for worker in [*free, *busy]:
        _send(worker.pipe, None)  # there will be no other trial
    for worker in busy:  # a trial that is about to end may hear no signal any more
        worker.process.terminate()
    for worker in [*free, *busy]:
        worker.process.join()
        worker.pipe.close()


# In the other process ----------------------------------------------------------------------------------------


def _work(run_one: RunOne, pipe: Connection) -> None:
    def tell(text: str) -> None:
        if pipe.poll():  # amid a trial nothing comes but the end
            raise KeyboardInterrupt
        pipe.send(News("says", text))

    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            trial = pipe.recv()
        except (EOFError, OSError):
            return
        if trial is None:
            return
        try:
            pipe.send(_outcome(run_one, trial, tell))
        except (KeyboardInterrupt, OSError):  # it is asked to end, or nobody listens any more
            return


def _outcome(run_one: RunOne, trial: Any, tell: Callable[[str], None]) -> News:
    try:
        return News("done", result=run_one(trial, tell))
    except InUse as error:
        return News("held", str(error))
    except Exception as error:  # a mistake of the user, or one of ours: the other trials go on
        return News("failed", mistake_of(error, REMEDY) or f"{type(error).__name__}: {line_of(error)}")


def _end_with_parent() -> None:
    """Where the parent dies, the trial is saved, and ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
