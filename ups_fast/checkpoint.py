"""The files of a run: written whole or not at all, locked, and checked before they are believed.

checkpoint.pt alone says where a run stands; everything else in the folder is a product of it.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ups_fast import config_file
from ups_fast.config import RENAMED
from ups_fast.files import (
    NotDense,
    RunFolderError,
    check_plain,
    is_leftover,
    load_torch,
    locked,
    read_bytes,
    remove_leftovers,
    write_arrays,
    write_atomic,
    writing,
)
from ups_fast.models.saved import BEST, MODEL
from ups_fast.state import Checkpoint, Keeps, Row, alone, among
from ups_fast.tasks import Task
from ups_fast.words import line_of, shown

CONFIG, CHECKPOINT, LOCK = "config.yaml", "checkpoint.pt", ".lock"
METRICS, SELECTION = "metrics.jsonl", "selection.npz"
READABLE = "readable.json"  # which files of a folder have been found good
BASELINES = "baselines.json"  # what the report holds the run against
NEXT, SUSPECTS = "next_to_label.csv", "suspects.csv"  # for a person to look at
TENSORBOARD = "tb"
# All that a run writes. In its folder each must be a regular file itself, or not there.
_PRODUCTS = (
    BASELINES,
    "files.json",
    "images.npz",
    METRICS,
    NEXT,
    "pseudo_labels.csv",
    "report.html",
    "report.png",
    SELECTION,
    "split.npz",
    SUSPECTS,
)
RUN_FILES = frozenset((CONFIG, CHECKPOINT, LOCK, MODEL, BEST, READABLE, *_PRODUCTS))
# What may change when a run goes on: where it runs, where its (fingerprinted) data lie, and how many rounds it has and
# what its report shows, on which no round depends.
FREE_KEYS = (
    "run_dir",
    "device",
    "threads",
    "checkpoint_seconds",
    "data.root",
    "data.cache",
    "train.rounds",
    "runtime.timeout",
    "report.baselines",
    "report.review",
)
FORMAT, VERSION = "ups_fast checkpoint", 5
MOST_CONFIG = 100_000  # bytes of a config.yaml; one has some 3,000


@contextmanager
def open_folder(folder: Path, config: Mapping[str, Any], free: Collection[str] = FREE_KEYS) -> Iterator[str]:
    """Holds a run's folder for this process; makes it, with its config.yaml, at first use.

    config  nested plain values, as resolved

    Yields a warning where the folder cannot be locked, else "". The folder itself may be a link. Raises
    RunFolderError: it is not a folder, holds files but no run, or a link or pipe in place of a run's file, is in use by
    another process, or its config.yaml contradicts `config` in more than the keys `free`.
    """
    with writing(folder):  # a name may be too long
        there = folder.exists()
    if there and not folder.is_dir():
        raise RunFolderError(f"run_dir must be a folder, but {folder} is a file")
    known = folder / CONFIG
    if not os.path.lexists(known) and any(not _is_ours(path) for path in folder.glob("*")):
        raise _no_run(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in sorted(RUN_FILES):
            check_plain(folder / name)
        for name in ("", "epochs", "rounds"):
            check_plain(folder / TENSORBOARD / name, folder=True)
    with locked(folder / LOCK) as warning:
        if known.exists():
            check_config(known, config, free)
        else:
            write_atomic(known, config_file.write(config).encode())
        with writing(folder):
            remove_leftovers(folder, RUN_FILES)
        yield warning


def _is_ours(path: Path) -> bool:
    """What a run that was killed before its config.yaml stood may have left."""
    return path.name in (LOCK, READABLE) or is_leftover(path, frozenset((LOCK, READABLE, CONFIG)))


def _no_run(folder: Path) -> RunFolderError:
    if not (folder / CHECKPOINT).exists():
        return RunFolderError(f"run_dir={folder} holds files but no run of ups_fast: choose another folder")
    return RunFolderError(
        f"run_dir={folder} has a {CHECKPOINT}, but its {CONFIG}, which says of which run, is gone or has no keys: "
        "put it back, or choose another folder"
    )


def read_config(path: Path) -> dict[Any, Any]:
    """A run's config.yaml as nested plain values. Raises RunFolderError, one sentence, where it is none."""
    try:
        tree = config_file.parse(read_bytes(path, MOST_CONFIG).decode())
    except RunFolderError:
        raise
    except Exception as error:  # whatever a stranger's bytes may cause
        raise RunFolderError(f"{path} is damaged: {line_of(error)}") from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise RunFolderError(f"{path} is damaged: it is not a mapping of keys to values")
    return tree


def check_config(path: Path, config: Mapping[str, Any], free: Collection[str] = FREE_KEYS) -> None:
    """Raises RunFolderError where the config.yaml at `path` contradicts `config` in more than the keys `free`."""
    tree = read_config(path)
    here, there = dict(flat(config)), dict(flat(tree))
    if not here.keys() & there.keys():
        raise _no_run(path.parent)
    if there.keys() & RENAMED.keys():
        raise RunFolderError(
            f"run_dir={path.parent} was begun by an older ups_fast, whose runs this one cannot go on with: choose "
            "another run_dir"
        )
    differing = [
        f"{shown(key)} is {shown(here.get(key, 'absent'))} and was {shown(there.get(key, 'absent'))}"
        for key in {**here, **there}
        if key not in free and here.get(key) != there.get(key)
    ]
    if differing:
        more = f" and {len(differing) - 5} others" if len(differing) > 5 else ""
        raise RunFolderError(
            f"run_dir={path.parent} belongs to a run with another config: {', '.join(differing[:5])}{more}; "
            "choose another run_dir, or delete that folder to start over"
        )


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested {a: {b: 1}} as ("a.b", 1)."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def save_checkpoint(folder: Path, state: Checkpoint) -> None:
    buffer = io.BytesIO()  # so that write_atomic alone meets the disk
    made_by = {"format": FORMAT, "version": VERSION, "torch_version": str(torch.__version__)}
    torch.save({**vars(state), **made_by}, buffer)
    write_atomic(folder / CHECKPOINT, buffer.getbuffer())


def write_rows(folder: Path, rows: Sequence[Row]) -> None:
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    write_atomic(folder / METRICS, lines.encode())


def write_split(folder: Path, state: Checkpoint) -> None:
    val = {"val": state.val} if len(state.val) else {}
    parts = {"labeled": state.labeled, "unlabeled": state.unlabeled, **val}
    write_arrays(folder / "split.npz", parts)


def write_selection(folder: Path, found: Mapping[str, torch.Tensor], truth: torch.Tensor) -> None:
    write_arrays(folder / SELECTION, {**found, "truth": truth})


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint of `folder`, on the host; None where there is none yet.

    Raises RunFolderError where it is no regular file, damaged (check sums are compared), larger in memory than on the
    disk, foreign, of another version, or where its parts have impossible types or values or contradict each other.
    """
    path = folder / CHECKPOINT
    if not os.path.lexists(path):
        return None
    check_plain(path)
    try:
        content = load_torch(path)
    except Exception as error:  # whatever a stranger's bytes may cause
        why = f" ({error})" if type(error) in (ValueError, NotDense) else ""
        raise RunFolderError(
            f"{path} is damaged or no checkpoint{why}; move it away to start over"
        ) from error
    made_by = (
        (content.pop("format", None), content.pop("version", None)) if type(content) is dict else ("", 0)
    )
    if [type(each) for each in made_by] != [str, int] or made_by[0] != FORMAT:
        raise RunFolderError(f"{path} is not a checkpoint of ups_fast; move it away to start over")
    if made_by[1] != VERSION:
        raise RunFolderError(
            f"{path} has version {shown(made_by[1])}, but this ups_fast reads version {VERSION}: go on with the "
            "ups_fast that began the run, or choose another run_dir"
        )
    if wrong := alone(content):
        raise _unbelievable(path, wrong)
    return Checkpoint(**content)


def check_state(
    folder: Path,
    state: Checkpoint,
    fresh: Checkpoint,
    weights: Mapping[str, torch.Tensor],
    trained: Mapping[str, torch.Tensor],
    n_classes: int,
    *,
    task: Task,
    keeps: Keeps,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Raises RunFolderError where the checkpoint of `folder` cannot come from this run; arguments as `state.among`."""
    if wrong := among(state, fresh, weights, trained, n_classes, task=task, keeps=keeps, ranges=ranges):
        raise _unbelievable(folder / CHECKPOINT, wrong)


def _unbelievable(path: Path, wrong: str) -> RunFolderError:
    return RunFolderError(f"{path} is no state of a run: {wrong} cannot be right; move it away to start over")
