"""The command line `python -m ups_fast.sweep CONFIG key=a,b key=low..high ...`: many trials, judged by validation.

Exit status: 0 where all trials have ended, 2 for what the user can mend (one sentence; what is done stays), 130 for
Ctrl-C, after which the same command goes on.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ups_fast import command, machine
from ups_fast.terminal import complain, ended, printable

try:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    from ups_fast.display import Interrupted, open_console, say, stop_signal
    from ups_fast.files import RunFolderError, check_plain, writing
    from ups_fast.inputs import validates
    from ups_fast.study import RECORDS as STUDY_RECORDS
    from ups_fast.sweep_space import MOST_TRIALS, Space, read
    from ups_fast.words import many
    from ups_fast.workers import News, run_trials

    if find_spec("optuna") is not None:
        from ups_fast.sweep_optuna import PRUNERS, SAMPLERS, file_url
        from ups_fast.sweep_results import BEST, PAGE, RECORDS, keys_of, line_of, records_of, write
        from ups_fast.sweep_storage import RUNNING, WAITING, Board, Entry, Plan, StorageGone, look
        from ups_fast.sweep_worker import Slot, run_one
except (KeyboardInterrupt, ImportError) as error:  # in the first seconds: nothing has been done
    if __name__ == "__main__":
        if str(getattr(error, "name", "")).partition(".")[0] in ("optuna", "sqlalchemy", "alembic"):
            complain(
                f"error: optuna cannot be used ({error}): pip install --force-reinstall 'ups_fast[sweep]'"
            )
            sys.exit(2)
        sys.exit(command.interrupted_early(error))
    raise

DESCRIPTION = """\
Train a config with many values of its keys, and find the best by its validation
samples.

CONFIG is a YAML file, such as configs/digits.yaml. key=a,b,c lists values,
key=low..high is a range, and key=low..high:log one on a logarithmic scale.
Lists alone make a grid. With a range, points are drawn and --trials says how
many. seed=0,1,2 trains each point with each seed. key=value changes a key of
all trials, and run_dir=FOLDER says where all is kept.
The same command goes on with a stopped sweep."""
DEFAULT_TRIALS = 20
POLL_SECONDS = 1.0
MOST_DEATHS = 10  # of processes of this machine, without a round that it finished between them
STORAGE = "sweep.db"
WIDE = 80  # columns of a terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the words `argv` (default: sys.argv) and returns the exit status."""
    return command.status_of(lambda: _sweep(_words(argv)), "give fewer --workers", command.may_go_on)


def _sweep(args: Namespace) -> None:
    if find_spec("optuna") is None:
        raise ValueError("optuna is not installed: pip install 'ups_fast[sweep]'")
    with command.told_warnings():
        space = read(args.config, args.overrides)
    plan = _plan(args, space)
    cfg = space.first
    device = machine.pick_device(cfg.device)
    command.check_packages()
    command.check_kernels(device)
    _check_folder(space.folder)
    console = open_console()
    if not validates(cfg, device, Console(quiet=True)):
        raise ValueError(
            "a sweep is judged by validation samples, and never by test samples: set data.val_share=0.2, or give the "
            "data a validation part"
        )
    if args.dry_run:
        _list(console, plan)
        return
    slots = _slots(args, plan, cfg.device, device)
    with writing(space.folder):
        (space.folder / "trials").mkdir(parents=True, exist_ok=True)
        if not os.access(space.folder, os.W_OK):  # of which SQLite would say that it cannot open a file
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    board = Board(plan)
    board.begin()
    drive = _Drive(console, board, slots)
    try:
        drive.run()
    except KeyboardInterrupt:
        drive.finish_early()
        raise Interrupted(f"stopped: {drive.counted()}; everything is saved in {space.folder}") from None
    except StorageGone as error:
        drive.trouble = str(error)
    finally:
        drive.close()
    if drive.trouble:
        drive.finish_early()
        raise ValueError(f"{drive.trouble}; {drive.counted()}, and the same command goes on")
    drive.finish()


def _plan(args: Namespace, space: Space) -> Plan:
    size = len(space.seeds) if space.is_search else len(space.grid) * len(space.seeds)
    if args.trials and not space.is_search:
        raise ValueError(
            f"--trials is for ranges, and these lists make a grid of {many(size, 'trial')}, all of which are run: "
            "leave it out, or give a range such as train.lr=0.01..0.3:log"
        )
    trials = (args.trials or DEFAULT_TRIALS) if space.is_search else size
    pruner = args.pruner or ("median" if space.is_search else "none")
    url = args.storage or file_url(space.folder / STORAGE)
    return Plan(space, url, trials, args.sampler, pruner)


def _slots(args: Namespace, plan: Plan, asked: str, device: torch.device) -> list[Slot]:
    """One for each core, or so many on each GPU."""
    if device.type == "cpu":
        places = ["cpu"] * (args.workers or machine.cores())
    else:
        all_of_them = asked in ("auto", "cuda")
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if all_of_them else [asked]
        places = gpus * args.slots_per_gpu
        places = (places * -(-args.workers // len(places)))[: args.workers] if args.workers else places
    return [Slot(i, place, plan) for i, place in enumerate(places)]


def _check_folder(folder: Path) -> None:
    with writing(folder):
        there = list(folder.iterdir()) if folder.exists() else []
    names = {each.name for each in there}
    if there and (not names & {"trials", STORAGE} or STUDY_RECORDS in names):
        raise RunFolderError(f"run_dir={folder} holds files but no sweep: choose another folder")
    for name in (RECORDS, BEST, PAGE):
        check_plain(folder / name)
    check_plain(folder / "trials", folder=True)


def _list(console: Console, plan: Plan) -> None:
    """What would run, and what has. Writes nothing."""
    space, there = plan.space, {entry.index: entry for entry in look(plan)}
    grid = [] if space.is_search else space.grid
    for index in range(plan.trials):
        point, seed = plan.point_of(index)
        values = there[index].values if index in there else {}
        said = keys_of(values or (grid[point] if grid else {}))
        if not said:
            said = ", ".join(f"{axis.key}=?" for axis in space.axes)
        state = there[index].state.name.lower() if index in there else "to do"
        say(console, f"{index:04d}  {state}  [{', '.join(filter(None, (said, f'seed={seed}')))}]")
    how = f"points drawn by {plan.sampler}" if space.is_search else "a grid"
    say(console, f"{many(plan.trials, 'trial')}: {how}; pruner: {plan.pruner}")


class _Drive:
    """The workers of this command, and what the storage says of all trials."""

    def __init__(self, console: Console, board: Board, slots: list[Slot]) -> None:
        self.console, self.board, self.plan = console, board, board.plan
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

    def __iter__(self) -> _Drive:
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
            self.board.forget_silence()
        if self.board.rescue(self.entries):
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
            self.board.rescue(self.board.entries(), blame=False)  # of workers that could not save any more
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


def _words(argv: Sequence[str] | None) -> Namespace:
    parser = command.Parser(
        "keys are written as key=value, and --help explains the rest",
        prog="python -m ups_fast.sweep",
        usage="%(prog)s CONFIG [key=value ...] [key=a,b ...] [key=low..high[:log] ...] [options]",
        description=DESCRIPTION,
    )
    parser.add_argument("config", metavar="CONFIG", help="the YAML file that describes a run")
    parser.add_argument("overrides", metavar="key=...", nargs="*", help="what varies, and what all share")
    parser.add_argument(
        "--trials", type=_trials, default=0, metavar="N",
        help=f"of a search, the number of runs in all, those of each seed counted. Default: {DEFAULT_TRIALS}",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=command.count, default=0, metavar="N",
        help="so many trials at once. Default: as many as there are cores, or slots on the GPUs",
    )  # fmt: skip
    parser.add_argument(
        "--slots-per-gpu", type=command.count, default=1, metavar="N",
        help="so many trials at once on each GPU. Small networks leave room for several. Default: 1",
    )  # fmt: skip
    parser.add_argument(
        "--storage", default="", metavar="URL",
        help="where trials are recorded, such as postgresql://user@host/name. Default: sweep.db in run_dir",
    )  # fmt: skip
    names = find_spec("optuna") is not None
    parser.add_argument(
        "--sampler", default="tpe", choices=SAMPLERS if names else None,
        help="how points of ranges are drawn. Default: tpe",
    )  # fmt: skip
    parser.add_argument(
        "--pruner", default="", choices=PRUNERS if names else None,
        help="which trials end early, judged after each round. Default: median with ranges, none for a grid",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="list the trials, and do nothing")
    return parser.parse_intermixed_args(argv)


def _trials(text: str) -> int:
    count = command.count(text)
    if count > MOST_TRIALS:
        raise ArgumentTypeError(f"must be at most {MOST_TRIALS:,}, got {text}")
    return count


if __name__ == "__main__":
    sys.exit(ended(main()))
