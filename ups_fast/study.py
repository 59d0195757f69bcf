"""The command line `python -m ups_fast.study STUDY [key=value ...]`: many trials, side by side, on one page.

Exit status: 0 where all trials are done, 2 for what the user can mend (one sentence; the trials that are done stay),
130 for Ctrl-C, after which the same command goes on.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ups_fast import command, machine
from ups_fast.terminal import ended, printable

try:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    from ups_fast import config_file
    from ups_fast.display import Interrupted, open_console, say
    from ups_fast.files import RunFolderError, write_atomic, writing
    from ups_fast.report.study_page import study_page
    from ups_fast.state import headline_of
    from ups_fast.study_file import Job, Study, read
    from ups_fast.trials import check, record_of, train
    from ups_fast.words import many
    from ups_fast.workers import News, run_trials
except (KeyboardInterrupt, ImportError) as error:  # in the first seconds: nothing has been done
    if __name__ == "__main__":
        sys.exit(command.interrupted_early(error))
    raise

DESCRIPTION = """\
Train all variants of a study with all its seeds, and compare them on one page.

STUDY is a YAML file, such as configs/study/digits.yaml. key=value changes a key
of all trials, such as train.rounds=2, and run_dir=FOLDER says where all is kept.
The same command goes on with a stopped study."""
PAGE, RECORDS = "study.html", "study.jsonl"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the words `argv` (default: sys.argv) and returns the exit status."""
    return command.status_of(lambda: _study(_words(argv)), "give fewer --workers", command.may_go_on)


def _study(args: Namespace) -> None:
    with command.told_warnings():
        study = read(args.study, args.overrides, base=args.base, seeds=args.seeds)
    device = machine.pick_device(study.base.device)
    command.check_packages()
    command.check_kernels(device)
    _check_folder(study)
    records = {job.name: record for job in study.jobs if (record := record_of(job.trial))}
    console = open_console()
    if args.dry_run:
        for job in study.jobs:
            say(console, _line(study, job, "done" if job.name in records else "to do"))
        return
    todo = [job for job in study.jobs if job.name not in records]
    workers = args.workers or (1 if device.type == "cuda" else machine.cores())
    many_trials, done = many(len(study.jobs), "trial"), len(records)
    say(
        console,
        f"{study.name}: {many_trials}, {done:,} done; {min(workers, len(todo))} at once on {device.type}",
    )
    with writing(study.folder):
        (study.folder / "trials").mkdir(parents=True, exist_ok=True)
    show = _Show(console, study, records)
    try:
        if todo:
            run_trials(todo, workers, run_one, console, show.told, show.tick)
    except Interrupted:
        show.close()
        _write(study, records, show.errors)
        raise Interrupted(
            f"stopped: {len(records):,} of {many_trials} are done; everything is saved in {study.folder}"
        ) from None
    finally:
        show.close()
    _write(study, records, show.errors)
    say(console, f"page: {study.folder / PAGE}; records: {study.folder / RECORDS}")
    for name, sentence in show.errors.items():
        bad = f"{len(show.errors):,} of {many_trials} are not done, such as {name}: {sentence}"
        raise ValueError(f"{bad}; {study.folder / PAGE} has the others")


def run_one(job: Job, tell: Any) -> dict[str, Any]:
    """In a worker: trains what the trial lacks, and returns its numbers."""
    train(job.trial, tell)
    record = record_of(job.trial)
    if record is None:
        raise RunFolderError(f"{job.trial.folder} has no readable results, though its rounds are done")
    return record


class _Show:
    """What runs, as a table on a terminal, and a line for each trial that has ended. It keeps what they came to."""

    def __init__(self, console: Console, study: Study, records: dict[str, dict[str, Any]]) -> None:
        self.console, self.study, self.records = console, study, records
        self.errors: dict[str, str] = {}
        self.running: dict[str, tuple[float, str]] = {}  # since when, and where
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        if self.live:
            self.live.start()

    def told(self, job: Job, news: News) -> None:
        since, _ = self.running.get(job.name, (time.monotonic(), ""))
        if news.state in ("begun", "says"):
            self.running[job.name] = since, news.text or "starting"
            return
        del self.running[job.name]
        if news.state == "done":
            self.records[job.name] = news.result
        else:
            self.errors[job.name] = news.text
        ended = "" if news.state == "done" else f"{news.state}: {news.text}"
        say(self.console, _line(self.study, job, ended or _result(news.result)))

    def tick(self) -> None:
        if not self.live:
            return
        over = len(self.records) + len(self.errors)
        table = Table(
            "trial", "where", "s", title=f"{over:,} of {len(self.study.jobs):,}", title_justify="left"
        )
        for name, (since, text) in self.running.items():
            table.add_row(printable(name), printable(text), f"{time.monotonic() - since:.0f}")
        self.live.update(table, refresh=True)

    def close(self) -> None:
        if self.live:
            self.live.stop()


def _result(record: dict[str, Any]) -> str:
    shares = {part: headline_of(record, part) for part in ("test", "unlabeled")}
    said = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items() if share is not None)
    return f"{said or 'done'} ({record['seconds']:.0f} s)"


def _line(study: Study, job: Job, what: str) -> str:
    width = max(len(each.name) for each in study.jobs)
    keys = ", ".join(f"{key}={value}" for key, value in study.variants[job.variant].items())
    return f"{job.name:<{width}}  {what}" + (f"  [{keys}]" if keys and what in ("done", "to do") else "")


def _check_folder(study: Study) -> None:
    """Before anything is written: the folder is new or a study's, and no trial in it has another config."""
    with writing(study.folder):
        there = list(study.folder.iterdir()) if study.folder.exists() else []
    swept = any(each.name in ("sweep.jsonl", "sweep.db") for each in there)
    if there and (swept or not (study.folder / "trials").is_dir()):
        raise RunFolderError(f"run_dir={study.folder} holds files but no study: choose another folder")
    for job in study.jobs:
        check(job.trial)


def _write(study: Study, records: dict[str, dict[str, Any]], errors: dict[str, str]) -> None:
    """The lines of the trials that have ended, and the page made of them."""
    lines = []
    for job in study.jobs:
        about = {
            "trial": job.name,
            "variant": job.variant,
            "keys": study.variants[job.variant],
            "seed": job.seed,
        }
        if job.name in records:
            lines.append({**about, **records[job.name]})
        elif job.name in errors:
            lines.append({**about, "error": errors[job.name]})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomic(study.folder / RECORDS, text.encode())
    base = asdict(study.base)
    for key in ("run_dir", "seed"):  # of each trial its own
        del base[key]
    settings = config_file.write(base)
    page = study_page(f"Study {study.name}", study.tables, study.variants, lines, settings)
    write_atomic(study.folder / PAGE, page.encode("utf-8", "replace"))


def _words(argv: Sequence[str] | None) -> Namespace:
    parser = command.Parser(
        "keys are written as key=value, and --help explains the rest",
        prog="python -m ups_fast.study",
        usage="%(prog)s STUDY [key=value ...] [--workers N] [--seeds 0,1,2] [--base CONFIG] [--dry-run]",
        description=DESCRIPTION,
    )
    parser.add_argument("study", metavar="STUDY", help="the YAML file that describes the study")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="changes of keys of all trials")
    parser.add_argument(
        "--workers", type=command.count, default=0, metavar="N",
        help="so many trials at once. Default: as many as there are cores, and 1 on a GPU",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=_seeds, default=[], metavar="0,1,2", help="in place of the file's seeds"
    )
    parser.add_argument(
        "--base", default="", metavar="CONFIG", help="a config file in place of the file's base"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the trials, and do nothing")
    return parser.parse_intermixed_args(argv)


def _seeds(text: str) -> list[int]:
    seeds = text.split(",")
    if not all(seed.isdecimal() for seed in seeds) or len(set(map(int, seeds))) < len(seeds):
        raise ArgumentTypeError(f"must be different integers such as 0,1,2, got {text}")
    return [int(seed) for seed in seeds]


if __name__ == "__main__":
    sys.exit(ended(main()))
