"""The command line: `python -m ups_fast.train CONFIG [key=value ...]`.

Exit status: 0 for a finished run, 2 for what the user can mend (one sentence, no traceback), 130 for Ctrl-C.
"""

from __future__ import annotations

import io
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import ups_fast
from ups_fast import command, machine
from ups_fast.messages import LINE
from ups_fast.terminal import complain, ended
from ups_fast.words import line_of, many
from ups_fast.world import ALONE, World, join

if TYPE_CHECKING:
    from ups_fast.data import ImageSet
    from ups_fast.report import Comparison, Review, Samples
    from ups_fast.rounds import Result

try:
    from rich.console import Console

    from ups_fast import config
    from ups_fast.checkpoint import flat
    from ups_fast.display import open_console
except (KeyboardInterrupt, ImportError) as error:  # in the first seconds: nothing has been done
    if __name__ == "__main__":
        sys.exit(command.interrupted_early(error))
    raise

DESCRIPTION = """\
Train a classifier from few labels and many unlabeled images by UPS, or by
another method.name.

CONFIG is a YAML file, such as configs/digits.yaml. key=value changes one of its
keys, such as seed=1 or train.rounds=3. A stopped run goes on when you give the
same command again. A finished run of UPS goes on when you raise train.rounds."""
REMEDY = "lower train.batch_size or select.batch_size, or choose a smaller model.name"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the words `argv` (default: sys.argv) and returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    world = ALONE

    def work() -> None:
        nonlocal world
        world = join()
        with world.together():
            cfg = _config(words, quiet=not world.main)
        _train(cfg, world)

    def stopped(error: KeyboardInterrupt) -> None:
        if not world.main:
            return
        python = os.path.relpath(sys.executable) if _below_here(sys.executable) else sys.executable
        again = shlex.join([python, "-m", "ups_fast.train", *words])
        complain("")
        complain(str(error) or "stopped")
        several = "the same command by torchrun, or in one process " if world.size > 1 else ""
        complain(f"to go on: {several}{again}")

    def say(error: Exception, sentence: str) -> None:
        world.say(error, sentence)
        if LINE.lost:  # what is left of the connections must not be waited for
            ended(2)
            sys.stdout.flush()
            os._exit(2)

    return command.status_of(work, REMEDY, stopped, say)


def _config(words: Sequence[str], quiet: bool = False) -> config.Config:
    with ExitStack() as nowhere:
        if quiet:
            nowhere.enter_context(redirect_stdout(io.StringIO()))
            nowhere.enter_context(redirect_stderr(io.StringIO()))
        return _parsed(words)


def _parsed(words: Sequence[str]) -> config.Config:
    parser = command.Parser(
        "keys are written as key=value, and --help explains them",
        prog="python -m ups_fast.train",
        usage="%(prog)s CONFIG [key=value ...]",
        description=DESCRIPTION,
        epilog="Keys, with their defaults:\n\n" + config.help_text(),
    )
    parser.add_argument("config", metavar="CONFIG", help="the YAML file that describes the run")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="changes of its keys, see below")
    args = parser.parse_args(words)
    with command.told_warnings():
        return config.load(args.config, args.overrides)


def _below_here(path: str) -> bool:
    return Path(path).is_relative_to(Path.cwd())


# Of a config, what may differ between the processes of a run; and the folder is that of process 0 alone.
OF_A_PROCESS = ("run_dir", "device", "threads", "data.cache")


def _start(cfg: config.Config, world: World) -> torch.device:
    """ValueError, at all processes, where one of them cannot take part."""
    with world.together():
        device = world.pick_device(cfg.device)
        command.check_packages()
        command.check_kernels(device)
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
    facts = {name: str(value) for name, value in flat(asdict(cfg)) if name not in OF_A_PROCESS}
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts |= {"ups_fast": ups_fast.__version__, "torch": torch.__version__, "device": kind}
    world.same(facts | {"what runs the ops": ups_fast.backend()[device.type]})
    world.open(device, cfg.runtime.timeout)
    return device


def _train(cfg: config.Config, world: World) -> None:
    console = open_console() if world.main else Console(quiet=True)
    if not world.main:
        warnings.simplefilter("ignore")  # process 0 has the same ones
    device = _start(cfg, world)
    gpu = device.type == "cuda"
    place = torch.cuda.get_device_name(device) if gpu else many(torch.get_num_threads(), "thread")
    load, cores = machine.load(), machine.cores()
    if not gpu and torch.get_num_threads() > 1 and load > cores:
        console.print(
            f"this machine is busy (load {load:.1f} on {cores} cores): threads=1 may be much faster"
        )
    each = f", {world.size} processes" if world.size > 1 else ""
    console.print(
        f"ups_fast {ups_fast.__version__} with torch {torch.__version__} on {device} ({place}){each}"
    )
    console.print(f"ops on {device.type}: {ups_fast.backend()[device.type]}")

    # Imported only now, because it takes seconds and most errors have been found before.
    from ups_fast import rounds
    from ups_fast.inputs import files_line, load_data

    data = world.share(lambda: load_data(cfg, device, console))
    if data.in_files and world.size > 1:
        world.same({} if world.local_rank else {f"data.root={data.root}": files_line(data)})
    for note in data.notes:
        console.print(note)
    result = rounds.run(cfg, data, console=console, world=world)
    world.close()
    if world.main:
        _report(cfg, data, result, console)


def _report(cfg: config.Config, data: ImageSet, result: Result, console: Console) -> None:
    from ups_fast import report
    from ups_fast.data.classes import class_counts

    table = result.folder / "pseudo_labels.csv"
    unreadable = [f"no longer trained on: {sentence}" for sentence in result.unreadable]
    try:
        # Of one's own arrays the labeled images come first in the training set.
        first = 0 if data.labeled is None else len(data.labeled)
        labels, val = data.train_labels[result.labeled], result.val
        samples = _samples(data, result)
        multi = data.train_labels.ndim == 2  # for which there are no baselines
        baselines = _baselines(cfg, data, result, samples) if cfg.report.baselines and not multi else None
        review, said = _review(data, result, samples, first) if cfg.report.review else (None, "")
        report.write_pseudo_labels(
            table,
            result.pseudo_labels,
            data.classes,
            first=first,
            names=data.names,
            unfamiliar=review.unfamiliar if review else None,
        )
        png, page = report.write_report(
            result.folder,
            result.rows,
            result.pseudo_labels,
            result.truth,
            cfg,
            data.classes,
            labeled=len(labels),
            class_labels=class_counts(labels, len(data.classes)),
            class_tests=class_counts(data.test_labels, len(data.classes)),
            class_vals=class_counts(data.train_labels[val], len(data.classes)) if len(val) else None,
            notes=[*data.notes, *data.damaged, *unreadable],
            baselines=baselines,
            examples=_examples(data, result, review, first, cfg.threads, console),
        )
    except (ValueError, OSError) as error:
        again = "fix that, and the same command makes the report without training again"
        raise ValueError(f"the run is complete, but its report is not: {error}; {again}") from error
    console.print(report.headline(result.rows, cfg))
    if guess := report.test_guess(result.rows[-1], cfg.noun):
        console.print(guess)
    if recall := report.recall_line(result.rows[-1], data.classes):
        console.print(recall)
    seconds = sum(row["seconds"] for row in result.rows)
    outside = sum(row["outside"] * row["seconds"] for row in result.rows) / seconds
    if seconds > 10:
        console.print(f"{seconds:.0f} s, {outside:.1%} of them outside of training steps and labeling")
    if advice := report.advice(result.rows, cfg):
        console.print(advice)
    if baselines and (better := report.verdict(baselines, result.rows, cfg)):
        console.print(better)
    if said:
        console.print(said)
    console.print(f"report: {page} (its picture alone: {png}); pseudo-labels: {table}")


def _samples(data: ImageSet, result: Result) -> Samples:
    from ups_fast import report

    index = {"labeled": result.labeled, "unlabeled": result.pseudo_labels.index, "val": result.val}
    return report.Samples(result.images, result.test_images, index, data.train_labels, data.test_labels)


def _review(data: ImageSet, result: Result, samples: Samples, first: int) -> tuple[Review | None, str]:
    """Writes the tables for a person, and says so in a sentence, or why they are not there."""
    from ups_fast import report

    found = result.pseudo_labels
    spread = found.std if found.std.ndim == 1 else found.std.nan_to_num(0).amax(1)
    std = dict(zip(found.index.tolist(), spread.tolist(), strict=True))
    try:
        review = report.write_review(result.folder, samples, data.classes, std, first=first, names=data.names)
    except Exception as error:  # the run is worth more than these tables
        return None, f"there is no table of what to label next: {line_of(error)}"
    said = f"worth a label next: {review.to_label}; given labels that look wrong: {review.wrong}"
    return review, said


def _examples(
    data: ImageSet, result: Result, review: Review | None, first: int, threads: int, console: Console
) -> str:
    """The examples of the report; without them where they fail, and that is said."""
    from ups_fast import report

    found, truth = result.pseudo_labels, result.truth
    try:
        return report.examples(
            data, result.images, found, truth, review, first=first, threads=threads or None
        )
    except Exception as error:  # the report is worth more than its examples
        console.print(f"the report has no examples: {line_of(error)}")
        return ""


def _baselines(cfg: config.Config, data: ImageSet, result: Result, samples: Samples) -> Comparison:
    from ups_fast import report

    rounds, classes = len(result.rows), len(data.classes)
    return report.baselines_of(result.folder, samples, rounds, classes, cfg.select.tau_p)


if __name__ == "__main__":
    sys.exit(ended(main()))
