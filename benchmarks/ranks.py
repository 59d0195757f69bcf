"""One run on several processes of this machine: `python -m benchmarks.ranks`, on CPUs by gloo.

For one process of one thread, one of two threads, and two processes of one thread: images a second of the training step
and of labeling, and the share of the step that is spent in messages. All are measured in turns, so that a machine that
slows down slows all of them. A line of results/ranks.jsonl for each. `--table` prints the table of docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import record
from ups_fast import messages, world
from ups_fast.batches import views_of
from ups_fast.data import ResidentImages
from ups_fast.methods import UPS, Group, Layout, Options, Setting
from ups_fast.models import build
from ups_fast.policy import POLICIES
from ups_fast.selection import Thresholds, labeling_rows, pseudo_label
from ups_fast.step import TrainStep, plan_step
from ups_fast.world import World, join

RECORD = record.RESULTS / "ranks.jsonl"
N, CLASSES, BATCH, PASSES = 2048, 10, 128, 10
WAYS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread": (2, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="wrn-28-2")
    parser.add_argument("--steps", type=int, default=6, help="of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--label", type=int, default=400, help="images to label in a turn")
    parser.add_argument("--table", action="store_true", help="print the table, measure nothing")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        print(json.dumps(measure(options)))
    elif options.table:
        print(table([json.loads(line) for line in RECORD.read_text().splitlines()]))
    else:
        measure_all(options)


def measure_all(options: argparse.Namespace) -> None:
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.turns):
        for way, (size, threads) in WAYS.items():
            found[way].append(turn(options, size, threads))
    about = {key: value for key, value in record.about().items() if key != "kernels"}
    with RECORD.open("a") as file:
        for way, turns in found.items():
            values = {key: statistics.median(each[key] for each in turns) for key in turns[0]}
            spread = {f"{key} all": [round(each[key], 4) for each in turns] for key in turns[0]}
            line = {"way": way, "model": options.model, "batch": BATCH, **values, **spread, **about}
            file.write(json.dumps(line) + "\n")
            print(way, values)


def turn(options: argparse.Namespace, size: int, threads: int) -> dict[str, float]:
    """Starts the processes, and takes the numbers of the first."""
    again = [sys.executable, "-m", "benchmarks.ranks", "--rank", f"--model={options.model}"]
    again += [f"--steps={options.steps}", f"--label={options.label}"]
    processes = []
    for rank in range(size):
        own = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": size,
            "MASTER_PORT": 29713,
            "OMP_NUM_THREADS": threads,
        }
        variables = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            **{name: str(value) for name, value in own.items()},
        }
        processes.append(subprocess.Popen(again, env=variables, stdout=subprocess.PIPE, text=True))
    outs = [each.communicate(timeout=3600)[0] for each in processes]
    if any(each.returncode for each in processes):
        raise SystemExit("a process has failed")
    result: dict[str, float] = json.loads(outs[0].splitlines()[-1])
    return result


def measure(options: argparse.Namespace) -> dict[str, float]:
    here = join()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    device = torch.device("cpu")
    here.open(device, 600)
    torch.manual_seed(0)
    step, index = made(options.model, here)
    in_messages = clocked()
    run(step, index, 2)
    in_messages.clear()
    here.wait()
    began = time.perf_counter()
    run(step, index, options.steps)
    seconds, messages = time.perf_counter() - began, sum(in_messages)
    ids = torch.arange(options.label)
    rows = labeling_rows(device, step.images.shape)
    how: Any = {"passes": PASSES, "batch_size": rows, "world": here}
    pseudo_label(step.method.answers, step.images, ids[: 2 * rows // PASSES], **how)  # the first takes longer
    here.wait()
    start = time.perf_counter()
    pseudo_label(step.method.answers, step.images, ids, **how)
    labeling = time.perf_counter() - start
    here.close()
    return {
        "step images/s": options.steps * BATCH / seconds,
        "messages": messages / seconds,
        "labeling images/s": options.label / labeling,
    }


def made(model: str, here: World) -> tuple[TrainStep, torch.Tensor]:
    net = build(model, n_classes=CLASSES, channels=3, size=32, dropout=0.3, preact="published")
    net = net.to(memory_format=torch.channels_last)
    method = UPS(Setting(lambda: net, Options("ups"), Thresholds(), N, CLASSES, world=here))
    pixels = torch.randint(0, 256, (N, 32, 32, 3), dtype=torch.uint8)
    images = ResidentImages(
        pixels, mean=(0.5,) * 3, std=(0.25,) * 3, device="cpu", policy=POLICIES["published"]
    )
    step = TrainStep(
        method, images, plan_step("eager", "auto", images.device), momentum=0.9, weight_decay=0.0
    )
    layout = Layout((Group("positive", BATCH // 2), Group("negative", BATCH // 2)), 1)
    positive = torch.arange(N) < N // 2
    target = torch.randint(CLASSES, (N,)).where(positive, -1)
    tables = {"target": target, "negative": torch.randint(0, 2**CLASSES, (N, 1), dtype=torch.int32)}
    views = views_of(layout.own(here).groups, {"strong": images.policy})
    step.start(layout, views, tables, method.state_dict(), augment_seed=0, dropout_seed=0)
    order = torch.stack([torch.randperm(N // 2), N // 2 + torch.randperm(N // 2)]).T.flatten()
    return step, order


def run(step: TrainStep, order: torch.Tensor, steps: int) -> None:
    """As `rounds` does: with the question whether anybody wants to stop."""
    for n in range(steps):
        index = order[n * BATCH % (N - BATCH) :][:BATCH]
        step(index, torch.full_like(index, n), 0.03)
        step.world.ask(False, False)


def clocked() -> list[float]:
    """The seconds of each message from now on, with the time in which the others are waited for."""
    seconds: list[float] = []
    real = messages.call

    def call(collective: Callable, *args: Any, **how: Any) -> Any:
        began = time.perf_counter()
        found = real(collective, *args, **how)
        seconds.append(time.perf_counter() - began)
        return found

    messages.call = world.call = call
    return seconds


def table(lines: list[dict[str, Any]]) -> str:
    body = [
        [
            each["way"],
            f"{each['step images/s']:.0f}",
            f"{each['messages']:.1%}",
            f"{each['labeling images/s']:.0f}",
        ]
        for each in lines[-len(WAYS) :]
    ]
    return record.grid(["", "training, images/s", "of it in messages", "labeling, images/s"], body)


if __name__ == "__main__":
    main()
