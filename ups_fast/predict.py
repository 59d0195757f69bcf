"""The command line of a finished run: `python -m ups_fast.predict RUN FILES... --out labels.csv`.

Labels any number of image files, or rows of features, with the run's network and thresholds. Exit status: 0 for a
whole table, in which damaged images are rows with an error; 2 for what the user can mend (one sentence, no traceback);
130 for Ctrl-C.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import math
import os
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

import numpy as np
import torch
from torch import Tensor

from ups_fast import command
from ups_fast.terminal import Shown, complain, ctrl_c_raises, ended, hold_the_first_three, swallow

try:
    from ups_fast.checkpoint import CONFIG, METRICS, SELECTION, read_config
    from ups_fast.config import SOURCES
    from ups_fast.data.classes import suffixes
    from ups_fast.data.clips import middle
    from ups_fast.data.features import Noise
    from ups_fast.data.folder import CLIPS, IMAGES, seen_by_people
    from ups_fast.data.image import ENOUGH, SUFFIXES, DamagedImage, picture, read_image, resize_crop
    from ups_fast.data.images import Draws, memory_format
    from ups_fast.data.reading import in_order
    from ups_fast.data.row_files import SUFFIXES as ROW_SUFFIXES
    from ups_fast.data.row_files import either, is_row_file, look_at, rows_of
    from ups_fast.data.video import check_installed, clip_of, read_clip
    from ups_fast.display import open_console, progress_bar
    from ups_fast.files import RunFolderError, home, load_arrays, read_bytes
    from ups_fast.machine import pick_device
    from ups_fast.models import Frozen, Network
    from ups_fast.models.saved import load_model
    from ups_fast.modules import mc_dropout
    from ups_fast.ops import augment, augment_plan
    from ups_fast.policy import AugmentPlan, Policy, weak_policy
    from ups_fast.reference import dropout_keys
    from ups_fast.report.table import label_rows, label_table
    from ups_fast.selection import labeling_rows, passes_over, skipped
    from ups_fast.tasks import MULTI, TASKS
    from ups_fast.words import many
except (KeyboardInterrupt, ImportError) as error:  # in the first seconds: nothing has been done
    if __name__ == "__main__":
        sys.exit(command.interrupted_early(error))
    raise

HEAD = ["path", "label", "name", "confidence", "std", "positive", "negative", "error"]
MULTI_HEAD = ["path", "labels", "confidence", "std", "positive", "negative", "error"]
DESCRIPTION = """\
Label image files, clips, or rows of features, with the network of a finished run.

RUN is the folder of the run. FILES are files, folders with such files at any
depth, or patterns such as 'photos/*.jpg'. The table has a row for each image:
number and name of its label, confidence and standard deviation over the run's
passes, 1 if the label passes the run's thresholds, the classes that the
image surely is not, and an error for a file that cannot be read.

Where an image may have several labels, these columns have one value for each
of its labels, and the names are separated by ";".

A run on clips takes video files, one on features .npy, .npz or .parquet files.
Of these the table has a row for each of their rows, such as rows.npy[17]."""
REMEDY = "end other programs, or use --device cpu"


class Predictor:
    """The network of a finished run with its thresholds.

    An image's answer depends on the image alone, not on the others or their order: what dropout drops is drawn by its
    pixels. The same holds for rows of features and their numbers.

    Raises as `load_model` does, and RunFolderError where the run's config.yaml lacks the thresholds.
    """

    def __init__(self, run_dir: str | Path, device: str = "auto", *, best: bool = False) -> None:
        model = load_model(run_dir, device, best=best)
        self.model, self.classes, self.task = model, model.classes, TASKS[model.task]
        self.head = MULTI_HEAD if self.task is MULTI else HEAD
        self.columns = getattr(model, "columns", 0)  # of rows; 0: the network is for images or clips
        self.frames = getattr(model, "frames", 0)  # of clips; 0: it is for images
        if not self.columns:
            self.channels, (self.height, self.width) = model.channels, model.size
        shape = [self.columns]
        if not self.columns:
            shape = [self.channels, *([self.frames] if self.frames else []), self.height, self.width]
        self.device = next(model.parameters()).device
        path = home(run_dir) / CONFIG
        try:
            config = read_config(path)
            self.stride = int(config.get("data", {}).get("stride", 1))
            select = config["select"]
            names = ("tau_p", "tau_n", "kappa_p", "kappa_n", "temp_nl")
            self.thresholds = {name: float(select[name]) for name in names}
            if (
                config.get("method", {}).get("schedule") == "curriculum"
            ):  # it keeps by rank: the last one kept
                found = load_arrays(home(run_dir) / SELECTION)
                kept = found["confidence"][found["positive"]]
                self.thresholds["tau_p"] = float(kept.min()) if len(kept) else math.inf
            rounds = int(config["train"]["rounds"])
            if not 1 <= int(select["passes"]) <= 10000:
                raise ValueError
            done = read_bytes(home(run_dir) / METRICS).count(b"\n")
            self.passes, mc_layers = (
                int(select["passes"]),
                int(select.get("mc_layers", select.get("dropouts", 0))),
            )
            self.uncertainty = str(select.get("uncertainty", "dropout"))
            self.policy = self._policy(config["data"]) if self.uncertainty == "augment" else None
            if self.uncertainty not in SOURCES or (
                self.uncertainty == "heads" and self.passes not in (1, model.heads)
            ):
                raise ValueError
        except Exception as error:  # whatever a stranger's bytes may cause
            raise RunFolderError(
                f"{path}, which says by which thresholds to label, or metrics.jsonl beside it is gone or damaged"
            ) from error
        self.skip = skipped(model, mc_layers)
        self.unfinished = f"{done} of {rounds} rounds" if done < rounds else ""
        # Passes over a frozen network are passes over its features.
        self.rows = max(1, labeling_rows(self.device, shape) // self.passes)
        if isinstance(model, Frozen):
            self.rows = labeling_rows(self.device, model.seen(model.size))

    def _policy(self, data: dict[str, Any]) -> Policy | Noise:
        """What the passes of select.uncertainty=augment do, as `policies_of` has it."""
        if self.columns or isinstance(self.model, Frozen):
            noise = Noise(float(data["noise"]), float(data["drop_columns"]))
            if not (0 <= noise.std <= 100 and 0 <= noise.drop < 1):
                raise ValueError
            return noise
        return weak_policy(bool(data["flip"]), int(data["crop"]), self.model.size)

    @property
    def kinds(self) -> Collection[str]:
        """Suffixes of the files that the network is for."""
        return ROW_SUFFIXES if self.columns else CLIPS.suffixes if self.frames else SUFFIXES

    def count(self, paths: Sequence[str]) -> int:
        """How many images or rows the files are. Raises ValueError where they are not for this network."""
        if self.columns:
            return sum(file.n for file in look_at(paths, self.columns))
        if odd := next(filter(is_row_file, paths), None):
            kind, article = ("clip", "a") if self.frames else ("image", "an")
            raise ValueError(
                f"{odd!r} must be {article} {kind}: the run's network is for {kind}s, and not for features"
            )
        if self.frames:
            check_installed()
        if self.frames and self.height != self.width:
            raise ValueError(
                f"clips of files are read as squares, and this network takes {self.height}x{self.width}"
            )
        return len(paths)

    def samples(self, paths: Sequence[str], threads: int | None) -> Iterator[tuple[str, np.ndarray | str]]:
        """Each image or row by its name, in order: as the network takes it, or what is wrong with it."""
        if self.columns:
            return rows_of(look_at(paths, self.columns))

        def read(path: str) -> np.ndarray | str:
            try:
                return self.read(path)
            except DamagedImage as error:
                return str(error)

        return zip(paths, in_order(read, paths, threads), strict=True)

    def read(self, path: str) -> np.ndarray:  # uint8 [H, W, C], or [T, H, W, C]
        """An image or video file as the network takes it. Raises DamagedImage."""
        if self.frames:
            clip = read_clip(path, clip_of(self.frames, self.stride, self.height, self.channels))
            return middle(torch.from_numpy(clip), self.frames).numpy()
        if self.height == self.width:
            with picture(path, self.channels, ENOUGH * self.height) as found:
                return resize_crop(found.pixels, self.height)
        image = read_image(path, self.channels)
        if image.shape[:2] != (self.height, self.width):
            got = "x".join(map(str, image.shape[:2]))
            raise DamagedImage(f"{path!r} must be {self.height}x{self.width} for this network, got {got}")
        return image

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Any:  # uint8 [n, .., H, W, C] or [n, d], n at most self.rows
        """`mc_select` of the run's passes over the images, or its like for several labels; on the host, packed."""
        n = len(images)
        filling = torch.arange(self.rows).clamp(max=n - 1)  # one shape, so the same bits
        keys = torch.tensor([_number(image) for image in images])[filling]
        batch = torch.from_numpy(images)[filling]
        network: Network = self.model
        with mc_dropout(network, active=False):
            if isinstance(self.policy, Policy):
                pixels = self._augmented(batch, keys).to(self.device)
            else:
                network, pixels = self._normalized(batch.to(self.device))
            keys = keys.to(self.device)
            if isinstance(self.policy, Noise):
                ids, draw = Draws(self.passes, self.policy, 0).of(keys)
                pixels = self.policy(pixels.repeat(self.passes, 1), dropout_keys(ids, seed=0, draw=draw))
            logits = passes_over(network, pixels, keys, self.passes, 0, self.skip, self.uncertainty)
        found: Any = self.task.select(logits, self.thresholds)
        return type(found)(*(each[:n].cpu() for each in found))

    def table(self, found: Any) -> Iterator[list[str]]:
        """The columns of `head` after the path."""
        rows = label_rows(found, self.classes)
        for row, answered in zip(rows, self.task.answered(found).tolist(), strict=True):
            error = "" if answered else "the network's answer is not finite"
            yield [*(row[name] for name in self.head[1:-1]), error]

    def _normalized(self, batch: Tensor) -> tuple[Network, Tensor]:
        """The batch as a network takes it, and that network: the head of a frozen one, which gets features."""
        if self.columns:
            return self.model, (batch.float() - self.model.mean) / self.model.std
        pixels = (batch.movedim(-1, 1) / 255 - self.model.mean) / self.model.std
        pixels = pixels.contiguous(memory_format=memory_format(pixels.ndim))
        if isinstance(self.model, Frozen):
            return self.model.head, self.model.standardized(pixels)
        return self.model, pixels

    def _augmented(
        self, batch: Tensor, keys: Tensor
    ) -> Tensor:  # uint8 [B, .., H, W, C], int64 [B] -> [P * B, C, .., H, W]
        """Each image once for each pass, changed as its number and the pass say; a clip's frames all alike."""
        assert isinstance(self.policy, Policy)
        ids, draw = Draws(self.passes, self.policy, 0).of(keys)
        size, frames = (self.height, self.width), batch[0, ..., 0, 0, 0].numel()
        plan = augment_plan(ids, policy=self.policy, size=size, seed=0, draw=draw)
        plan = AugmentPlan(plan.draws.repeat_interleave(frames, 0), self.policy, size)
        pixels = batch.reshape(-1, *batch.shape[-3:]).contiguous()
        scale = {name: getattr(self.model, name).flatten().tolist() for name in ("mean", "std")}
        rows = torch.arange(len(pixels)).repeat(self.passes)
        made = augment(pixels, rows, policy=self.policy, seed=0, draw=0, plan=plan, **scale)
        if batch.ndim == 4:
            return made
        return made.unflatten(0, (-1, frames)).movedim(1, 2)  # [P * B, C, T, H, W]


class Answer(NamedTuple):
    path: str
    row: list[str]  # the columns of `Predictor.head` after the path


def predict(
    predictor: Predictor, paths: Sequence[str], *, threads: int = 0, progress: Any = lambda samples: None
) -> Iterator[Answer]:
    """One answer for each image or row, in order; `progress` hears of how many of them each batch had."""
    each = predictor.samples(paths, threads or None)
    while chunk := list(islice(each, predictor.rows)):
        found = [sample for _, sample in chunk if not isinstance(sample, str)]
        rows = predictor.table(predictor(np.stack(found))) if found else iter([])
        empty = [""] * (len(predictor.head) - 2)
        for name, sample in chunk:
            yield Answer(name, [*empty, sample] if isinstance(sample, str) else next(rows))
        progress(len(chunk))


def _number(image: np.ndarray) -> int:
    """Of 63 bits, from the pixels: by it an image's dropout is drawn."""
    return int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest(), "little") >> 1


def find(
    words: Sequence[str], passed: Counter[str] | None = None, kinds: Collection[str] = SUFFIXES
) -> list[str]:
    """The files that are meant by files, folders and patterns, each once, in order. ValueError where one means none.

    Of a folder these are the files whose suffix is one of `kinds`; `passed` counts the suffixes of its other files.
    """
    passed = Counter() if passed is None else passed
    over: set[str] = set()
    found: dict[str, None] = {}
    for word in words:
        place = os.path.expanduser(word)
        others: Counter[str] = Counter()
        if os.path.isdir(place):
            files = []
            for folder, names in sorted(_walk(place)):
                for name in sorted(filter(seen_by_people, names)):
                    file, suffix = os.path.join(folder, name), os.path.splitext(name)[1].lower()
                    if suffix in kinds:
                        files.append(file)
                    elif file not in over:
                        over.add(file)
                        others[suffix] += 1
        elif os.path.lexists(place):
            files = [place]
        else:
            files = sorted(file for file in glob.glob(place, recursive=True) if not os.path.isdir(file))
        if not files:
            what = "is no file or folder, and no file matches it"
            if os.path.isdir(place):
                wanted = next((each for each in (IMAGES, CLIPS) if each.suffixes is kinds), None)
                what = f"holds no {wanted.noun}s" if wanted else f"holds no file {either(kinds)}"
                if others and wanted:
                    what += (
                        f" of a kind that is read, but {suffixes(others)}; convert them to {wanted.instead}"
                    )
                elif others:
                    what += f", but {suffixes(others)}"
            raise ValueError(f"{word!r} {what}")
        found |= dict.fromkeys(files)
        passed += others
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
    if out != "-":
        try:
            file = open(os.path.expanduser(out), "x", newline="", **encoding)  # noqa: SIM115 (closed below)
        except FileExistsError:
            raise ValueError(f"--out {out} is there already: choose another name, or delete it") from None
        with file:
            yield file
        return
    if sys.stdout is None:
        raise ValueError("standard output is closed: give --out a file")
    if sys.stdout.isatty():
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        yield cast(TextIO, Shown(sys.stdout))
        return
    sys.stdout.reconfigure(**encoding)  # type: ignore[union-attr]
    try:
        yield sys.stdout
        sys.stdout.flush()
    except OSError:
        swallow(sys.stdout)
        raise


def _words(argv: Sequence[str] | None) -> Namespace:
    parser = command.Parser(
        "--help explains the rest", prog="python -m ups_fast.predict", description=DESCRIPTION
    )
    parser.add_argument("run", metavar="RUN", help="the run's folder, such as runs/digits")
    parser.add_argument("files", metavar="FILES", nargs="+", help="files, folders or patterns")
    parser.add_argument(
        "--out", default="-", help="the table to write. It must be a new file. Default: standard output"
    )
    parser.add_argument(
        "--best",
        action="store_true",
        help="use the network of the round with the highest validation accuracy instead of the last one",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the words `argv` (default: sys.argv) and returns the exit status."""
    hold_the_first_three()
    done = damaged = 0
    out = "the table"
    try:
        ctrl_c_raises()
        args = _words(argv)
        console, out = open_console(error=True), "standard output" if args.out == "-" else args.out
        command.check_kernels(pick_device(args.device))
        predictor = Predictor(args.run, args.device, best=args.best)
        passed: Counter[str] = Counter()
        paths = find(args.files, passed, predictor.kinds)
        if passed:
            console.print(f"{many(passed.total(), 'file')} ignored for the suffix: {suffixes(passed)}")
        if predictor.unfinished:
            console.print(f"{args.run} is not finished: its network has {predictor.unfinished}")
        total = predictor.count(paths)
        with _table(args.out) as file, progress_bar(console) as bar:
            task = bar.add_task("labeling", total=total, now="")
            write = label_table(file, predictor.head)
            for answer in predict(predictor, paths, progress=lambda samples: bar.advance(task, samples)):
                write(dict(zip(predictor.head, [answer.path, *answer.row], strict=True)))
                done, damaged = done + 1, damaged + bool(answer.row[-1])
    except KeyboardInterrupt:
        complain(f"stopped: {done:,} rows are in {out}" if done else "stopped")
        return 130
    except BrokenPipeError:  # standard output has no reader any more
        return 0
    except Exception as error:
        sentence = command.mistake_of(error, REMEDY)
        if sentence is None:
            raise
        if (
            isinstance(error, OSError)
            and error.errno not in (None, errno.ENOMEM)
            and error.filename in (None, out)
        ):
            sentence = f"{out} could not be written: {error.strerror}; {done:,} rows are in it"
        complain(f"error: {sentence}")
        return 2
    if args.out != "-":
        wrong = f", {damaged:,} with an error" if damaged else ""
        complain(f"{many(done, 'row')}{wrong} in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(ended(main()))
