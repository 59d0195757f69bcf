"""Gathers a benchmark run into a record, prints its table and, with --record, writes both (see record.py)."""

from __future__ import annotations

import pytest
import record

ABOUT = pytest.StashKey[dict]()
missing: dict[str, str] = {}


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="write benchmarks/results/<machine>-<date>.json")


def pytest_sessionstart(session):
    session.config.stash[ABOUT] = (
        record.about()
    )  # now: the commit of a tree that is edited meanwhile is another one


def pytest_runtest_logreport(report):
    name = report.nodeid.rpartition("/")[2]
    if report.skipped:
        missing[name] = str(report.longrepr[2]).removeprefix("Skipped: ")
    elif report.failed:
        missing[name] = "failed"


def pytest_sessionfinish(session):
    found = getattr(session.config, "_benchmarksession", None)
    if not found or not found.benchmarks:
        return
    made = record.make(session.config.stash[ABOUT], [b for b in found.benchmarks if b.stats.rounds], missing)
    print(f"\n\n{record.section(made)}")
    if session.config.getoption("--record"):
        print(f"\nrecorded in {record.write(made)}")
