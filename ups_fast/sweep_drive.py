"""A sweep while it runs: it starts workers where trials wait, shows how they stand, and takes care of the lost ones."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from ups_fast.display import Interrupted, say, stop_signal
from ups_fast.files import RunFolderError
from ups_fast.sweep_claims import Rescue
from ups_fast.sweep_results import keys_of, line_of, records_of, write
from ups_fast.sweep_storage import RUNNING, WAITING, Board, Entry, StorageGone
from ups_fast.sweep_worker import Slot, run_one
from ups_fast.terminal import printable
from ups_fast.words import many
from ups_fast.workers import News, run_trials

POLL_SECONDS = 1.0
MOST_DEATHS = 10  # of processes of this machine, without a round that it finished between them
WIDE = 80  # columns of a terminal


class Drive:
    """The workers of this command, and what the storage says of all trials."""

    def __init__(self, console: Console, board: Board, slots: list[Slot]) -> None:
        self.console, self.board, self.plan = console, board, board.plan
        self.rescue = Rescue(board)
        self.free = slots
        self.trouble = ""  # why this machine cannot go on
        self.deaths = 0  # of its processes, since a round was finished
        self.entries: list[Entry] = []
        self.shown: set[int] = set()
        self.polled, self.due = 0.0, 0.0
        self.rounds_done = 0
        self.seen: dict[int, float] = {}  # since when a trial runs, as seen from here
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self.poll()
        what = "drawn" if self.plan.space.is_search else "in a grid"
        where = slots[0].device.partition(":")[0]
        waiting = sum(not entry.ended for entry in self.entries)
        if waiting or len(self.mine()) < self.plan.trials:
            say(
                console,
                f"{self.plan.name}: {many(self.plan.trials, 'trial')} {what}, {self.counted()}; "
                f"{many(len(slots), 'worker')} on {where}",
            )
        if self.live:
            self.live.start()

    # The iterator that feeds `run_trials`: a slot where a trial waits, else None.

    def __iter__(self) -> Drive:
        return self

    def __next__(self) -> Any:
        if self.trouble or not self.free:
            return None
        self.tick()
        return self.free.pop(0) if any(each.state == WAITING for each in self.mine()) else None

    def mine(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.index < self.plan.trials]

    def over(self) -> bool:
        return len(self.mine()) >= self.plan.trials and all(entry.ended for entry in self.mine())

    def run(self) -> None:
        """Until all trials have ended, those of other machines too, or this machine cannot go on."""
        while not self.over() and not self.trouble:
            run_trials(self, len(self.free), run_one, self.console, self.told, self.tick)
            if not self.over() and not self.trouble:  # others have the rest
                with stop_signal(self.console) as stop:
                    self.tick()
                    if stop.wait(POLL_SECONDS):
                        raise Interrupted

    def told(self, slot: Slot, news: News) -> None:
        if news.state in ("begun", "says"):
            return
        self.free.append(slot)
        self.due = 0.0
        if news.state == "done":
            self.trouble = self.trouble or news.result
            return
        self.deaths += 1
        if self.deaths >= MOST_DEATHS:
            self.trouble = f"{self.deaths} processes have ended without a finished round: {news.text}"

    def tick(self) -> None:
        if time.monotonic() >= self.due:
            self.poll()

    def poll(self) -> None:
        begun = time.monotonic()
        self.entries = self.board.entries()
        took = time.monotonic() - begun
        if took > 5:
            self.rescue.forget_silence()
        if self.rescue(self.entries):
            self.entries = self.board.entries()
        self.due = time.monotonic() + max(POLL_SECONDS, 10 * took)
        here = self.board.me.rpartition(":")[0]
        mine = [entry for entry in self.entries if entry.worker.rpartition(":")[0] == here]
        finished = sum(len(entry.curve) + entry.ended for entry in mine)
        if finished > self.rounds_done:
            self.deaths = 0
        self.rounds_done = finished
        running = {entry.index for entry in self.entries if entry.state == RUNNING}
        self.seen = {index: self.seen.get(index, begun) for index in running}
        for entry in self.mine():
            if entry.ended and entry.index not in self.shown:
                self.shown.add(entry.index)
                if self.polled:
                    say(self.console, line_of(self.plan, entry))
        self.polled = begun
        self._show()

    def _show(self) -> None:
        if not self.live:
            return
        scores = [entry.score for entry in self.mine() if entry.score is not None]
        title = self.counted() + (f"; best trial so far: val {100 * max(scores):.1f} %" if scores else "")
        running = [entry for entry in self.mine() if entry.state == RUNNING]
        since = {index: time.monotonic() - begun for index, begun in self.seen.items()}
        self.live.update(table_of(title, running, since, self.console.width), refresh=True)

    def counted(self) -> str:
        states = [entry.state.name for entry in self.mine()]
        words = {"COMPLETE": "done", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "begun"}
        said = [f"{states.count(name):,} {word}" for name, word in words.items() if name in states]
        return f"{', '.join(said) or '0 done'} of {self.plan.trials:,}"

    def finish(self) -> None:
        """The page, the table and the best config, of what the storage has."""
        self.close()
        self.entries = self.board.entries()
        ran = [entry for entry in self.entries if entry.index < self.plan.trials or entry.ended]
        for line in write(self.plan, records_of(self.plan, ran), self.board.study):
            say(self.console, line)

    def finish_early(self) -> None:
        """The same as far as storage and disk allow: why it ends is what there is to say."""
        self.board.patience = 0.0
        with suppress(StorageGone, RunFolderError):
            self.rescue(self.board.entries(), blame=False)  # of workers that could not save any more
            self.finish()

    def close(self) -> None:
        if self.live:
            self.live.stop()


def table_of(title: str, running: Sequence[Entry], since: Mapping[int, float], width: int) -> Table:
    """The trials in progress. A narrow terminal has no room for where they are."""
    names = ["trial", "round", "val %", "s", "where"][: 5 if width >= WIDE else 4]
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    table.add_column("values", overflow="fold")
    for entry in running:
        best = "" if entry.score is None else f"{100 * entry.score:.1f}"
        said = ", ".join(filter(None, (keys_of(entry.values), f"seed={entry.seed}")))
        cells = [f"{entry.index:04d}", str(len(entry.curve)), best, f"{since[entry.index]:.0f}", entry.where]
        table.add_row(*map(printable, [*cells[: len(names)], said]))
    return table
