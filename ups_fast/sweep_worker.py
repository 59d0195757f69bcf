"""A worker of a sweep: takes one trial after the other from the storage, trains it, and says what it came to."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import ups_fast
from ups_fast.checkpoint import load_checkpoint
from ups_fast.command import mistake_of
from ups_fast.files import InUse
from ups_fast.state import Row, headline_of
from ups_fast.sweep_claims import Claim, Claims
from ups_fast.sweep_storage import Board, Lost, Plan, StorageGone
from ups_fast.trials import Trial, begin
from ups_fast.words import line_of
from ups_fast.workers import REMEDY

# What no trial is to blame for, and the next one would meet, too: disks and data that are full, gone or closed.
_MACHINE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE),
    *(errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENOTCONN, errno.ENODEV),
)
WAIT_SECONDS = 1.0  # after a trial that another process holds
_claims: dict[Plan, Claims] = {}  # of this process, one


@dataclass(frozen=True)
class Slot:
    """A place for one trial at a time."""

    number: int
    device: str
    plan: Plan

    @property
    def name(self) -> str:
        return f"worker {self.number}"


def run_one(slot: Slot, tell: Callable[[str], None]) -> str:
    """Runs trials until none waits. Returns "", or why this machine cannot go on: the trial then waits again."""
    try:
        if slot.plan not in _claims:
            _claims[slot.plan] = Claims(Board(slot.plan, new=False))
        claims = _claims[slot.plan]
        while True:
            tell("looks for a trial")
            claim = claims.take()
            if claim is None:
                return ""
            with suppress(Lost):
                if sentence := _run(claims, claim, slot):
                    return sentence
    except StorageGone as error:
        return str(error)


def _run(claims: Claims, claim: Claim, slot: Slot) -> str:
    try:
        with claim:
            values = claims.board.draw(claim.entry)
            cfg = slot.plan.space.trial(claim.entry.index, values, claim.entry.seed)
            _train(claim, replace(cfg, device=slot.device))
    except KeyboardInterrupt:  # everything is saved
        claim.release()
        raise
    except InUse:  # by a process that was taken for dead, or by the user
        claim.release()
        claims.shun(claim.entry.index)
        time.sleep(WAIT_SECONDS)
    except (Lost, StorageGone):
        raise
    except Exception as error:  # of this trial alone: the others go on
        if (number := _errno(error)) in _MACHINE:
            claim.release()
            return f"{line_of(error)}" + (": make room" if number in (errno.ENOSPC, errno.EDQUOT) else "")
        claim.failed(mistake_of(error, REMEDY) or f"{type(error).__name__}: {line_of(error)}")
    return ""


def _train(claim: Claim, cfg: Any) -> None:
    trial = Trial(f"{claim.entry.index:04d}", cfg)
    stood = load_checkpoint(Path(cfg.run_dir))
    claim.starts_at(*((stood.round, stood.epoch) if stood else (0, 0)))
    rows: list[Row] = []
    with closing(begin(trial)) as found:  # type: ignore[type-var]
        for row in found:
            rows.append(row)
            score = headline_of(row, "val")
            if score is None:
                raise ValueError("it has no validation samples: set data.val_share")
            if claim.report(row["round"], score):
                claim.ended(_numbers(rows), pruned=True)
                return
    claim.ended(_numbers(rows))


def _numbers(rows: Sequence[Row]) -> dict[str, Any]:
    """Of the round whose network is kept as the best: the last one of those that validate best."""
    best = max(rows, key=lambda row: (headline_of(row, "val") or 0.0, row["round"]))
    return {
        "round": best["round"],
        "test": headline_of(best),
        "unlabeled": headline_of(best, "unlabeled"),
        "right": best["positive_acc"],
        "positives": best["positives"],
        "ece": best["ece"],
        "seconds": round(sum(row["seconds"] for row in rows), 2),
        "torch": str(torch.__version__),
        "ups_fast": ups_fast.__version__,
    }


def _errno(error: BaseException | None) -> int | None:
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        error = error.__cause__
    return None
