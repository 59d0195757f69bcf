"""Keys of a configuration as fields of dataclasses: each with its default, its legal values and one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from ups_fast.words import said

NOUN = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
_BOOL_WORDS = ("true", "false", "yes", "no", "on", "off")


def key(default: Any, text: str, *, within: str = "", choices: tuple[str, ...] = ()) -> Any:
    """A field with its sentence and its legal values: an interval such as "[0, 1)", or a list of words."""
    return field(default=default, metadata={"help": text, "within": within, "choices": choices})


@dataclass(frozen=True)
class Key:
    """What is known about one key, for checks and help."""

    name: str  # dotted, such as "select.tau_p"
    type: type
    default: Any
    help: str
    within: str
    choices: tuple[str, ...]


def keys_of(cls: type, prefix: str = "") -> Iterator[Key]:
    """The keys of a dataclass, in order, their names behind `prefix`."""
    types = get_type_hints(cls)
    for item in fields(cls):
        if item.metadata:
            yield Key(prefix + item.name, types[item.name], item.default, **item.metadata)


def check(key: Key, value: Any) -> None:
    """ValueError, one sentence, where a value of the right type is not legal."""
    if key.choices and value not in key.choices:
        raise ValueError(
            f"{key.name} must be one of {', '.join(key.choices)}, got {said(value)}{hint(value, key.choices)}"
        )
    if key.within and not _inside(value, key.within):
        raise ValueError(f"{key.name} must be {interval(key.within)}, got {said(value)}")


def typed(kind: type, value: Any) -> Any:
    """The value as a key of this type takes it: 1 and 0 may be true and false, "3" is 3, but 8 is no text."""
    from ups_fast import config_file  # it needs yaml, and whoever only declares keys does not

    word = isinstance(value, str)
    if kind is str and word:
        value.encode("utf-8", "surrogateescape")  # ValueError for half a character, as no file's name has it
        return value
    if kind is bool and (isinstance(value, (bool, int, float)) and value in (0, 1)):
        return bool(value)
    if kind is bool and word and value in _BOOL_WORDS:
        return value in ("true", "yes", "on")
    if kind is int and (word or type(value) is int):
        return config_file.integer(value) if word else value
    if kind is float and (word or type(value) in (int, float)):
        return config_file.decimal(value) if word else float(value)
    raise ValueError


def hint(name: str, valid: Iterable[str]) -> str:
    """ " (did you mean ...?)" for the nearest valid name, or the one whose last part is nearest."""
    names = {key.rpartition(".")[2]: key for key in reversed(list(valid))}
    names |= {key: key for key in valid}
    near = difflib.get_close_matches(name[:100], names, n=1)
    return f" (did you mean {names[near[0]]}?)" if near else ""


def _inside(value: float, interval: str) -> bool:
    """Whether `value` is in an interval such as "[0, 1)"; NaN is in none."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


def interval(within: str) -> str:
    """The interval as people say it: "at least 0", "above 0 and finite", "in [0, 1)"; "" for no interval."""
    if not within:
        return ""
    low, high = within[1:-1].split(", ")
    if high != "inf":
        return f"in {within}"
    return f"{'at least' if within[0] == '[' else 'above'} {low}{'' if within[-1] == ']' else ' and finite'}"
