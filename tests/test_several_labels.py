"""Runs, tables and numbers of samples with any number of labels."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from sklearn.metrics import average_precision_score
from test_rounds import tiny_config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ups_fast import UPSClassifier, checkpoint, label_studio, predict, rounds, train
from ups_fast.build import prepare
from ups_fast.data import ImageSet, load_set, scan, split_label_sets
from ups_fast.data.label_sets import marks_of, read_names
from ups_fast.data.merging import open_table
from ups_fast.data.voc import voc
from ups_fast.display import Watch
from ups_fast.files import RunFolderError
from ups_fast.models.network import mean_answer
from ups_fast.precision import average_precision, class_ece, f1_scores
from ups_fast.pseudo_labels import balance_entries
from ups_fast.reference import unpack_mask
from ups_fast.tasks import MULTI

LOOSE = {"select__tau_p": 0.55, "select__tau_n": 0.45, "select__kappa_p": 0.3, "select__kappa_n": 0.3}


def tiny(unlabeled_truth: bool = True) -> ImageSet:
    """60 training and 30 test images of 8x8: three classes, each a bright band; two entries are unknown."""
    g = torch.Generator().manual_seed(0)
    labels = (torch.rand(90, 3, generator=g) < 0.5).to(torch.int8)
    images = torch.randint(0, 120, (90, 8, 8, 1), generator=g)
    for c, band in enumerate((slice(0, 3), slice(3, 5), slice(5, 8))):
        images[labels[:, c] == 1, band] += 100
    train, test = labels[:60].clone(), labels[60:]
    if not unlabeled_truth:
        train[12:] = -1
    train[0, 1] = train[1, 2] = -1
    names = ["top", "middle", "bottom"]
    images, given = images.to(torch.uint8), torch.arange(12)
    return ImageSet("tiny", names, images[:60], train, images[60:], test, (0.4,), (0.25,), given)


def config(folder: Path, **changes: Any) -> Any:
    values = {"data__n_labels": 0, "train__round0_batch_size": 12, "train__lr": 0.1, **LOOSE, **changes}
    return tiny_config(folder, **values)


def run(cfg: Any, data: ImageSet) -> tuple[rounds.Result, str]:
    text = io.StringIO()
    return rounds.run(cfg, data, console=Console(file=text, width=200)), text.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[rounds.Result, str, Any]:
    cfg = config(tmp_path_factory.mktemp("multi") / "run")
    return (*run(cfg, tiny()), cfg)


# Numbers --------------------------------------------------------------------------------------------------


def test_average_precision_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    p = np.round(rng.random((200, 7)), 1)  # many ties
    truth = (rng.random((200, 7)) < 0.3).astype(np.int8)
    truth[:, 5] = 0
    truth[rng.random((200, 7)) < 0.2] = -1
    found = average_precision(torch.from_numpy(p), torch.from_numpy(truth)).tolist()
    for c in range(7):
        known = truth[:, c] >= 0
        if c == 5:
            assert found[c] != found[c]
        else:
            assert found[c] == pytest.approx(average_precision_score(truth[known, c], p[known, c]), abs=1e-12)


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 1), (2, 10_000)])
def test_average_precision_of_odd_shapes(shape: tuple[int, int]) -> None:
    p = torch.full(shape, float("nan"))
    assert average_precision(p, torch.ones(shape, dtype=torch.int8)).isnan().all() == (shape[0] == 0)
    assert average_precision(p, torch.zeros(shape, dtype=torch.int8)).isnan().all()
    assert average_precision(p, torch.zeros(shape, dtype=torch.int8), points=11).isnan().all()
    assert f1_scores(p, torch.zeros(shape, dtype=torch.int8))[0] is None
    assert len(class_ece(p[:, :3], torch.zeros(shape, dtype=torch.int8)[:, :3])) == min(3, shape[1])


def test_eleven_points_by_hand() -> None:
    p, truth = (
        torch.tensor([[0.9], [0.8], [0.7], [0.6]]),
        torch.tensor([[1], [0], [1], [0]], dtype=torch.int8),
    )
    # Recall 0.5 at precision 1, recall 1 at 2/3: six points of 1, five of 2/3.
    assert average_precision(p, truth, points=11).item() == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert f1_scores(p, truth) == (pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_balance_of_entries_is_that_of_each_class() -> None:
    g = torch.Generator().manual_seed(0)
    std, candidate = torch.rand(50, 3, generator=g).round(decimals=1), torch.rand(50, 3, generator=g) < 0.5
    kept = balance_entries(std, candidate, floor=4)
    m = max(4, int(candidate.sum(0).min()))
    for c in range(3):
        order = sorted(candidate[:, c].nonzero()[:, 0].tolist(), key=lambda i: (std[i, c].item(), i))
        assert kept[:, c].nonzero()[:, 0].tolist() == sorted(order[:m])
    assert balance_entries(std[:0], candidate[:0]).shape == (0, 3)


def test_heads_answer_by_the_mean_of_their_sigmoids() -> None:
    logits = torch.tensor([[[2.0, -90.0, 90.0]], [[-1.0, -80.0, 100.0]]])
    mean = logits.sigmoid().mean(0)
    assert torch.allclose(mean_answer(logits, True).sigmoid(), mean)
    assert mean_answer(logits, True).isfinite().all()


@pytest.mark.parametrize("heads", [1, 3])
def test_a_step_and_a_labeling_wait_for_no_number(heads: int) -> None:
    """Fake tensors have no values: whatever asks for one raises."""
    limits = {"tau_p": 0.7, "tau_n": 0.05, "kappa_p": 0.05, "kappa_n": 0.005, "temp_nl": 2.0}
    with FakeTensorMode():
        mask, logits = torch.zeros(6, 1, dtype=torch.int32), torch.randn(heads, 6, 7, requires_grad=True)
        for more in ({}, {"weight": torch.rand(6, 7)}):
            MULTI.loss(logits, {"positive": mask, "negative": mask, **more}).backward()
        found = MULTI.record(
            torch.arange(6), MULTI.select(logits.detach(), limits), torch.zeros(6, dtype=torch.bool)
        )
        kept = MULTI.finish(found, n_classes=7, balanced=True, passes=heads)
    assert kept.positive.shape == (6, 1) and logits.grad is not None and logits.grad.shape == (heads, 6, 7)


# Labels ---------------------------------------------------------------------------------------------------


def test_a_split_of_label_sets_keeps_shares_and_rare_classes() -> None:
    g = torch.Generator().manual_seed(0)
    labels = (torch.rand(400, 6, generator=g) < torch.tensor([0.5, 0.3, 0.2, 0.1, 0.0, 0.0])).to(torch.int8)
    labels[7, 4] = 1  # one image alone has it
    labels[3] = -1
    for seed in range(3):
        labeled, unlabeled = split_label_sets(labels, 40, seed)
        assert len(labeled) == 40 and sorted([*labeled.tolist(), *unlabeled.tolist()]) == list(range(400))
        assert 7 in labeled and 3 in unlabeled
        counts = (labels[labeled] == 1).sum(0)
        assert (counts - (labels == 1).sum(0) / 10).abs().max() < 2
        assert torch.equal(labeled, split_label_sets(labels, 40, seed)[0])
    with pytest.raises(ValueError, match=r"n_labels must be in 1 \.\. 399, .*, got 400"):
        split_label_sets(labels, 400, 0)


def test_names_in_a_cell() -> None:
    assert read_names("", "line 2") == "" and read_names(" ; ", "line 2") == ";"
    assert read_names("b;a; b ;?c", "line 2") == "?c;a;b"
    assert marks_of("?c;a", {"a": 0, "b": 1, "c": 2}).tolist() == [1, 0, -1]
    assert marks_of("", {"a": 0}).tolist() == [-1] and marks_of(";", {"a": 0}).tolist() == [0]
    with pytest.raises(ValueError, match="line 2 contradicts itself on 'a'"):
        read_names("a;?a", "line 2")
    with pytest.raises(ValueError, match="line 2 has a question mark without the name of a class"):
        read_names("a; ? ", "line 2")


def arrays(path: Path, **changes: Any) -> Path:
    data = tiny()
    images = data.train_images[..., 0].numpy()
    every = {
        "x_labeled": images[:12],
        "y_labeled": data.train_labels[:12].numpy(),
        "x_unlabeled": images[12:],
        "x_test": data.test_images[..., 0].numpy(),
        "y_test": data.test_labels.numpy(),
    }
    np.savez(path, **{**every, **changes})
    return path


def test_arrays_of_several_labels(tmp_path: Path) -> None:
    data = load_set("npz", str(arrays(tmp_path / "a.npz")))
    assert data.train_labels.dtype == torch.int8 and data.train_labels.shape == (60, 3)
    assert (data.train_labels[12:] == -1).all() and data.train_labels[0, 1] == -1
    assert "2 of 36 labels are unknown and not learned from" in " ".join(data.notes)
    one = load_set(
        "npz",
        str(arrays(tmp_path / "1.npz", y_labeled=np.eye(12, 1, dtype=int), y_test=np.ones((30, 1), int))),
    )
    assert one.classes == ["0"] and one.train_labels.shape == (60, 1)
    some = np.tile(np.array([1, 0, 0], np.int8), (12, 1))
    notes = " ".join(load_set("npz", str(arrays(tmp_path / "2.npz", y_labeled=some))).notes)
    assert "classes '1', '2' have no labeled sample with a positive label" in notes
    assert "class '0' has no labeled sample with a negative label" in notes


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"y_labeled": np.full((12, 3), 2)},
        "y_labeled must hold 1, 0 and, where it is not known, -1, got 2 in row 0",
    ),
    (
        {"y_labeled": np.zeros((12, 3), int)},
        "y_labeled must hold a 1 of at least one class, got none in 12 rows",
    ),
    (
        {"y_labeled": np.full((12, 3), -1)},
        "y_labeled must hold a known label for each sample, got 12 rows of -1",
    ),
    ({"y_labeled": np.ones((12, 0), int)}, "y_labeled must be integer labels"),
    ({"y_labeled": np.ones((12, 3))}, "y_labeled must be integer labels"),
    (
        {"y_labeled": np.ones((11, 3), int)},
        "y_labeled must have one label for each image of x_labeled, got 11 for 12",
    ),
    ({"y_test": np.ones((30, 2), int)}, "y_test must have the 3 columns of y_labeled"),
    ({"y_test": np.ones(30, int)}, "y_test must be integer labels"),
]


@pytest.mark.parametrize(("changes", "said"), WRONG)
def test_arrays_that_cannot_be(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        load_set("npz", str(arrays(tmp_path / "a.npz", **changes)))
    assert str(error.value).startswith(said)


# Tables and files -----------------------------------------------------------------------------------------


def table(folder: Path, lines: list[list[str]], head: str = "path,labels,split") -> Path:
    for i, (path, *_) in enumerate(lines):
        Image.fromarray(np.full((8, 8), 3 * i, np.uint8)).save(folder / path)
    with open(folder / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([head.split(","), *lines])
    return folder / "t.csv"


def test_a_table_of_label_sets(tmp_path: Path) -> None:
    lines = [
        ["0.png", "cat;dog", ""],
        ["1.png", "dog;dog", ""],
        ["2.png", ";", ""],
        ["3.png", "cat;?dog", ""],
    ]
    lines += [["4.png", "", ""], ["5.png", "dog", "test"]]
    found = scan(table(tmp_path, lines))
    assert found.classes == ["cat", "dog"] and found.label.dtype == torch.int8
    assert found.label.tolist() == [[1, 1], [0, 1], [0, 0], [1, -1], [-1, -1], [0, 1]]
    assert found.labeled.tolist() == [0, 1, 2, 3] and found.unlabeled.tolist() == [4]
    held = scan(table(tmp_path, [*lines[:5], ["5.png", "dog", ""]]))
    assert len(held.test) == 1 and "held out to test" in " ".join(held.notes)
    both = [["0.png", "cat", "cat"], ["1.png", "", ""]]
    with pytest.raises(
        ValueError, match="must have a column label, or labels for several classes, and has both"
    ):
        scan(table(tmp_path, both, "path,label,labels"))
    with pytest.raises(ValueError, match=r"contradicts an earlier one on '0\.png'"):
        scan(table(tmp_path, [*lines, ["0.png", "cat", ""]]))
    with pytest.raises(ValueError, match="calls the class 'cow' unknown"):
        scan(table(tmp_path, [*lines, ["6.png", "?cow", ""]]))
    with pytest.raises(ValueError, match="has 1 image with a question mark at each class"):
        scan(table(tmp_path, [*lines, ["6.png", "?dog;?cat", "test"]]))
    with pytest.raises(
        ValueError, match="has a column labels, for several classes, and annotations are merged"
    ):
        open_table(tmp_path / "t.csv")
    with pytest.raises(ValueError, match=r"test images .* have class 'cow', of which no image is labeled"):
        scan(table(tmp_path, [*lines, ["6.png", "cow", "test"]]))


def test_a_fake_pascal_voc(tmp_path: Path) -> None:
    base = tmp_path / "VOCdevkit/VOC2007"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / name).mkdir(parents=True)
    objects = {"1": ["dog", "person"], "2": ["cat!"], "3": ["dog", "dog!"], "4": []}
    for i, names in objects.items():
        Image.new("RGB", (40, 30), (int(i), 0, 0)).save(base / f"JPEGImages/{i}.jpg")
        each = [
            f"<object><name>{n.strip('!')}</name><difficult>{int('!' in n)}</difficult></object>"
            for n in names
        ]
        (base / f"Annotations/{i}.xml").write_text(f"<annotation>{''.join(each)}</annotation>")
    (base / "ImageSets/Main/trainval.txt").write_text("1\n2\n3\n")
    (base / "ImageSets/Main/test.txt").write_text("4\n")
    found = voc("voc2007", tmp_path)
    dog, person, cat = (found.classes.index(name) for name in ("dog", "person", "cat"))
    assert found.label.shape == (4, 20) and len(found.classes) == 20
    assert found.label[0].nonzero()[:, 0].tolist() == sorted([dog, person])
    assert found.label[1, cat] == -1 and (found.label[1] == 0).sum() == 19
    assert found.label[2, dog] == 1 and (found.label[3] == 0).all()
    (base / "Annotations/4.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match=r"4\.xml' is no annotation of Pascal VOC"):
        voc("voc2007", tmp_path)


# Runs -----------------------------------------------------------------------------------------------------


def test_rows_and_records(finished: tuple[rounds.Result, str, Any]) -> None:
    result, text, _ = finished
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.rows and "test mAP" in text and "test acc" not in text
    row, found = result.rows[-1], result.pseudo_labels
    assert row["test_map"] > 0.6 and len(row["test_ap"]) == 3 and row["test_map_classes"] == 3
    positive = unpack_mask(found.positive, 3)
    assert row["positives"] == int(positive.sum()) > 0 and row["negatives"] > 0
    truth = result.truth
    assert row["positive_acc"] == pytest.approx(float((truth[positive] == 1).double().mean()))
    assert row["unlabeled_map"] == pytest.approx(
        average_precision_score(truth.numpy(), found.confidence.numpy())
    )


def test_an_interrupted_run_ends_in_the_same_weights(
    finished: tuple[rounds.Result, str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, real = config(tmp_path / "run"), Watch.show

    def stop_in_round_1(self: Watch, *args: Any) -> None:
        if self.state.round == 1 and self.state.epoch == 1:
            self.stop.set()
        real(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Watch, "show", stop_in_round_1)
        with pytest.raises(rounds.Interrupted):
            run(cfg, tiny())
    path = tmp_path / "run" / checkpoint.CHECKPOINT
    content = torch.load(path, weights_only=True)
    job = prepare(cfg, tiny())

    def refused(**parts: Tensor) -> None:
        torch.save({**content, "pseudo_labels": {**content["pseudo_labels"], **parts}}, path)
        state = checkpoint.load_checkpoint(tmp_path / "run")
        assert state is not None
        with pytest.raises(RunFolderError, match="pseudo_labels"):
            rounds._check(job, state)

    found = content["pseudo_labels"]
    refused(confidence=found["confidence"][:, :2])
    refused(confidence=found["confidence"] + 1)
    refused(positive=found["positive"] | 8)  # a class that is not there
    refused(positive=~found["candidate"] & 7)
    refused(std=found["std"].double())
    refused(weight=found["std"][:, :2])
    refused(another=found["std"])
    torch.save(content, path)
    again, _ = run(cfg, tiny())
    first = finished[0]
    for name in ("model.safetensors",):
        assert (again.folder / name).read_bytes() == (first.folder / name).read_bytes()
    assert torch.equal(again.pseudo_labels.confidence, first.pseudo_labels.confidence)


def test_what_a_step_learns_from() -> None:
    labels = tiny().train_labels
    tables = MULTI.given(labels, torch.arange(12))
    known = labels[:12]
    assert torch.equal(unpack_mask(tables["positive"], 3)[:12], known == 1)
    assert torch.equal(unpack_mask(tables["negative"], 3)[:12], known == 0)
    assert not tables["positive"][12:].any() and not tables["negative"][12:].any()


def test_a_single_class(tmp_path: Path) -> None:
    data = tiny()
    one = replace(
        data, classes=["top"], train_labels=data.train_labels[:, :1], test_labels=data.test_labels[:, :1]
    )
    result, _ = run(config(tmp_path / "run", train__rounds=1), one)
    assert result.rows[-1]["test_map_classes"] == 1 and result.pseudo_labels.confidence.shape == (48, 1)


def test_measured_weights_and_an_unknown_truth(tmp_path: Path) -> None:
    cfg = config(tmp_path / "run", select__weight="measured", data__val_share=0.4)
    result, _ = run(cfg, tiny(unlabeled_truth=False))
    found, row = result.pseudo_labels, result.rows[-1]
    assert found.weight.shape == found.confidence.shape and 0 < found.weight.min() <= found.weight.max() <= 1
    assert row["val_map"] is not None and row["unlabeled_map"] is None and row["test_positives"] >= 0
    assert (result.folder / "best.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"method__name": "fixmatch"},
            "samples with several labels are for method.name=ups, supervised, self_training",
        ),
        ({"select__weight": "measured"}, "select.weight=measured needs a validation part"),
    ],
)
def test_what_cannot_work_leaves_no_folder(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    cfg = config(tmp_path / "run", **changes)
    cfg.method.name = changes.get("method__name", "ups")
    with pytest.raises(ValueError, match=said):
        run(cfg, tiny())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["supervised", "self_training"])
def test_other_methods(name: str, tmp_path: Path) -> None:
    cfg = config(tmp_path / "run", method__name=name, train__rounds=1)
    cfg.method.name = name
    result, _ = run(cfg, tiny())
    assert result.rows[-1]["test_map"] > 0.4


def test_unreadable_images_are_selected_for_nothing() -> None:
    parts = (
        torch.rand(3, 2),
        torch.rand(3, 2),
        torch.full((3, 1), 3, dtype=torch.int32),
        torch.zeros(3, 1, dtype=torch.int32),
    )
    found = MULTI.record(torch.arange(3), parts, torch.tensor([False, True, False]))
    assert MULTI.answered(found).tolist() == [True, False, True] and found.positive[:, 0].tolist() == [
        3,
        0,
        3,
    ]
    entries, truth = MULTI.entries(found, torch.tensor([[1, 0], [1, 1], [-1, 1]], dtype=torch.int8))
    assert entries.label.tolist() == [0, 1, -1, -1, 0, 1] and truth.tolist() == [0, 2, 0, 1, -1, 1]
    assert not MULTI.impossible(found, 2) and MULTI.impossible(replace(found, negative=parts[2]), 2)


@pytest.mark.slow
def test_the_commands_from_a_table_to_labels(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Train on a CSV table of label sets, again without training, then label one of its files, which need no label."""
    data, rows = tiny(), []
    for i in range(30):
        Image.fromarray(data.test_images[i, ..., 0].numpy()).save(tmp_path / f"{i}.png")
        marks = data.test_labels[i].tolist()
        names = ";".join(name for name, mark in zip(data.classes, marks, strict=True) if mark)
        rows.append([f"{i}.png", (names or ";") * (i < 20), "test" * (12 <= i < 20)])
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "labels", "split"], *rows])
    (tmp_path / "c.yaml").write_text(
        f"data: {{name: folder, root: {tmp_path}/t.csv, size: 8, channels: 1}}\n"
        "model: {name: wrn-10-1, dropout: 0.1}\ntrain: {rounds: 1, epochs: 3, batch_size: 12}\n"
        "threads: 1\ndevice: cpu\n"
    )
    words = [str(tmp_path / "c.yaml"), f"run_dir={tmp_path}-run"]
    assert train.main(words) == 0 and train.main(words) == 0
    folder = Path(f"{tmp_path}-run")
    out = capfd.readouterr().out
    assert "all rounds are done" in out and "only 8 test images: their mAP is a rough guess" in out
    with open(folder / "pseudo_labels.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 10 and {row["path"] for row in found} == {f"{i}.png" for i in range(20, 30)}
    for row in found:
        n = len([name for name in row["labels"].split(";") if name])
        assert len(row["confidence"].split()) == len(row["std"].split()) == len(row["positive"].split()) == n
    page = (folder / "report.html").read_text()
    assert "test mAP" in page and "test AP" in page and "Baselines" not in page
    assert {"suspects.csv", "next_to_label.csv"} <= {each.name for each in folder.iterdir()}
    assert predict.main([str(folder), str(tmp_path / "25.png"), "--out", f"{tmp_path}.csv"]) == 0
    assert label_studio.main(["tasks", str(folder), "--out", f"{tmp_path}.json"]) == 2
    assert "several labels for each sample, of which no tasks are made" in capfd.readouterr().err
    head, line = Path(f"{tmp_path}.csv").read_text().splitlines()
    assert head == "path,labels,confidence,std,positive,negative,error" and line.endswith(",")
    rows[0][1] = "top;middle;bottom"
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "labels", "split"], *rows])
    assert train.main(words) == 2
    assert "1 file has another class or part (such as '0.png'" in capfd.readouterr().err


def test_the_estimator() -> None:
    data = tiny()
    X = data.train_images.flatten(1).float().numpy()
    y = data.train_labels.numpy().astype(np.int64)
    truth = y.copy()
    y[20:] = -1
    model = UPSClassifier(rounds=2, steps=40, heads=2, passes=4, random_state=0, n_jobs=1).fit(X, y)
    known = y >= 0
    assert (model.transduction_[known] == y[known]).all() and model.transduction_.dtype == y.dtype
    p = model.predict_proba(X)
    assert p.shape == (60, 3) and (model.predict(X) == (p >= 0.5)).all()
    assert (model.predict(X)[20:] == truth[20:]).mean() > 0.7
    assert model.positive_.shape == model.negative_.shape == model.std_.shape == (60, 3)
    assert (model.confidence_[known] == 1).all() and not (model.positive_ & model.negative_).any()
    with pytest.raises(ValueError, match="y must hold a 1 of at least one class"):
        UPSClassifier().fit(X, np.zeros_like(y))
