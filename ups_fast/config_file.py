"""The YAML of a config: read as plain values, with one sentence for all else, and written so that it reads back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from ups_fast.words import did_you_mean, said, shown

LARGEST = 2**20  # bytes of a config file: one that is larger is something else
MOST_BITS = 14_000  # of an integer: Python writes no number of more than 4,300 digits
DEEPEST = 20  # lists and mappings within each other
_TAG = "tag:yaml.org,2002:"
# YAML reads 010 as the octal 8 and 12:30 as the sexagesimal 750.
_MISREAD = re.compile(r"[-+]?(0[\d_]+|[\d_]+:[\d_:.]+)")


def read(path: Path) -> dict[str, Any]:
    """The file as nested plain values. Raises FileNotFoundError or ValueError with one sentence."""
    if not path.exists():
        others = (each.name for each in path.parent.glob("*.yaml"))
        hint = did_you_mean(path.name, others, lambda name: str(path.parent / name))
        raise FileNotFoundError(f"there is no config file {path}{hint}")
    if path.is_dir():
        raise ValueError("a config must be a file, and this is a folder")
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"a config must have at most {LARGEST:,} bytes, and this file has more")
        tree = parse(content.decode("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"this file cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"this is not a readable config: it is no text in UTF-8 ({error.reason})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"this is not valid YAML: {_yaml_words(error)}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        got = "a list" if isinstance(tree, list) else said(str(tree))
        raise ValueError(f"a config must be a mapping of keys to values, got {got}")
    return tree


def write(tree: Mapping[str, Any]) -> str:
    """Nested plain values as YAML, which `parse` makes into the same values again."""
    return yaml.dump(dict(tree), Dumper=_Dumper, allow_unicode=True, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Quotes text that some reader of YAML takes for a number, or reads back as other characters."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = None if text.isprintable() else '"'
    try:
        float(text)
        style = "'"
    except ValueError:
        style = "'" if _MISREAD.fullmatch(text) else style
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def parse(text: str) -> Any:
    """YAML as plain values: None, bool, int, float, str, and lists and dicts of them with keys as they were written.

    Dates stay text. Raises yaml.YAMLError, or ValueError for what YAML knows and a config does not, or what YAML reads
    as nobody means it.
    """
    depth, plain = 0, set()
    for event in yaml.parse(text, Loader=yaml.SafeLoader):  # before anything is built from it
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"a config must not nest deeper than {DEEPEST} lists and mappings")
        if isinstance(event, yaml.ScalarEvent):
            if event.anchor:
                plain.add(event.anchor)
            if event.style is None and _MISREAD.fullmatch(event.value):
                raise ValueError(
                    f"a number must have no leading zeros or colons, got {said(event.value)} "
                    "(where it is meant as text, put it in quotes)"
                )
        elif isinstance(event, yaml.AliasEvent) and event.anchor not in plain:
            raise ValueError(f"an alias must stand for a single value, got *{shown(event.anchor)}")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return None if root is None else _plain(root)


def _plain(node: yaml.Node) -> Any:
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [_plain(each) for each in node.value]
    if isinstance(node, yaml.MappingNode) and kind == "map":
        result: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == f"{_TAG}null":
                got = "nothing" if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                raise ValueError(f"this is not a readable config: a key must be a word, got {got}")
            if key.value in result:
                raise ValueError(f"this is not valid YAML: duplicate key {said(key.value)}")
            result[key.value] = _plain(value)
        return result
    if not isinstance(node, yaml.ScalarNode):
        kind = ""
    if kind in ("str", "timestamp", "merge", "value"):
        return node.value
    try:
        if kind == "null":
            return None
        if kind == "bool":
            return {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}[
                node.value.lower()
            ]
        if kind == "int":
            return integer(node.value)
        if kind == "float":
            return decimal(node.value)
    except (ValueError, KeyError):
        raise ValueError(f"{said(node.value)} cannot be read as {shown(kind)}") from None
    raise ValueError(
        f"this is not valid YAML of a config, which has plain values alone: got the tag {said(node.tag)}"
    )


def integer(text: str) -> int:
    digits = text.replace("_", "").lower()
    if not re.fullmatch(r"[-+]?(0|[1-9][0-9]*|0x[0-9a-f]+|0b[01]+)", digits):
        raise ValueError
    number = int(digits, 0)
    if number.bit_length() > MOST_BITS:
        raise ValueError
    return number


def decimal(text: str) -> float:
    number = text.replace("_", "").lower()
    if not re.fullmatch(
        r"[-+]?([0-9]+\.?[0-9]*(e[-+]?[0-9]+)?|\.[0-9]+(e[-+]?[0-9]+)?|\.?inf|infinity|\.?nan)", number
    ):
        raise ValueError
    return float(number.replace(".inf", "inf").replace(".nan", "nan"))


def _yaml_words(error: yaml.YAMLError) -> str:
    words = " ".join(str(error).split()).replace('in "<unicode string>", line', "in line")
    return words if len(words) <= 300 else f"{words[:297]}..."
