"""The rounds of UPS: train anew, label all that is unlabeled, select, repeat; from wherever a run stood."""

from __future__ import annotations

import copy
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice, repeat, tee
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console
from rich.progress import TaskID
from torch import Tensor, nn

from ups_fast.calibration import (
    ece,
    or_none,
    recall,
    reliability,
    report,
    test_selection,
    top_confusions,
)
from ups_fast.checkpoint import (
    CHECKPOINT,
    TENSORBOARD,
    check_state,
    load_checkpoint,
    open_folder,
    save_checkpoint,
)
from ups_fast.config import Config, pick_device
from ups_fast.data import FileImages, ImageSet, ResidentImages
from ups_fast.data.classes import class_counts, classes_line, uneven
from ups_fast.data.fingerprint import differences, fingerprint
from ups_fast.display import HEADER, Row, TensorBoard, progress_bar, table_line
from ups_fast.engine import (
    Mix,
    Supervision,
    batch_mix,
    epoch_plan,
    evaluate,
    lr_at,
    occurrences,
    supervise,
)
from ups_fast.files import RunFolderError, write_arrays, write_atomic
from ups_fast.fullgraph import fullgraph
from ups_fast.inputs import IMAGES, naming_key, open_images, policy_of, split_of, write_files
from ups_fast.models.saved import MODEL, rebuild, save_model
from ups_fast.policy import POLICIES
from ups_fast.seeds import derive
from ups_fast.selection import PseudoLabels, labeling_rows, passes_over, pseudo_label, skipped
from ups_fast.state import Checkpoint
from ups_fast.step import TrainStep, plan_step
from ups_fast.words import many

# Of the number by which an image's augmentation is drawn; above them, how often it came before.
EPOCH_BITS = 20
REFRESH_SECONDS = 0.3  # the progress bar reads the loss, and so waits for the device, no oftener than this
LOG_SECONDS = 60.0  # likewise, a line where there is no terminal for a bar


@dataclass(frozen=True)
class Result:
    """A finished run. Tensors are on the host."""

    folder: Path
    rows: list[Row]  # one per round
    pseudo_labels: PseudoLabels  # of the last round
    truth: Tensor  # int64 [U], in the order of `pseudo_labels`, -1 where unknown
    labeled: Tensor  # int64 [L], into the training set
    unreadable: list[
        str
    ]  # sentences on files that could not be read any more, from which nothing was learned


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM ended the run, and everything is saved. The message says where it stands."""


class Diverged(ValueError):
    """Loss, weights or answers became NaN or infinite. Nothing of that is saved; the message says what to lower."""


def run(cfg: Config, data: ImageSet, *, console: Console) -> Result:
    """Runs the rounds that the folder `cfg.run_dir` lacks, and keeps all its files but the report.

    Raises ValueError where config and data cannot work, before anything is written; RunFolderError where the
    folder cannot be used; Diverged where training does; Interrupted after a signal.
    """
    job = _Run(cfg, data, console)
    with open_folder(job.folder, asdict(cfg)) as warning, _stop_signal(console) as job.stop:
        if warning:
            job._say(warning)
        job.resume()
        if job.state.round < cfg.train.rounds:
            with (
                torch.backends.cudnn.flags(enabled=True, deterministic=True),
                TensorBoard(job.folder / TENSORBOARD, job.epochs_done(), job.state.round) as job.board,
                job.progress,
            ):
                while job.state.round < cfg.train.rounds:
                    job.train_round()
                    job.finish_round()
        return job.result()


class _Run:
    """One run: gives the config's values to the functions of `engine` and `selection`, keeps the folder."""

    stop: threading.Event
    board: TensorBoard

    def __init__(self, cfg: Config, data: ImageSet, console: Console) -> None:
        self.cfg, self.data, self.console = cfg, data, console
        self.folder = Path(cfg.run_dir)
        self.device = pick_device(cfg.device)
        self.about = {
            "model": asdict(cfg.model),
            "classes": data.classes,
            "channels": data.train_images.shape[3],
            "size": list(data.train_images.shape[1:3]),
            "mean": data.mean,
            "std": data.std,
        }
        with naming_key("model.name"):
            model = rebuild(self.about)  # an impossible network ends the run here, before it leaves a folder
        self._check_small_batches(model)
        self.model = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        with naming_key("runtime.step"):
            plan = plan_step(cfg.runtime.step, cfg.runtime.precision, self.device)
        policy = policy_of(cfg)
        self.train_images = open_images(cfg, data, self.device, policy)
        self.test_images = open_images(cfg, data, self.device, POLICIES["none"], test=True)
        with naming_key("select.mc_layers"):
            skipped(model, cfg.select.mc_layers)
        self.forward = passes_over if plan.mode == "eager" else fullgraph(passes_over)
        self.step = TrainStep(
            self.model,
            self.train_images,
            len(data.classes),
            plan,
            momentum=cfg.train.momentum,
            weight_decay=cfg.train.weight_decay,
        )
        self.state = Checkpoint(fingerprint(data, cfg.model.weights), *split_of(cfg, data))
        self.clock = self.saved_at = self.shown_at = time.monotonic()
        self.unreadable = self.reported = 0
        self.progress = progress_bar(console)

    def _check_small_batches(self, model: nn.Module) -> None:
        """ValueError where batch-norm would meet a single value per channel: a batch of one, images down to 1x1."""
        train = self.cfg.train
        for key, size in (("round0_batch_size", train.round0_batch_size), ("batch_size", train.batch_size)):
            if size != 1:
                continue
            trial = copy.deepcopy(model).train()
            _, height, width, channels = self.data.train_images.shape
            image = torch.zeros(1, channels, height, width)
            try:
                with torch.no_grad():
                    trial(image, torch.zeros(1, dtype=torch.int32))
            except ValueError as error:
                raise ValueError(
                    f"train.{key}=1 is too small a batch for model.name={self.cfg.model.name}, whose normalization "
                    f"needs more than one value per channel: raise it to 2 or more ({error})"
                ) from error

    def _plans(self, told: Supervision, mix: Mix, epochs: range) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each epoch the sample ids and draws of its steps, int64 [steps, B], on the host."""
        for epoch in epochs:
            plan = epoch_plan(told.positives, told.negatives, mix, self._stream("epoch", epoch))
            yield plan, epoch + (occurrences(plan) << EPOCH_BITS)

    def _batches(self, images: FileImages, plans: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """Puts the images of the round's remaining steps where the step reads them, one by one."""
        steps = chain.from_iterable(zip(*each, strict=True) for each in plans)
        rest = islice(steps, self.state.step, None)
        return images.training(rest, seed=self._seed("augment"), out=self.step.batch)

    def resume(self) -> None:
        """Goes on from the folder's checkpoint, if it has one, and brings what follows from it up to date."""
        found = load_checkpoint(self.folder)
        if found:
            self._check(found)
        self.state = state = found or self.state
        rounds = self.cfg.train.rounds
        write_files(self.folder, self.data)
        write_arrays(self.folder / "split.npz", {"labeled": state.labeled, "unlabeled": state.unlabeled})
        self._write_rows()
        if state.pseudo_labels:
            self._write_selection(state.pseudo_labels)
        self._say(
            f"{self.data.name}: {len(state.labeled):,} labeled, {len(state.unlabeled):,} unlabeled, "
            f"{len(self.data.test_labels):,} test images; {self.cfg.model.name} on {self.device}"
        )
        labeled = class_counts(self.data.train_labels[state.labeled], len(self.data.classes))
        tests = class_counts(self.data.test_labels, len(self.data.classes))
        self._say(classes_line(self.data.classes, labeled, tests))
        if note := uneven(self.data.classes, labeled):
            self._say(note)
        mode, dtype, why = self.step.plan
        self._say(f"training step: {mode}, {str(dtype)[6:]} ({why})")
        at = "all rounds are done" if state.round == rounds else "a new run"
        if found and state.round < rounds:
            if found.torch_version != torch.__version__:
                self._say(
                    f"the run was saved by torch {found.torch_version} and goes on with torch {torch.__version__}: "
                    "the results may differ in their last bits"
                )
            at = f"going on from round {state.round}, epoch {state.epoch}"
        self._say(f"{self.folder}: {at}")
        if state.round == rounds and not (self.folder / MODEL).exists():
            self._say(f"{MODEL} is gone. Only a new run can make it again: choose another run_dir")
        self._say(HEADER)
        for row in state.rows:
            self._say(table_line(row))

    def _check(self, found: Checkpoint) -> None:
        """Raises RunFolderError where the folder's checkpoint is of another run or cannot be believed."""
        cfg, path = self.cfg, self.folder / CHECKPOINT
        if found.data != self.state.data:
            what = differences(self.data, self.state.data, found.data, self.folder / IMAGES)
            raise RunFolderError(
                f"run_dir={self.folder} belongs to other data: {what}; choose another run_dir, or put the data back"
            )
        rounds = cfg.train.rounds
        if found.round > rounds:
            raise RunFolderError(
                f"run_dir={self.folder} has {found.round} rounds done, but train.rounds is {rounds}: raise it, or "
                "choose another run_dir"
            )
        fresh, n_classes = self.state, len(self.data.classes)
        check_state(self.folder, found, fresh, self.model, n_classes, warm_start=cfg.train.warm_start)
        epochs, steps = 0, 0
        if found.round < rounds:
            epochs, batch_size = self._budget(found.round)
            told = self._supervision(found)
            steps = batch_mix(len(told.positives), len(told.negatives), batch_size).steps
        if found.epoch > epochs or found.step > (steps if found.epoch < epochs else 0):
            raise RunFolderError(
                f"{path} stands in round {found.round}, epoch {found.epoch}, step {found.step}, which this config does "
                "not have; move it away to start over"
            )

    def train_round(self) -> None:
        """Trains the round's network from where the checkpoint stands."""
        cfg, state = self.cfg, self.state
        self._check_lost()
        epochs, batch_size = self._budget(state.round)
        told = self._supervision(state)
        mix = batch_mix(len(told.positives), len(told.negatives), batch_size)
        if mix.note:
            self._say(f"round {state.round}: {mix.note}")
        total, warmup = epochs * mix.steps, cfg.train.warmup_epochs * mix.steps
        peak = self._rate()[1]
        done = state.epoch * mix.steps + state.step
        bar = self._bar("training", total * batch_size, done * batch_size)
        with self._outside():
            self._start(told, mix)
        plans = self._plans(told, mix, range(state.epoch, epochs))
        batches: Iterator[Tensor | None] = repeat(None)  # images on the device are read by the step itself
        if isinstance(self.train_images, FileImages):
            plans, ahead = tee(plans)  # by an epoch at most
            batches = self._batches(self.train_images, ahead)
        while state.epoch < epochs:
            before = state.epoch * mix.steps
            with self._outside():
                plan, draw = (each.to(self.device) for each in next(plans))
            if state.step == 0:
                state.loss.zero_()
            for step in range(state.step, mix.steps):
                lr = lr_at(before + step, total, lr=peak, warmup=warmup, cosine=cfg.train.cosine)
                with self._outside():
                    next(batches)
                self._check_lost()
                self.step(plan[step], draw[step], lr)
                state.step = step + 1
                self._show(bar, (before + state.step) * batch_size, lr)
                self._save_if_due()
            lr = lr_at(before + mix.steps - 1, total, lr=peak, warmup=warmup, cosine=cfg.train.cosine)
            self._end_epoch(self._read_loss() / mix.steps, lr)
        self._save(training=True)
        self.progress.remove_task(bar)

    def finish_round(self) -> None:
        """Tests the network, labels all that is unlabeled, writes the round's files, last the checkpoint."""
        state, data = self.state, self.data
        size = self._labeling_batch()
        with self._outside():
            test = evaluate(
                self.model, self.test_images, data.test_labels, batch_size=size, forward=self.forward
            )
        self._check_answers(test.label)
        pseudo_labels = self._label(
            "labeling",
            self.train_images,
            state.unlabeled,
            balanced=state.round < self.cfg.select.balance_rounds,
        )
        kept = ~torch.isin(
            state.unlabeled, torch.tensor(list(self.train_images.unreadable), dtype=torch.int64)
        )
        self._check_answers(pseudo_labels.label[kept])
        guess = {}
        if not (self._truth() >= 0).any():
            index = torch.arange(len(data.test_labels))
            guess = test_selection(
                self._label("labeling test images", self.test_images, index), data.test_labels
            )
        accuracy = or_none(test.correct.double().mean())
        before = [row["test_acc"] or 0 for row in state.rows]
        with self._outside():
            save_model(self.folder, self.model, self.about, best=(accuracy or 0) >= max(before, default=0))
            self._write_selection(vars(pseudo_labels))
        row = {
            "round": state.round,
            "test_acc": accuracy,
            **report(pseudo_labels, self._truth(), len(data.classes)),
            "seconds": round(self._lap(), 3),
            "outside": round(state.outside / max(state.seconds, 1e-9), 4),
            "train_loss": state.train_loss,
            "test_ece": or_none(ece(reliability(test.confidence, test.correct))),
            "test_mistakes": [
                list(each) for each in top_confusions(test.label, data.test_labels[test.index])
            ],  # as JSON has it
            "test_recall": recall(test.label, data.test_labels[test.index], len(data.classes)),
            **guess,
        }
        self.board.add_round(row)
        state.rows.append(row)
        state.pseudo_labels = dict(vars(pseudo_labels))
        state.model = self.model.state_dict() if self.cfg.train.warm_start else None
        state.round, state.epoch, state.step, state.seconds, state.outside = state.round + 1, 0, 0, 0.0, 0.0
        self._save()
        self._write_rows()
        self._say(table_line(row))
        for sentence in self._warnings(row):
            self._say(f"round {row['round']}: {sentence}")

    def _warnings(self, row: Row) -> Iterator[str]:
        """What the user should know of a round's selection."""
        each, unreadable = row["per_class_positives"], self.train_images.unreadable
        none = [repr(name) for name, n in zip(self.data.classes, each, strict=True) if not n]
        if not row["positives"] and not row["negatives"]:
            yield "nothing was selected. More epochs or a lower select.tau_p may help"
        elif row["positives"] > 20 and max(each) > 0.95 * row["positives"]:
            yield (
                f"nearly all positives are of class {self.data.classes[each.index(max(each))]!r}. If the images are "
                "not, the network does not tell the classes apart yet: more train.round0_epochs or a lower "
                "train.lr may help"
            )
        elif row["positives"] > 20 and none:
            yield (
                "nothing was selected as "
                + ", ".join(none[:3])
                + f" and {len(none) - 3:,} more" * (len(none) > 3)
            )
        if no_label := row["no_label"] - sum(i in unreadable for i in self.state.unlabeled.tolist()):
            yield f"{no_label:,} images have no label: their logits are NaN or infinite"

    def _check_lost(self) -> None:
        """Says when files are gone, and when twice as many are; raises ValueError where what is left is too little."""
        unreadable, test_unreadable = self.train_images.unreadable, self.test_images.unreadable
        found = len(unreadable) + len(test_unreadable)
        if found == self.unreadable:
            return
        self.unreadable = found
        labeled = sum(i in unreadable for i in self.state.labeled.tolist())
        some = next(iter([*unreadable.values(), *test_unreadable.values()]))
        if labeled == len(self.state.labeled) or 2 * len(unreadable) > len(self.train_images):
            what = (
                f"all {labeled:,} labeled" if labeled == len(self.state.labeled) else f"{len(unreadable):,}"
            )
            raise ValueError(
                f"data.root={self.cfg.data.root}: {what} images cannot be read any more, such as {some}. Put them "
                "back, and the same command goes on"
            )
        if found >= 2 * self.reported:
            self.reported = found
            are = "is" if found == 1 else "are"
            self._say(
                f"{many(found, 'file')} cannot be read any more and {are} no longer trained on, such as {some}"
            )

    def result(self) -> Result:
        assert self.state.pseudo_labels is not None  # a config has at least one round
        unreadable = sorted({*self.train_images.unreadable.values(), *self.test_images.unreadable.values()})
        pseudo_labels = PseudoLabels(**self.state.pseudo_labels)
        return Result(
            self.folder, self.state.rows, pseudo_labels, self._truth(), self.state.labeled, unreadable
        )

    def _supervision(self, state: Checkpoint) -> Supervision:
        """What the round in progress learns from."""
        last = state.pseudo_labels
        return supervise(
            self.data.train_labels,
            state.labeled,
            PseudoLabels(**last) if last else None,
            len(self.data.classes),
            repeat=self.cfg.train.labeled_repeats,
            device=self.device,
            generator=self._stream("expand"),
        )

    def _start(self, told: Supervision, mix: Mix) -> None:
        """Gives the step the state of the checkpoint; a round that it says nothing of has new weights."""
        state, step = self.state, self.step
        torch.manual_seed(self._seed("init"))
        weights = state.model or rebuild(self.about).state_dict()
        seeds = {f"{name}_seed": self._seed(name) for name in ("augment", "dropout")}
        step.start(told, mix, weights, state.momentum, **seeds)
        step.loss.copy_(state.loss)
        state.loss, state.model, state.momentum = step.loss, None, None

    def _label(
        self, what: str, images: ResidentImages | FileImages, index: Tensor, *, balanced: bool = False
    ) -> PseudoLabels:
        select = self.cfg.select
        bar = self._bar(what, len(index))

        def advance(done: int) -> None:
            self.progress.advance(bar, done)
            self._check_lost()
            self._end_if_asked()  # training was saved when it ended

        pseudo_labels = pseudo_label(
            self.model,
            images,
            index.to(self.device),
            tau_p=select.tau_p,
            tau_n=select.tau_n,
            kappa_p=select.kappa_p,
            kappa_n=select.kappa_n,
            temp_nl=select.temp_nl,
            passes=select.passes,
            batch_size=self._labeling_batch(),
            mc_layers=select.mc_layers,
            forward=self.forward,
            balanced=balanced,
            seed=self._seed("label"),
            progress=advance,
        )
        self.progress.remove_task(bar)
        return pseudo_labels.cpu()

    def _end_epoch(self, loss: float, lr: float) -> None:
        state = self.state
        state.train_loss = loss
        state.epoch, state.step = state.epoch + 1, 0
        with self._outside():
            self.board.add_epoch(self.epochs_done(), {"train/loss": loss, "train/lr": lr})

    def _save_if_due(self) -> None:
        if self.stop.is_set() or time.monotonic() - self.saved_at >= self.cfg.checkpoint_seconds:
            self._save(training=True)
        self._end_if_asked()

    def _save(self, *, training: bool = False) -> None:
        """Writes the checkpoint; between rounds without momentum, and without a network that starts anew."""
        self._lap()
        state = self.state
        with self._outside():
            if training:
                self._check_weights()
                state = replace(state, model=self.model.state_dict(), momentum=self.step.momentum)
            self.board.flush()  # scalars of what the checkpoint calls done are not logged again
            save_checkpoint(self.folder, state)
        self.saved_at = time.monotonic()

    def _read_loss(self) -> float:
        """The sum of the epoch's losses so far: this waits for the device. Raises Diverged."""
        loss = float(self.state.loss)
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {'NaN' if math.isnan(loss) else 'infinite'}")
        return loss

    def _check_weights(self) -> None:
        """Before they are saved: the loss, weights, statistics and momentum. Raises Diverged."""
        self._read_loss()
        tensors = {
            **self.model.state_dict(),
            **{f"momentum of {k}": v for k, v in self.step.momentum.items()},
        }
        floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        each = [tensor.isfinite().all() for tensor in floats.values()]
        finite = torch.stack(each).tolist()  # one wait for all
        if bad := [name for name, good in zip(floats, finite, strict=True) if not good]:
            raise self._diverged(f"{len(bad)} of {len(floats)} weights are NaN or infinite, such as {bad[0]}")

    def _check_answers(self, label: Tensor) -> None:  # int64 [n], of images that could be read
        """Weights may be finite, and yet so large that no answer is. Raises Diverged."""
        if len(label) and bool((label < 0).all()):
            raise self._diverged("the network's answers are NaN or infinite for all images")

    def _rate(self) -> tuple[str, float]:
        """The key of the learning rate that holds in this round, and its value."""
        train = self.cfg.train
        return (
            ("later_rounds_lr", train.later_rounds_lr)
            if self.state.round and train.later_rounds_lr
            else ("lr", train.lr)
        )

    def _diverged(self, what: str) -> Diverged:
        state, (key, rate) = self.state, self._rate()
        also = f" (here train.{key})" if key != "lr" else ""
        return Diverged(
            f"training diverged in round {state.round}, epoch {state.epoch}: {what}; lower train.lr{also}, which is "
            f"{rate:g}, and choose another run_dir ({self.folder} keeps its config and its last good state)"
        )

    def _end_if_asked(self) -> None:
        if self.stop.is_set():
            at = f"round {self.state.round}, epoch {self.state.epoch}"
            raise Interrupted(f"stopped in {at}; everything is saved in {self.folder}")

    @contextmanager
    def _outside(self) -> Iterator[None]:
        """Counts what is done in it as neither training nor labeling: it keeps a GPU waiting."""
        start = time.monotonic()
        yield
        self.state.outside += time.monotonic() - start

    def _lap(self) -> float:
        """Seconds spent on this round so far, by all processes that worked on it."""
        now = time.monotonic()
        self.state.seconds += now - self.clock
        self.clock = now
        return self.state.seconds

    def _bar(self, what: str, images: int, done: int = 0) -> TaskID:
        name = f"round {self.state.round}: {what}"
        return self.progress.add_task(name, total=images, completed=done, now="")

    def _show(self, bar: TaskID, images: int, lr: float) -> None:
        now, state = time.monotonic(), self.state
        if now - self.shown_at < (LOG_SECONDS if self.progress.disable else REFRESH_SECONDS):
            return
        self.shown_at = now
        seen = f"loss {self._read_loss() / state.step:.3f}  lr {lr:.4f}"
        self.progress.update(bar, completed=images, now=seen)
        if self.progress.disable:
            self._say(
                f"round {state.round}: epoch {state.epoch + 1} of {self._budget(state.round)[0]}, {seen}"
            )

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _write_rows(self) -> None:
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in self.state.rows)
        write_atomic(self.folder / "metrics.jsonl", lines.encode())

    def _write_selection(self, pseudo_labels: dict[str, Tensor]) -> None:
        write_arrays(self.folder / "selection.npz", {**pseudo_labels, "truth": self._truth()})

    def _truth(self) -> Tensor:
        return self.data.train_labels[self.state.unlabeled]

    def _budget(self, round: int) -> tuple[int, int]:
        """Epochs and batch size of a round; round 0 may have its own."""
        train, first = self.cfg.train, round == 0
        return (
            train.round0_epochs if first and train.round0_epochs else train.epochs,
            train.round0_batch_size if first and train.round0_batch_size else train.batch_size,
        )

    def _labeling_batch(self) -> int:
        _, height, width, _ = self.data.train_images.shape
        return self.cfg.select.batch_size or labeling_rows(self.device, height, width)

    def epochs_done(self) -> int:
        """Of the whole run."""
        return sum(self._budget(round)[0] for round in range(self.state.round)) + self.state.epoch

    def _seed(self, stream: str, *path: int) -> int:
        return derive(self.cfg.seed, stream, self.state.round, *path)

    def _stream(self, stream: str, *path: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(stream, *path))


@contextmanager
def _stop_signal(console: Console) -> Iterator[threading.Event]:
    """Set by the first SIGINT or SIGTERM, so that the step ends and is saved; the second kills at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        console.show_cursor()  # the progress bar hides it, and a killed process cannot bring it back
        for each in signals:
            signal.signal(each, signal.SIG_DFL)

    # What the parent has ignored, as nohup and some shells do for background jobs, stays ignored.
    signals = [
        each for each in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(each) is not signal.SIG_IGN
    ]
    before = {each: signal.signal(each, ask) for each in signals}
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
