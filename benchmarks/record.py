"""What a benchmark run leaves: a JSON record per machine and day, and the table made of all records.

A record holds what its numbers must not travel without (machine, torch, commit, kernels, copy bandwidth) and its rows:

    group, implementation, test
    median, q1, q3  seconds of one call;  n  rounds that they are taken from
    rate, unit      images/s, or GB/s of the bytes that any implementation must move, or % of the time in which a step
                    waits for its images; absent where none says much
    share           of the bound: those bytes at the copy bandwidth of the same run, over the median
    predicted       [from, to, unit], written down before the machine was met (`PREDICTED`)
    note            empty; for the sentence that explains a miss, written into the JSON by hand
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch

import ups_fast

RESULTS = Path(__file__).parent / "results"
COPY = "copy"  # the group whose rate is the bound

# What a GPU should do, before anybody has seen it: (group, implementation) -> (from, to, unit).
PREDICTED_FOR = "H100"
PREDICTED = {
    ("mc_select cuda P=10 N=50000 C=10 float32", "ups_fast, graph"): (9, 10, "us"),
    ("mc_select cuda P=10 N=50000 C=100 float32", "ups_fast, graph"): (75, 85, "us"),
    ("mc_select cuda P=10 N=50000 C=100 bfloat16", "ups_fast, graph"): (60, 65, "us"),
    ("augment cuda", "ups_fast"): (20e6, 30e6, "images/s"),
    ("training step cuda wrn-28-2 B=128", "ups_fast"): (70e3, 110e3, "images/s"),
    ("training step cuda wrn-28-2 B=512", "ups_fast"): (90e3, 130e3, "images/s"),
    ("label cuda wrn-28-2 N=46000 P=10", "ups_fast"): (1.5, 2.5, "s"),
}
PER_SECOND = {"us": 1e6, "s": 1.0}  # units of time

HEAD = """# Benchmarks

`make bench` and `make gpu-check` make this page from the JSON records beside it.

- **median** is taken from n rounds. Brackets hold the middle half.
- **of the bound** compares with the bytes that any implementation must move, at the copy bandwidth of the same run.
  It is left out where these bytes fit into a cache, or where arithmetic is the limit.
- **time** says how many times longer a call takes than with ups_fast. Where images are counted, it is one image.
- **graph** means one CUDA graph, without the time of Python."""


def about() -> dict[str, Any]:
    """The machine and the code that are measured, before anything is."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE)
        cpu = names[0] if names else cpu
    return {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "host": f"{cpu}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "commit": commit(),
        "date": date.today().isoformat(),
        "kernels": ups_fast.backend(),
    }


def commit() -> str:
    """Of the code; "-dirty" where anything differs from it but the records themselves.

    A copy of the tree without its history is told: make gpu-check COMMIT=$(git rev-parse --short HEAD)
    """

    def git(*words: str) -> str:
        if shutil.which("git") is None:
            return ""
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=RESULTS.parents[1])
        return done.stdout.strip()

    dirty = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if dirty else "") or os.environ.get(
        "COMMIT", "unknown"
    )


def make(about: dict[str, Any], benchmarks: list[Any], missing: dict[str, str]) -> dict[str, Any]:
    """The record of a finished run of pytest-benchmark. `missing`: what was skipped or failed, and why."""
    rows = [row_of(bench, about["hardware"]) for bench in benchmarks]
    bandwidth = next((row["rate"] for row in rows if row["group"].startswith(COPY)), None)
    for row, bench in zip(rows, benchmarks, strict=True):
        moved = bench.extra_info.get("bytes")
        if bandwidth and moved and bench.extra_info.get("bounded") and not row["group"].startswith(COPY):
            row["share"] = moved / (bandwidth * 1e9) / row["median"]
    return {**about, "copy_gb_s": bandwidth, "rows": rows, "missing": missing}


def row_of(bench: Any, hardware: str) -> dict[str, Any]:
    info, stats = bench.extra_info, bench.stats
    calls = info.get("calls", 1)  # of one round, over as many buffers
    row: dict[str, Any] = {"group": bench.group, "implementation": info["implementation"]}
    row |= {"test": bench.fullname.rpartition("/")[2]}
    row |= {name: getattr(stats, name) / calls for name in ("median", "q1", "q3")} | {"n": stats.rounds}
    if "images" in info:
        row |= {"rate": info["images"] / row["median"], "unit": "images/s"}
    elif "waiting" in info:
        row |= {"rate": 100 * info["waiting"], "unit": "% waiting"}
    elif "bytes" in info:
        row |= {"rate": info["bytes"] / row["median"] / 1e9, "unit": "GB/s"}
    predicted = PREDICTED.get((row["group"], row["implementation"]))
    if predicted and PREDICTED_FOR in hardware:
        row |= {"predicted": list(predicted), "note": ""}
    return row


def write(record: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes `<machine>-<date>.json`, and the table of all records anew.

    What an earlier run of the same day and code measured, and this one did not, stays in it.
    """
    name = re.sub(r"[^a-z0-9]+", "-", record["hardware"].lower()).strip("-")
    path = folder / f"{name}-{record['date']}.json"
    if path.exists():
        record = joined(json.loads(path.read_text()), record)
    path.write_text(json.dumps(record, indent=1) + "\n")
    tabulate(folder)
    return path


def joined(before: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """The record with the groups that only an earlier one of the very same code has, whose shares stay their own."""
    same = all(before[key] == record[key] for key in ("hardware", "torch", "commit", "kernels"))
    if not same or record["commit"] == "unknown" or record["commit"].endswith("-dirty"):
        return record
    again = {row["group"] for row in record["rows"]}
    kept = [row for row in before["rows"] if row["group"] not in again]
    ran = {row.get("test") for row in record["rows"]}
    missing = {test: why for test, why in before["missing"].items() if test not in ran}
    bandwidth = record["copy_gb_s"] or before["copy_gb_s"]
    return {
        **record,
        "copy_gb_s": bandwidth,
        "rows": kept + record["rows"],
        "missing": missing | record["missing"],
    }


def tabulate(folder: Path = RESULTS) -> None:
    """README.md of all the records in `folder`, the newest first."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    records.sort(key=lambda record: (record["date"], record["hardware"]), reverse=True)
    parts = [
        HEAD,
        f"## Predicted for an {PREDICTED_FOR}\n\n{predictions(records)}",
        *(section(record) for record in records),
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n")


def predictions(records: list[dict[str, Any]]) -> str:
    """Every prediction with what the newest record says; `records` come newest first."""
    lines = []
    for (group, name), (low, high, unit) in PREDICTED.items():
        found = [
            row
            for record in records
            if PREDICTED_FOR in record["hardware"]
            for row in record["rows"]
            if (row["group"], row["implementation"]) == (group, name)
        ]
        said = [f"{number(low)} to {number(high)} {unit}"]
        if found:
            row = found[0]
            value = row["median"] * PER_SECOND[unit] if unit in PER_SECOND else row["rate"]
            hit = "yes" if low <= value <= high else "no"
            said += [f"{number(value)} {unit}", hit, row["note"]]
        else:
            said += ["not measured", "", ""]
        lines.append([group, name, *said])
    return grid(["group", "implementation", "predicted", "measured", "as predicted", "explanation"], lines)


def section(record: dict[str, Any]) -> str:
    """One record: its machine, its rows, and what is missing."""
    head = f"## {record['hardware']}, {record['date']}\n\n{record['host']}; torch {record['torch']}; commit "
    head += record["commit"] + (f"; copy {number(record['copy_gb_s'])} GB/s" if record["copy_gb_s"] else "")
    kernels = "\n".join(f"- {device}: {said}" for device, said in record["kernels"].items())
    lines, before = [], ""
    for row, times in zip(record["rows"], factors(record["rows"]), strict=True):
        lines.append(
            [
                "" if row["group"] == before else row["group"],
                row["implementation"],
                duration(row),
                str(row["n"]),
                f"{number(row['rate'])} {row['unit']}" if "rate" in row else "",
                f"{row['share']:.0%}" if "share" in row else "",
                f"{times:.1f} x" if times else "",
            ]
        )
        before = row["group"]
    table = grid(["group", "implementation", "median", "n", "rate", "of the bound", "time"], lines)
    missing = "".join(f"\n- {test}: {why}" for test, why in record["missing"].items())
    return f"{head}\n\n{kernels}\n\n{table}" + (f"\n\nNot measured:\n{missing}" if missing else "")


def factors(rows: list[dict[str, Any]]) -> list[float | None]:
    """How many times as long as ours each row takes, a graph beside our graph; None where ours is not there."""
    cost = {(row["group"], row["implementation"]): per_image(row) for row in rows}
    kinds = ["ups_fast, graph" if row["implementation"].endswith(", graph") else "ups_fast" for row in rows]
    ours = [cost.get((row["group"], kind)) for row, kind in zip(rows, kinds, strict=True)]
    return [per_image(row) / base if base else None for row, base in zip(rows, ours, strict=True)]


def per_image(row: dict[str, Any]) -> float:
    """What ratios are of: implementations of one group may have been given different numbers of images."""
    return 1 / row["rate"] if row.get("unit") == "images/s" else row["median"]


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(row: dict[str, Any]) -> str:
    unit, scale = next(
        x for x in (("s", 1), ("ms", 1e3), ("us", 1e6)) if row["median"] * x[1] >= 1 or x[0] == "us"
    )
    low, middle, high = (number(row[name] * scale) for name in ("q1", "median", "q3"))
    return f"{middle} {unit} [{low}, {high}]"


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a record that grows run by run."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, line: dict[str, Any]) -> None:
    """One more of them, with machine and commit."""
    made = {key: value for key, value in about().items() if key != "kernels"}
    with path.open("a") as file:
        file.write(json.dumps({**line, **made}) + "\n")


def grid(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table that can be read as it is, too."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    rows = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in [head, *lines]]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
