"""Configs that nobody should write: a seeded generator of YAML files and key=value words, most of them wrong.

`python tests/fuzz_config.py 20000` tries many, and prints each that ends in anything but a config or one sentence.
"""

# ruff: noqa: E501

from __future__ import annotations

import random
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from ups_fast.config import KEYS, METHOD_KEYS, RENAMED, load

SCALARS = [
    "1", "0", "-1", "+1", "1.0", "1e3", "1e-3", "1e400", "-1e400", "1e", "1_000", "0x10", "0o17", "010", "0b101",
    "12:30", "1:2:3.5", "-12:30:45", ".inf", "-.inf", "+.inf", ".nan", ".NaN", "inf", "nan", "-nan", "Infinity",
    "true", "True", "yes", "No", "on", "OFF", "y", "n", "null", "~", "", "Null", "none", "???", "'???'",
    "9" * 20, "9" * 400, "-" + "9" * 400, "1" * 5000, "1e" + "9" * 30, "0x" + "f" * 400, "0." + "3" * 500, "1" + "_0" * 99,
    "2024-01-01", "2024-01-01T10:00:00Z", "2024-13-45", "2024-01-01 25:61:61", "2001-12-14t21:59:43.10-05:00", "0000-00-00",
    "99999-01-01", "2024-1-1", "2024-02-30T00:00:00+99:99",
    "${seed}", "${oc.env:HOME}", "'${'", "${", "$", "${a", "${}", "}", "${${seed}}", "x${seed}", "\\${seed}", "${oc.env:X,${",
    "${seed", "1${", "${oc.decode:'1'}", "$ {x}", "'${x:y:z}'",
    "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!binary aGk=", "!!binary '%%%'", "!!float x", "!!int x", "!!int ''",
    "!!bool maybe", "!!null x", "!!timestamp x", "!!str 5", "!!float 1", "!!int 1.5", "!!python/object:os.system x",
    "!!python/tuple [1]", "!!python/name:os.system", "!!python/object/apply:os.system ['true']", "!x y", "!!map x",
    "!!seq x", "!!merge x", "!!value x", "!<tag:yaml.org,2002:int> 3", "!!int 0x", "!!int 0b", "!!float 1:2", "!!int 1:99",
    "&a 1", "*a", "*nobody", "&a [*a]", "&a {x: *a}", "=", "<<", "[<<]", "{<<: 1}", "{<<: [1]}", "{<<: {lr: 1}}",
    "[1]", "[]", "{}", "{a: 1}", "[[[[1]]]]", "{1: 2}", "{true: 1}", "{null: 1}", "{[1]: 2}", "{{a: 1}: 2}", "{1.5: 2}",
    "? a", "- 1", "|", "|\n  text", ">-\n  text\n  more", "'a\n\n  b'", "\"\\x00\"", "\"\\ud800\"", "\"\\U00110000\"", "\"\\x1b[31m\"",
    "'it''s'", "\"", "'", "#", "# x", "%", "@x", "`x`", "a: b: c", "[1", "{a", "]", "\t1", "1\t", "\x00", "\x07", "\x1b[0m",
    "\ud800", "\udcff", "\ufeff", "\u2028", "\x85", "é", "日本", "😀", "x" * 5000, " ", "   1   ", "--- 1", "...", "%YAML 9.9",
    "[" * 50 + "]" * 50, "[" * 150 + "]" * 150, "[" * 3000, "{a: " * 120 + "1" + "}" * 120, "- " * 200 + "1", "((((", "1,2", "a=b", "a:b",
    "auto", "cpu", "cuda:99999999999999999999", "cuda:-1", "cuda:²", "paper", "fast", "npz", "folder", "C:\\x", "~nobody/x", "~/x",
]  # fmt: skip
FILES = [
    "", "\n", "---\n", "--- \n---\n", "seed: 1\n---\nseed: 2\n", "...\n", "%YAML 1.1\n---\nseed: 1\n", "%TAG ! x\n", "null\n", "[]\n",
    "- seed\n", "5\n", "text\n", "\ttrain:\n", "train:\n\tlr: 1\n", "train:\n  lr: 1\n lr: 2\n", "seed: 1\nseed: 2\n", "train: {lr: 1, lr: 2}\n",
    "train.lr: 1\ntrain: {lr: 2}\n", "train: *x\n", "a: &x {lr: 1}\ntrain: *x\n", "train: &x {lr: 1}\nselect: *x\n", "train: &x {lr: *x}\n",
    "base: &b {lr: 0.1}\ntrain:\n  <<: *b\n", "train:\n  <<: {lr: 0.1}\n", "train:\n  <<: [{lr: 0.1}, {lr: 1}]\n", "<<: {seed: 3}\n", "train:\n  <<: 3\n",
    "? [1, 2]\n: 3\n", "? {a: 1}\n: 3\n", "1: 2\n", "true: 1\n", "null: 1\n", "~: 1\n", "1.5: 2\n", "2024-01-01: 1\n", "'': 1\n", "train:\n  '': 1\n",
    "train:\n  1: 2\n", "train:\n  null: 2\n", "train:\n  true: 1\n", "!!set {seed, train}\n", "!!omap [seed: 1]\n", "!!python/object:os.system {}\n",
    "&a [*a]\n", "&a {seed: *a}\n", "seed: &a 1\ndata: {n_labels: *a}\n", "a: " * 300 + "1\n", "\n".join("  " * i + f"k{i}:" for i in range(300)),
    "[" * 5000, "{" * 5000, "- " * 5000, "? " * 3000, "!!map " * 100, "&a " * 10, "seed: " + "[" * 1500 + "]" * 1500, "seed: " + "{a: " * 1000 + "}" * 1000,
    "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
    ),
    "\ufeffseed: 1\n", "seed: 1\r\ntrain:\r\n  lr: 1\r\n", "seed: 1\rtrain:\r", "seed: 1\x85train: {lr: 2}", "seed: 1\0", "\0", "seed: \x07", "seed\x1b: 1\n",
    "${seed}: 1\n", "train: {${seed}: 1}\n", "seed: 1\n${: 2\n", "train.: 1\n", ".lr: 1\n", "train..lr: 1\n", ".: 1\n", "train[lr]: 1\n", "train.lr.x: 1\n",
    "seed : 1\n", "seed:1\n", "'seed': 1\n", "\"se\\u0065d\": 1\n", "? seed\n", "? seed\n: 1\n", "Seed: 1\n", "seed: 1 # x\n", "seed: 1#x\n", "x" * 20000 + ": 1\n",
    "".join(f"key{i}: 1\n" for i in range(2000)), "self: 1\n", "__class__: 1\n", "_metadata: 1\n", "_content: 1\n", "train: {_parent: 1}\n", "data: {_flags: {}}\n",
]  # fmt: skip
RAW = [
    b"\xff\xfe",
    b"\xfe\xff\0s",
    "seed: 1\n".encode("utf-16"),
    "seed: 1\n".encode("utf-32"),
    b"seed: \xff\n",
    b"\x80",
    b"\xed\xa0\x80: 1\n",
    bytes(range(256)),
]


def cases(seed: int) -> Iterator[tuple[bytes, list[str]]]:
    """Without end: the bytes of a file, and words of a command line. The lists above come first."""
    draw = random.Random(seed)
    base = b"data: {name: digits, n_labels: 40}\n"
    yield from ((each.encode("utf-8", "surrogatepass"), []) for each in FILES)
    yield from ((each, []) for each in RAW)
    names, odd = (
        [*KEYS, *RENAMED, *sorted({key for found in METHOD_KEYS.values() for key in found}.difference(KEYS))],
        [
            "",
            ".",
            "train",
            "data.",
            "${seed}",
            "a b",
            "é",
            "\ud800",
            "[0]",
            "train.lr[0]",
            "-x",
            "<<",
            "seed\n",
            "\x1b",
        ],
    )
    for each in SCALARS:
        for name in ("seed", "train.lr", "data.flip", "run_dir", "recipe", "train"):
            yield base, [f"{name}={each}"]
            yield _nested(name, each).encode("utf-8", "surrogatepass"), ["data.n_labels=40"]
    while True:
        name = draw.choice(names if draw.random() < 0.9 else odd)
        value = draw.choice(SCALARS)
        for _ in range(draw.choice([0, 0, 1, 2])):  # a few bytes are changed, lost or doubled
            at = draw.randrange(len(value) + 1)
            value = (
                value[:at]
                + draw.choice(["", draw.choice(SCALARS)[:3], chr(draw.randrange(1, 300)), "$", "{", ":"])
                + value[at + 1 :]
            )
        if draw.random() < 0.5:
            yield base, [f"{name}={value}" if draw.random() < 0.97 else value]
        else:
            text = "".join(
                _nested(draw.choice(names), draw.choice(SCALARS)) for _ in range(draw.choice([0, 0, 1]))
            )
            text += _nested(name, value) if draw.random() < 0.8 else draw.choice(FILES).replace("1", value, 1)
            yield text.encode("utf-8", "surrogatepass"), ["data.n_labels=40"]


def _nested(name: str, value: str) -> str:
    group, dot, last = name.rpartition(".")
    return f"{group}:\n  {last}: {value}\n" if dot else f"{name}: {value}\n"


def fault(path: Path, content: bytes, words: list[str]) -> str:
    """What is wrong with the way `load` takes this; "" where it is a config, or refused by one sentence."""
    path.write_bytes(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # old names say so
            load(path, words)
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
        long = len(said) > 700 or "\n" in said
        return (
            f"not a sentence: {said[:200]!r}"
            if long or type(error) not in (ValueError, FileNotFoundError)
            else ""
        )
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def main(n: int, seed: int) -> int:
    found: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _, (content, words) in zip(range(n), cases(seed), strict=False):
            why = fault(Path(folder) / "fuzz.yaml", content, words)
            if why:
                if why[:60] not in found:
                    print(f"{why}\n    {content[:120]!r} {[word[:120] for word in words]}", flush=True)
                found[why[:60]] = found.get(why[:60], 0) + 1
    print(f"{n:,} configs, {sum(found.values()):,} faults of {len(found)} kinds")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
