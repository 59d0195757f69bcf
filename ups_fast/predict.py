"""The command line of a finished run: `python -m ups_fast.predict RUN IMAGES... --out labels.csv`.

Labels any number of image files with the run's network and thresholds. Exit status: 0 for a whole table, in which
damaged files are rows with an error; 2 for what the user can mend (one sentence, no traceback); 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import csv
import glob
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from omegaconf import OmegaConf
from rich.console import Console

from ups_fast.checkpoint import CONFIG, RunFolderError, load_model
from ups_fast.data.image import ENOUGH, SUFFIXES, DamagedImage, picture, read_image, resize_crop
from ups_fast.data.reading import in_order
from ups_fast.display import progress_bar
from ups_fast.ops import mc_select
from ups_fast.reference import Selection, unpack_mask
from ups_fast.selection import labelling_rows, mc_dropout, passes_over, skipped

HEAD = ["path", "label", "name", "confidence", "std", "positive", "negative", "error"]
DESCRIPTION = """\
Label image files with the network of a finished run.

RUN is the run's folder; IMAGES are files, folders (with all images in them) or
patterns such as 'photos/*.jpg'. The table has a row for each file: the label's
number and name, its confidence and standard deviation over the run's dropout
passes, whether it is positive by the run's thresholds, which classes the image
surely is not, and what is wrong with a file that could not be read."""


class Predictor:
    """The network of a finished run with its thresholds.

    An image's answer depends on the image alone, not on the others or their order: what dropout drops is drawn by its
    pixels.

    Raises as `load_model` does, and RunFolderError where the run's config.yaml lacks the thresholds.
    """

    def __init__(self, run_dir: str | Path, device: str = "auto", *, best: bool = False) -> None:
        model: Any = load_model(run_dir, device, best=best)
        self.model, self.classes, self.channels = model, list(model.classes), int(model.channels)
        self.height, self.width = model.size
        self.device = next(model.parameters()).device
        path = Path(run_dir) / CONFIG
        try:
            config: Any = OmegaConf.to_container(OmegaConf.load(path))
            select = config["select"]
            names = ("tau_p", "tau_n", "kappa_p", "kappa_n", "temp_nl")
            self.thresholds = {name: float(select[name]) for name in names}
            rounds = int(config["train"]["rounds"])
            if not 1 <= int(select["passes"]) <= 10000:
                raise ValueError
            done = (Path(run_dir) / "metrics.jsonl").read_bytes().count(b"\n")
            self.passes, dropouts = int(select["passes"]), int(select.get("dropouts", 0))
        except Exception as error:  # whatever a stranger's bytes may cause
            raise RunFolderError(
                f"{path}, which says by which thresholds to label, or metrics.jsonl beside it is gone or damaged"
            ) from error
        self.skip = skipped(model, dropouts)
        self.unfinished = f"{done} of {rounds} rounds" if done < rounds else ""
        self.rows = max(1, labelling_rows(self.device, self.height, self.width) // self.passes)

    def read(self, path: str) -> np.ndarray:  # uint8 [H, W, C]
        """An image file as the network takes it. Raises DamagedImage."""
        if self.height == self.width:
            with picture(path, self.channels, ENOUGH * self.height) as found:
                return resize_crop(found.pixels, self.height)
        image = read_image(path, self.channels)
        if image.shape[:2] != (self.height, self.width):
            got = "x".join(map(str, image.shape[:2]))
            raise DamagedImage(f"{path!r} must be {self.height}x{self.width} for this network, got {got}")
        return image

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Selection:  # uint8 [n, H, W, C], n at most self.rows
        """`mc_select` of the run's passes over the images, on the host, negatives packed."""
        n = len(images)
        keys = torch.tensor([_number(image) for image in images], device=self.device)
        batch = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)
        filling = torch.arange(self.rows, device=self.device).clamp(max=n - 1)  # one shape, so the same bits
        pixels = (batch[filling] / 255 - self.model.mean) / self.model.std
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with mc_dropout(self.model, active=False):
            logits = passes_over(self.model, pixels, keys[filling], self.passes, 0, self.skip)
        found = mc_select(logits, **self.thresholds, packed=True)
        return Selection(*(each[:n].cpu() for each in found))


class Answer(NamedTuple):
    path: str
    row: list[str]  # the columns of HEAD after the path


def predict(
    predictor: Predictor, paths: Sequence[str], *, threads: int = 0, progress: Any = lambda files: None
) -> Iterator[Answer]:
    """One answer for each file, in order; `progress` hears of how many files each batch had."""

    def read(path: str) -> np.ndarray | str:
        try:
            return predictor.read(path)
        except DamagedImage as error:
            return str(error)

    each = zip(paths, in_order(read, paths, threads or len(os.sched_getaffinity(0))), strict=True)
    while chunk := list(islice(each, predictor.rows)):
        images = [image for _, image in chunk if not isinstance(image, str)]
        rows = iter(_rows(predictor(np.stack(images)), predictor.classes) if images else [])
        for path, image in chunk:
            yield Answer(path, [""] * 6 + [image] if isinstance(image, str) else next(rows))
        progress(len(chunk))


def _rows(found: Selection, classes: Sequence[str]) -> Iterator[list[str]]:
    negative = unpack_mask(found.negative, len(classes)).numpy()
    columns = found.label.tolist(), found.confidence.numpy(), found.std.numpy(), found.positive.int().tolist()
    for label, confidence, std, positive, surely_not in zip(*columns, negative, strict=True):
        known = label >= 0
        name = classes[label] if known else ""
        error = "" if known else "the network's answer is not finite"
        others = " ".join(map(str, np.flatnonzero(surely_not)))
        yield [str(label), name, str(confidence), str(std), str(positive), others, error]


def _number(image: np.ndarray) -> int:
    """Of 63 bits, from the pixels: by it an image's dropout is drawn."""
    return int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest(), "little") >> 1


def find(words: Sequence[str]) -> list[str]:
    """The files that are meant by files, folders and patterns, each once, in order. ValueError where one means none."""
    found: dict[str, None] = {}
    for word in words:
        place = os.path.expanduser(word)
        if os.path.isdir(place):
            files = [
                os.path.join(folder, name)
                for folder, names in sorted(_walk(place))
                for name in sorted(names)
                if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")
            ]
        elif os.path.lexists(place):
            files = [place]
        else:
            files = sorted(file for file in glob.glob(place, recursive=True) if not os.path.isdir(file))
        if not files:
            what = (
                "holds no images" if os.path.isdir(place) else "is no file or folder, and no file matches it"
            )
            raise ValueError(f"{word!r} {what}")
        found |= dict.fromkeys(files)
    return list(found)


def _walk(place: str) -> Iterator[tuple[str, list[str]]]:
    """The folders in a folder, linked ones too, each once, with the names of their files."""
    seen: set[str] = set()
    for folder, inside, names in os.walk(place, onerror=_refuse, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            inside.clear()
            continue
        seen.add(real)
        yield folder, names


def _refuse(error: OSError) -> None:
    """Instead of leaving out a folder without a word."""
    raise ValueError(f"folder {error.filename!r} cannot be read: {error.strerror}")


@contextmanager
def _table(out: str) -> Iterator[TextIO]:
    """A new file, or standard output for "-"; nothing is overwritten."""
    encoding: Any = {"encoding": "utf-8", "errors": "surrogateescape"}  # a file's name may be no text
    if out == "-" and sys.stdout is None:
        raise ValueError("standard output is closed: give --out a file")
    if out == "-":
        sys.stdout.reconfigure(**encoding)  # type: ignore[union-attr]
        yield sys.stdout
        return
    try:
        with open(out, "x", newline="", **encoding) as file:
            yield file
    except FileExistsError:
        raise ValueError(f"--out {out} is there already: choose another name, or delete it") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the words `argv` (default: sys.argv) and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ups_fast.predict",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="the run's folder, such as runs/digits")
    parser.add_argument("images", metavar="IMAGES", nargs="+", help="files, folders or patterns")
    parser.add_argument("--out", default="-", help="the table to write, a new file; default: standard output")
    parser.add_argument(
        "--best",
        action="store_true",
        help="by the network of the round whose test accuracy was highest, not the last",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    console, done, damaged = Console(stderr=True, highlight=False, markup=False, soft_wrap=True), 0, 0
    try:
        paths = find(args.images)
        predictor = Predictor(args.run, args.device, best=args.best)
        if predictor.unfinished:
            console.print(f"{args.run} is not finished: this is the network of {predictor.unfinished}")
        with _table(args.out) as file, progress_bar(console) as bar:
            task = bar.add_task("labelling", total=len(paths), now="")
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(HEAD)
            for answer in predict(predictor, paths, progress=lambda files: bar.advance(task, files)):
                writer.writerow([answer.path, *answer.row])
                done, damaged = done + 1, damaged + bool(answer.row[-1])
    except KeyboardInterrupt:
        print(f"stopped: {done:,} rows are in {args.out}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # standard output has no reader any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        why = f"{args.out} could not be written: {error.strerror}; {done:,} rows are in it"
        print(f"error: {why if error.strerror else error}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.out != "-":
        wrong = f", {damaged:,} with an error" if damaged else ""
        print(f"{done:,} row{'s' * (done != 1)}{wrong} in {args.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
