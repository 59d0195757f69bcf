"""Trials per minute of a sweep, and of the same trials as a shell loop of `python -m ups_fast.train`, in one run.

    python -m benchmarks.sweeps [--trials 12] [--workers 2] [digits] [features]

The loop has as many lanes as the sweep has workers, one thread each, and writes no baselines and no review. CPU seconds
count all processes: they say what a trial costs where other work shares the machine.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from benchmarks import record

ROOT = Path(__file__).parents[1]
RECORD = record.RESULTS / "sweeps.jsonl"
TAUS = ("0.6", "0.8")
SHORT = ("report.baselines=false", "report.review=false")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="*", default=["features", "digits"], metavar="SET")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    for name in args.sets:
        for how in (loop, sweep):
            with tempfile.TemporaryDirectory() as place:
                line = measured(name, how, Path(place), args.trials, args.workers)
            record.append(RECORD, {"load": round(os.getloadavg()[0], 1), **line})
            print(line, flush=True)
    print(table(record.lines(RECORD)))


def measured(name: str, how: Any, place: Path, trials: int, workers: int) -> dict[str, Any]:
    words = digits(place) if name == "digits" else features(place)
    seeds = range(trials // len(TAUS))
    cpu, start = used(), time.monotonic()
    how(words, list(seeds), place / "out", workers)
    seconds, count = time.monotonic() - start, len(TAUS) * len(seeds)
    about = {
        "set": name,
        "how": how.__name__,
        "trials": count,
        "workers": workers,
        "seconds": round(seconds, 1),
    }
    return {**about, "per_minute": round(60 * count / seconds, 2), "cpu": round((used() - cpu) / count, 2)}


def used() -> float:
    """CPU seconds of all processes that have ended."""
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


def digits(place: Path) -> list[str]:
    return [str(ROOT / "configs/sweep.yaml")]


def features(place: Path) -> list[str]:
    """The pixels of the digits as rows, of which 200 are labeled."""
    x, y = load_digits(return_X_y=True)
    parts = {"labeled": slice(0, 200), "unlabeled": slice(200, 1400), "test": slice(1400, None)}
    arrays = {
        f"{kind}_{name}": each[part] for name, part in parts.items() for kind, each in (("x", x), ("y", y))
    }
    arrays = {name: each.astype(np.float32) if name[0] == "x" else each for name, each in arrays.items()}
    np.savez(place / "x.npz", **arrays)
    return [str(ROOT / "configs/features.yaml"), f"data.root={place / 'x.npz'}", "data.val_share=0.3"]


# The two ways --------------------------------------------------------------------------------------------------


def sweep(words: list[str], seeds: list[int], out: Path, workers: int) -> None:
    axes = [f"select.tau_p={','.join(TAUS)}", f"seed={seeds[0]}..{seeds[-1]}", f"run_dir={out}"]
    run([sys.executable, "-m", "ups_fast.sweep", *words, *axes, "--workers", str(workers)])


def loop(words: list[str], seeds: list[int], out: Path, workers: int) -> None:
    train = [sys.executable, "-m", "ups_fast.train", *words, *SHORT, "threads=1"]
    commands = [
        [*train, f"select.tau_p={tau}", f"seed={seed}", f"run_dir={out / f'{tau}-{seed}'}"]
        for tau in TAUS
        for seed in seeds
    ]
    text = "".join(" ".join(command) + "\n" for command in commands)
    run(["xargs", "-P", str(workers), "-I", "{}", "sh", "-c", "{}"], text)


def run(command: list[str], text: str = "") -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, input=text.encode(), check=True, env=env, stdout=subprocess.DEVNULL, cwd=ROOT)


def table(lines: list[dict[str, Any]]) -> str:
    names = ("date", "commit", "load", "set", "how", "trials", "workers", "per_minute", "cpu")
    head = [*names[:-2], "trials/min", "CPU s a trial"]
    return record.grid(head, [[str(line[name]) for name in names] for line in lines])


if __name__ == "__main__":
    main()
