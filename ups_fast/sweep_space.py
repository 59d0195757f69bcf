"""What a sweep varies: words such as train.lr=0.01..0.3:log and select.tau_p=0.6,0.7, and the configs they make."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice, product
from pathlib import Path
from typing import Any

from yaml import YAMLError  # type: ignore[import-untyped]

from ups_fast import config, config_file
from ups_fast.config import KEYS, METHOD_KEYS, Config
from ups_fast.files import home
from ups_fast.schema import typed
from ups_fast.words import many, said

MOST_TRIALS = 2000
MOST_CORNERS = 256  # configs of a search that are checked before it begins
_RANGE = re.compile(r"([-+.\w]+?)\.\.([-+.\w]+?)(:log)?")
# What decides which samples validate, and so must be equal in all trials.
SPLIT = ("data.name", "data.root", "data.n_labels", "data.test_share", "data.val_share")
# What no trial is better for.
_NO_AXES = ("run_dir", "device", "threads", "checkpoint_seconds", "data.cache", "data.loader")
_WHOLE = (*_NO_AXES, "data.root", "data.ops", "model.weights")  # a comma is part of their text
Values = dict[str, Any]  # of each axis one: of a list its word, of a range a number


@dataclass(frozen=True)
class Axis:
    """A key and what it may be: words of a list, or a range of numbers."""

    key: str
    words: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False  # integers alone

    @property
    def ends(self) -> tuple[Any, ...]:
        return self.words or (self.low, self.high)


@dataclass(frozen=True)
class Space:
    """A sweep as its words say it. A point has one value of each axis; a trial is a point with one seed."""

    config: Path
    tree: Mapping[str, Any] = field(compare=False, repr=False)  # what was in it: it may be edited meanwhile
    words: tuple[str, ...]  # that all trials share
    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    folder: Path

    @property
    def is_search(self) -> bool:
        """Whether points are drawn. Lists alone make a grid."""
        return any(not axis.words for axis in self.axes)

    @property
    def grid(self) -> list[Values]:
        keys = [axis.key for axis in self.axes]
        return [dict(zip(keys, each, strict=True)) for each in product(*(axis.words for axis in self.axes))]

    def make(self, values: Mapping[str, Any], seed: int, run_dir: str = "") -> Config:
        """The config of a trial. Raises ValueError as `config.load`."""
        where = [f"run_dir={run_dir}"] if run_dir else []
        words = ["threads=1", *self.words, *_words(values), f"seed={seed}", *where]
        return config.load(self.config, words, self.tree)

    def trial(self, index: int, values: Mapping[str, Any], seed: int) -> Config:
        return self.make(values, seed, str(self.folder / "trials" / f"{index:04d}"))

    def plan(self) -> dict[str, Any]:
        """What a sweep that goes on must agree with: plain values by name."""
        base = dict(config.flatten(asdict(self.make(self._first(), self.seeds[0]))))
        for key in (*config_free(), "seed", *(axis.key for axis in self.axes)):
            base.pop(key, None)
        axes = {axis.key: [*axis.ends, "log" if axis.log else ""] for axis in self.axes}
        return {
            **base,
            "seeds": list(self.seeds),
            **{f"{key} by the sweep": ends for key, ends in axes.items()},
        }

    @property
    def first(self) -> Config:
        """The config of some trial, in no folder."""
        return self.make(self._first(), self.seeds[0], str(self.folder / "trials" / "none"))

    def _first(self) -> Values:
        return {axis.key: axis.ends[0] for axis in self.axes}


def config_free() -> tuple[str, ...]:
    from ups_fast.checkpoint import FREE_KEYS

    return tuple(key for key in FREE_KEYS if key != "train.rounds")


def read(path: str | Path, words: Sequence[str]) -> Space:
    """The space of a config file and the words of a command, checked as far as it can be without reading data.

    The word run_dir=FOLDER is the sweep's folder, runs/sweep/<stem of the file> by default.
    Raises ValueError or FileNotFoundError with one sentence. Nothing is written.
    """
    path = home(path)
    shared: list[str] = []
    axes: dict[str, Axis] = {}
    seeds: tuple[int, ...] = ()
    folder = f"runs/sweep/{path.stem}"
    keys = [word.partition("=")[0] for word in words]
    if twice := next((key for key in keys if keys.count(key) > 1), ""):
        raise ValueError(f"{twice} is given twice")
    for word in words:
        key, _, text = word.partition("=")
        if key == "run_dir" and text:
            folder = text
        elif key == "seed" and text:
            seeds = _seeds(text)
        elif axis := _axis(key, text):
            axes[key] = axis
        else:
            shared.append(word)
    try:
        tree = config_file.read(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    space = Space(path, tree, tuple(shared), tuple(axes.values()), seeds or (0,), home(folder))
    _check(space)
    if not seeds:
        own = config.load(path, [*shared, *_words(space._first())], tree).seed
        space = replace(space, seeds=(own,))
    return space


def _words(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def _axis(key: str, text: str) -> Axis | None:
    """None for a word with one value."""
    found = _RANGE.fullmatch(text)
    kind = next((known[key].type for known in (KEYS, *METHOD_KEYS.values()) if key in known), str)
    number = kind in (int, float)
    if key in _WHOLE or not ("," in text or (found and number)):
        return None
    if key in SPLIT:
        raise ValueError(
            f"{key} decides which samples validate, and all trials of a sweep must be judged by the same ones: make a "
            "sweep for each value, with another run_dir"
        )
    if "," in text:
        words = tuple(each.strip() for each in text.split(","))
        same = [_value(kind, word) for word in words]
        if not all(words) or len(set(same)) < len(same):
            raise ValueError(f"{key} must list different values, such as {key}=a,b, got {said(text)}")
        if any(number and _RANGE.fullmatch(word) for word in words):
            raise ValueError(f"{key} must be a list or a range, got both in {said(text)}")
        return Axis(key, words)
    assert found
    return _range(key, kind, text, *found.groups())


def _value(kind: type, word: str) -> Any:
    """So that 0.6 is 0.60, and true is yes; what is no legal value is refused when the config is made."""
    try:
        return typed(kind, word if kind is str else config_file.parse(word))
    except (ValueError, OverflowError, YAMLError):
        return word


def _range(key: str, kind: type, text: str, low: str, high: str, log: str | None) -> Axis:
    noun = "integers" if kind is int else "numbers"
    try:
        ends = typed(kind, low), typed(kind, high)
    except (ValueError, OverflowError):
        raise ValueError(f"{key} must be a range of {noun} such as 1..10, got {said(text)}") from None
    if not all(map(math.isfinite, ends)) or ends[0] >= ends[1]:
        raise ValueError(f"{key} must be a range from a lower to a higher number, got {said(text)}")
    if log and ends[0] <= 0:
        raise ValueError(f"{key} must be a range above 0 for :log, got {said(text)}")
    return Axis(key, (), *ends, log=bool(log), whole=kind is int)


def _seeds(text: str) -> tuple[int, ...]:
    bad = ValueError(f"seed must be different integers such as 0,1,2 or 0..4, got {said(text)}")
    found = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", text)
    if found:
        low, high = map(int, found.groups())
        if not low <= high < low + MOST_TRIALS:
            raise bad
        return tuple(range(low, high + 1))
    if not re.fullmatch(r"\d{1,18}(,\d{1,18})*", text):
        raise bad
    seeds = tuple(map(int, text.split(",")))
    if len(set(seeds)) < len(seeds):
        raise bad
    return seeds


def _check(space: Space) -> None:
    """That the configs can be, and agree on the data. Of a search those at the ends of its ranges."""
    if not space.axes and len(space.seeds) == 1:
        space.make({}, space.seeds[0])  # which says what is wrong with method.name=a..b
        raise ValueError(
            "nothing varies: give a key several values, such as train.lr=0.01..0.3:log, select.tau_p=0.6,0.7 or "
            "seed=0,1,2"
        )
    size = math.prod(len(axis.words) for axis in space.axes if axis.words) * len(space.seeds)
    if size > MOST_TRIALS and not space.is_search:
        raise ValueError(
            f"these lists make {many(size, 'trial')}, and {MOST_TRIALS:,} are allowed: use ranges"
        )
    first: Config | None = None
    for values in islice(_corners(space), MOST_CORNERS if space.is_search else None):
        try:
            cfg = space.make(values, space.seeds[0])
        except ValueError as error:
            said_ = ", ".join(_words(values))
            raise ValueError(f"{said_}: {error}" if said_ else str(error)) from None
        first = first or cfg
        for key in SPLIT:
            one, other = (_get(each, key) for each in (first, cfg))
            if one != other:
                raise ValueError(
                    f"{', '.join(_words(values))} changes {key} from {said(one)} to {said(other)}, and all trials of a "
                    "sweep must be judged by the same samples"
                )


def _corners(space: Space) -> Iterator[Values]:
    for each in product(*(axis.ends for axis in space.axes)):
        yield {axis.key: value for axis, value in zip(space.axes, each, strict=True)}


def _get(cfg: Config, key: str) -> Any:
    group, _, last = key.rpartition(".")
    return getattr(getattr(cfg, group), last)
