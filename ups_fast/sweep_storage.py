"""The trials of a sweep in a storage of Optuna, which any number of processes on any number of machines share.

All trials are queued when a sweep begins, each with its index. A worker claims one by making it RUNNING; that is one
transaction, so nobody else gets it. A trial whose worker is gone becomes WAITING again, under the same number and with
its run folder: no moment exists at which a trial is in neither state, so none can be lost.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from ups_fast import machine
from ups_fast.files import RunFolderError
from ups_fast.sweep_optuna import GONE, distribution, one_sentence, open_storage, pruner, sampler, why
from ups_fast.sweep_space import Space, Values
from ups_fast.words import shown

PATIENCE_SECONDS = 120.0  # so long a storage that does not answer is waited for
RETRY_SECONDS = 0.5
WAITING, RUNNING, COMPLETE = TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE
PRUNED, FAILED = TrialState.PRUNED, TrialState.FAIL


class StorageGone(ValueError):
    """The storage has not answered for PATIENCE_SECONDS, or lacks what was in it."""


class Lost(Exception):
    """The trial was taken for dead, and is another worker's now, or has been ended by it."""


@dataclass(frozen=True)
class Plan:
    """What every process of a sweep knows: its space, where its trials stand, and how they are chosen."""

    space: Space
    url: str
    trials: int  # so many in all
    sampler: str = "tpe"
    pruner: str = "none"

    @property
    def name(self) -> str:
        """Of the study in its storage."""
        return str(self.space.folder)

    def point_of(self, index: int) -> tuple[int, int]:
        """The number of a trial's point, and its seed."""
        point, at = divmod(index, len(self.space.seeds))
        return point, self.space.seeds[at]


@dataclass
class Entry:
    """A trial as the storage has it."""

    index: int
    state: TrialState
    values: Values  # of its point; empty while none is drawn
    seed: int
    score: float | None  # best share of the validation samples
    curve: dict[int, float]  # the same of each round
    notes: Mapping[str, Any] = field(repr=False)  # worker, beat, deaths, starts, numbers, error
    trial_id: int = -1

    @property
    def worker(self) -> str:
        """The process that runs it, or was the last one: of `Board.me`."""
        return str(self.notes.get("worker", ""))

    @property
    def where(self) -> str:
        """The same for people: such as host:1234."""
        host, _, pid = self.worker.rpartition(":")
        return f"{host.partition('/')[0]}:{pid}" if pid else ""

    @property
    def sign(self) -> tuple[Any, ...]:
        """Changes as long as somebody works on it."""
        return self.state, self.worker, self.notes.get("beat"), len(self.curve)

    @property
    def ended(self) -> bool:
        return self.state.is_finished()


def patient(call: Callable[..., Any]) -> Callable[..., Any]:
    """A method that tries again while the storage does not answer. What it does may be done twice.

    Raises Lost where it would change a trial that has ended.
    """

    def tried(board: Board, *args: Any) -> Any:
        end = time.monotonic() + board.patience
        while True:
            try:
                return call(board, *args)
            except UpdateFinishedTrialError as error:
                raise Lost from error
            except GONE as error:
                if time.monotonic() >= end:
                    raise StorageGone(f"the storage does not answer: {why(error)}") from error
                time.sleep(RETRY_SECONDS)
                board.storage.engine.dispose()  # its connections may lead to what was there before

    return tried


class Board:
    """The trials of a sweep, for one process. Methods raise StorageGone where the storage stays away."""

    def __init__(self, plan: Plan, *, new: bool = True) -> None:
        """Opens the storage and the study in it. Where there is none, makes one, or if not `new` raises StorageGone.

        Raises ValueError with one sentence.
        """
        self.plan, self.patience = plan, PATIENCE_SECONDS
        self.me = f"{machine.name()}:{os.getpid()}"
        self.storage = open_storage(plan.url)
        about: dict[str, Any] = {
            "storage": self.storage,
            "study_name": plan.name,
            "pruner": pruner(plan.pruner),
        }
        with one_sentence(plan.url):
            try:
                if new:
                    self.study = optuna.create_study(**about, direction="maximize", load_if_exists=True)
                else:
                    self.study = optuna.load_study(**about)
            except KeyError:
                raise StorageGone("the storage has lost its sweep") from None

    @patient
    def begin(self) -> None:
        """Queues the trials that the storage lacks. Raises RunFolderError where it has those of another sweep."""
        mine, found = self.plan.space.plan(), self.study.user_attrs.get("plan")
        ours = isinstance(found, dict) or (found is None and not self.study.get_trials(deepcopy=False))
        if not ours or self.study.directions != [StudyDirection.MAXIMIZE]:
            raise RunFolderError(
                f"the storage has a study named {shown(self.plan.name)} that is no sweep: choose another run_dir"
            )
        if found is None:
            self.study.set_user_attr("plan", mine)
        elif differing := [key for key in {**mine, **found} if mine.get(key) != found.get(key)]:
            key = differing[0]
            more = f" and {len(differing) - 1} others" if len(differing) > 1 else ""
            now, was = (shown(each.get(key, "absent")) for each in (mine, found))
            raise RunFolderError(
                f"run_dir={self.plan.space.folder} has another sweep: {key} is {now} and was {was}{more}; choose "
                "another run_dir"
            )
        there = {entry.index: entry for entry in self.entries()}
        grid = [] if self.plan.space.is_search else self.plan.space.grid
        for index in range(self.plan.trials):
            if index not in there and (grid or index % len(self.plan.space.seeds) == 0):
                self._queue(index, grid[self.plan.point_of(index)[0]] if grid else {})
        for entry in there.values():
            if entry.values:
                self._queue_seeds(entry, there)

    def _queue(self, index: int, values: Values) -> None:
        given = {axis.key: distribution(axis) for axis in self.plan.space.axes if values}
        self.study.add_trial(
            create_trial(state=WAITING, params=values, distributions=given, user_attrs={"index": index})
        )

    def _queue_seeds(self, entry: Entry, there: Mapping[int, Entry]) -> None:
        """The other seeds of a point, which its first trial has drawn."""
        seeds = len(self.plan.space.seeds)
        if entry.index % seeds == 0:
            for index in range(entry.index + 1, min(entry.index + seeds, self.plan.trials)):
                if index not in there:
                    self._queue(index, entry.values)

    @patient
    def entries(self) -> list[Entry]:
        """All trials by index. Where two processes have queued one at once, the first of its kind counts."""
        found: dict[int, Entry] = {}
        for trial in self.study.get_trials(deepcopy=False):
            index = trial.user_attrs.get("index")
            if isinstance(index, int) and index not in found:
                found[index] = self._entry(index, trial)
        return sorted(found.values(), key=lambda entry: entry.index)

    def _entry(self, index: int, trial: FrozenTrial) -> Entry:
        seed = self.plan.point_of(index)[1]
        curve = dict(trial.intermediate_values)
        score = max(curve.values(), default=None)
        return Entry(
            index, trial.state, dict(trial.params), seed, score, curve, trial.user_attrs, trial._trial_id
        )

    # One trial -----------------------------------------------------------------------------------------------

    @patient
    def take(self, entry: Entry) -> bool:
        """Makes a trial that waits this process's. False where another one was faster."""
        with suppress(UpdateFinishedTrialError):
            if self.storage.set_trial_state_values(entry.trial_id, RUNNING):
                self.note(entry.trial_id, "worker", self.me)
                return True
        return False

    @patient
    def draw(self, entry: Entry) -> Values:
        """The values of a trial's point, drawn where there are none, and then queues its other seeds."""
        space, values = self.plan.space, entry.values
        if len(values) < len(space.axes):
            self.study.sampler = sampler(self.plan.sampler, entry.index)
            trial = optuna.trial.Trial(self.study, entry.trial_id)
            values = {axis.key: trial._suggest(axis.key, distribution(axis)) for axis in space.axes}
        entry.values = values
        if space.is_search:
            self._queue_seeds(entry, {each.index: each for each in self.entries()})
        return values

    @patient
    def note(self, trial_id: int, name: str, value: Any) -> None:
        self.storage.set_trial_user_attr(trial_id, name, value)

    @patient
    def now(self, entry: Entry) -> Entry:
        """The trial as the storage has it now."""
        return self._entry(entry.index, self.storage.get_trial(entry.trial_id))

    @patient
    def end(self, trial_id: int, state: TrialState, value: float | None = None) -> None:
        with suppress(UpdateFinishedTrialError):  # by this process, when the answer got lost
            self.storage.set_trial_state_values(trial_id, state, None if value is None else [value])

    def requeue(self, trial_id: int) -> None:
        self.note(trial_id, "worker", "")  # first, so that the next worker is not taken for the last one
        self.end(trial_id, WAITING)


def look(plan: Plan) -> list[Entry]:
    """The trials that a storage has. Makes no table and no file. Raises ValueError with one sentence."""
    with one_sentence(plan.url):
        file = sqlalchemy.make_url(plan.url).database if plan.url.startswith("sqlite") else ""
        if file and not os.path.exists(file):
            return []
        engine = sqlalchemy.create_engine(plan.url)
        there = "studies" in sqlalchemy.inspect(engine).get_table_names()
        engine.dispose()
        if not there or plan.name not in optuna.get_all_study_names(plan.url):
            return []
    return Board(plan, new=False).entries()
