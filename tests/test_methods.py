"""What every method must do, whatever it learns from: run, go on after an interruption, leave out what is not there.

The cases are made from `ups_fast.methods.METHODS`: each method by itself, and with each other choice of its own keys.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_rounds import one_thread, tiny_config
from torch import Tensor, nn
from tracing import traced

from ups_fast import rounds
from ups_fast.build import Run, prepare
from ups_fast.checkpoint import load_checkpoint
from ups_fast.config import KEYS, METHOD_KEYS, Config
from ups_fast.data import ImageSet, load_set
from ups_fast.display import Interrupted, Watch
from ups_fast.methods import METHODS, Batch, Known, Method, Options, Setting
from ups_fast.pseudo_labels import PseudoLabels
from ups_fast.selection import Thresholds, passes_over
from ups_fast.step import TrainStep

__all__ = ["one_thread"]  # the fixture
METHOD_NAMES = list(METHODS)
Case = tuple[str, dict[str, Any]]
CASES: list[Case] = [(name, {}) for name in METHOD_NAMES] + [
    (name, {key.name.partition(".")[2]: choice})
    for name in METHOD_NAMES
    for key in METHOD_KEYS[name].values()
    if key.name not in KEYS
    for choice in key.choices
    if choice != key.default
]
# One training, with a state of every sample. The others are slow together; UPS has test_rounds and test_resume.
QUICK = ("flexmatch",)


def named(case: Case) -> str:
    return "-".join([case[0], *map(str, case[1].values())])


each_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case[0] in QUICK and not case[1] else pytest.mark.slow, id=named(case))
        for case in CASES
    ],
)


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    """240 training and 60 test images of 8x8."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    whole = load_set("digits", "")
    return replace(
        whole,
        train_images=whole.train_images[:240],
        train_labels=whole.train_labels[:240],
        test_images=whole.test_images[:60],
        test_labels=whole.test_labels[:60],
    )


def config_of(folder: Path, case: Case, **changes: Any) -> Config:
    """Two short rounds, in which all methods have something to learn from both kinds of images."""
    name, own = case
    views: dict[str, Any] = {"data__ops": "ups", "data__n_ops": 1} if METHODS[name].two_views else {}
    if "method.mu" in METHOD_KEYS[name]:
        views["method__mu"] = 1
    values = {
        "data__n_labels": 40,
        "method__name": name,
        **{f"method__{key}": value for key, value in own.items()},
        "train__epochs": 2,
        "train__round0_epochs": 4,
        "train__batch_size": 20,
        "train__round0_batch_size": 10,
        "select__tau_p": 0.15,
        "select__tau_n": 0.14,
        "select__passes": 2,
        "select__batch_size": 512,
        "checkpoint_seconds": 3600.0,
    }
    return tiny_config(folder, **{**values, **views, **changes})


def quiet() -> Console:
    return Console(file=io.StringIO())


def rows_of(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key not in ("seconds", "outside")} for row in found]


def assert_same_run(got: Path, want: Path) -> None:
    """Bit for bit the same networks, labels and method, and the same numbers."""
    assert rows_of(got) == rows_of(want)
    for name in ("model.safetensors", "best.safetensors"):
        a, b = load_file(got / name), load_file(want / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
    with np.load(got / "selection.npz") as a, np.load(want / "selection.npz") as b:
        assert all(a[key].tobytes() == b[key].tobytes() for key in b)
    ends = [load_checkpoint(folder) for folder in (got, want)]
    assert ends[0] is not None and ends[1] is not None
    for name in ("method", "momentum"):
        a, b = (getattr(each, name) for each in ends)
        assert (a is None) == (b is None)
        assert a is None or (a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)), name


@each_case
def test_a_run_goes_on_after_interruptions_as_if_there_were_none(
    case: Case, digits: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an epoch of either round, and between rounds; with an average of the weights."""
    more = {"train__ema": 0.9, "data__n_labels": 60, "data__val_share": 0.34}
    whole = config_of(tmp_path / "whole", case, **more)
    rows = rounds.run(whole, digits, console=quiet()).rows
    assert [row["round"] for row in rows] == [0, 1]
    assert all(row["train_loss"] is not None and 0 <= row["val_acc"] <= 1 for row in rows)

    cfg = config_of(tmp_path / "run", case, **more)
    stops = [(0, 1, 2), (1, 1, 2)]  # round, epoch, step
    real = Watch.show

    def show(self: Watch, *args: Any) -> None:
        state = self.state
        if stops and (state.round, state.epoch, state.step) == stops[0]:
            stops.pop(0)
            self.stop.set()
        real(self, *args)

    monkeypatch.setattr(Watch, "show", show)
    for at in list(stops):
        with pytest.raises(Interrupted):
            rounds.run(cfg, digits, console=quiet())
        state = load_checkpoint(tmp_path / "run")
        assert state is not None and (state.round, state.epoch, state.step) == at, "in the middle"
        if at[0] == 0:  # and then stop where round 1 has not begun
            steps = rounds.rounds(prepare(cfg, digits), quiet())
            assert next(steps)["round"] == 0
            steps.close()
    rounds.run(cfg, digits, console=quiet())
    assert not stops
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@each_case
def test_all_that_is_learned_keeps_its_place_and_the_answers_are_saved(
    case: Case, digits: ImageSet, tmp_path: Path
) -> None:
    """A CUDA graph goes on reading and writing there."""
    job = prepare(config_of(tmp_path, case), digits)
    places = {name: tensor.data_ptr() for name, tensor in job.method.state_dict().items()}
    momentum = {name: tensor.data_ptr() for name, tensor in job.step.momentum.items()}
    for row in rounds.rounds(job, quiet()):
        assert {name: tensor.data_ptr() for name, tensor in job.method.state_dict().items()} == places
        assert {name: tensor.data_ptr() for name, tensor in job.step.momentum.items()} == momentum
        saved, answers = load_file(tmp_path / "model.safetensors"), job.method.answers.state_dict()
        assert saved.keys() == answers.keys() and all(torch.equal(saved[key], answers[key]) for key in saved)
        assert row["positives"] + row["negatives"] >= 0


def watched(
    job: Run, look: Callable[[Method, Batch], None], monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, Any]]:
    """The rows of a run; `look` sees each batch before the step does."""
    real = job.step.loss_of

    def loss_of(batch: Batch) -> Tensor:
        look(job.method, batch)
        return real(batch)

    monkeypatch.setattr(job.step, "loss_of", loss_of)
    return [dict(row) for row in rounds.rounds(job, quiet())]


@each_case
def test_every_step_moves_the_weights(
    case: Case, digits: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is finite, its gradient is not zero, and progress counts from 0 to just below 1."""
    job = prepare(config_of(tmp_path, case), digits)
    real, seen = TrainStep.__call__, []

    def step(self: TrainStep, *args: Any) -> None:
        before, sum_ = (
            {name: p.detach().clone() for name, p in self.method.trained().items()},
            self.loss.clone(),
        )
        real(self, *args)
        moved: Any = {name: not torch.equal(before[name], p) for name, p in self.method.trained().items()}
        grads = [p.grad.abs().max() for p in self.method.trained().values() if p.grad is not None]
        assert (self.loss - sum_).isfinite()
        seen.append((job.state.round, float(self.t)))
        if case[1].get("variant") == "alternate":
            return  # while the weight of unlabeled images is 0, their steps teach nothing
        if case[0] == "meta_pseudo_labels" and job.state.round == 1:
            moved = [each for name, each in moved.items() if name.startswith("network.")]
        else:
            moved = list(moved.values())
        assert all(moved) and float(torch.stack(grads).max()) > 0 and self.loss > sum_

    monkeypatch.setattr(TrainStep, "__call__", step)
    list(rounds.rounds(job, quiet()))
    for n in (0, 1):  # of one training a round is half, however many steps it has
        part = [t for r, t in seen if r == n]
        first, whole = (n, 2) if job.method.continues else (0, 1)
        want = [(first + at / len(part)) / whole for at in range(len(part))]
        assert part == pytest.approx(want, abs=1e-6) and len(part) > 3


@each_case
def test_an_unreadable_image_contributes_nothing(
    case: Case, digits: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of the loss by its pixels is zero, once batch-norm no longer joins the rows of a batch."""
    job = prepare(config_of(tmp_path, case), digits)
    gone = [*job.state.labeled[::4].tolist(), *job.state.unlabeled[::4].tolist()]
    job.images.unreadable.update({i: f"{i} is gone" for i in gone})
    counts = {"gone": 0, "there": 0}

    def look(method: Method, batch: Batch) -> None:
        missing = torch.isin(batch.index, torch.tensor(gone))
        assert torch.equal(batch.rows["readable"], ~missing)
        norms = [each for each in method.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
        was = [norm.training for norm in norms]
        for norm in norms:
            norm.eval()
        before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
        images = batch.images.clone().requires_grad_()
        with torch.enable_grad():
            loss = method.loss(batch._replace(images=images))
        (grad,) = torch.autograd.grad(loss, images)
        with torch.no_grad():
            for name, tensor in method.state_dict().items():
                if not torch.equal(tensor, before[name]):  # else a step that is under way would notice
                    tensor.copy_(before[name])
        for norm, training in zip(norms, was, strict=True):
            norm.train(training)
        reach = grad.flatten(1).abs().amax(dim=1)
        assert not reach[missing].any(), "nothing is learned from what is not there"
        counts["gone"] += int(missing.sum())
        counts["there"] += int((reach > 0).sum())

    rows = watched(job, look, monkeypatch)
    assert len(rows) == 2 and counts["gone"] > 20 and counts["there"] > 20


@each_case
def test_the_labels_of_unlabeled_images_are_not_looked_at(
    case: Case, digits: ImageSet, tmp_path: Path
) -> None:
    rounds.run(config_of(tmp_path / "true", case), digits, console=quiet())
    with np.load(tmp_path / "true" / "split.npz") as split:
        labeled, unlabeled = (torch.from_numpy(split[name]) for name in ("labeled", "unlabeled"))
    hidden = digits.train_labels.clone()
    hidden[unlabeled] = -1
    blind = replace(digits, train_labels=hidden, labeled=labeled)
    rounds.run(config_of(tmp_path / "blind", case, data__n_labels=0), blind, console=quiet())
    seen, unseen = (load_file(tmp_path / name / "model.safetensors") for name in ("true", "blind"))
    assert all(torch.equal(seen[key], unseen[key]) for key in seen)


@each_case
def test_more_rounds_go_on_where_each_is_a_training_of_its_own(
    case: Case, digits: ImageSet, tmp_path: Path
) -> None:
    """One training over all rounds has a schedule that depends on their number."""
    short = {"train__epochs": 1, "train__round0_epochs": 1, "data__val_share": 0.25}
    one, two = (config_of(tmp_path / "run", case, train__rounds=n, **short) for n in (1, 2))
    rounds.run(one, digits, console=quiet())
    if METHODS[case[0]].continues:
        with pytest.raises(rounds.RunFolderError, match=r"train\.rounds is 2 and was 1"):
            rounds.run(two, digits, console=quiet())
        return
    rounds.run(two, digits, console=quiet())
    rounds.run(config_of(tmp_path / "whole", case, train__rounds=2, **short), digits, console=quiet())
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("case", [("ups", {}), ("fixmatch", {})], ids=named)  # test_twins traces each loss
def test_a_method_compiles_as_one_graph(
    case: Case, digits: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And learns the same: the losses of a few steps are those of eager ones, up to rounding that grows."""
    short = {"train__round0_epochs": 1, "train__epochs": 1, "train__round0_batch_size": 20, "train__lr": 0.01}
    found = []
    monkeypatch.setattr("ups_fast.step.fullgraph", traced)
    for mode in ("eager", "compile"):
        torch._dynamo.reset()
        job = prepare(config_of(tmp_path / mode, case, runtime__step=mode, **short), digits)
        job.forward = passes_over  # labeling, which is the same for all methods, is compiled elsewhere
        found.append([row["train_loss"] for row in rounds.rounds(job, quiet())])
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
    assert found[0] == pytest.approx(found[1], rel=0.05), "the labels in between may differ by a few"


# What single methods do.


def setting(n: int = 8, n_classes: int = 3, name: str = "ups", **options: Any) -> Setting:
    from ups_fast.models import build

    return Setting(
        lambda: build("wrn-10-1", n_classes=n_classes, channels=1, size=8, dropout=0.3),
        METHODS[name].Options(name, **options),
        Thresholds(),
        n,
        n_classes,
    )


def found(confidence: list[float], positive: list[int]) -> PseudoLabels:
    n, kept = len(confidence), torch.tensor(positive, dtype=torch.bool)
    values = torch.tensor(confidence)
    label = torch.zeros(n, dtype=torch.int64).masked_fill(values.isnan(), -1)
    return PseudoLabels(
        torch.arange(n), label, values, values * 0, kept, kept, torch.zeros(n, 1, dtype=torch.int32)
    )


def test_supervised_learns_from_labels_alone() -> None:
    method = METHODS["supervised"](setting(name="supervised"))
    labels = torch.tensor([2, 1, 0, 0, 0, 0, 0, 0])
    known = Known(1, True, labels, torch.tensor([0, 1]), torch.arange(2, 8), None, torch.Generator())
    lists, tables = method.targets(known)
    assert tables["target"].tolist() == [2, 1] + [-1] * 6 and set(tables) == {"target"}
    layout = method.lay_out({name: len(ids) for name, ids in lists.items()}, 4)
    assert [(group.source, group.rows) for group in layout.groups] == [("labeled", 4)]
    assert layout.steps == 2, "as many as all images of the training set fill"


@pytest.mark.parametrize(("round", "kept"), [(0, 2), (1, 4), (2, 6), (3, 8), (4, 10), (5, 10), (9, 10)])
def test_the_curriculum_keeps_a_fifth_more_each_round(round: int, kept: int) -> None:
    method = METHODS["self_training"](setting(name="self_training", schedule="curriculum"))
    confidence = [0.5, 0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.6, 0.4, 1.0, float("nan")]
    got = method.keep(found(confidence, [1] * 10 + [0]), round)
    best = sorted(range(10), key=lambda i: -confidence[i])[:kept]
    assert got.positive.nonzero()[:, 0].tolist() == sorted(best)
    assert (
        method.limits(method.options, Thresholds()).tau_p == 0.0
        and method.limits(method.options, Thresholds()).tau_n == 0.0
        and method.limits(method.options, Thresholds()).kappa_p == float("inf")
    )


def test_a_threshold_keeps_all_that_is_confident() -> None:
    method = METHODS["self_training"](setting(name="self_training"))
    given = found([0.9, 0.2, 0.8], [1, 0, 1])
    assert (
        method.keep(given, 0) is given
        and method.limits(method.options, Thresholds()).tau_p == Thresholds().tau_p
    )
    assert type(setting().options) is Options


def test_methods_that_go_on_have_one_schedule_over_all_rounds(digits: ImageSet, tmp_path: Path) -> None:
    for name, method in METHODS.items():
        job = prepare(config_of(tmp_path / name, (name, {})), digits)
        assert job.keeps.weights == job.keeps.momentum == method.continues
        assert job.budget(0) == ((2, 20) if method.continues else (4, 10)) and job.budget(1) == (2, 20)
