"""What a run leaves for people: numbers are right, nothing is invented, hostile names stay harmless."""

from __future__ import annotations

import csv
import html
import json
import math
import posixpath
import re
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from ups_fast import report
from ups_fast.calibration import report as numbers
from ups_fast.calibration import selection_on_test as of_test_images
from ups_fast.config import Config
from ups_fast.data.cells import read_cell, write_cell
from ups_fast.data.table import read_table
from ups_fast.pseudo_labels import PseudoLabels, drop_negatives
from ups_fast.reference import mc_select, unpack_mask
from ups_fast.report import page as page_module
from ups_fast.report.figure import MOST_POINTS, draw
from ups_fast.report.sentences import chosen

NASTY = [
    "plain",
    "comma, quote\" and 'both'",
    "<script>alert(1)</script>",
    "zwei\nZeilen",
    "ünï & ©",
    "",
    " ",
    "=1+1",
]


def case(n=300, n_classes=10, passes=10, n_rounds=3, seed=0, broken=0):
    """Made-up logits, labeled by the specification; `broken` rows are NaN, 1 in 20 truths is moved."""
    g = torch.Generator().manual_seed(seed)
    truth = torch.randint(n_classes, (n,), generator=g)
    strength = 9 * torch.rand(n, 1, generator=g).sqrt()
    mean = 1.8 * torch.randn(n, n_classes, generator=g).scatter_add(1, truth[:, None], strength)
    logits = mean + torch.randn(passes, n, n_classes, generator=g)
    logits[0, :broken] = math.nan
    limits = {} if passes > 1 else {"kappa_p": math.inf, "kappa_n": math.inf}
    found = mc_select(logits, packed=True, **limits)
    kept = found.positive.clone()
    kept[::7] = False  # as if the class balance had dropped some
    truth[::20] = (truth[::20] + 1) % n_classes
    pseudo_labels = PseudoLabels(
        index=torch.arange(n) * 3 + 5,
        label=found.label,
        confidence=found.confidence,
        std=found.std,
        candidate=found.positive,
        positive=kept,
        negative=drop_negatives(found.negative, kept),
    )
    return pseudo_labels, truth, rows_of(pseudo_labels, truth, n_classes, n_rounds)


def rows_of(pseudo_labels, truth, n_classes, n_rounds):
    found = numbers(pseudo_labels, truth, n_classes)
    return [{"round": r, "test_acc": 0.8 + 0.05 * r, "seconds": 1.5, **found} for r in range(n_rounds)]


def no_samples(pseudo_labels):
    return PseudoLabels(**{name: tensor[:0] for name, tensor in vars(pseudo_labels).items()})


@pytest.fixture
def cfg():
    cfg = Config(seed=7)
    cfg.data.n_labels = 40
    return cfg


@pytest.fixture
def blank(monkeypatch):
    """For tests of the page's words: in place of the picture a small empty one, which is made in no time."""
    monkeypatch.setattr(page_module, "draw", lambda *_: Figure(figsize=(0.1, 0.1)))


# pseudo_labels.csv ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [2, 8, 33])
def test_table_gives_every_value_back(tmp_path, n_classes):
    pseudo_labels, _, _ = case(n=200, n_classes=n_classes, broken=2)
    classes = (NASTY * 5)[:n_classes]
    path = tmp_path / "pseudo_labels.csv"
    path.write_text("an older file that is longer than a line\n" * 1000)
    report.write_pseudo_labels(path, pseudo_labels, classes)
    with open(path, newline="", encoding="utf-8") as file:
        head, *lines = list(csv.reader(file))
    assert head == ["index", "label", "confidence", "std", "positive", "negative", "name"]
    assert len(lines) == 200 and all(len(line) == 7 for line in lines)
    index, label, confidence, std, positive, negative, name = zip(*lines, strict=True)
    assert [int(v) for v in index] == pseudo_labels.index.tolist()
    assert [int(v) for v in label] == pseudo_labels.label.tolist()
    assert label[:2] == ("-1", "-1") and confidence[:2] == std[:2] == ("nan", "nan") and name[:2] == ("", "")
    for text, tensor in [(confidence, pseudo_labels.confidence), (std, pseudo_labels.std)]:
        assert np.array_equal(np.array(text, dtype=np.float32), tensor.numpy(), equal_nan=True)
    assert [v == "1" for v in positive] == pseudo_labels.positive.tolist() and set(positive) == {"0", "1"}
    masks = unpack_mask(pseudo_labels.negative, n_classes)
    assert [[int(c) for c in text.split()] for text in negative] == [
        row.nonzero()[:, 0].tolist() for row in masks
    ]
    assert [read_cell(cell) for cell in name[2:]] == [classes[c] for c in pseudo_labels.label[2:].tolist()]
    assert [p.name for p in tmp_path.iterdir()] == ["pseudo_labels.csv"]


def test_table_without_samples_is_its_head(tmp_path):
    pseudo_labels = no_samples(case(n=1)[0])
    report.write_pseudo_labels(tmp_path / "t.csv", pseudo_labels, ["a"] * 10)
    assert (tmp_path / "t.csv").read_text() == "index,label,confidence,std,positive,negative,name\n"


EVIL = [
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\tx",
    "\rx",
    "\n=x",
    "'=x",
    "''=x",
    "'x",
    "'",
    "''",
    "'\tx",
    " =x",
    '"=x"',
    "\"'-x",
    "\uff1d1",
    "\xa0@x",
    "a=1",
    "x",
    "-rf.png",
    "' -",
    "cat's",
]


def test_no_cell_runs_in_a_spreadsheet_and_all_are_read_back(tmp_path):
    """Names and paths, by the package's own reader of tables too."""
    runs = re.compile(r"""[\s"]*[=+@\uff1d\uff0b\uff0d\uff20-]|[\t\r\n]""")
    for text in EVIL:
        cell = write_cell(text)
        assert not runs.match(cell) and read_cell(cell) == text and cell in (text, f"'{text}")
    for text in ("a=1", "x", "'x", "'", "''", "cat's", "", " "):
        assert write_cell(text) == text, "nothing else is changed"
    n = len(EVIL)
    pseudo_labels, _, _ = case(n=n, n_classes=n)
    pseudo_labels.index[:] = torch.arange(n)
    pseudo_labels.label[:] = torch.arange(n)
    pseudo_labels.label[-1] = -1
    names = [f"{text}" for text in EVIL]
    report.write_pseudo_labels(tmp_path / "t.csv", pseudo_labels, EVIL, names=names)
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["label"] == "-1", "a number stays a number"
    assert [read_cell(row["path"]) for row in rows] == EVIL
    assert not any(runs.match(row[key]) for row in rows for key in ("path", "name"))
    with open(tmp_path / "again.csv", "w", newline="") as file:  # what a user makes of it
        writer = csv.writer(file)
        writer.writerows([("path", "label"), *((row["path"], row["name"]) for row in rows)])
    found = read_table(tmp_path / "again.csv", [], problems := [])
    assert len(problems) == 1, "no file is there"
    assert sorted(found) == sorted(posixpath.normpath(name.replace("\\", "/")) for name in EVIL)
    for path, (part, name) in found.items():
        row = EVIL.index(path)
        assert name == ("" if row == n - 1 else EVIL[row].strip()) and (part == "unlabeled") == (name == "")


def test_recall_and_counts_by_class(tmp_path, cfg, blank):
    pseudo_labels, truth, rows = case(n=60, n_classes=3)
    rows = [{**row, "test_recall": [0.985, None, 1 / 3]} for row in rows]
    classes, unknown = ["cat", "dog", "<emu>"], torch.full_like(truth, -1)
    how = {"class_labels": [200, 6, 40], "class_tests": [1000, 0, 3], "class_vals": [7, 1, 1200]}
    _, path = report.write_report(
        tmp_path, rows, pseudo_labels, unknown, cfg, classes, notes=["a note"], **how
    )
    page = Page(path.read_text())
    head, *body = page.tables[1]
    assert head[:5] == ["class", "number", "labeled", "validation images", "test images"]
    assert head[5:] == ["test recall", "positives", "correct"]
    assert [cells[:6] for cells in body] == [
        ["cat", "0", "200", "7", "1,000", "98.5 %"],
        ["dog", "1", "6", "1", "0", "n/a"],
        ["<emu>", "2", "40", "1,200", "3", "33.3 %"],
    ]
    assert (
        "the labels are uneven: 200 of class 'cat', 6 of class 'dog'" in page.text and "a note" in page.text
    )
    line = "test recall by class, lowest first: '<emu>' 33.3 %, 'cat' 98.5 %"
    assert report.recall_line(rows[-1], classes) == line
    assert report.recall_line({}, classes) == report.recall_line({"test_recall": [None] * 3}, classes) == ""
    many = report.recall_line({"test_recall": [0.5] * 100}, [str(c) for c in range(100)])
    assert many.endswith("'9' 50.0 % and 90 more")


# report.png ----------------------------------------------------------------------------------------


def panels(pseudo_labels, truth, rows, cfg):
    figure = draw(rows, pseudo_labels, truth, cfg, 40)
    figure.canvas.draw()  # whatever cannot be drawn fails here
    return figure.axes


def words(axes) -> str:
    legend = axes.get_legend()
    texts = [*axes.texts, *(legend.get_texts() if legend else [])]
    return " | ".join([axes.get_title(loc="left"), *(text.get_text() for text in texts)])


def offsets(axes, name):
    return next(
        (np.asarray(c.get_offsets()) for c in axes.collections if c.get_label() == name), np.empty((0, 2))
    )


def heights(axes, name):
    return next([bar.get_height() for bar in c] for c in axes.containers if c.get_label() == name)


def test_panels_show_the_numbers(cfg):
    pseudo_labels, truth, rows = case()
    accuracy, counts, calibration, plane = panels(pseudo_labels, truth, rows, cfg)

    assert {line.get_label() for line in accuracy.lines} == {
        "test set", "positive pseudo-labels", "negative pseudo-labels"
    }  # fmt: skip
    test = next(line for line in accuracy.lines if line.get_label() == "test set")
    assert test.get_xdata().tolist() == [0, 1, 2] and np.allclose(test.get_ydata(), [80, 85, 90])
    assert "80.0" in words(accuracy) and "90.0" in words(accuracy)

    right = int((pseudo_labels.positive & (pseudo_labels.label == truth)).sum())
    wrong = int((pseudo_labels.positive & (pseudo_labels.label != truth)).sum())
    only_negative = int((unpack_mask(pseudo_labels.negative, 10).any(1) & ~pseudo_labels.positive).sum())
    assert right > 0 and wrong > 0 and only_negative > 0  # or the case shows nothing
    assert heights(counts, "positive, correct") == [right] * 3
    assert heights(counts, "positive, wrong") == [wrong] * 3
    assert heights(counts, "negative classes only") == [only_negative] * 3
    assert "all 300" in words(counts)

    assert f"all unlabeled: ECE {rows[0]['ece']:.3f}" in words(calibration)
    assert f"selected: ECE {rows[0]['ece_selected']:.3f}" in words(calibration)

    points = np.stack([pseudo_labels.confidence.numpy(), pseudo_labels.std.numpy()], axis=1)
    hit = (pseudo_labels.label == truth).numpy()
    assert np.array_equal(offsets(plane, "correct"), points[hit])
    assert np.array_equal(offsets(plane, "wrong"), points[~hit])
    assert "tau_p = 0.7" in words(plane) and "kappa_p = 0.05" in words(plane)
    shade = plane.collections[0].get_paths()[0].get_extents()
    assert (shade.x0, shade.y0, shade.y1) == (0.7, 0.0, 0.05)


def test_unknown_truth_leaves_gaps_that_are_named(cfg):
    pseudo_labels, truth, _ = case()
    truth = torch.full_like(truth, -1)
    accuracy, counts, calibration, plane = panels(
        pseudo_labels, truth, rows_of(pseudo_labels, truth, 10, 3), cfg
    )
    assert [line.get_label() for line in accuracy.lines] == ["test set"]
    assert "The true classes of unlabeled images are not known" in words(accuracy)
    assert heights(counts, "positive") == [int(pseudo_labels.positive.sum())] * 3 and "wrong" not in words(
        counts
    )
    assert "No label can be checked" in words(calibration) and "ECE" not in words(calibration)
    assert len(offsets(plane, "truth unknown")) == 300
    assert len(offsets(plane, "correct")) == len(offsets(plane, "wrong")) == 0


def test_where_the_truth_is_unknown_test_images_judge(tmp_path, cfg, blank):
    pseudo_labels, truth, _ = case(broken=4)
    test, test_truth, _ = case(seed=1, broken=3)
    unknown = torch.full_like(truth, -1)
    found = of_test_images(test, test_truth)
    rows = [{**row, **json.loads(json.dumps(found))} for row in rows_of(pseudo_labels, unknown, 10, 2)]
    calibration = panels(pseudo_labels, unknown, rows, cfg)[2]
    expected = numbers(test, test_truth, 10)
    assert found["test_positives"] == expected["positives"] > 50
    assert found["test_positive_acc"] == expected["positive_acc"]
    assert f"all test images: ECE {expected['ece']:.3f}" in words(calibration)
    assert f"selected: ECE {expected['ece_selected']:.3f}" in words(calibration)
    _, page = report.write_report(tmp_path, rows, pseudo_labels, unknown, cfg, ["x"] * 10)
    share = f"{100 * expected['positive_acc']:.1f} % of them with the right label"
    taken = f"The same thresholds select {expected['positives']} of 297 test images, {share}"
    assert taken in page.read_text() and report.test_guess(rows[-1]).startswith(taken)
    assert report.test_guess(rows_of(pseudo_labels, truth, 10, 1)[0]) == ""
    nothing = {**found, **of_test_images(no_samples(test), test_truth[:0])}
    assert report.test_guess(nothing) == "The same thresholds select 0 of 0 test images"
    assert "No label can be checked" in words(
        panels(pseudo_labels, unknown, [{**rows[0], **nothing}], cfg)[2]
    )


def test_uncertainty_says_what_it_has_done(tmp_path, cfg, blank):
    pseudo_labels, truth, rows = case()
    sure = pseudo_labels.confidence >= cfg.select.tau_p
    kept_out = int((sure & (pseudo_labels.std > cfg.select.kappa_p)).sum())
    assert 0 < kept_out < int(sure.sum())
    _, page = report.write_report(tmp_path, rows, pseudo_labels, truth, cfg, ["x"] * 10)
    dropped = int((pseudo_labels.candidate & ~pseudo_labels.positive).sum())
    said = f"Of {int(sure.sum())} confident labels {kept_out} were too uncertain (std above 0.05), and {dropped} more"
    assert said in page.read_text()


def test_a_run_that_did_not_pay_says_so(tmp_path, cfg, blank):
    pseudo_labels, truth, rows = case(n_rounds=4)
    assert report.advice(rows, cfg) == "" and report.advice(rows[:1], cfg) == ""
    rows = [{**row, "test_acc": acc} for row, acc in zip(rows, (0.8, 0.85, 0.85, 0.7), strict=True)]
    assert "The last round is worse than round 0" in report.advice(rows, cfg)
    assert "warm_start" in report.advice(rows, cfg) and "data.ops" in report.advice(rows, cfg)
    said = replace(
        cfg, train=replace(cfg.train, warm_start=True, labeled_repeats=4), data=replace(cfg.data, ops="ups")
    )
    said.select = replace(cfg.select, balance_rounds=100)
    assert report.advice(rows, said).endswith(
        "What may help: more train.epochs, a higher select.tau_p, select.balance_rounds=0 where classes are of "
        "unequal size."
    )
    rowwise = replace(cfg, data=replace(cfg.data, name="features"), train=replace(cfg.train, min_steps=300))
    frozen = replace(cfg, model=replace(cfg.model, freeze=True))
    assert "data.ops" not in report.advice(rows, rowwise) and "data.noise" in report.advice(rows, rowwise)
    assert "on the test rows. What may help: a higher train.min_steps, a" in report.advice(rows, rowwise)
    assert "data.views=4 with" in report.advice(rows, frozen)
    _, page = report.write_report(tmp_path, rows, pseudo_labels, truth, cfg, ["x"] * 10)
    assert report.advice(rows, cfg) in page.read_text()
    for accuracies in ((None, None), (0.8, None), (None, 0.8)):
        rows = [{**row, "test_acc": acc} for row, acc in zip(case(n_rounds=2)[2], accuracies, strict=True)]
        _, page = report.write_report(tmp_path, rows, pseudo_labels, truth, cfg, ["x"] * 10)
        assert ("No test image could be read" in page.read_text()) == (accuracies[1] is None)


def test_one_round_is_no_drama(cfg):
    pseudo_labels, truth, rows = case(n_rounds=1)
    for test_acc in (0.0, 0.5, 1.0):
        row = {**rows[0], "test_acc": test_acc, "positive_acc": None, "negative_acc": None}
        low, high = panels(pseudo_labels, truth, [row], cfg)[0].get_ylim()
        assert high - low >= 4 and low < 100 * test_acc <= high


def test_partly_known_truth_is_not_stretched_over_the_rest(cfg):
    pseudo_labels, truth, _ = case()
    truth[100:] = -1
    _, counts, calibration, plane = panels(pseudo_labels, truth, rows_of(pseudo_labels, truth, 10, 3), cfg)
    assert "wrong" not in words(counts) and "ECE" in words(calibration)
    assert len(offsets(plane, "truth unknown")) == 200
    assert len(offsets(plane, "correct")) + len(offsets(plane, "wrong")) == 100


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "shape", ["one round", "no positives", "100 classes", "one pass", "not finite", "no samples"]
)
def test_extreme_runs_are_drawn_without_a_warning(tmp_path, cfg, shape):
    n_classes = 100 if shape == "100 classes" else 10
    n = 0 if shape == "no samples" else 300
    passes = 1 if shape == "one pass" else 10
    broken = n if shape == "not finite" else 0
    if n:
        pseudo_labels, truth, rows = case(n, n_classes, passes, n_rounds=20, broken=broken)
    else:
        pseudo_labels, truth, _ = case(1)
        pseudo_labels = no_samples(pseudo_labels)
        truth, rows = truth[:0], rows_of(pseudo_labels, truth[:0], 10, 1)
    if shape == "one round":
        rows = rows[:1]
    if shape == "one pass":
        cfg.select.passes, cfg.select.kappa_p, cfg.select.kappa_n = 1, math.inf, math.inf
    if shape == "no positives":
        none = torch.zeros_like(pseudo_labels.positive)
        pseudo_labels = PseudoLabels(**{**vars(pseudo_labels), "positive": none, "candidate": none})
        rows = rows_of(pseudo_labels, truth, 10, 20)
        assert rows[0]["positive_acc"] is None
    png, page = report.write_report(
        tmp_path, rows, pseudo_labels, truth, cfg, [f"class {c}" for c in range(n_classes)]
    )
    assert (
        png.read_bytes().startswith(b"\x89PNG")
        and page.read_text().count("<tr>") == 2 + len(rows) + n_classes
    )


def test_own_arrays_give_the_run_its_name(cfg):
    pseudo_labels, truth, rows = case()
    cfg.data.name, cfg.data.root, cfg.data.n_labels = "npz", "/somewhere/my $\\frac{$ data.npz", 0
    figure = draw(rows, pseudo_labels, truth, cfg, 40)
    figure.canvas.draw()  # the name is no formula
    assert figure.texts[0].get_text().startswith("my $\\frac{$ data: test accuracy 80.0 %")
    assert figure.texts[1].get_text().startswith("40 labeled and 300 unlabeled images")


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("row", "data.name", "features"),
        ("clip", "model.name", "conv2plus1d-8"),
        ("clip", "model.name", "r3d_18"),
    ],
)
def test_rows_and_clips_are_not_called_images(tmp_path, cfg, kind, key, value):
    pseudo_labels, truth, rows = case()
    group, name = key.split(".")
    cfg = replace(cfg, **{group: replace(getattr(cfg, group), **{name: value})})
    figure = draw(rows, pseudo_labels, truth, cfg, 40)
    told = " ".join([*(text.get_text() for text in figure.texts), *map(words, figure.axes)])
    assert f"unlabeled {kind}s" in told and "image" not in told
    counts = {"class_labels": [4] * 10, "class_vals": [4] * 10, "class_tests": [4] * 10}
    _, page = report.write_report(tmp_path, rows, pseudo_labels, truth, cfg, ["x"] * 10, **counts)
    shown = re.sub(
        r"<style>.*?</style>|<pre>.*?</pre>|data:image[^\"]*", "", page.read_text(), flags=re.DOTALL
    )
    assert (
        f"of the test {kind}s" in shown and f"<th>validation {kind}s</th>" in shown and "image" not in shown
    )


def test_of_many_images_the_same_ones_are_drawn_every_time(cfg):
    pseudo_labels, truth, rows = case(n=9000)
    first, again = (panels(pseudo_labels, truth, rows, cfg)[3] for _ in range(2))
    assert "6,000 of 9,000 images" in words(first)
    drawn = [np.concatenate([offsets(plane, "correct"), offsets(plane, "wrong")]) for plane in (first, again)]
    assert len(drawn[0]) == MOST_POINTS and np.array_equal(*drawn)
    assert len(np.unique(drawn[0], axis=0)) > 5990  # drawn without replacement


# report.html ---------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags, table cells and plain text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    pseudo_labels, truth, rows = case(n_classes=len(NASTY))
    cfg = Config(seed=7)
    cfg.data.n_labels, cfg.data.root = 40, "<b>/folder</b>"
    folder = tmp_path_factory.mktemp("page")
    png, path = report.write_report(folder, rows, pseudo_labels, truth, cfg, NASTY)
    return Page(path.read_text(encoding="utf-8")), png, pseudo_labels, truth, rows


def test_page_stands_alone(page):
    page, png, *_ = page
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "b>"})
    sources = [attrs["src"] for _, attrs in page.tags if "src" in attrs]
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    assert b64decode(sources[0].partition(",")[2]) == png.read_bytes()
    assert not any("href" in attrs for _, attrs in page.tags)
    assert "prefers-color-scheme: dark" in page.text


def test_page_shows_names_and_settings_as_text(page):
    page, *_ = page
    assert "<b>/folder</b>" in page.text and "tau_p: 0.7" in page.text and "seed: 7" in page.text
    assert [cells[0] for cells in page.tables[1][1:]] == NASTY


def test_page_has_a_line_per_round_and_per_class(page):
    page, _, pseudo_labels, truth, rows = page
    by_round, by_class = page.tables
    assert [cells[:3] for cells in by_round[1:]] == [
        [str(r), f"{80 + 5 * r:.1f} %", str(rows[0]["positives"])] for r in range(3)
    ]
    assert by_class[0] == ["class", "number", "unlabeled recall", "positives", "correct"]
    for number, (_, shown, found, positives, precision) in enumerate(by_class[1:]):
        is_it = truth == number
        share = float((pseudo_labels.label[is_it] == number).double().mean()) if is_it.any() else None
        assert found == ("n/a" if share is None else f"{100 * share:.1f} %")
        chosen = [i for i in range(300) if pseudo_labels.positive[i] and pseudo_labels.label[i] == number]
        hits = sum(int(truth[i]) == number for i in chosen)
        assert (shown, positives) == (str(number), str(len(chosen)))
        assert precision == (f"{100 * hits / len(chosen):.1f} %" if chosen else "n/a")


def test_the_sentence_says_what_came_of_it(page):
    page, _, pseudo_labels, truth, _ = page
    positives = int(pseudo_labels.positive.sum())
    share = 100 * float((pseudo_labels.label == truth)[pseudo_labels.positive].double().mean())
    assert "right on 90.0 % of the test images, +10.0 points from round 0" in page.text
    assert (
        f"{positives:,} of 300 unlabeled images have a positive pseudo-label, {share:.1f} % of" in page.text
    )


@pytest.mark.parametrize(
    ("known", "said"),
    [(0, "are not known, so these labels cannot be checked"), (120, "(checked on the 120 images")],
)
def test_the_sentence_says_what_is_not_known(tmp_path, cfg, blank, known, said):
    pseudo_labels, truth, _ = case()
    truth[known:] = -1
    _, path = report.write_report(
        tmp_path, rows_of(pseudo_labels, truth, 10, 1), pseudo_labels, truth, cfg, ["x"] * 10
    )
    assert said in html.unescape(path.read_text())
    assert ("points from round 0" in path.read_text()) is False
    percentages = re.findall(
        r"[\d.]+ %", Page(path.read_text()).text.partition("How to read")[0].partition("}\n\n")[2]
    )
    assert (
        len(percentages) >= 1 if known else len(percentages) == 2
    )  # title and sentence: test accuracy alone


def test_the_page_names_the_most_frequent_mistakes(tmp_path, cfg, blank):
    pseudo_labels, truth, rows = case(n=50, n_classes=8)
    rows = [{**row, "test_mistakes": [[0, 3, 7], [2, 1, 1]]} for row in rows]
    _, page = report.write_report(
        tmp_path, rows, pseudo_labels, truth, cfg, [f"class <{c}>" for c in range(8)]
    )
    text = page.read_text()
    assert (
        "Most frequent mistakes" in text
        and "<td>class &lt;0&gt;</td><td>class &lt;3&gt;</td><td>7</td>" in text
    )
    rows = [{**row, "test_mistakes": []} for row in rows]
    _, page = report.write_report(tmp_path, rows, pseudo_labels, truth, cfg, [f"{c}" for c in range(8)])
    assert "Most frequent mistakes" not in page.read_text()


def test_the_best_network_is_chosen_on_validation_images_or_not_at_all(cfg):
    rows = [
        {"round": i, "val_acc": each, "test_acc": 1 - each} for i, each in enumerate([0.5, 0.75, 0.75, 0.7])
    ]
    assert chosen(rows) == (
        "best.safetensors holds the network of round 2, the best on validation images (75.0 %)."
    )
    rows = [{**row, "val_acc": None} for row in rows]
    assert chosen(rows).startswith("There are no validation images")
