"""Whole runs on 60 tiny images: what a round starts from, what it leaves behind, and what it does in odd cases."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import signal
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ups_fast
from ups_fast import build, display, reference, rounds, step
from ups_fast.batches import lr_at
from ups_fast.checkpoint import load_checkpoint, open_folder
from ups_fast.config import Config
from ups_fast.data import ImageSet, ResidentImages
from ups_fast.methods import METHODS, Batch, Method
from ups_fast.models import build as build_network
from ups_fast.reference import dropout_keys
from ups_fast.rounds import Result
from ups_fast.seeds import derive
from ups_fast.selection import pseudo_label

INF = math.inf


def tiny_set(unlabeled_truth: bool = True) -> ImageSet:
    """60 training and 30 test images of 8x8: three classes by the place of a bright band, under much noise."""
    labels = torch.arange(90) % 3
    images = torch.randint(0, 160, (90, 8, 8, 1), generator=torch.Generator().manual_seed(0))
    for c, band in enumerate((slice(0, 3), slice(3, 5), slice(5, 8))):
        images[labels == c, band] += 60
    images = images.to(torch.uint8)
    train, test = labels[:60].clone(), labels[60:]
    given = None
    if not unlabeled_truth:
        given = torch.arange(6)
        train[6:] = -1
    names = ["top", "middle", "bottom"]
    return ImageSet("tiny", names, images[:60], train, images[60:], test, (0.4,), (0.25,), given)


def tiny_config(folder: Path, **changes: Any) -> Config:
    """Settings under which every round of `tiny_set` has positives and negatives; changes as train__epochs=1."""
    cfg = Config(run_dir=str(folder), device="cpu")
    values = {
        "seed": 2,
        "data__n_labels": 6,
        "data__crop": 1,
        "model__name": "wrn-10-1",
        "train__rounds": 2,
        "train__epochs": 3,
        "train__round0_epochs": 12,
        "train__batch_size": 20,
        "train__round0_batch_size": 6,
        "train__lr": 0.05,
        "runtime__precision": "float32",
        "select__tau_p": 0.95,
        "select__tau_n": 0.3,
        "select__kappa_p": 0.2,
        "select__kappa_n": 0.1,
        "select__balance_rounds": 1,
        "select__batch_size": 40,
    }
    if "method__name" in changes:
        cfg.method = METHODS[changes["method__name"]].Options()
    for name, value in {**values, **changes}.items():
        group, _, last = name.rpartition("__")
        owner = getattr(cfg, group) if group else cfg
        assert hasattr(owner, last)
        setattr(owner, last, value)
    return cfg


def run(cfg: Config, data: ImageSet | None = None) -> tuple[Result, str]:
    text = io.StringIO()
    result = rounds.run(cfg, data or tiny_set(), console=Console(file=text, width=40))
    return result, text.getvalue()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Result, str]:
    cfg = tiny_config(tmp_path_factory.mktemp("run") / "deep" / "folder")
    return cfg, *run(cfg)


Finished = tuple[Config, Result, str]
Arrays = dict[str, np.ndarray]


def selection(folder: Path) -> Arrays:
    with np.load(folder / "selection.npz") as arrays:
        return dict(arrays)


# A run from end to end.


def test_the_rows_have_their_keys_and_are_the_files(finished: Finished) -> None:
    _, result, _ = finished
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.rows and [row["round"] for row in rows] == [0, 1]
    wanted = {
        "round",
        "test_acc",
        "val_acc",
        "positives",
        "positive_acc",
        "negatives",
        "negative_acc",
        "negative_samples",
    }
    wanted |= {"ece", "ece_selected", "seconds"}
    extra = {"per_class_positives", "no_label", "train_loss", "test_ece", "test_mistakes", "outside"}
    extra |= {"test_recall", "unlabeled_acc"}
    for row in rows:
        assert set(row) == wanted | extra
        assert row["positives"] > 0 and row["negative_samples"] > 0, "both groups must be in this test"
        shares = ("test_acc", "positive_acc", "negative_acc", "ece", "ece_selected", "test_ece", "outside")
        assert all(0 <= row[key] <= 1 for key in shares) and row["seconds"] > 0
        assert row["val_acc"] is None, "there is no validation part"


def test_the_last_row_follows_from_the_saved_selection(finished: Finished) -> None:
    _, result, _ = finished
    saved, row = selection(result.folder), result.rows[-1]
    for name, tensor in vars(result.pseudo_labels).items():
        assert np.array_equal(saved[name], tensor.numpy())
    truth, positive = saved["truth"], saved["positive"]
    assert np.array_equal(truth, tiny_set().train_labels.numpy()[saved["index"]])
    assert row["positives"] == positive.sum() == sum(row["per_class_positives"])
    assert row["positive_acc"] == pytest.approx((saved["label"] == truth)[positive].mean())
    negative = (saved["negative"][:, :1] >> np.arange(3)) & 1
    assert row["negatives"] == negative.sum() and row["negative_samples"] == negative.any(axis=1).sum()
    assert row["negative_acc"] == pytest.approx(1 - negative[np.arange(54), truth].sum() / negative.sum())
    assert not (negative.any(axis=1) & positive).any()


def test_labeled_and_unlabeled_never_meet_and_all_unlabeled_are_labeled(finished: Finished) -> None:
    _, result, _ = finished
    with np.load(result.folder / "split.npz") as split:
        labeled, unlabeled = split["labeled"], split["unlabeled"]
    assert sorted([*labeled, *unlabeled]) == list(range(60))
    assert np.bincount(tiny_set().train_labels[labeled]).tolist() == [2, 2, 2]
    assert np.array_equal(selection(result.folder)["index"], unlabeled)


def test_the_best_network_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the highest accuracy on the validation part, of equal ones the last, whatever the later rounds do."""
    accuracies, kept, tested = [0.5, 0.75, 0.75, 0.25, 0.0], {}, []
    real = rounds.evaluate

    def so_right(found, share):
        right = torch.arange(len(found.truth)) < share * len(found.truth)
        label = torch.where(right, found.truth, (found.truth + 1) % 3)
        return found._replace(found=replace(found.found, label=label))

    def scripted(model, images, labels, index=None, **kwargs):
        found, n = real(model, images, labels, index, **kwargs), len(kept)
        if index is None:  # the test part, which must not matter
            tested.append(1.0 - accuracies[n])
            return so_right(found, tested[-1])
        kept[n] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return so_right(found, accuracies[n])

    monkeypatch.setattr(rounds, "evaluate", scripted)
    val = {"data__n_labels": 24, "data__val_share": 0.5}
    result, text = run(short(tmp_path / "run", train__rounds=5, **val))
    best, last = (ups_fast.load_model(result.folder, best=each).state_dict() for each in (True, False))
    n = 12
    assert [row["val_acc"] for row in result.rows] == [
        sum(i < a * n for i in range(n)) / n for a in accuracies
    ]
    assert [row["test_acc"] for row in result.rows] == pytest.approx(tested, abs=1 / 30)
    assert "12 labeled, 36 unlabeled, 12 validation, 30 test images" in text
    assert all(map(torch.equal, best.values(), kept[2].values()))
    assert all(map(torch.equal, last.values(), kept[4].values()))
    (result.folder / "best.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no best network: it has no best\.safetensors"):
        ups_fast.load_model(result.folder, best=True)


def test_the_saved_network_is_the_one_that_labeled(finished: Finished) -> None:
    cfg, result, _ = finished
    model, data = ups_fast.load_model(cfg.run_dir), tiny_set()
    assert (model.classes, model.channels, model.size) == (data.classes, 1, [8, 8])
    assert model.mean.shape == model.std.shape == (1, 1, 1)
    mean, std = ([float(value) for value in each.flatten()] for each in (model.mean, model.std))
    assert (mean, std) == (pytest.approx(data.mean), pytest.approx(data.std)) and not model.training
    train, test = (
        ResidentImages(images, mean=mean, std=std, device="cpu")
        for images in (data.train_images, data.test_images)
    )
    again = pseudo_label(
        model,
        train,
        result.pseudo_labels.index,
        tau_p=0.95,
        tau_n=0.3,
        kappa_p=0.2,
        kappa_n=0.1,
        batch_size=40,
        seed=derive(cfg.seed, "label", 1),
    )
    assert torch.equal(again.label, result.pseudo_labels.label)
    assert torch.allclose(again.std, result.pseudo_labels.std, atol=1e-5)
    with torch.no_grad():
        right = model(test.clean(torch.arange(30))).argmax(dim=1) == data.test_labels
    assert float(right.double().mean()) == pytest.approx(result.rows[-1]["test_acc"])


def test_the_table_reads_well_without_a_terminal(finished: Finished) -> None:
    _, result, text = finished
    lines = text.splitlines()
    assert len(lines) == 7, f"four sentences, a header, a line per round, and none of them wrapped: {text}"
    assert lines.pop(1).startswith("classes (labeled + test images): 'top' 2 + 10, 'middle' 2 + 10,")
    assert "6 labeled, 54 unlabeled, 30 test images" in lines[0] and lines[2].endswith(": a new run")
    assert lines[1].startswith("method: ups; training step: eager, float32 (")
    assert len(lines[3]) == len(lines[4]) == len(lines[5]) <= 80
    assert f"{100 * result.rows[1]['test_acc']:.1f}%" in lines[5]
    assert "\x1b" not in text


def test_scalars(finished: Finished) -> None:
    _, result, _ = finished
    epochs = EventAccumulator(str(result.folder / "tb" / "epochs")).Reload()
    assert [event.step for event in epochs.Scalars("train/loss")] == list(range(1, 16)), "12 + 3 epochs"
    lr = [event.value for event in epochs.Scalars("train/lr")]
    assert lr[:12] == pytest.approx([lr_at(step, 12, lr=0.05) for step in range(12)])
    by_round = EventAccumulator(str(result.folder / "tb" / "rounds")).Reload()
    for key in ("test_acc", "positives", "ece_selected", "seconds"):
        values = [(event.step, pytest.approx(event.value)) for event in by_round.Scalars(key)]
        assert values == [(row["round"], row[key]) for row in result.rows]


def test_a_finished_run_is_not_run_again(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, result, text = finished
    monkeypatch.setattr(Method, "step", None)
    before = {path: path.read_bytes() for path in result.folder.rglob("*") if path.is_file()}
    again, said = run(cfg)
    assert again.rows == result.rows and torch.equal(again.truth, result.truth)
    assert all(
        torch.equal(a, b)
        for a, b in zip(*(vars(x.pseudo_labels).values() for x in (result, again)), strict=True)
    )
    assert {path: path.read_bytes() for path in result.folder.rglob("*") if path.is_file()} == before
    assert "all rounds are done" in said and said.splitlines()[-3:] == text.splitlines()[-3:]


# What a round starts from.


class Spy:
    """Stands for `Method.step`: keeps what each step was given, and takes the step."""

    def __init__(self) -> None:
        self.step = Method.step
        self.seen: list[dict[str, Any]] = []

    def __call__(
        self, method: Method, loss_of: Any, optimizer: torch.optim.Optimizer, batch: Batch
    ) -> torch.Tensor:
        weights = [value.detach().clone() for value in optimizer.param_groups[0]["params"]]
        target, negative = batch.rows["target"], batch.rows["negative"]
        given = {"images": batch.images, "keys": batch.keys, "target": target, "negative": negative}
        assert all(value is not None for value in given.values()) and batch.rows["readable"].all()
        given = {**{name: value.clone() for name, value in given.items()}, "positive": target >= 0}
        lr = float(optimizer.param_groups[0]["lr"])
        momentum = any(state["momentum_buffer"].any() for state in optimizer.state.values())
        self.seen.append({**given, "weights": weights, "lr": lr, "t": float(batch.t), "momentum": momentum})
        return self.step(method, loss_of, optimizer, batch)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    watch = Spy()
    monkeypatch.setattr(Method, "step", lambda *args: watch(*args))
    return watch


def test_every_round_starts_anew(tmp_path: Path, spy: Spy) -> None:
    cfg = tiny_config(tmp_path / "run", seed=5, train__rounds=3, train__round0_epochs=3)
    run(cfg)
    starts = [i for i, step in enumerate(spy.seen) if not step["momentum"]]
    assert len(starts) == 3 and starts[:2] == [0, 3], "the optimizer is new in each round, and only there"
    for number, start in enumerate(starts):
        torch.manual_seed(derive(5, "init", number))
        fresh = build_network("wrn-10-1", n_classes=3, channels=1, size=8, dropout=0.3)
        first = spy.seen[start]
        assert first["lr"] == pytest.approx(0.05)
        assert all(map(torch.equal, first["weights"], fresh.parameters()))
    assert not all(map(torch.equal, spy.seen[starts[1]]["weights"], spy.seen[0]["weights"]))


def test_a_warm_start_goes_on_from_the_last_weights(tmp_path: Path, spy: Spy) -> None:
    result, _ = run(short(tmp_path / "run", train__warm_start=True, train__rounds=1))
    last = ups_fast.load_model(result.folder).parameters()
    run(short(tmp_path / "run", train__warm_start=True, train__rounds=2))  # another process would do the same
    first = spy.seen[1]
    assert all(map(torch.equal, first["weights"], last)) and not first["momentum"]
    assert first["lr"] == pytest.approx(0.05)


def test_later_rounds_may_have_a_rate_of_their_own(tmp_path: Path, spy: Spy) -> None:
    run(short(tmp_path / "run", train__later_rounds_lr=0.01))
    assert spy.seen[0]["lr"] == pytest.approx(0.05) and spy.seen[1]["lr"] == pytest.approx(0.01)


def test_every_epoch_and_step_has_random_numbers_of_its_own(
    tmp_path: Path, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def recorded(seed: int, *path: int | str) -> int:
        asked.append((seed, *path))
        return derive(seed, *path)

    drawn: list[tuple[int, int, int]] = []  # seed, epoch and sample of each augmented image
    read = ResidentImages._read

    def watched(
        self: ResidentImages, index: torch.Tensor, policy: Any, seed: Any, epoch: Any, *out: Any
    ) -> Any:
        if len(index) and out:
            drawn.extend(zip([int(seed)] * len(index), epoch.tolist(), index.tolist(), strict=True))
        return read(self, index, policy, seed, epoch, *out)

    monkeypatch.setattr(build, "derive", recorded)
    monkeypatch.setattr(ResidentImages, "_read", watched)
    run(tiny_config(tmp_path, seed=5, train__rounds=1, train__round0_batch_size=2, train__round0_epochs=4))
    assert asked.count((5, "augment", 0)) == 2, "for what is read ahead and for the step itself"
    asked.remove((5, "augment", 0))
    assert len(set(asked)) == len(asked), "no stream is drawn twice"
    assert [path for path in asked if path[1] == "augment"] == [(5, "augment", 0)]
    assert len(set(drawn)) == len(drawn) == 4 * 3 * 2, "no image is augmented twice by the same numbers"
    assert [epoch & 0xFFFFF for _, epoch, _ in drawn] == [epoch for epoch in range(4) for _ in range(6)]
    assert {(5, "epoch", 0, epoch) for epoch in range(4)} < set(asked)
    keys = torch.cat([step["keys"] for step in spy.seen])
    assert len(keys.unique()) == len(keys) == 4 * 3 * 2
    _, epoch, index = torch.tensor(drawn).unbind(1)
    assert torch.equal(keys, dropout_keys(index, seed=derive(5, "dropout", 0), draw=epoch))


def test_round_0_learns_from_labels_and_later_rounds_from_the_selection(tmp_path: Path, spy: Spy) -> None:
    run(tiny_config(tmp_path / "one", train__rounds=1))
    first, data = selection(tmp_path / "one"), tiny_set()
    with np.load(tmp_path / "one" / "split.npz") as split:
        labeled = split["labeled"]
    assert len(spy.seen) == 12
    assert [each["t"] for each in spy.seen] == pytest.approx([at / 12 for at in range(12)])
    for each in spy.seen:
        assert each["positive"].all() and not each["negative"].any()
        assert sorted(each["target"].tolist()) == sorted(data.train_labels[labeled].tolist())

    spy.seen.clear()
    run(tiny_config(tmp_path / "one"))  # goes on with round 1
    n_neg = int((first["negative"] != 0).any(axis=1).sum())
    n_pos = max(6 + int(first["positive"].sum()), n_neg)  # as expanded
    steps = spy.seen
    assert len(steps) == 3 * ((n_pos + n_neg) // 20)
    pseudo = first["label"][first["positive"]]
    possible = {*data.train_labels[labeled].tolist(), *pseudo.tolist()}
    words = set(first["negative"][:, 0].tolist()) - {0}
    for each in steps:
        nl_bs = 20 * n_neg // (n_pos + n_neg)
        assert int((~each["positive"]).sum()) == nl_bs > 0 and each["images"].shape == (20, 1, 8, 8)
        assert set(each["target"][each["positive"]].tolist()) <= possible
        assert (each["target"][~each["positive"]] == -1).all()
        assert set(each["negative"][~each["positive"], 0].tolist()) <= words
        assert not each["negative"][each["positive"]].any()


def test_balance_holds_for_the_first_rounds_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def spy(*args: Any, **settings: Any) -> Any:
        asked.append(settings["balanced"])
        return pseudo_label(*args, **settings)

    monkeypatch.setattr(rounds, "pseudo_label", spy)
    run(
        tiny_config(
            tmp_path, train__rounds=3, train__epochs=1, train__round0_epochs=1, select__balance_rounds=2
        )
    )
    assert asked == [True, True, False]


def test_seeds(tmp_path: Path) -> None:
    short = {"train__round0_epochs": 2, "train__epochs": 1}
    first, _ = run(tiny_config(tmp_path / "a", seed=3, **short))
    torch.rand(1)  # whatever happened before does not matter
    again, _ = run(tiny_config(tmp_path / "b", seed=3, **short))
    other, _ = run(tiny_config(tmp_path / "c", seed=4, **short))
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "a", tmp_path / "b")]
    assert weights[0] == weights[1]
    assert torch.equal(first.pseudo_labels.std, again.pseudo_labels.std)
    assert not torch.equal(first.pseudo_labels.std, other.pseudo_labels.std)
    assert not torch.equal(first.pseudo_labels.index, other.pseudo_labels.index), (
        "the split is drawn from the seed too"
    )


# Whatever is missing, the run goes on with what it has.

NO_POSITIVES = {"select__tau_p": 1.0, "select__kappa_p": 0.0}
NO_NEGATIVES = {"select__tau_n": 0.0}


@pytest.mark.parametrize("changes", [NO_POSITIVES, NO_NEGATIVES, {**NO_POSITIVES, **NO_NEGATIVES}])
def test_empty_groups(tmp_path: Path, changes: dict[str, float]) -> None:
    result, text = run(tiny_config(tmp_path, train__epochs=1, **changes))
    last = result.rows[-1]
    if "select__tau_p" in changes:
        assert (last["positives"], last["positive_acc"], last["ece_selected"]) == (0, None, None)
    if "select__tau_n" in changes:
        assert (last["negatives"], last["negative_acc"], last["negative_samples"]) == (0, None, 0)
    if len(changes) == 3:
        assert "round 1: 6 samples are fewer than a batch of 20" in text
    assert "-" in next(line for line in text.splitlines() if line.startswith("    1 "))


def test_fewer_labels_than_a_batch_and_no_place_for_negatives(tmp_path: Path, spy: Spy) -> None:
    _, text = run(tiny_config(tmp_path, train__rounds=1, train__round0_epochs=4, train__round0_batch_size=50))
    assert "round 0: 6 samples are fewer than a batch of 50" in text
    assert len(spy.seen) == 4 and all(len(step["target"]) == 50 for step in spy.seen)


def test_first_epochs_and_batch_size_default_to_the_others(tmp_path: Path, spy: Spy) -> None:
    run(
        tiny_config(
            tmp_path, train__rounds=1, train__round0_epochs=0, train__round0_batch_size=0, train__batch_size=3
        )
    )
    assert [len(step["target"]) for step in spy.seen] == [3] * 6, "3 epochs of 2 steps"


def test_a_single_pass_without_uncertainty(tmp_path: Path) -> None:
    single = {"select__passes": 1, "select__kappa_p": INF, "select__kappa_n": INF, "model__dropout": 0.0}
    result, _ = run(tiny_config(tmp_path, train__epochs=1, **single))
    assert (result.pseudo_labels.std == 0).all() and len(result.rows) == 2
    found = result.pseudo_labels
    assert torch.equal(found.positive, found.confidence >= 0.95)


@pytest.mark.parametrize("lr", [1e3, 1e6, 1e30])
def test_a_network_that_explodes_ends_the_round_and_is_not_saved(lr: float, tmp_path: Path) -> None:
    with pytest.raises(
        rounds.Diverged,
        match=rf"in round 0, epoch \d+: .*; lower train.lr, which is {re.escape(f'{lr:g}')}, and choose another",
    ):
        run(tiny_config(tmp_path, train__lr=lr, train__round0_epochs=200, checkpoint_seconds=0.0))
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "best.safetensors").exists()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    state = load_checkpoint(tmp_path)
    assert state is None or all(
        x.isfinite().all() for part in (state.method, state.momentum) for x in (part or {}).values()
    )


def test_what_was_good_before_a_round_diverged_stays(tmp_path: Path) -> None:
    cfg = short(tmp_path, train__later_rounds_lr=1e30, data__val_share=0.5, checkpoint_seconds=0.0)
    for _ in range(2):  # the same command again meets the same end
        with pytest.raises(
            rounds.Diverged, match=r"in round 1, .* train.lr \(here train.later_rounds_lr\), which is 1e"
        ):
            run(cfg)
        state = load_checkpoint(tmp_path)
        assert state is not None and state.round == 1 and [row["round"] for row in state.rows] == [0]
        best, last = (load_file(tmp_path / f"{name}.safetensors") for name in ("best", "model"))
        assert all(torch.equal(best[name], last[name]) and last[name].isfinite().all() for name in last)


@pytest.mark.parametrize("what", ["loss", "weight", "statistic", "momentum"])
def test_nothing_that_is_not_finite_is_saved(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, steps = step.TrainStep.__call__, itertools.count()

    def poisoned(self: step.TrainStep, *args: Any) -> None:
        call(self, *args)
        if next(steps) == 5:
            whole = {
                "loss": self.loss,
                "weight": next(self.method.parameters()).data,
                "statistic": next(x for x in self.method.buffers() if x.is_floating_point()),
                "momentum": next(iter(self.momentum.values())),
            }[what]
            whole.view(-1)[0] = INF

    monkeypatch.setattr(step.TrainStep, "__call__", poisoned)
    with pytest.raises(rounds.Diverged, match=r"round 0, epoch 5: .*infinite"):
        run(tiny_config(tmp_path, checkpoint_seconds=0.0))
    state = load_checkpoint(tmp_path)
    assert state is not None and (state.epoch, state.step) == (4, 1)


def test_answers_that_are_not_finite_are_no_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights may be finite, and the sums of their products not."""
    forward = build.passes_over
    monkeypatch.setattr(build, "passes_over", lambda *args: forward(*args) * math.nan)
    with pytest.raises(rounds.Diverged, match="answers are NaN or infinite for all images"):
        run(tiny_config(tmp_path, train__round0_epochs=1))
    assert not (tmp_path / "best.safetensors").exists()


@pytest.mark.parametrize("key", ["batch_size", "round0_batch_size"])
def test_a_batch_of_one_names_its_key_and_leaves_no_folder(key: str, tmp_path: Path) -> None:
    small = {"model__name": "torchvision:resnet18", f"train__{key}": 1}
    with pytest.raises(
        ValueError, match=rf"^train\.{key}=1 is too small a batch for model\.name=torchvision"
    ):
        run(tiny_config(tmp_path / "run", **small))
    assert not list(tmp_path.iterdir())


def test_a_batch_of_one_is_good_where_batch_norm_sees_more_than_a_pixel(tmp_path: Path) -> None:
    result, _ = run(
        tiny_config(tmp_path, train__round0_batch_size=1, train__rounds=1, train__round0_epochs=1)
    )
    assert len(result.rows) == 1


def test_a_log_without_a_terminal_hears_of_long_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "LOG_SECONDS", 0.0)
    _, text = run(tiny_config(tmp_path, train__rounds=1))
    assert "round 0: epoch 1 of 12, loss " in text and "round 0: epoch 12 of 12, loss " in text


def test_truth_may_be_unknown(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, data__n_labels=0, select__tau_p=0.5)
    result, _ = run(cfg, tiny_set(unlabeled_truth=False))
    assert result.pseudo_labels.index.tolist() == list(range(6, 60)) and (result.truth == -1).all()
    assert result.rows[0]["positives"] > 0
    for row in result.rows:
        judged = ("positive_acc", "negative_acc", "ece", "ece_selected")
        assert [row[key] for key in judged] == [None] * 4
        assert 0 <= row["test_acc"] <= 1 and 0 <= row["test_ece"] <= 1


def test_truth_of_unlabeled_samples_serves_reports_only(tmp_path: Path) -> None:
    data = tiny_set()
    run(tiny_config(tmp_path / "true", train__epochs=1), data)
    with np.load(tmp_path / "true" / "split.npz") as split:
        unlabeled, labeled = split["unlabeled"], torch.from_numpy(split["labeled"])
    hidden = data.train_labels.clone()
    hidden[unlabeled] = -1
    blind = ImageSet(**{**vars(data), "train_labels": hidden, "labeled": labeled})
    run(tiny_config(tmp_path / "blind", train__epochs=1), blind)
    seen, unseen = (load_file(tmp_path / name / "model.safetensors") for name in ("true", "blind"))
    assert all(torch.equal(seen[key], unseen[key]) for key in seen)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"model__name": "cnn13"}, "cnn13 .*8x8"),
        ({"model__name": "wrn-11-1"}, "11"),
        ({"data__n_labels": 7}, "n_labels"),
        ({"data__crop": 8}, "crop"),
        ({"device": "cuda:99"}, "device"),
    ],
)
def test_what_cannot_work_leaves_no_folder(tmp_path: Path, changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        run(tiny_config(tmp_path / "run", **changes))
    assert not list(tmp_path.iterdir())


def test_the_progress_bar_of_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = Progress.update

    def update_now(self: Progress, *args: Any, **fields: Any) -> None:
        update(self, *args, **fields)
        self.refresh()

    monkeypatch.setattr(display, "REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(Progress, "update", update_now)
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=True)
    rounds.run(tiny_config(tmp_path, train__rounds=1), tiny_set(), console=console)
    for word in ("round 0: training", "loss ", "lr 0.04", "images/s", "0:00:0"):
        assert word in text.getvalue()


def test_packed_words_of_the_selection(finished: Finished) -> None:
    found = finished[1].pseudo_labels
    assert found.negative.dtype == torch.int32 and found.negative.shape == (54, 1)
    negative = reference.unpack_mask(found.negative, 3)
    finite = found.label >= 0
    assert not negative[finite].gather(1, found.label[finite][:, None]).any(), "never the label itself"


# Rounds one by one.


def quiet() -> Console:
    return Console(file=io.StringIO())


def short(folder: Path, **changes: Any) -> Config:
    return tiny_config(folder, train__round0_epochs=1, train__epochs=1, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Three rounds at once."""
    return run(short(tmp_path_factory.mktemp("whole") / "run", train__rounds=3))[0]


def test_rounds_are_a_generator_of_rows(tmp_path: Path, whole: Result) -> None:
    """First of the rounds that the folder holds, then of each new one as soon as all its files are written."""
    folder, seen = tmp_path / "run", []
    run(short(folder, train__rounds=1))
    for row in rounds.rounds(build.prepare(short(folder, train__rounds=3), tiny_set()), quiet()):
        seen.append(row)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert row["round"] == len(seen) - 1 and json.loads(lines[row["round"]]) == row
        state = load_checkpoint(folder)
        assert state is not None and state.round == len(lines) == max(1, len(seen))
        assert ups_fast.load_model(folder).classes == tiny_set().classes
    clock = {"seconds": 0, "outside": 0}
    assert [row | clock for row in seen] == [row | clock for row in whole.rows]
    job = build.prepare(short(folder, train__rounds=3), tiny_set())
    assert [row["round"] for row in rounds.rounds(job, quiet())] == [0, 1, 2], "nothing is left to do"
    assert job.resumed == 3


def test_a_sweep_may_leave_off_after_any_round(tmp_path: Path, whole: Result) -> None:
    """What is closed lets the folder go, and the run goes on from there as if nothing was."""
    cfg = short(tmp_path / "run", train__rounds=3)
    before = signal.getsignal(signal.SIGINT), torch.backends.cudnn.deterministic
    for last in (0, 1):
        steps = rounds.rounds(build.prepare(cfg, tiny_set()), quiet())
        for row in steps:
            if row["round"] == last:
                with (
                    pytest.raises(rounds.RunFolderError, match="in use by another process"),
                    open_folder(Path(cfg.run_dir), asdict(cfg)),
                ):
                    pass
                break
        steps.close()
        assert (signal.getsignal(signal.SIGINT), torch.backends.cudnn.deterministic) == before
        with open_folder(Path(cfg.run_dir), asdict(cfg)) as warning:
            assert warning == "", "it is free again"
    result, text = run(cfg)
    assert "going on from round 2, epoch 0" in text
    same = [load_file(each.folder / "model.safetensors") for each in (whole, result)]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])
    assert len(EventAccumulator(str(result.folder / "tb/rounds")).Reload().Scalars("test_acc")) == 3


def test_nothing_happens_before_the_first_row_is_asked_for(tmp_path: Path) -> None:
    job = build.prepare(short(tmp_path / "run"), tiny_set())
    rounds.rounds(job, quiet())
    assert not (tmp_path / "run").exists()


def test_warnings_are_of_new_rounds(tmp_path: Path) -> None:
    changes = {**NO_POSITIVES, **NO_NEGATIVES}
    _, first = run(short(tmp_path, train__rounds=1, **changes))
    _, second = run(short(tmp_path, train__rounds=2, **changes))
    assert "round 0: nothing was selected" in first
    assert "round 0: nothing" not in second and "round 1: nothing was selected" in second


def test_lines_are_printed_as_they_are_on_any_console(tmp_path: Path) -> None:
    """Names may look like markup, and a narrow terminal wraps no table."""
    data = replace(tiny_set(), classes=["[red]top[/red]", "[/]", "\\[x"])
    _, text = run(short(tmp_path / "[bold]run"), data)
    assert "'[red]top[/red]' 2 + 10, '[/]' 2 + 10" in text and "[bold]run: a new run" in text
    assert max(map(len, text.splitlines())) > 40


# The average of the weights.


def test_the_average_is_what_answers(tmp_path: Path) -> None:
    """It is tested, labels and is saved; what is trained is as without it."""
    plain, _ = run(short(tmp_path / "plain", train__rounds=1))
    job = build.prepare(short(tmp_path / "mean", train__rounds=1, train__ema=0.5), tiny_set())
    (row,) = rounds.rounds(job, quiet())
    trained, mean = job.method.network.state_dict(), load_file(tmp_path / "mean" / "model.safetensors")
    same = load_file(plain.folder / "model.safetensors")
    assert all(torch.equal(trained[name], same[name]) for name in same)
    assert set(mean) == set(same) and not all(torch.equal(mean[name], same[name]) for name in same)
    ema = job.method.ema
    assert ema is not None and all(torch.equal(ema.state_dict()[name], mean[name]) for name in mean)
    model, data = ups_fast.load_model(tmp_path / "mean"), tiny_set()
    test = ResidentImages(data.test_images, mean=data.mean, std=data.std, device="cpu")
    with torch.no_grad():
        right = model(test.clean(torch.arange(30))).argmax(dim=1) == data.test_labels
    assert float(right.double().mean()) == pytest.approx(row["test_acc"])


def test_each_round_begins_its_own_average(tmp_path: Path) -> None:
    job = build.prepare(short(tmp_path, train__rounds=2, train__ema=0.5), tiny_set())
    ends = []
    for _ in rounds.rounds(job, quiet()):
        assert job.method.ema is not None
        ends.append([weight.clone() for weight in job.method.ema.parameters()])
    fresh = job.new_method()
    assert fresh.ema is not None
    for mean, weight in zip(fresh.ema.parameters(), fresh.network.parameters(), strict=True):
        assert torch.equal(mean, weight), "it begins as the network does"
    assert not all(map(torch.equal, *ends))


def test_weight_decay_of_norms_is_a_key(tmp_path: Path) -> None:
    ends = []
    for decay_norms in (True, False):
        cfg = short(tmp_path / str(decay_norms), train__rounds=1, train__weight_decay=0.1)
        cfg.train.decay_norms = decay_norms
        result, _ = run(cfg)
        ends.append(load_file(result.folder / "model.safetensors"))
    norms = [name for name, weight in ends[0].items() if weight.ndim == 1 and name.endswith("weight")]
    assert norms and all(ends[0][name].sum() < ends[1][name].sum() for name in norms)
