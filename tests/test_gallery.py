"""The examples in a report: the right samples, their own pixels, nothing too large, and no word of theirs is run."""

from __future__ import annotations

import csv
import io
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ups_fast import report, train
from ups_fast.data import ImageSet, PlainImages, ResidentFeatures, ResidentImages, read_image, resize_crop
from ups_fast.pseudo_labels import PseudoLabels
from ups_fast.report.examples import _places
from ups_fast.report.thumbnails import SHORT, thumbnail
from ups_fast.report.to_review import Review, Suspect

N_LABELED = 6
HOSTILE = ['<script>alert("x")</script>', "a\" onload='y", "&amp;", "zwei\nZeilen", "x" * 300, "\udcff"]


class Sections(HTMLParser):
    """Of each heading the figures below it, as attributes of the image and words, and the lines of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: dict[str, list[tuple[str, dict, str]]] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.text: dict[str, str] = {}
        self.tags, self.open, self.head, self.within = set(), "", "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not any(name.startswith("on") or name == "href" for name, _ in attrs)
        if tag == "h2":
            self.head = ""
        elif tag == "figure":
            self.figures.setdefault(self.head, []).append((dict(attrs)["title"], {}, ""))
            self.within = True
        elif tag == "img":
            self.figures[self.head][-1][1].update(attrs)
        elif tag == "tr":
            self.rows.setdefault(self.head, []).append([])
        elif tag in ("td", "th"):
            self.rows[self.head][-1].append("")
        self.open = tag

    def handle_endtag(self, tag):
        self.open, self.within = "", self.within and tag != "figure"

    def handle_data(self, data):
        if self.open == "h2":
            self.head += data
            return
        self.text[self.head] = self.text.get(self.head, "") + data
        if self.open in ("td", "th"):
            self.rows[self.head][-1][-1] += data
        elif self.within:
            title, image, words = self.figures[self.head][-1]
            self.figures[self.head][-1] = title, image, f"{words} {data}".strip()


def pixels_of(image: dict) -> np.ndarray:
    kind, _, data = image["src"].partition(";base64,")
    assert kind in ("data:image/png", "data:image/jpeg")
    return np.asarray(Image.open(io.BytesIO(b64decode(data))))


def case(n=40, shape=(8, 8, 1), n_classes=4, **changes):
    """Labels for n samples beside N_LABELED labeled ones. The first half is positive, every fifth label wrong."""
    g = torch.Generator().manual_seed(0)
    size = N_LABELED + n
    if len(shape) == 1:
        images = torch.randn(size, *shape, generator=g)
    else:
        images = torch.randint(256, (size, *shape), generator=g, dtype=torch.uint8)
    truth = torch.randint(n_classes, (size,), generator=g)
    index = torch.arange(N_LABELED, size)
    label = truth[index].clone()
    label[::5] = (label[::5] + 1) % n_classes
    positive = torch.arange(n) < n // 2
    confidence, std = 0.5 + 0.5 * torch.rand(n, generator=g), 0.1 * torch.rand(n, generator=g)
    none = torch.zeros(n, (n_classes + 31) // 32, dtype=torch.int32)
    found = PseudoLabels(index, label, confidence, std, positive.clone(), positive, none)
    mean = (0.5,) * (shape[0] if len(shape) == 1 else shape[2])
    classes = [f"class {c}" for c in range(n_classes)]
    data = ImageSet(
        "x", classes, images, truth, images[:0], truth[:0], mean, mean, torch.arange(N_LABELED), **changes
    )
    ratio = {int(i): 0.5 + int(i) / size for i in index}
    nearest = {i: i % N_LABELED for i in ratio}
    wrong = [Suspect(2, 1, 3, 0.1, 0.8), Suspect(4, 0, 1, 0.3, 0.4)]
    return data, found, truth[index], Review(Path(), Path(), wrong, ratio, nearest)


def made(data, found, truth, review, images=None) -> Sections:
    if images is None:
        kind = ResidentFeatures if data.noun == "row" else ResidentImages
        images = kind(data.train_images, mean=data.mean, std=data.std, device="cpu")
    return Sections(report.examples(data, images, found, truth, review, first=N_LABELED, threads=1))


def index_of(title: str, first: int = N_LABELED) -> int:
    return int(title.removeprefix("index ")) + first


TITLES = [
    "Positive labels, by class",
    "The least certain positive labels",
    "The most confident labels that were rejected",
    "Taken for another class",
    "Given labels that look wrong",
    "Unlike all labeled images",
]


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 20, 3), (1, 1, 3)])
def test_each_section_has_its_samples_with_their_own_pixels(shape):
    data, found, truth, review = case(shape=shape)
    page = made(data, found, truth, review)
    assert list(page.figures) == TITLES
    for head, figures in page.figures.items():
        for title, image, words in figures:
            i = index_of(title, 0 if head == TITLES[4] else N_LABELED)
            want = data.train_images[i].numpy()
            assert np.array_equal(pixels_of(image).reshape(shape), want), "a small image keeps its pixels"
            larger = int(image["width"]) // shape[1]
            assert (int(image["width"]), int(image["height"])) == (larger * shape[1], larger * shape[0])
            assert SHORT // 2 < min(int(image["width"]), int(image["height"])) <= SHORT
            if head == TITLES[4]:
                continue
            place = i - N_LABELED
            label, right = int(found.label[place]), int(truth[place])
            said = f"class {label} {found.confidence[place]:.2f} ± {found.std[place]:.2f}"
            said += f" is class {right}" if label != right else ""
            assert words == said + (f" {review.unfamiliar[i]:.1f} x" if head == TITLES[5] else "")


def test_the_sections_choose_what_they_say():
    data, found, truth, review = case(n=200)
    found.candidate[150:155] = True  # passed, and left out by the class balance
    found.label[199] = -1
    page = made(data, found, truth, review)
    place = {
        head: [index_of(title) - N_LABELED for title, *_ in figures] for head, figures in page.figures.items()
    }
    positive, rejected = set(range(100)), set(range(100, 199)) - set(range(150, 155))
    assert set(place[TITLES[0]]) <= positive and len(set(place[TITLES[0]])) == 32, "8 of each of 4 classes"
    for c in range(4):
        assert f"class {c}{int((found.label[:100] == c).sum())}" in page.text[TITLES[0]].replace("\n", "")
    assert place[TITLES[1]] == sorted(positive, key=lambda i: -float(found.std[i]))[:24]
    assert place[TITLES[2]] == sorted(rejected, key=lambda i: -float(found.confidence[i]))[:24]
    assert "5 other labels passed" in page.text[TITLES[2]]
    assert place[TITLES[5]] == list(range(199, 175, -1)), "the farthest first"
    assert f"{sum(r > 1 for r in review.unfamiliar.values())} of 200 images" in page.text[TITLES[5]]
    wrong = [i for i in range(199) if found.label[i] != truth[i]]
    assert set(place[TITLES[3]]) <= set(wrong)
    table = page.rows[TITLES[3]]
    assert [row[0] for row in table[1:]] == data.classes
    for a, (_, *cells) in enumerate(table[1:]):
        for b, cell in enumerate(cells):
            assert int(cell or 0) == sum(truth[i] == a and found.label[i] == b for i in range(199))
    suspects = [(index_of(title, 0), words) for title, _, words in page.figures[TITLES[4]]]
    assert suspects == [(2, "class 1 0.10 or class 3, 0.80"), (4, "class 0 0.30 or class 1, 0.40")]


def test_what_is_not_known_is_left_out():
    data, found, truth, review = case()
    page = made(data, found, torch.full_like(truth, -1), None)
    assert list(page.figures) == TITLES[:3] and not any("is class" in f[2] for f in page.figures[TITLES[0]])
    assert list(made(data, found, found.label, None).figures) == TITLES[:3], "no label is wrong"
    none = replace(review, suspects=[], unfamiliar=dict.fromkeys(review.unfamiliar, 0.9))
    page = made(data, found, truth, none)
    assert TITLES[4] not in page.figures and "agrees with all of them" in page.text[TITLES[4]]
    assert TITLES[5] not in page.figures and page.text[TITLES[5]].strip().startswith("0 of 40 images")
    nothing = replace(found, positive=torch.zeros(40, dtype=torch.bool), label=torch.full((40,), -1))
    assert not made(data, nothing, truth, None).figures
    empty = PseudoLabels(**{name: tensor[:0] for name, tensor in vars(found).items()})
    assert not made(data, empty, truth[:0], None).figures


def test_rows_of_numbers_are_lines_of_tables():
    data, found, truth, review = case(shape=(5,))
    page = made(data, found, truth, review)
    assert not page.figures and list(page.rows) == [*TITLES[:5], "Unlike all labeled rows"]
    head, *rows = page.rows[TITLES[1]]
    assert head == ["row", "label", "confidence ± std", "true class", "nearest labeled row"]
    for row in rows:
        i = index_of(row[0])
        other = review.nearest[i]
        assert row[1] == data.classes[found.label[i - N_LABELED]]
        assert row[4] == f"index {other} (class {int(data.train_labels[other])})"
    assert page.rows["Unlike all labeled rows"][0][4] == "unfamiliar" and len(rows) == 10


def test_hostile_names_and_paths_are_text():
    names = [f"{HOSTILE[i % 6]}/{i}.png" for i in range(N_LABELED + 40)]
    for shape in ((8, 8, 1), (5,)):
        data, found, truth, review = case(shape=shape, n_classes=6, names=names)
        data = replace(data, classes=HOSTILE)
        page = made(data, found, truth, review)
        assert not page.tags & {"script", "iframe", "link", "style"}
        titles = {title for figures in page.figures.values() for title, *_ in figures}
        titles |= {row[0] for rows in page.rows.values() for row in rows if len(row) > 1}
        assert any(title.startswith(HOSTILE[0]) for title in titles)
        assert max(map(len, titles)) < 310, "a long path is cut"


# Files ------------------------------------------------------------------------------------------------------


def test_pictures_of_files_are_read_and_what_is_gone_says_so(tmp_path):
    data, found, truth, review = case(n=10, shape=(32, 32, 3))
    names = [f"{i}.png" for i in range(16)]
    for i, name in enumerate(names):
        Image.fromarray(data.train_images[i].numpy()).resize((50, 40)).save(tmp_path / name)
    (tmp_path / "9.png").unlink()
    (tmp_path / "8.png").write_bytes((tmp_path / "8.png").read_bytes()[:100])
    data = replace(data, train_images=data.train_images[:0], names=names, root=str(tmp_path), in_files=True)
    how = {"size": 32, "channels": 3, "mean": data.mean, "std": data.std, "device": "cpu"}
    images = PlainImages(tmp_path, names, **how, unreadable={7: "'7.png' was gone"})
    page = made(data, found, truth, review, images)
    seen = {}
    for title, image, words in (figure for figures in page.figures.values() for figure in figures):
        seen[title] = words
        if title in ("7.png", "8.png", "9.png"):
            assert not image and words.startswith("cannot be read class")
        else:
            want = resize_crop(read_image(tmp_path / title, 3), 32)
            assert np.array_equal(pixels_of(image), want)
    assert set(seen) == set(names[6:]) | {"2.png", "4.png"}


@pytest.mark.parametrize("size", [(480, 640), (640, 100), (20, 3000), (3000, 1), (64, 64), (33, 32)])
def test_large_and_long_images_become_small(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    found = thumbnail(pixels)
    image = pixels_of({"src": found.source})
    assert min(image.shape[:2]) <= 64 and max(image.shape[:2]) <= 128 and len(found.source) < 20_000
    larger = 2 if size == (33, 32) else 1
    assert (found.height, found.width) == (larger * image.shape[0], larger * image.shape[1])
    flat = np.full((*size, 1), 77, np.uint8)
    assert abs(pixels_of({"src": thumbnail(flat).source}).astype(int) - 77).max() <= 1


def test_a_thousand_classes_of_large_images_stay_below_5_mb():
    names = [f"{'&' * 200}/{i}.jpg" for i in range(N_LABELED + 1500)]  # each of which takes 5 bytes
    data, found, truth, review = case(n=1500, shape=(1, 1, 3), n_classes=1000, names=names)
    big = torch.randint(256, (1, 128, 100, 3), dtype=torch.uint8).expand(len(names), -1, -1, -1)
    wrong = [Suspect(i % N_LABELED, 0, 1, 0.1, 0.8) for i in range(100)]
    data = replace(data, train_images=big, classes=[f"{'<' * 200}{c}" for c in range(1000)])
    images = ResidentImages(big[:1], mean=data.mean, std=data.std, device="cpu")
    review = replace(review, suspects=wrong)
    text = report.examples(data, images, found, truth, review, first=N_LABELED, threads=1)
    page = Sections(text)
    assert list(page.figures) == TITLES and len(page.figures[TITLES[0]]) > 100
    assert "The 80 of" in page.text[TITLES[0]]
    assert len(text.encode()) < 4_500_000, "beside half a MB of all else"


# In a run ---------------------------------------------------------------------------------------------------


def test_the_table_of_labels_says_what_is_unfamiliar(tmp_path):
    data, found, _, review = case(n=5)
    known = {i: review.unfamiliar[i] for i in range(N_LABELED, N_LABELED + 4)}
    report.write_pseudo_labels(
        tmp_path / "t.csv", found, data.classes, first=N_LABELED, names=["=x"] * 11, unfamiliar=known
    )
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[-4:] == ["negative", "unfamiliar", "name", "path"]
    assert [row["unfamiliar"] for row in rows] == [*(f"{each:.3f}" for each in known.values()), "nan"]


def test_examples_that_fail_cost_no_report(monkeypatch):
    from types import SimpleNamespace

    from rich.console import Console

    def broken(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr(report, "examples", broken)
    console = Console(file=io.StringIO())
    result = SimpleNamespace(pseudo_labels=None, truth=None, images=None)
    assert train._examples(None, result, None, 0, 0, console) == ""
    assert console.file.getvalue() == "the report has no examples: no room\n"


@pytest.mark.parametrize("most", [1, 7, 500, 2000])
def test_the_first_places_are_those_of_a_whole_sort(most: int) -> None:
    rng = np.random.default_rng(most)
    mask, ties, rest = rng.random(1000) < 0.7, rng.integers(0, 5, 1000) / 5, rng.random(1000)
    whole = sorted(np.flatnonzero(mask).tolist(), key=lambda i: (-ties[i], -rest[i]))
    keys = map(torch.from_numpy, (ties, rest))
    assert _places(torch.from_numpy(mask), most, *keys) == whole[:most]
