"""Who works on which trial of a sweep: claims, their signs of life, and trials whose worker is gone."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import optuna

from ups_fast import machine
from ups_fast.sweep_storage import (
    COMPLETE,
    FAILED,
    PATIENCE_SECONDS,
    PRUNED,
    RUNNING,
    WAITING,
    Board,
    Entry,
    Lost,
    StorageGone,
    patient,
)

BEAT_SECONDS = 10.0  # a worker says so often that it lives
GRACE_SECONDS = 60.0  # one of another machine that has not for so long is gone
LONG_GRACE_SECONDS = 900.0  # one of this machine, whose number another process may have taken
MOST_DEATHS = 5  # of processes in one trial, none of which got further than the one before
MOST_STARTS = 100  # of a trial that are kept


class Claims:
    """The trials that this process takes, one after the other."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self._shunned: dict[int, float] = {}  # indices of trials that another process holds, and until when

    def take(self) -> Claim | None:
        """A trial that waits, now this process's: first those whose point is drawn. None where none waits."""
        now, most = time.monotonic(), self.board.plan.trials
        waiting = [each for each in self.board.entries() if each.state == WAITING and each.index < most]
        for entry in sorted(
            waiting,
            key=lambda each: (self._shunned.get(each.index, 0) > now, not each.values, each.index),
        ):
            if self.board.take(entry):
                return Claim(self.board, entry)
        return None

    def shun(self, index: int) -> None:
        """Takes it last for a while."""
        self._shunned[index] = time.monotonic() + GRACE_SECONDS


class Claim:
    """A trial while this process runs it. As a context it gives signs of life."""

    def __init__(self, board: Board, entry: Entry) -> None:
        self.board, self.entry, self.id = board, entry, entry.trial_id
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Claim:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        number = int(self.entry.notes.get("beat", 0))
        while not self._over.wait(BEAT_SECONDS):
            number += 1
            storage = self.board.storage
            with suppress(Exception):  # a storage that is away hears the next one
                if storage.get_trial(self.id).user_attrs.get("worker") == self.board.me:
                    storage.set_trial_user_attr(self.id, "beat", number)
        self.board.storage.remove_session()

    def _check_mine(self) -> Entry:
        """The trial as it is now. Raises Lost where it is another process's: what this one says counts no more."""
        now = self.board.now(self.entry)
        if now.worker != self.board.me:
            raise Lost
        return now

    def starts_at(self, round: int, epoch: int) -> None:
        """Notes where the checkpoint stood when this process took the trial. Raises Lost."""
        self._check_mine()
        starts = self.entry.notes.get("starts", [])
        if starts and [round, epoch] > starts[-1] and self.entry.notes.get("deaths"):
            self.board.note(self.id, "deaths", 0)
        self.board.note(self.id, "starts", [*starts[1 - MOST_STARTS :], [round, epoch]])

    def report(self, round: int, score: float) -> bool:
        """Keeps what a round came to. Returns whether the pruner ends the trial. Raises Lost."""
        if round in self.entry.curve:  # before this process took it
            return False
        now = self._check_mine()
        prune: bool = self._report(round, score)
        self.entry.curve[round] = score
        if now.notes.get("deaths"):
            self.board.note(self.id, "deaths", 0)
        return prune

    def _report(self, round: int, score: float) -> bool:
        @patient
        def both(board: Board) -> bool:
            board.storage.set_trial_intermediate_value(self.id, round, score)
            return optuna.trial.Trial(board.study, self.id).should_prune()

        return bool(both(self.board))

    def ended(self, numbers: Mapping[str, Any], *, pruned: bool = False) -> None:
        """Raises Lost."""
        self._check_mine()
        self.board.note(self.id, "numbers", dict(numbers))
        curve = self.entry.curve
        self.board.end(
            self.id, PRUNED if pruned else COMPLETE, curve[max(curve)] if pruned else max(curve.values())
        )

    def failed(self, sentence: str) -> None:
        """Raises Lost."""
        self._check_mine()
        self.board.note(self.id, "error", sentence)
        self.board.end(self.id, FAILED)

    def release(self) -> None:
        """Leaves the trial to whoever comes next. Where the storage is away, it is found out by its silence."""
        self.board.patience = 0.0
        try:
            with suppress(StorageGone, Lost):
                self._check_mine()
                self.board.requeue(self.id)
        finally:
            self.board.patience = PATIENCE_SECONDS


class Rescue:
    """Watches over the workers of all trials, for one process."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self._heard: dict[int, tuple[Any, float]] = {}  # by trial: its last sign, and when it was heard first

    def __call__(self, entries: Sequence[Entry], *, blame: bool = True) -> list[int]:
        """Queues trials again whose worker is gone: its process on this machine, or elsewhere its sign of life.

        Returns their indices. Signs of life are counted, not dated, so that clocks need not agree.

        blame  whether the trial may have ended the process, and so may count as failed
        """
        rescued, now = [], time.monotonic()
        for entry in entries:
            if entry.state != RUNNING:
                self._heard.pop(entry.index, None)
                continue
            last, since = self._heard.get(entry.index, (None, now))
            if entry.sign != last:
                self._heard[entry.index] = entry.sign, now
                since = now
            lives = _lives(entry.worker)
            grace = LONG_GRACE_SECONDS if lives else GRACE_SECONDS
            if lives is not False and now - since < grace:
                continue
            if self.board.now(entry).sign != entry.sign:  # it has ended, or lives, or was rescued
                continue
            self._heard.pop(entry.index, None)
            rescued.append(entry.index)
            with suppress(Lost):  # it ended just now
                self._queue_again(entry, int(entry.notes.get("deaths", 0)) + blame)
        return rescued

    def _queue_again(self, entry: Entry, deaths: int) -> None:
        self.board.note(entry.trial_id, "deaths", deaths)
        if deaths < MOST_DEATHS:
            self.board.requeue(entry.trial_id)
            return
        self.board.note(
            entry.trial_id,
            "error",
            f"its process ended {deaths} times and got no further: memory may be used up, and fewer --workers need "
            "less",
        )
        self.board.end(entry.trial_id, FAILED)

    def forget_silence(self) -> None:
        """After a time without the storage, in which no sign of life could arrive."""
        self._heard.clear()


def _lives(worker: str) -> bool | None:
    """Whether it is a process of this machine that lives, or was one; None for those of other machines."""
    host, _, pid = worker.rpartition(":")
    if host != machine.name() or not pid.isdecimal():
        return None
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True
