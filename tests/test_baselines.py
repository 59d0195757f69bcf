"""Baselines in the report: their numbers are scikit-learn's, they are kept, and none of them can cost a report."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sklearn.semi_supervised import LabelSpreading, SelfTrainingClassifier
from test_report import Page, case

from ups_fast import train
from ups_fast.config import Config, make
from ups_fast.data import ResidentFeatures
from ups_fast.models.saved import load_model
from ups_fast.report import baselines as module
from ups_fast.report import comparison
from ups_fast.report import page as page_module
from ups_fast.report.baselines import Part, Rival, compare
from ups_fast.report.comparison import Comparison, Samples, table, verdict

NAMES = ["logistic regression", "label spreading", "self-training"]
TAU = 0.3  # at which self-training has labels to add


def cut(n: int = 400) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Digits, standardized on the training rows: 40 labeled, 200 unlabeled, 100 test and 60 validation rows."""
    x, y = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(y))[:n]
    x, y = x[order], y[order]
    first = np.concatenate([np.flatnonzero(y == c)[:4] for c in range(10)])
    rest = np.setdiff1d(np.arange(n), first)
    parts = {"labeled": first, "unlabeled": rest[:200], "test": rest[200:300], "val": rest[300:]}
    scale = StandardScaler().fit(x[np.concatenate([first, rest[:200]])])
    return {name: (scale.transform(x[i]).astype(np.float32), y[i]) for name, i in parts.items()}


def as_parts(cut: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Part]:
    return {
        name: Part(torch.from_numpy(x).__getitem__, torch.arange(len(x)), torch.from_numpy(y))
        for name, (x, y) in cut.items()
    }


def by_scikit_learn(cut: dict[str, tuple[np.ndarray, np.ndarray]], tau: float) -> dict[str, list[float]]:
    """Accuracy on test, unlabeled and val, by its own kernel of neighbors."""
    x, y = cut["labeled"]
    every = np.concatenate([x, cut["unlabeled"][0]])
    some = np.concatenate([y, np.full(len(every) - len(y), -1)])
    models = {
        "logistic regression": LogisticRegression(C=0.01, max_iter=200).fit(x, y),
        "label spreading": LabelSpreading(kernel="knn", n_neighbors=7, alpha=0.2).fit(every, some),
        "self-training": SelfTrainingClassifier(LogisticRegression(C=0.01, max_iter=200), threshold=tau).fit(
            every, some
        ),
    }
    found = {
        name: [
            float((model.predict(cut[part][0]) == cut[part][1]).mean())
            for part in ("test", "unlabeled", "val")
        ]
        for name, model in models.items()
    }
    spread = models["label spreading"].transduction_[len(y) :]
    found["label spreading"][1] = float((spread == cut["unlabeled"][1]).mean())
    return found


# The numbers -----------------------------------------------------------------------------------------------


def test_numbers_are_those_of_scikit_learn():
    wanted = by_scikit_learn(cut(), TAU)
    found = compare(as_parts(cut()), 10, TAU)
    assert [each.name for each in found] == NAMES
    for each in found:
        assert [each.test, each.unlabeled, each.val] == pytest.approx(wanted[each.name], abs=1e-12)
        assert each.seconds > 0 and not each.why and not each.failed
    assert found[2].note.startswith("trusted ") and not found[0].note
    strict = compare(as_parts(cut()), 10, 0.9)
    assert (
        strict[2].note == "no label reached 0.9: as logistic regression" and strict[2].test == found[0].test
    )
    assert len({tuple(each) for each in wanted.values()}) == 3, "or a test could not tell them apart"


def test_unknown_truth_is_not_judged():
    parts = as_parts(cut())
    whole = compare(parts, 10, TAU)
    some = parts["unlabeled"].truth.clone()
    some[20:] = -1
    few = compare(
        {**parts, "unlabeled": Part(parts["unlabeled"].read, parts["unlabeled"].index, some)}, 10, TAU
    )
    none = torch.full_like(some, -1)
    no = compare(
        {**parts, "unlabeled": Part(parts["unlabeled"].read, parts["unlabeled"].index, none)}, 10, TAU
    )
    for a, b, c in zip(whole, few, no, strict=True):
        assert a.test == b.test == c.test and c.unlabeled is None
        assert 20 * b.unlabeled == pytest.approx(round(20 * b.unlabeled)) and b.unlabeled is not None


def test_no_unlabeled_rows_are_no_error():
    parts = as_parts(cut())
    nothing = Part(parts["unlabeled"].read, parts["unlabeled"].index[:0], parts["unlabeled"].truth[:0])
    for each in compare({**parts, "unlabeled": nothing}, 10, TAU):
        assert each.test is not None and each.unlabeled is None and not each.why


@pytest.mark.parametrize(
    ("limit", "value", "out", "said"),
    [
        ("MOST_ROWS", 239, NAMES[1:], "skipped: 240 rows are more than 239"),
        ("MOST_COLUMNS", 63, NAMES[1:], "skipped: 64 columns are more than 63"),
        ("MOST_PRODUCTS", {"fit": 40 * 640, "graph": 10**9}, NAMES[2:], "skipped: 240 rows of 64 columns and 10"),
        ("MOST_PRODUCTS", {"fit": 40 * 640 - 1, "graph": 10**9}, NAMES[:1], "skipped: 40 labeled rows of 64"),
        ("MOST_PRODUCTS", {"fit": 10**9, "graph": 240**2 * 64 - 1}, NAMES[1:2], "skipped: 240 rows of 64"),
    ],
)  # fmt: skip
def test_what_would_take_minutes_is_skipped_with_a_sentence(monkeypatch, limit, value, out, said):
    monkeypatch.setattr(module, limit, value)
    found = {each.name: each for each in compare(as_parts(cut()), 10, TAU)}
    for name in out:
        assert found[name].why.startswith(said) and found[name].why.endswith("would take minutes")
        assert found[name].test is None and not found[name].failed
    others = set(NAMES) - set(out) - ({"self-training"} if out == NAMES[:1] else set())
    assert all(found[name].test is not None for name in others) and others


def test_a_baseline_that_fails_costs_its_own_row_alone(monkeypatch):
    def broken(parts: Any, tau: float) -> Any:
        raise MemoryError("no\nroom")

    with monkeypatch.context() as patch:
        patch.setitem(module.BASELINES, "label spreading", broken)
        first, second, third = compare(as_parts(cut()), 10, TAU)
    assert second == Rival("label spreading", why="failed: no room", failed=True)
    assert first.test and third.test and not first.failed and not third.failed
    x, _ = cut()["labeled"]
    one = {
        **as_parts(cut()),
        "labeled": Part(torch.from_numpy(x).__getitem__, torch.arange(40), torch.zeros(40).long()),
    }
    found = compare(one, 10, TAU)
    assert [each.failed for each in found] == [True, False, True] and "class" in found[0].why


def test_rows_that_cannot_be_read_any_more_are_in_no_part():
    rows, labels = torch.arange(12.0)[:, None], torch.arange(12) % 3
    images = ResidentFeatures(rows, mean=[0], std=[2], device="cpu", unreadable={1: "gone", 7: "gone"})
    tests = ResidentFeatures(rows[:3], mean=[0], std=[2], device="cpu", unreadable={0: "gone"})
    index = {"labeled": torch.tensor([0, 1]), "unlabeled": torch.arange(2, 9), "val": torch.tensor([9])}
    parts = comparison._given(Samples(images, tests, index, labels, torch.tensor([2, 1, 0])))
    wanted = {"labeled": [0], "unlabeled": [2, 3, 4, 5, 6, 8], "test": [1, 2], "val": [9]}
    assert {name: (2 * part.rows()[:, 0]).tolist() for name, part in parts.items()} == wanted
    assert parts["unlabeled"].truth.tolist() == [2, 0, 1, 2, 0, 2] and parts["test"].truth.tolist() == [1, 0]


def test_scikit_learn_is_imported_only_when_it_is_needed():
    for path in (module.__file__, comparison.__file__, train.__file__):
        for node in ast.parse(Path(path).read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] in ("sklearn", "scipy")], path


# What is said ----------------------------------------------------------------------------------------------


def found(**shares: tuple[float | None, float | None]) -> Comparison:
    """Baselines with these accuracies on test and val, of 100 test and 400 validation images."""
    rivals = [Rival(name, test=test, val=val, seconds=1.0) for name, (test, val) in shares.items()]
    return Comparison(3, 0.7, True, {"test": 100, "unlabeled": 0, "val": 400}, 0.1, rivals)


def a_row(test: float | None, val: float | None = None, round: int = 0) -> Any:
    return {"round": round, "test_acc": test, "val_acc": val, "seconds": 2.0, "unlabeled_acc": 0.5}


@pytest.mark.parametrize(
    ("rivals", "ours", "wins"),
    [
        ({"a": (0.83, None)}, (0.8, None), ""),  # the standard error is 4 points
        ({"a": (0.839, None)}, (0.8, None), ""),
        ({"a": (0.841, None)}, (0.8, None), "a"),
        ({"a": (0.85, None), "b": (0.9, None)}, (0.8, None), "b"),
        ({"a": (0.7, None)}, (0.8, None), ""),
        ({"a": (1.0, None)}, (0.995, None), ""),  # that of 0.995 counts, as that of 1 is 0
        ({"a": (0.81, 0.83)}, (0.8, 0.8), "a"),  # on 400 validation images it is 2 points
        ({"a": (0.99, 0.81)}, (0.8, 0.8), ""),  # and test images are not looked at
        ({"a": (None, None)}, (0.8, None), ""),
        ({"a": (0.9, None)}, (None, None), ""),
        ({}, (0.8, None), ""),
    ],
)
def test_the_sentence_appears_exactly_where_a_baseline_wins(tmp_path, monkeypatch, rivals, ours, wins):
    monkeypatch.setattr(page_module, "draw", lambda *_: Figure(figsize=(0.1, 0.1)))
    rows = [a_row(0.99, 0.99), a_row(*ours, round=1)]  # the last round counts, not the best
    said = verdict(found(**rivals), rows, Config())
    assert said.startswith(
        f"A baseline serves these data better: {wins} on the features is right on"
    ) == bool(wins)
    assert bool(said) == bool(wins)
    if wins:
        looked = said.endswith("but test images were looked at to find this.")
        assert looked == (ours[1] is None) == ("100 test images" in said) != ("400 validation images" in said)
    page = a_page(tmp_path, rows, found(**rivals))
    assert page.text.count("A baseline serves these data better") == bool(wins)


def test_the_standard_error_of_all_against_nothing_is_not_zero():
    few = replace(found(a=(1.0, None)), known={"test": 2, "unlabeled": 0, "val": 0})
    assert "(standard error 35.4 points)" in verdict(few, [a_row(0.5), a_row(0.0, round=1)], Config())


def a_page(folder: Any, rows: Any, baselines: Comparison | None) -> Page:
    """A page around them, whose other parts say nothing."""
    pseudo_labels, truth, others = case(n=30, n_classes=3)
    whole = [{**others[0], **row} for row in rows]
    cfg = make({"data.n_labels": 3})
    _, path = page_module.write_report(
        folder, whole, pseudo_labels, truth, cfg, list("abc"), baselines=baselines
    )
    return Page(path.read_text())


def test_the_table_has_labels_alone_then_baselines_then_rounds(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "draw", lambda *_: Figure(figsize=(0.1, 0.1)))
    some = found(a=(0.5, None))
    some.rivals.append(Rival("<b>", why="failed: <i>", failed=True))
    page = a_page(tmp_path, [a_row(0.6), a_row(0.7, round=1)], some)
    assert page.tables[1] == [
        ["", "test", "unlabeled", "seconds", "note"],
        ["labels alone (round 0)", "60.0 %", "50.0 %", "2.0", ""],
        ["a", "50.0 %", "n/a", "1.0", ""],
        ["<b>", "n/a", "n/a", "n/a", "failed: <i>"],
        ["ups, round 1", "70.0 %", "50.0 %", "4.0", ""],
    ]
    assert "The baselines learn from the given features." in page.text
    assert "Baselines" not in a_page(tmp_path, [a_row(0.6)], None).text.partition("Settings")[0]


def test_one_training_has_no_row_of_labels_alone():
    cfg = make({"method.name": "fixmatch", "data.n_labels": 40, "data.ops": "ups"})
    lines = table(found(a=(0.5, 0.5)), [a_row(0.6, 0.6), a_row(0.7, 0.7, 1)], cfg)[1]
    assert [line[0] for line in lines] == ["labels alone", "a", "fixmatch, round 0", "fixmatch, round 1"]
    assert lines[0][1] == "n/a" and lines[0][-1].startswith("not available: fixmatch is one training")


# In runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A run on features, in a second; the picture is blank."""
    monkeypatch.setattr(page_module, "draw", lambda *_: Figure(figsize=(0.1, 0.1)))
    data = {}
    for name, (x, y) in cut().items():
        data |= {f"x_{name}": x, f"y_{name}": y}
    np.savez(tmp_path / "data.npz", **data)
    (tmp_path / "config.yaml").write_text("recipe: features\ndevice: cpu\n")
    words = [
        str(tmp_path / "config.yaml"),
        f"data.root={tmp_path / 'data.npz'}",
        f"run_dir={tmp_path / 'run'}",
    ]
    return [*words, f"select.tau_p={TAU}", "train.min_steps=5", "train.rounds=2"]


def shown(folder: Any) -> str:
    return Page((folder / "report.html").read_text()).text.partition("Settings")[0]


def test_given_features_are_what_baselines_learn_from(words, tmp_path):
    assert train.main(words) == 0
    kept = json.loads((tmp_path / "run/baselines.json").read_text())
    assert (kept["rounds"], kept["given"]) == (2, True) and kept["known"] == {
        "test": 100,
        "unlabeled": 200,
        "val": 60,
    }
    wanted = by_scikit_learn(cut(), TAU)
    for each in kept["rivals"]:
        assert [each["test"], each["unlabeled"], each["val"]] == pytest.approx(wanted[each["name"]])
        assert f"{100 * each['test']:.1f} %" in shown(tmp_path / "run")
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    with np.load(tmp_path / "run/selection.npz") as last:
        assert row["unlabeled_acc"] == pytest.approx((last["label"] == last["truth"]).mean())


def test_results_are_kept_until_there_are_more_rounds(words, tmp_path, monkeypatch):
    calls = []
    real = comparison.compare
    monkeypatch.setattr(comparison, "compare", lambda *args: calls.append(1) or real(*args))
    file = tmp_path / "run/baselines.json"
    assert train.main(words) == 0 and len(calls) == 1
    first = file.read_bytes()
    assert train.main(words) == 0 and len(calls) == 1 and file.read_bytes() == first
    assert train.main([*words, "train.rounds=3"]) == 0 and len(calls) == 2
    assert json.loads(file.read_bytes())["rounds"] == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree["rivals"][0].update(test=2.0),
        lambda tree: tree["rivals"][0].update(name=["x"]),
        lambda tree: tree["rivals"][0].pop("name"),
        lambda tree: tree["rivals"][0].update(failed=True, why="failed: of no memory"),  # tried again
        lambda tree: tree["rivals"].append(3),
        lambda tree: tree.update(known={"test": -1, "unlabeled": 0, "val": 0}),
        lambda tree: tree.update(more=1),
        lambda tree: tree.update(tau_p=0.9),
        lambda tree: tree.update(seconds=float("nan")),
        lambda tree: tree.update(rivals=None),
        lambda tree: tree.update(why="failed: of no memory"),
    ],
)
def test_a_damaged_or_failed_record_is_not_believed(tmp_path, change):
    rivals = [Rival("a", 0.5, 0.5, 0.5, 1.0)]
    good = Comparison(2, 0.7, True, {"test": 100, "unlabeled": 200, "val": 60}, 0.1, rivals)
    tree = comparison._plain(good)
    file = tmp_path / "baselines.json"
    file.write_text(json.dumps(tree))
    assert comparison.baselines_of(tmp_path, None, 2, 3, 0.7) == good, "or the change shows nothing"
    change(tree)
    file.write_text(json.dumps(tree))
    with pytest.raises(AttributeError):  # it would compute them, of samples that are not there
        comparison.baselines_of(tmp_path, None, 2, 3, 0.7)


def test_a_key_turns_them_off_and_on_again(words, tmp_path):
    assert train.main([*words, "report.baselines=false"]) == 0
    assert not (tmp_path / "run/baselines.json").exists() and "Baselines" not in shown(tmp_path / "run")
    assert train.main(words) == 0
    assert (tmp_path / "run/baselines.json").exists() and "Baselines" in shown(tmp_path / "run")


def test_features_of_the_network_are_said_to_have_seen_pseudo_labels(words, tmp_path, monkeypatch):
    x, y = load_digits(return_X_y=True)
    x = (x[:160] * 15).astype(np.uint8).reshape(-1, 8, 8)
    y = y[:160].astype(np.int64)
    data = {"x_labeled": x[:40], "y_labeled": y[:40], "x_unlabeled": x[40:120], "y_unlabeled": y[40:120]}
    np.savez(tmp_path / "images.npz", **data, x_test=x[120:], y_test=y[120:])
    (tmp_path / "images.yaml").write_text("device: cpu\ndata:\n  name: npz\nmodel:\n  name: wrn-10-1\n")
    quick = [
        "train.rounds=1",
        "train.epochs=2",
        "select.passes=2",
        "runtime.precision=float32",
        "train.batch_size=20",
    ]
    where = [f"data.root={tmp_path / 'images.npz'}", f"run_dir={tmp_path / 'run'}"]
    call = [str(tmp_path / "images.yaml"), *quick, *where]
    assert train.main(call) == 0
    network = load_model(tmp_path / "run")
    pixels = torch.from_numpy(x)[:, None].float() / 255
    with torch.no_grad():
        features = network.embed(network.prefix((pixels - network.mean) / network.std), None).numpy()
    features = StandardScaler().fit(features[:120]).transform(features)
    model = LogisticRegression(C=0.01, max_iter=200).fit(features[:40], y[:40])
    first = json.loads((tmp_path / "run/baselines.json").read_text())["rivals"][0]
    assert first["test"] == pytest.approx(model.score(features[120:], y[120:]))
    assert first["unlabeled"] == pytest.approx(model.score(features[40:120], y[40:120]))
    assert "That network has learned from the pseudo-labels of ups" in shown(tmp_path / "run")

    # What goes wrong before a baseline begins, or is too much for them, costs no report either.
    for name, value, said in (
        ("MOST_IMAGES", 159, "skipped: features of 160 images, more than 159, would take minutes"),
        ("load_model", None, "failed: 'NoneType' object is not callable"),
    ):
        (tmp_path / "run/baselines.json").unlink()
        with monkeypatch.context() as patch:
            patch.setattr(comparison, name, value)
            assert train.main(call) == 0
        assert said in shown(tmp_path / "run")
