"""A study file: a base config, seeds, and tables of variants, each of which changes some keys of the base.

base: ../digits.yaml           a config file, seen from the study file; without it `keys` say all
keys: {train.epochs: 5}        what all trials change
seeds: [0, 1, 2]
tables:
  Selection:                   the title of a table
    UPS:                       a variant that changes nothing
    confidence only: {select.kappa_p: inf, select.kappa_n: inf}
    kappa_p: {select.kappa_p: [0.02, 0.1]}         a list of values: a variant of each
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ups_fast import config, config_file
from ups_fast.config import Config
from ups_fast.files import home
from ups_fast.report.study_page import Table
from ups_fast.schema import hint
from ups_fast.trials import Trial
from ups_fast.words import said

NAMES = ("base", "keys", "seeds", "tables")
OURS = {"seed": "give seeds", "run_dir": "give run_dir=FOLDER on the command line"}
Keys = dict[str, Any]  # values by dotted key


@dataclass(frozen=True)
class Job:
    """A trial and what it is a trial of."""

    trial: Trial
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return self.trial.name


@dataclass(frozen=True)
class Study:
    """What is compared, checked as far as it can be without reading data."""

    name: str
    folder: Path
    base: Config
    seeds: Sequence[int]
    tables: Sequence[Table]
    variants: Mapping[str, Keys]  # by name, what each changes
    jobs: Sequence[Job]  # by seed, so that those of equal data follow each other


def read(path: str | Path, words: Sequence[str] = (), *, base: str = "", seeds: Sequence[int] = ()) -> Study:
    """The study of a file. `words` ("key=value") change the base; `base` and `seeds` take the file's place.

    A variant's own keys stand above `words`. The word run_dir=FOLDER is the study's folder, runs/study/<stem of the
    file> by default. A trial has one thread, unless a word or the file's `keys` say otherwise.

    Raises ValueError or FileNotFoundError with one sentence. Nothing is written.
    """
    path = home(path)
    try:
        tree = config_file.read(path)
        for name in tree:
            if name not in NAMES:
                raise ValueError(f"unknown key {said(name)} of a study{hint(name, NAMES)}")
        chosen = home(base) if base else _base(tree.get("base"), path.parent)
        common = _keys("keys", tree.get("keys"))
        if not chosen and not common:
            raise ValueError("a study needs base, a config file, or keys")
        given = list(seeds) or _seeds(tree.get("seeds", [0]))
        tables, variants = _tables(tree.get("tables"))
        folder = next((w.partition("=")[2] for w in reversed(words) if w.startswith("run_dir=")), "")
        place = home(folder or f"runs/study/{path.stem}")
        rest = [word for word in words if not word.startswith("run_dir=")]
        _refuse_ours([word.partition("=")[0] for word in rest], "the command line")
        shared = ["threads=1", *_words(common), *rest]
        cfg = _config(chosen, shared)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    jobs = list(_jobs(chosen, shared, variants, given, place, path))
    axes = [_with_values(table, variants, jobs) for table in tables]
    return Study(path.stem, place, cfg, given, axes, variants, jobs)


def _jobs(
    base: Path | None,
    shared: Sequence[str],
    variants: Mapping[str, Keys],
    seeds: Sequence[int],
    place: Path,
    path: Path,
) -> Iterator[Job]:
    for seed in seeds:
        for name, changed in variants.items():
            folder = f"{_slug(name)}-seed{seed}"
            own = [f"seed={seed}", f"run_dir={place / 'trials' / folder}"]
            try:
                cfg = _config(base, [*shared, *_words(changed), *own])
            except ValueError as error:
                raise ValueError(f"{path}: variant {said(name)}: {error}") from None
            yield Job(Trial(folder, cfg), name, seed)


def _config(base: Path | None, words: Sequence[str]) -> Config:
    return config.load(base, words) if base else config.make(dict(map(config.parse_word, words)))


# The parts of the file ---------------------------------------------------------------------------------------


def _base(value: Any, folder: Path) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"base must be the path of a config file, got {said(value)}")
    return folder / home(value)


def _seeds(value: Any) -> list[int]:
    seeds = value if isinstance(value, list) else [value]
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"seeds must be a list of integers from 0, such as [0, 1, 2], got {said(value)}")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must differ, got {said(value)}")
    return seeds


def _keys(where: str, value: Any) -> Keys:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a mapping of keys to values, got {said(value)}")
    found: Keys = {}
    for key, each in config.flatten(value):
        if key in found:
            raise ValueError(f"{where}: {key} is given twice")
        if each is None or isinstance(each, dict):
            raise ValueError(f"{where}: {key} must have a value, got {said(each)}")
        found[key] = each
    _refuse_ours(found, where)
    return found


def _refuse_ours(keys: Any, where: str) -> None:
    for key in keys:
        if key in OURS:
            raise ValueError(f"{where}: {key} is set by the study itself: {OURS[key]}")


def _tables(value: Any) -> tuple[list[Table], dict[str, Keys]]:
    if not isinstance(value, dict) or not value:
        raise ValueError(f"tables must be a mapping of titles to variants, got {said(value)}")
    tables: list[Table] = []
    variants: dict[str, Keys] = {}
    for title, body in value.items():
        if not isinstance(body, dict) or not body:
            raise ValueError(f"table {said(title)} must be a mapping of variants to keys, got {said(body)}")
        names, listed = [], ""
        for name, keys in body.items():
            for each, changed, key in _listed(name, _keys(f"variant {said(name)}", keys)):
                if variants.setdefault(each, changed) != changed:
                    raise ValueError(f"variant {said(each)} is there twice with different keys: rename one")
                if listed and key and key != listed:
                    raise ValueError(
                        f"table {said(title)} lists values of {listed} and of {key}: make two tables"
                    )
                names.append(each)
                listed = listed or key
        tables.append(Table(title, names, listed))
    _check_names(variants)
    return tables, variants


def _listed(name: str, keys: Keys) -> Iterator[tuple[str, Keys, str]]:
    """The variant, or one for each value of the key that has a list: its name, what it changes, and that key."""
    lists = [key for key, value in keys.items() if isinstance(value, list)]
    if len(lists) > 1:
        raise ValueError(f"variant {said(name)} must list values of one key, got {' and '.join(lists)}")
    if not lists:
        yield name, keys, ""
        return
    (key,) = lists
    if not keys[key] or any(isinstance(value, (list, dict)) or value is None for value in keys[key]):
        raise ValueError(
            f"variant {said(name)}: {key} must be a value or a list of values, got {said(keys[key])}"
        )
    for value in keys[key]:
        yield f"{name} {_word(value)}", {**keys, key: value}, key


def _check_names(variants: Mapping[str, Keys]) -> None:
    """Each variant has a folder name of its own."""
    seen: dict[str, str] = {}
    for name in variants:
        other = seen.setdefault(_slug(name), name)
        if other != name or not _slug(name):
            what = f"like that of {said(other)}" if other != name else "empty"
            raise ValueError(f"variant {said(name)} would have a folder name {what}: rename it")


def _with_values(table: Table, variants: Mapping[str, Keys], jobs: Sequence[Job]) -> Table:
    """The table with its variants' values of the key that it lists, numbers in order.

    Variants that change other keys are not of that series.
    """
    if not table.key:
        return table
    series = [name for name in table.variants if variants[name].keys() <= {table.key}]
    cfgs = {job.variant: job.trial.cfg for job in jobs}
    group, _, last = table.key.rpartition(".")
    values = {name: getattr(getattr(cfgs[name], group) if group else cfgs[name], last) for name in series}
    numbers = all(isinstance(value, (int, float)) for value in values.values())
    order = sorted(series, key=values.__getitem__) if numbers else series
    return Table(table.title, table.variants, table.key, {name: _word(values[name]) for name in order})


def _slug(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name.lower()).strip("_.-")[:80]


def _word(value: Any) -> str:
    return (
        f"{value:g}"
        if isinstance(value, float)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )


def _words(keys: Keys) -> list[str]:
    """As they would stand on the command line. A list there is no value, which the check of the type says."""
    return [f"{key}={_word(value) if isinstance(value, bool) else value}" for key, value in keys.items()]
