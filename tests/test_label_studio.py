"""Tasks for Label Studio and its annotations: hostile paths and classes, every kind of conflict, nothing overwritten.

The forms of tasks, predictions and exports are the documented ones. Label Studio's own package weighs half a gigabyte,
so its `LabelInterface` and `Converter` are no part of the tests.
"""

from __future__ import annotations

import csv
import doctest
import json
import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from ups_fast import label_studio, train
from ups_fast.data import merging, scan
from ups_fast.data.annotations import read_annotations
from ups_fast.data.cells import csv_line, write_cell
from ups_fast.data.merging import image_url, merge, open_table
from ups_fast.models import build
from ups_fast.models.saved import save_model
from ups_fast.pseudo_labels import PseudoLabels
from ups_fast.report.table import write_pseudo_labels
from ups_fast.report.tasks import write_tasks

CLASSES = ['"q" & <x>', "=1+1", "a, b", "gr\u00f6\u00dfe\nzwei"]
PATHS = [
    "plain.png",
    "with blank/a b.png",
    "\u00fcml\u00e4ut #1?.png",
    "100%20 & +.png",
    "=sum.png",
    "../up.png",
]


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), errors="surrogateescape")
    return path


def make_table(root: Path, rows: list[tuple[str, str]], more: str = "") -> Path:
    for path, _ in rows:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    lines = [csv_line(("path", "label"))] + [csv_line(map(write_cell, row)) for row in rows]
    return write(root / "table.csv", "".join(lines) + more)


def make_run(root: Path, data: Path, paths: list[str]) -> Path:
    """A run as far as `tasks` reads it: path i has class i % 4, and is less certain than the one before."""
    run, n = root / "my run", len(paths)
    run.mkdir()
    model = {"name": "linear", "dropout": 0.1, "preact": "fixed", "activation": "mish", "bn_momentum": 0.1}
    about = {
        "model": {**model, "weights": ""},
        "classes": CLASSES,
        "columns": 2,
        "mean": [0.0] * 2,
        "std": [1.0] * 2,
    }
    save_model(run, build(n_classes=4, columns=2, **model), about)
    negative = torch.zeros(n, 1, dtype=torch.int32)
    negative[0] = 6  # classes 1 and 2
    label = torch.arange(n) % 4
    label[-1], confidence = -1, 0.9 - 0.1 * torch.arange(n)
    confidence[-1] = float("nan")
    kept = label == 0
    found = PseudoLabels(torch.arange(n), label, confidence, confidence / 10, kept, kept, negative)
    write_pseudo_labels(run / "pseudo_labels.csv", found, CLASSES, names=paths)
    write(
        run / "next_to_label.csv",
        "rank,index,reason,path\n" + csv_line(("1", "2", "unsure", write_cell(paths[2]))),
    )
    write(run / "metrics.jsonl", "{}\n{}\n{}\n")
    write(run / "config.yaml", f"data: {{root: {json.dumps(str(data))}}}\n")
    return run


def said(name: str, value: Any) -> dict:
    result = {"from_name": name, "to_name": "sample", "type": "choices", "value": {"choices": value}}
    return {"id": 1, "completed_by": 7, "was_cancelled": False, "result": [result] if value else []}


def task(data: dict | str, *classes: list[str], **more: Any) -> dict:
    data = {"path": data} if isinstance(data, str) else data
    return {"id": 5, "data": data, "annotations": [said("label", each) for each in classes], **more}


def minimal(data: dict | str, name: Any) -> dict:
    data = {"path": data} if isinstance(data, str) else data
    return {**data, "id": 5, "label": name, "annotator": 7, "annotation_id": 1}


def merged(
    table: Path, tasks: list[dict], tmp_path: Path, prefix: str = "https://host/"
) -> tuple[dict, list[tuple]]:
    """The labels by path, and what was found."""
    export = read_annotations(write(tmp_path / "export.json", tasks))
    found = merge(open_table(table), export.annotations, prefix)
    labels = {
        name: found.table.given(row)
        for name, row in zip(found.table.names, found.table.rows, strict=True)
        if name
    }
    return labels, [tuple(each) for each in found.findings]


# Out ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    root = tmp_path / "my images"
    return make_run(tmp_path, make_table(root, [(path, "") for path in PATHS]), PATHS)


def tasks_of(run: Path, out: Path, *words: str) -> tuple[list[dict], ElementTree.Element]:
    assert label_studio.main(["tasks", str(run), "--out", str(out), *words]) == 0
    return json.loads(out.read_text()), ElementTree.parse(out.with_suffix(".xml")).getroot()


def test_tasks_have_what_label_studio_asks_for(run: Path, tmp_path: Path) -> None:
    tasks, view = tasks_of(run, tmp_path / "tasks.json")
    assert [each.tag for each in view] == ["Image", "Choices"] and view[0].get("value") == "$image"
    assert [choice.get("value") for choice in view[1]] == CLASSES
    by_path = {each["data"]["path"]: each for each in tasks}
    # The one to label next, then those of rising confidence; without one first.
    assert list(by_path) == [PATHS[i] for i in (2, 5, 4, 3, 1, 0)]
    first = by_path[PATHS[0]]
    assert first["data"]["negative"] == CLASSES[1:3] and first["data"]["positive"] == 1
    assert by_path[PATHS[2]]["data"]["reason"] == "unsure" and "reason" not in first["data"]
    assert by_path[PATHS[5]]["predictions"] == []
    for i, path in enumerate(PATHS[:5]):
        (prediction,) = by_path[path]["predictions"]
        (region,) = prediction["result"]
        assert region["value"] == {"choices": [CLASSES[i % 4]]} and region["type"] == "choices"
        assert (region["from_name"], region["to_name"]) == (view[1].get("name"), view[0].get("name"))
        assert (
            prediction["score"] == pytest.approx(0.9 - 0.1 * i)
            and prediction["model_version"] == "my run, round 2"
        )
    assert by_path[PATHS[2]]["data"]["image"] == (
        "/data/local-files/?d=my%20images/%C3%BCml%C3%A4ut%20%231%3F.png"
    )


def test_options_of_tasks(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tasks, _ = tasks_of(run, tmp_path / "a.json", "--next", "2", "--prefix", "https://host/?id=")
    capsys.readouterr()
    assert [each["data"]["image"] for each in tasks] == [
        image_url(PATHS[i], "https://host/?id=") for i in (2, 5)
    ]
    assert doctest.testmod(merging).attempted and not doctest.testmod(merging).failed
    assert image_url("a b#.png", "s3://bucket/") == "s3://bucket/a b#.png"
    before = (tmp_path / "a.xml").read_bytes()
    for words in (["a.json"], ["b.json", "--next", "0"], ["b.csv"], ["no/b.json"]):
        try:
            status = label_studio.main(["tasks", str(run), "--out", str(tmp_path / words[0]), *words[1:]])
        except SystemExit as stopped:
            status = int(str(stopped.code))
        assert status == 2 and capsys.readouterr().err.startswith("error: "), words
    (tmp_path / "b.xml").symlink_to("nowhere")
    assert label_studio.main(["tasks", str(run), "--out", str(tmp_path / "b.json")]) == 2
    assert "b.xml is there already" in capsys.readouterr().err
    assert (tmp_path / "a.xml").read_bytes() == before and not (tmp_path / "b.json").exists()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("pseudo_labels.csv", None, "has no pseudo_labels.csv"),
        ("pseudo_labels.csv", "index,label,confidence,name\n0,1,0.5,a\n", "has no files to show"),
        ("pseudo_labels.csv", "index,label\n0,1\n", "its columns do not fit"),
        ("pseudo_labels.csv", 'path,label,confidence,name\n"a', "is damaged"),
        ("pseudo_labels.csv", "path,label,confidence,name\na,1,0.5,b,c\n", "its columns do not fit"),
        ("next_to_label.csv", "rank\n1\n", "its columns do not fit"),
        ("config.yaml", "data: 3", "has no data.root"),
        ("model.safetensors", "", "is damaged or no network"),
    ],
)
def test_a_damaged_run_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str, content: str | None, sentence: str
) -> None:
    (run / name).unlink()
    if content is not None:
        write(run / name, content)
    assert label_studio.main(["tasks", str(run), "--out", str(tmp_path / "tasks.json")]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1
    assert not list(tmp_path.glob("tasks.*"))


@pytest.mark.parametrize(("column", "cell", "url"), [
    ("image", "a b.png", "/data/local-files/?d=rows/a%20b.png"),
    ("image", "https://host/1.png", "https://host/1.png"),
    ("text", "A sentence", None),
    ("other", "", None),
])  # fmt: skip
def test_rows_are_shown_by_a_column_of_their_table(
    tmp_path: Path, column: str, cell: str, url: str | None
) -> None:
    root = tmp_path / "rows"
    root.mkdir()
    np.save(root / "x.npy", np.zeros((3, 2), np.float32))
    write(root / "x.csv", f"label,{column}\na,one\n,two\n,{cell}\n")
    run = make_run(tmp_path, root / "x.npy", ["x.npy[1]", "x.npy[0]", "x.npy[2]"])
    tasks, view = tasks_of(run, tmp_path / "tasks.json")
    data = tasks[0]["data"]
    assert data["path"] == "x.npy[2]" and data.get("image") == url
    assert view[0].tag == ("Image" if url else "Text") and (view[0].get("value") or "")[1:] in data
    assert column != "text" or data["text"] == cell


def test_a_class_that_xml_lacks_is_refused(run: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(globals(), "CLASSES", ["a\x01", "b", "c", "d"])
    about_run = make_run(tmp_path / "my images", tmp_path / "my images", PATHS)
    assert label_studio.main(["tasks", str(about_run), "--out", str(tmp_path / "tasks.json")]) == 2
    assert r"class 'a\x01' has a character" in capsys.readouterr().err and not list(tmp_path.glob("tasks.*"))


# In -------------------------------------------------------------------------------------------------------


def test_annotations_come_back_to_their_paths(run: Path, tmp_path: Path) -> None:
    """With all the paths and classes of a run, by path and by URL alone, in both forms of the export."""
    root = tmp_path / "my images"
    table = make_table(
        root, [(path, "") for path in PATHS] + [(f"known {i}", name) for i, name in enumerate(CLASSES)]
    )
    for prefix in ("https://host/?id=", "s3://bucket/", "/data/local-files/?d=my%20images/"):
        name = prefix.replace("/", "")
        tasks, _ = tasks_of(run, tmp_path / f"{name}.json", "--prefix", prefix)
        for keys in (("path", "image"), ("path",), ("image",)):
            some = [{key: each["data"][key] for key in keys} for each in tasks]
            classes = [CLASSES[i % 4] for i in range(len(some))]
            for export in (
                [task(data, [c]) for data, c in zip(some, classes, strict=True)],
                [minimal(data, c) for data, c in zip(some, classes, strict=True)],
            ):
                labels, findings = merged(table, export, tmp_path, prefix)
                assert not findings
                assert [labels[each["data"]["path"]] for each in tasks] == classes


ROWS = [("a/1.png", "cat"), ("a/2.png", "dog"), ("a/3.png", ""), ("a/4 \u00fc.png", ""), ("b/3.png", "")]


def test_conflicts_keep_the_label_of_the_table(tmp_path: Path) -> None:
    table = make_table(tmp_path, ROWS)
    a1, a3, a4 = (ROWS[i][0] for i in (0, 2, 3))
    skip = {**said("label", []), "was_cancelled": True, "completed_by": {"id": 3, "email": "an@x.org"}}
    for tasks, label, findings in [
        ([task(a3, ["cat"])], "cat", []),
        ([task(a3, [" dog "]), task(a3, ["dog"], ["dog"])], "dog", []),  # duplicates that agree
        ([task(a1, ["cat"])], "", []),
        ([task(a1, ["dog"])], "", [(a1, "cat", "dog", "differs from the table", "")]),
        ([task(a3, ["cat"], ["dog"])], "", [(a3, "", "cat or dog", "annotations disagree", "")]),
        ([task(a3, ["cat"]), task(a3, ["dog"])], "", [(a3, "", "cat or dog", "annotations disagree", "")]),
        ([task(a3, ["cat"], ["cow"])], "", [(a3, "", "cat or cow", "annotations disagree", "")]),
        ([task(a3, ["cat", "dog"])], "", [(a3, "", "cat + dog", "several classes", "")]),
        ([task(a3, ["Cat"])], "", [(a3, "", "Cat", "unknown class", " (did you mean 'cat'?)")]),
        ([task(a3, [])], "", [(a3, "", "", "no class", " by 7")]),
        ([task(a3, ["  "])], "", [(a3, "", "", "no class", " by 7")]),
        ([{**task(a3), "annotations": [skip]}], "", [(a3, "", "", "skipped", " by an@x.org")]),
        ([{**task(a3), "annotations": [skip, said("label", ["dog"])]}], "dog",
         [(a3, "", "", "skipped", " by an@x.org")]),
        ([task("A/3.png", ["cat"])], "", [("A/3.png", "", "cat", "unknown path", "")]),
        ([task({"text": "?"}, ["cat"])], "", [("task 5", "", "cat", "unknown path", "")]),
        ([minimal(a3, "cat")], "cat", []),
        ([minimal(a3, {"choices": ["cat", "dog"]})], "", [(a3, "", "cat + dog", "several classes", "")]),
        ([minimal(a3, "cat"), minimal(a3, ["dog"])], "", [(a3, "", "cat or dog", "annotations disagree", "")]),
        ([minimal(a1, "cat"), {"path": a3, "id": 4, "annotation_id": 9}], "", [(a3, "", "", "no class", "")]),
    ]:  # fmt: skip
        labels, found = merged(table, tasks, tmp_path)
        assert found == findings, tasks
        assert labels == {**dict(ROWS), a3: label}, tasks
    labels, found = merged(
        table, [task(a4.replace("\u00fc", "u\u0308"), ["cat"])], tmp_path
    )  # as a Mac writes it
    assert labels[a4] == "cat" and not found


def test_choices_in_many_lists_are_choices(tmp_path: Path) -> None:
    text = '[{"path": "a/3.png", "label": ' + "[" * 700 + '"cat"' + "]" * 700 + "}]"
    (found,) = read_annotations(write(tmp_path / "export.json", text)).annotations
    assert found.classes == ("cat",)


def test_names_that_are_no_text_are_written_all_the_same(tmp_path: Path) -> None:
    odd = "a/\udcff.png"
    table, url = make_table(tmp_path, [*ROWS, (odd, "")]), image_url(odd, "s3://bucket/")
    written = json.loads(write_tasks([{"data": {"image": url, "text": "\udcff"}}]))
    assert written[0]["data"] == {"image": "s3://bucket/a/%FF.png", "text": "?"}
    labels, found = merged(table, [task({"image": url}, ["cat"])], tmp_path, "s3://bucket/")
    assert labels[odd] == "cat" and not found


def test_urls_lead_to_one_file_or_to_none(tmp_path: Path) -> None:
    table = make_table(tmp_path, ROWS)
    for url, path, what in [
        ("https://host/a/4%20%C3%BC.png", "a/4 \u00fc.png", ""),
        ("https://host/a/4 \u00fc.png", "a/4 \u00fc.png", ""),
        ("https://other/a/3.png", "", "unknown path"),
        ("https://host/3.png", "", "unknown path"),
        ("https://host/", "", "unknown path"),
        ("https://host/%FF%00.png", "", "unknown path"),
        ("/data/upload/12/0a1b2c3d-4_%C3%BC.png", "a/4 \u00fc.png", ""),
        ("http://ls:8080/data/upload/12/0a1b2c3d-3.png", "", "several files of this name"),
        ("/data/upload/12/3.png", "", "unknown path"),
    ]:
        labels, found = merged(table, [task({"image": url}, ["dog"])], tmp_path)
        assert [each[3] for each in found] == ([what] if what else []), url
        assert {name for name, label in labels.items() if label} == {
            "a/1.png",
            "a/2.png",
            *([path] if path else []),
        }


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "must be an export of Label Studio in JSON"),
        ("[{]", "must be an export of Label Studio in JSON"),
        ("[" * 100_000, "must be an export of Label Studio in JSON"),
        ('{"id": 1}', "a list of tasks, got an object"),
        ("[]", "has 0 tasks and no annotation"),
        ([task("a/3.png")], "has 1 task and no annotation"),
        ([3], "task 1 of"),
        ([{"data": {}, "annotations": {"a": 1}}], "must be a list, got an object"),
        ([{"data": {}, "annotations": [None]}], "an annotation of task 1"),
        ([{"data": {}, "annotations": [{"result": 3}]}], "the result of task 1"),
        ([task("a/3.png", [3])], "must have a list of choices, got 3"),
        ([minimal("a/3.png", 4.5)], "must have a list of choices, got 4.5"),
        ('[{"label": "\\ud800", "path": "a"}]', "must be text in UTF-8"),
        ('[{"label": "x", "path": "\\ud800"}]', "must be text in UTF-8"),
        ([{"data": {}, "annotations": [said("choice", ["cat"])]}], "has the control 'label', but 'choice'"),
    ],
)
def test_a_broken_export_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture, content: Any, sentence: str
) -> None:
    table, export = make_table(tmp_path, ROWS), write(tmp_path / "export.json", content)
    out = tmp_path / "new.csv"
    assert label_studio.main(["merge", str(export), "--table", str(table), "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1 and not out.exists()


def test_merge_keeps_the_table_and_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table = write(
        tmp_path / "t.csv", 'Path;LABEL;my note\na.png;cat;"x;y"\n\nb.png\n;;\nb.png;;again\nc.png;dog;=1\n'
    )
    for name in "abc":
        (tmp_path / f"{name}.png").touch()
    export = write(tmp_path / "e.json", [task("b.png", ["dog"]), task("a.png", ["dog"]), task("c.png")])
    words = ["merge", str(export), "--table", str(table), "--out"]
    before = table.read_bytes()
    assert label_studio.main([*words, str(tmp_path / "new.csv")]) == 0
    rows = list(csv.reader((tmp_path / "new.csv").open()))
    assert rows[:4] == [["Path", "LABEL", "my note"], ["a.png", "cat", "x;y"], [], ["b.png", "dog", ""]]
    assert rows[5:] == [["b.png", "dog", "again"], ["c.png", "dog", "=1"]]
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == ["path", "table", "annotation", "what"]
    assert out.splitlines()[1].split(None, 3) == ["a.png", "cat", "dog", "differs from the table"]
    assert err.endswith(
        "new.csv: 1 new label, 0 that the table had; not merged: differs from the table 1; 1 task without annotation\n"
    )
    (tmp_path / "elsewhere").mkdir()
    for name, sentence in (
        ("t.csv", "is there already"),
        ("new.csv", "is there already"),
        ("elsewhere/n.csv", "lie in"),
    ):
        assert label_studio.main([*words, str(tmp_path / name)]) == 2
        assert sentence in capsys.readouterr().err
    assert table.read_bytes() == before and not list((tmp_path / "elsewhere").iterdir())
    assert (
        label_studio.main(["merge", str(export), "--table", str(tmp_path / "no.csv"), "--out", "x.csv"]) == 2
    )
    assert "there is no table or folder" in capsys.readouterr().err


def test_the_control_of_a_project_of_ones_own(tmp_path: Path) -> None:
    table = make_table(tmp_path, ROWS)
    own = [{"id": 1, "data": {"path": "a/3.png"}, "annotations": [said("choice", ["dog"])]}]
    export, out = write(tmp_path / "e.json", own), tmp_path / "new.csv"
    words = ["merge", str(export), "--table", str(table), "--out", str(out), "--control", "choice"]
    assert label_studio.main(words) == 0 and "a/3.png,dog" in out.read_text()


def test_rows_of_features_are_merged_by_their_number(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, 2), np.float32))
    labels, found = merged(
        write(tmp_path / "x.csv", "label\na\n\nb\n\n\n"), [task("x.npy[1]", ["b"])], tmp_path
    )
    assert labels["x.npy[1]"] == "b" and not found
    table = write(tmp_path / "x.csv", "label,text\na,\n\n,\nb,\n")  # the empty line is no row
    labels, found = merged(table, [task("x.npy[1]", ["b"]), task("x.npy[3]", ["a"])], tmp_path)
    assert labels == {"x.npy[0]": "a", "x.npy[1]": "b", "x.npy[2]": "b"}
    assert found == [("x.npy[3]", "", "a", "unknown path", "")]


def test_a_folder_becomes_a_table_that_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = tmp_path / "images"
    for path in (
        "labeled/=a/1.png",
        "labeled/b, c/1.png",
        "unlabeled/\u00fc 1.png",
        "unlabeled/2.png",
        "test/=a/3.png",
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), len(path)).save(root / path)
    os.rename(root / "unlabeled/2.png", os.fsencode(root) + b"/unlabeled/\xff.png")
    export = write(tmp_path / "e.json", [task("unlabeled/\u00fc 1.png", ["b, c"])])
    words = ["merge", str(export), "--table", str(root), "--out", str(root / "merged.csv")]
    assert label_studio.main(words) == 0, capsys.readouterr().err
    before, now = scan(root), scan(root / "merged.csv")
    assert (before.classes, before.paths) == (now.classes, now.paths) == (["=a", "b, c"], before.paths)
    changed = np.flatnonzero(before.label != now.label).tolist()
    assert [(now.paths[i], int(now.label[i])) for i in changed] == [("unlabeled/\u00fc 1.png", 1)]
    assert torch.equal(before.test, now.test)


def test_the_first_labels_of_a_table_make_its_classes(tmp_path: Path) -> None:
    labels, found = merged(
        make_table(tmp_path, [("a.png", ""), ("b.png", "")]), [task("a.png", ["new"])], tmp_path
    )
    assert labels == {"a.png": "new", "b.png": ""} and not found


@pytest.mark.slow
def test_the_loop(tmp_path: Path) -> None:
    """A run, its tasks, annotations of ten of them, and a second run on the merged table."""
    rng, root = np.random.default_rng(0), tmp_path / "images"
    rows = []
    for i in range(60):
        name = ("dark", "light & bright")[i % 2]
        pixels = (50 + 150 * (i % 2) + rng.integers(-20, 20, (12, 12))).astype(np.uint8)
        root.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / f"{i} \u00fc.png")
        rows.append((f"{i} \u00fc.png", name if i < 12 else ""))
    table = write(root / "table.csv", "".join(csv_line(row) for row in [("path", "label"), *rows]))
    fast = [
        "threads=1",
        "data.size=8",
        "data.channels=1",
        "model.name=wrn-10-1",
        "train.rounds=1",
        "train.epochs=1",
    ]
    fast += ["train.batch_size=12", "report.baselines=false"]
    config = str(Path(__file__).parents[1] / "configs/folder.yaml")
    assert train.main([config, f"data.root={table}", f"run_dir={tmp_path / 'one'}", *fast]) == 0
    tasks, _ = tasks_of(tmp_path / "one", tmp_path / "tasks.json", "--next", "10")
    for each in tasks:
        number = int(each["data"]["path"].split()[0])
        each["annotations"] = [said("label", [("dark", "light & bright")[number % 2]])]
    export, out = write(tmp_path / "export.json", tasks), root / "merged.csv"
    assert label_studio.main(["merge", str(export), "--table", str(table), "--out", str(out)]) == 0
    assert train.main([config, f"data.root={out}", f"run_dir={tmp_path / 'two'}", *fast]) == 0
    counts = [
        len((tmp_path / name / "pseudo_labels.csv").read_text().splitlines()) for name in ("one", "two")
    ]
    assert counts == [49, 39]
