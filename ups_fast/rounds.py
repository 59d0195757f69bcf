"""The rounds: train, label all that is unlabeled, select, repeat; from wherever a run stood."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice, tee
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ups_fast.batches import epoch_order, lr_at, views_of
from ups_fast.build import Run, prepare
from ups_fast.checkpoint import (
    CHECKPOINT,
    FREE_KEYS,
    check_state,
)
from ups_fast.config import Config, limits_of
from ups_fast.data import Images, ImageSet
from ups_fast.data.classes import class_counts, classes_line, uneven
from ups_fast.data.fingerprint import differences
from ups_fast.display import HEADER, Interrupted, TensorBoard, Watch, say, stop_signal, table_line
from ups_fast.files import RunFolderError
from ups_fast.inputs import IMAGES
from ups_fast.methods import Known, Layout, Look, Targets
from ups_fast.models.saved import MODEL
from ups_fast.selection import Evaluation, evaluate, features_of, pseudo_label
from ups_fast.state import Checkpoint, Row
from ups_fast.tasks import MULTI
from ups_fast.words import many
from ups_fast.world import ALONE, World

__all__ = ["Diverged", "Interrupted", "Result", "rounds", "run"]


@dataclass(frozen=True)
class Result:
    """A finished run. Tensors are on the host."""

    folder: Path
    rows: list[Row]  # one per round
    pseudo_labels: Any  # of the last round, a record of the task such as PseudoLabels
    truth: (
        Tensor  # int64 [U], of several labels int8 [U, C], in the order of `pseudo_labels`, -1 where unknown
    )
    labeled: Tensor  # int64 [L], into the training set
    val: Tensor  # int64 [V], likewise
    unreadable: list[str]  # sentences on files that could not be read any more: nothing was learned from them
    images: Images  # the training set
    test_images: Images


class Diverged(ValueError):
    """Loss, weights or answers became NaN or infinite. Nothing of that is saved; the message says what to lower."""


def run(cfg: Config, data: ImageSet, *, console: Console, world: World = ALONE) -> Result:
    """Runs the rounds that the folder `cfg.run_dir` lacks, prints them, and keeps all its files but the report.

    Raises ValueError where config and data cannot work, before anything is written; else as `rounds`.
    """
    with world.together():
        job = prepare(cfg, data, console, world)
    world.same({"the data": job.state.data})
    for row in rounds(job, console):
        say(console, table_line(row))
        for sentence in worries(row, job) if row["round"] >= job.resumed else ():
            say(console, f"round {row['round']}: {sentence}")
    state, parts = job.state, (job.images, job.test_images)
    assert state.pseudo_labels is not None  # a config has at least one round
    unreadable = sorted({sentence for images in parts for sentence in images.unreadable.values()})
    found = job.task.of(state.pseudo_labels)
    return Result(job.folder, state.rows, found, job.truth, state.labeled, state.val, unreadable, *parts)


def rounds(run: Run, console: Console) -> Iterator[Row]:
    """The rows of all rounds: first of those that the folder holds, then of each new one when it is finished.

    Raises RunFolderError where the folder cannot be used; Diverged where training does; Interrupted after a signal.
    """
    # One training over all rounds depends on their number.
    free = [key for key in FREE_KEYS if key != "train.rounds" or not run.method.continues]
    world, patience = run.world, 10.0 if run.world.size > 1 else 0.0
    with ExitStack() as opened, stop_signal(console, patience) as stop:
        with world.together():
            if warning := opened.enter_context(run.store.open(asdict(run.cfg), free)):
                say(console, warning)
        resume(run, console)
        yield from run.state.rows
        if run.state.round == run.cfg.train.rounds:
            return
        watch = Watch(console, run.state, stop)
        with (
            torch.backends.cudnn.flags(enabled=True, deterministic=True),
            run.store.board(run.epochs_done(), run.state.round) as board,
            watch.progress,
        ):
            current = _Round(run, watch, board)
            while run.state.round < run.cfg.train.rounds:
                current.train()
                yield current.finish()


# Where a run stands ----------------------------------------------------------------------------------------


def resume(run: Run, console: Console) -> None:
    """Goes on from the folder's checkpoint, if it has one, and brings what follows from it up to date."""
    folder, data, fresh = run.store, run.data, run.state
    found = run.world.share(folder.load)
    with run.world.together():
        if found:
            _check(run, found)
        run.state = state = found or fresh
        run.resumed = state.round
        folder.begin(data, state, run.truth)
    val = f"{len(state.val):,} validation, " if len(state.val) else ""
    say(
        console,
        f"{data.name}: {len(state.labeled):,} labeled, {len(state.unlabeled):,} unlabeled, {val}"
        f"{len(data.test_labels):,} test {data.noun}s; {_networks(run)} on {run.device}",
    )
    labeled = class_counts(data.train_labels[state.labeled], len(data.classes))
    tests = class_counts(data.test_labels, len(data.classes))
    vals = class_counts(data.train_labels[state.val], len(data.classes)) if len(state.val) else None
    say(console, classes_line(data.classes, labeled, tests, vals, data.noun))
    if note := uneven(data.classes, labeled):
        say(console, note)
    mode, dtype, why = run.step.plan
    say(console, f"method: {run.cfg.method.name}; training step: {mode}, {str(dtype)[6:]} ({why})")
    done = state.round == run.cfg.train.rounds
    at = "all rounds are done" if done else "a new run"
    if found and not done:
        if found.torch_version != torch.__version__:
            say(
                console,
                f"the run was saved by torch {found.torch_version} and goes on with torch {torch.__version__}: "
                "the results may differ in their last bits",
            )
        at = f"going on from round {state.round}, epoch {state.epoch}"
    say(console, f"{folder}: {at}")
    if done and not (folder.path / MODEL).exists():
        say(console, f"{MODEL} is gone. Only a new run can make it again: choose another run_dir")
    say(console, HEADER.replace("test acc", "test mAP") if run.task is MULTI else HEADER)


def _networks(run: Run) -> str:
    model = run.cfg.model
    return f"{model.head} behind {model.name}, which is frozen," if model.freeze else model.name


def _check(run: Run, found: Checkpoint) -> None:
    """Raises RunFolderError where the folder's checkpoint is of another run or cannot be believed."""
    folder, fresh, total = run.store.path, run.state, run.cfg.train.rounds
    if found.data != fresh.data:
        what = differences(run.data, fresh.data, found.data, folder / IMAGES)
        raise RunFolderError(
            f"run_dir={folder} belongs to other data: {what}; choose another run_dir, or put the data back"
        )
    if found.round > total:
        raise RunFolderError(
            f"run_dir={folder} has {found.round} rounds done, but train.rounds is {total}: raise it, or "
            "choose another run_dir"
        )
    weights, trained, n_classes = run.method.state_dict(), run.step.momentum, len(run.data.classes)
    ranges = run.method.ranges()
    check_state(
        folder, found, fresh, weights, trained, n_classes, task=run.task, keeps=run.keeps, ranges=ranges
    )
    epochs, steps = 0, 0
    if found.round < total:
        epochs = run.budget(found.round)[0]
        run.state = found  # its seeds are those of its round
        steps = targets_and_layout(run)[1].steps
        run.state = fresh
    if found.epoch > epochs or found.step > (steps if found.epoch < epochs else 0):
        raise RunFolderError(
            f"{folder / CHECKPOINT} stands in round {found.round}, epoch {found.epoch}, step {found.step}, which this "
            "config does not have; move it away to start over"
        )


def targets_and_layout(run: Run) -> tuple[Targets, Layout]:
    """What the round in progress learns from, and how its batches are made up."""
    state = run.state
    if state.method and run.keeps.weights:
        run.method.load_state_dict(state.method)  # what it learned when the last round ended
    found = run.task.of(state.pseudo_labels) if state.pseudo_labels else None
    known = Known(
        state.round,
        state.round == run.cfg.train.rounds - 1,
        run.data.train_labels,
        state.labeled,
        state.unlabeled,
        found,
        run.stream("expand"),
    )
    targets = run.method.targets(known)
    sizes = {name: len(ids) for name, ids in targets.lists.items()}
    epochs, batch_size = run.budget(state.round)
    layout = run.method.lay_out(sizes, batch_size)
    least = math.ceil(run.cfg.train.min_steps / epochs)
    return targets, layout._replace(steps=max(layout.steps, least))


# A round ---------------------------------------------------------------------------------------------------


class _Round:
    """The round in progress of a run."""

    def __init__(self, run: Run, watch: Watch, board: TensorBoard) -> None:
        self.run, self.watch, self.board, self.state = run, watch, board, run.state

    def train(self) -> None:
        """Trains from where the checkpoint stands."""
        run, state, watch, step = self.run, self.state, self.watch, self.run.step
        check_unreadable(run, watch)
        epochs, _ = run.budget(state.round)
        targets, layout = targets_and_layout(run)
        if layout.note:
            watch.say(f"round {state.round}: {layout.note}")
        per_round = epochs * layout.steps
        first, total = 0, per_round  # steps before this round, and in all, on one schedule
        if run.method.continues:
            first, total = state.round * per_round, run.cfg.train.rounds * per_round
        warmup = run.cfg.train.warmup_epochs * layout.steps
        done = state.epoch * layout.steps + state.step
        bar = watch.bar("training", per_round * layout.rows, done * layout.rows)
        with watch.overhead():
            self._start(targets, layout)
        orders, ahead = tee(
            epoch_order(targets.lists, layout, run.stream("epoch", epoch), epoch)
            for epoch in range(state.epoch, epochs)
        )
        ours = (map(run.world.own, each) for each in ahead)
        rest = islice(chain.from_iterable(zip(*each, strict=True) for each in ours), state.step, None)
        fetched = run.images.ahead(rest, step.views, seed=run.seed("augment"), out=step.batch)
        while state.epoch < epochs:
            before = first + state.epoch * layout.steps
            with watch.overhead():
                ids, draw = (each.to(run.device) for each in next(orders))
            if state.step == 0:
                state.loss.zero_()
            for at in range(state.step, layout.steps):
                lr = self._lr(before + at, total, warmup)
                with watch.overhead():
                    next(fetched)
                if run.data.in_files:
                    step.gone = run.world.union(run.images.unreadable, step.gone)
                check_unreadable(run, watch)
                step(ids[at], draw[at], lr, (before + at) / total)
                state.step = at + 1
                images = (before - first + state.step) * layout.rows
                watch.show(bar, images, epochs, lr, self._read_loss)
                if self._asked():
                    self._save(training=True)
                watch.end_if_asked(run.saved_in)
            self._end_epoch(
                self._read_loss() / layout.steps, self._lr(before + layout.steps - 1, total, warmup)
            )
        self._save(training=True)
        watch.progress.remove_task(bar)

    def finish(self) -> Row:
        """Tests the network, labels all that is unlabeled, writes the round's files, last the checkpoint."""
        run, state, data, watch = self.run, self.state, self.run.data, self.watch
        method, task, n_classes = run.method, run.task, len(data.classes)
        headline, score = f"val_{task.headline}", None
        with watch.overhead():
            test = self._evaluate(run.test_images, data.test_labels)
            if len(state.val):
                val = self._evaluate(run.images, data.train_labels[state.val], state.val)
                score = task.score(val.found, val.truth)
        self._check_answers(task.answered(test.found))
        balanced = state.round < run.cfg.select.balance_rounds
        found = self._label(
            "labeling",
            run.images,
            state.unlabeled,
            keep=lambda found: method.keep(found, state.round),
            balanced=balanced,
        )
        gone = torch.tensor(list(run.images.unreadable), dtype=torch.int64)
        self._check_answers(task.answered(found)[~torch.isin(state.unlabeled, gone)])
        if run.cfg.select.weight == "measured":
            known = self._label(f"labeling validation {run.data.noun}s", run.images, state.val)
            found = task.weighed(found, known, data.train_labels[state.val])
        guess = {}
        if not (run.truth >= 0).any():
            index = torch.arange(len(data.test_labels))
            on_test = self._label(f"labeling test {run.data.noun}s", run.test_images, index)
            guess = task.guess(on_test, data.test_labels)
        earlier: list[float] = [row.get(headline) or 0.0 for row in state.rows]  # type: ignore[misc]
        best = score is not None and score >= max(earlier, default=0)
        with watch.overhead():
            there = state.labeled[~torch.isin(state.labeled, gone)]
            method.end_round(Look(found, data.train_labels, there, self._features))
            run.world.copy_(list(method.state_dict().values()))
            run.store.keep(run.network, run.about, vars(found), run.truth, best=best)
        row: Any = dict(
            round=state.round,
            **{f"test_{task.headline}": task.score(test.found, test.truth), headline: score},
            **task.report(found, run.truth, n_classes),
            seconds=round(watch.lap(), 3),
            outside=round(state.outside / max(state.seconds, 1e-9), 4),
            train_loss=state.train_loss,
            **task.tested(test.found, test.truth, n_classes),
            **guess,
        )
        self.board.add_round(row)
        state.rows.append(row)
        state.pseudo_labels = dict(vars(found))
        state.method = method.state_dict() if run.keeps.weights else None
        state.momentum = run.step.momentum if run.keeps.momentum else None
        state.round, state.epoch, state.step, state.seconds, state.outside = state.round + 1, 0, 0, 0.0, 0.0
        self._save()
        run.store.write_rows(state.rows)
        return row

    def _start(self, targets: Targets, layout: Layout) -> None:
        """Gives the step the state of the checkpoint; a round that it says nothing of has new weights."""
        run, state, step = self.run, self.state, self.run.step
        torch.manual_seed(run.seed("init"))
        weights = state.method or run.new_method().state_dict()
        views = views_of(layout.own(run.world).groups, run.policies)
        seeds = {f"{name}_seed": run.seed(name) for name in ("augment", "dropout")}
        step.start(layout, views, targets.tables, weights, state.momentum, **seeds)
        step.loss.copy_(state.loss)
        state.loss, state.method, state.momentum = step.loss, None, None

    def _lr(self, at: int, total: int, warmup: float) -> float:
        peak = self.run.lr(self.state.round)[1]
        return lr_at(at, total, lr=peak, warmup=warmup, cosine=self.run.cfg.train.cosine)

    def _label(self, what: str, images: Images, index: Tensor, **how: Any) -> Any:
        run, watch, select = self.run, self.watch, self.run.cfg.select
        bar = watch.bar(what, len(index))

        def advance(done: int) -> None:
            watch.progress.advance(bar, done * run.world.size)
            check_unreadable(run, watch)
            self._asked()
            watch.end_if_asked(run.saved_in)  # training was saved when it ended

        found = pseudo_label(
            run.method.answers,
            images,
            index.to(run.device),
            task=run.task,
            **limits_of(run.cfg)._asdict(),
            passes=select.passes,
            batch_size=run.labeling_rows(),
            mc_layers=select.mc_layers,
            uncertainty=select.uncertainty,
            policy=run.policies["passes"],
            forward=run.forward,
            **how,
            seed=run.seed("label"),
            progress=advance,
            world=run.world,
        )
        watch.progress.remove_task(bar)
        return found.cpu()

    def _evaluate(self, images: Images, labels: Tensor, index: Tensor | None = None) -> Evaluation:
        run = self.run
        how: Any = {"batch_size": run.labeling_rows(), "forward": run.forward, "world": run.world}
        return evaluate(run.method.answers, images, labels, index, task=run.task, **how)

    def _features(self, index: Tensor) -> Tensor:
        run = self.run
        how: Any = {"batch_size": run.labeling_rows(), "world": run.world}
        return features_of(run.method.answers, run.images, index, **how)

    def _asked(self) -> bool:
        """Whether to save, or to stop, which `watch` then knows: all processes get the same answer."""
        watch = self.watch
        due = time.monotonic() - watch.saved_at >= self.run.cfg.checkpoint_seconds
        stop, save = self.run.world.ask(watch.stop.is_set(), due)
        watch.ending = bool(stop)
        return bool(stop or save)

    def _end_epoch(self, loss: float, lr: float) -> None:
        state = self.state
        state.train_loss = loss
        state.epoch, state.step = state.epoch + 1, 0
        with self.watch.overhead():
            self.board.add_epoch(self.run.epochs_done(), {"train/loss": loss, "train/lr": lr})

    def _save(self, *, training: bool = False) -> None:
        """Writes the checkpoint; between rounds without what the next one makes anew."""
        run, watch = self.run, self.watch
        watch.lap()
        state = self.state
        with watch.overhead():
            if training:
                self._check_weights()
                state = replace(state, method=run.method.state_dict(), momentum=run.step.momentum)
            self.board.flush()  # scalars of what the checkpoint calls done are not logged again
            run.store.save(state)
            if watch.ending:  # torchrun ends all processes as soon as one has ended: they wait for the file
                run.world.wait()
        watch.saved_at = time.monotonic()

    # What can go wrong -------------------------------------------------------------------------------------

    def _read_loss(self) -> float:
        """The sum of the epoch's losses so far: this waits for the device. Raises Diverged."""
        loss = float(self.state.loss)
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {'NaN' if math.isnan(loss) else 'infinite'}")
        return loss

    def _check_weights(self) -> None:
        """Before they are saved: the loss, weights, statistics and momentum. Raises Diverged."""
        self._read_loss()
        momentum = {f"momentum of {name}": each for name, each in self.run.step.momentum.items()}
        tensors = {**self.run.method.state_dict(), **momentum}
        floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        finite = torch.stack([tensor.isfinite().all() for tensor in floats.values()]).tolist()  # one wait
        if bad := [name for name, good in zip(floats, finite, strict=True) if not good]:
            raise self._diverged(f"{len(bad)} of {len(floats)} weights are NaN or infinite, such as {bad[0]}")

    def _check_answers(self, answered: Tensor) -> None:  # bool [n], of images that could be read
        """Weights may be finite, and yet so large that no answer is. Raises Diverged."""
        if len(answered) and not bool(answered.any()):
            raise self._diverged(f"the network's answers are NaN or infinite for all {self.run.data.noun}s")

    def _diverged(self, what: str) -> Diverged:
        state, (key, rate) = self.state, self.run.lr(self.state.round)
        also = f" (here train.{key})" if key != "lr" else ""
        return Diverged(
            f"training diverged in round {state.round}, epoch {state.epoch}: {what}; lower train.lr{also}, which is "
            f"{rate:g}{self._and_elsewhere()}"
        )

    def _and_elsewhere(self) -> str:
        run = self.run
        if not run.cfg.run_dir:
            return ""
        return f", and choose another run_dir ({run.folder} keeps its config and its last good state)"


def check_unreadable(run: Run, watch: Watch) -> None:
    """Says when files are gone, and when twice as many are; raises ValueError where what is left is too little."""
    gone, test_gone, state = run.images.unreadable, run.test_images.unreadable, run.state
    found = len(gone) + len(test_gone)
    if found == watch.unreadable:
        return
    watch.unreadable = found
    labeled = sum(i in gone for i in state.labeled.tolist())
    some = next(iter([*gone.values(), *test_gone.values()]))
    if labeled == len(state.labeled) or 2 * len(gone) > len(run.images):
        what = f"all {labeled:,} labeled" if labeled == len(state.labeled) else f"{len(gone):,}"
        raise ValueError(
            f"data.root={run.cfg.data.root}: {what} {run.data.noun}s cannot be read any more, such as {some}. Put them "
            "back, and the same command goes on"
        )
    if found >= 2 * watch.reported:
        watch.reported = found
        are = "is" if found == 1 else "are"
        watch.say(
            f"{many(found, 'file')} cannot be read any more and {are} no longer trained on, such as {some}"
        )


def worries(row: Row, run: Run) -> Iterator[str]:
    """What the user should know of a round's selection."""
    each, gone, classes = row["per_class_positives"], run.images.unreadable, run.data.classes
    epochs = "train.epochs" if run.method.continues else "train.round0_epochs"
    none = [repr(name) for name, n in zip(classes, each, strict=True) if not n]
    if not row["positives"] and not row["negatives"]:
        lower = "" if run.method.continues else " or a lower select.tau_p"
        yield f"nothing was selected. More epochs{lower} may help"
    elif row["positives"] > 20 and max(each) > 0.95 * row["positives"]:
        yield (
            f"nearly all positives are of class {classes[each.index(max(each))]!r}. If the {run.data.noun}s are "
            f"not, the network does not tell the classes apart yet: more {epochs} or a lower train.lr may help"
        )
    elif row["positives"] > 20 and none:
        more = f" and {len(none) - 3:,} more" * (len(none) > 3)
        yield f"nothing was selected as {', '.join(none[:3])}{more}"
    if no_label := row["no_label"] - sum(i in gone for i in run.state.unlabeled.tolist()):
        yield f"{no_label:,} {run.data.noun}s have no label: their logits are NaN or infinite"
