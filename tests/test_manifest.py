"""A run knows its data: every change of labels, parts, classes and pixels is refused, and nothing else is."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from test_rounds import tiny_set

from ups_fast.config import Config
from ups_fast.data import ImageSet
from ups_fast.data.equal import notes_on_equal_arrays
from ups_fast.data.fingerprint import array_record, differences, fingerprint
from ups_fast.data.manifest import Manifest
from ups_fast.inputs import load_data, write_files

CPU = torch.device("cpu")


def put(file: Path, seed: int) -> None:
    """A picture; all have one size in bytes, and one time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format="BMP")
    os.utime(file, (1e9, 1e9))


def folder_of(root: Path, *, test: bool = True, seed: int = 0) -> Path:
    for i in range(4):
        put(root / f"labeled/cat/{i}.bmp", seed + i)
        put(root / f"labeled/dog/{i}.bmp", seed + 10 + i)
        put(root / f"unlabeled/{i}.bmp", seed + 20 + i)
    if test:
        put(root / "test/cat/0.bmp", seed + 30)
        put(root / "test/dog/0.bmp", seed + 31)
    return root


def table_of(root: Path) -> Path:
    """A table with test images; 0 to 3 are cats, 4 to 7 dogs, 8 to 11 unlabeled."""
    for i in range(12):
        put(root / f"{i}.bmp", i)
    rows = [f"{i}.bmp,{('cat', 'dog', '')[i // 4]},{'test' if i in (0, 4) else ''}" for i in range(12)]
    (root / "labels.csv").write_text("\n".join(["path,label,split", *rows]))
    return root / "labels.csv"


def start(root: Path, run_dir: Path, loader: str = "plain", channels: int = 3) -> tuple[ImageSet, str]:
    """One start of a run, up to its training, and what it says."""
    cfg = Config(run_dir=str(run_dir))
    cfg.data.name, cfg.data.root, cfg.data.size, cfg.data.loader, cfg.threads = (
        "folder",
        str(root),
        4,
        loader,
        1,
    )
    cfg.data.channels = channels
    text = io.StringIO()
    data = load_data(cfg, CPU, Console(file=text, width=1000))
    run_dir.mkdir(exist_ok=True)
    write_files(run_dir, data)
    return data, text.getvalue()


def refused(root: Path, run_dir: Path) -> str:
    with pytest.raises(ValueError) as caught:
        start(root, run_dir)
    said = str(caught.value)
    assert "\n" not in said and str(root) in said
    return said


def rename(old: str, new: str) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / old).rename(root / new)

    return change


def swap(root: Path) -> None:
    for old, new in (("cat/0", "x"), ("dog/0", "cat/0"), ("x", "dog/0")):
        (root / f"labeled/{old}.bmp").rename(root / f"labeled/{new}.bmp")


def another_folder(root: Path) -> None:
    shutil.rmtree(root)
    folder_of(root, seed=100)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another class": (
        rename("labeled/cat/0.bmp", "labeled/dog/9.bmp"),
        "1 file has another class or part (such as 'labeled/cat/0.bmp', then 'cat', now 'labeled/dog/9.bmp', 'dog')",
    ),
    "a label withdrawn": (
        rename("labeled/cat/0.bmp", "unlabeled/9.bmp"),
        "1 file has another class or part (such as 'labeled/cat/0.bmp', then 'cat', now 'unlabeled/9.bmp', unlabeled)",
    ),
    "a label given": (
        rename("unlabeled/0.bmp", "labeled/cat/9.bmp"),
        "1 file has another class or part (such as 'unlabeled/0.bmp', then unlabeled, now 'labeled/cat/9.bmp', 'cat')",
    ),
    "tested, not labeled": (
        rename("labeled/cat/0.bmp", "test/cat/9.bmp"),
        "then 'cat', now 'test/cat/9.bmp', test image of 'cat')",
    ),
    "a class renamed": (rename("labeled/cat", "labeled/lynx"), "4 files have another class or part"),
    "another path": (
        rename("labeled/cat/0.bmp", "labeled/cat/deep/0.bmp"),
        "1 file lies under another path (such as 'labeled/cat/0.bmp', now 'labeled/cat/deep/0.bmp')",
    ),
    "a new label": (
        lambda root: put(root / "labeled/dog/9.bmp", 99),
        "1 file is new among the labeled, validation and test images (such as 'labeled/dog/9.bmp', 'dog')",
    ),
    "new test images": (
        lambda root: [put(root / f"test/dog/{i}.bmp", 90 + i) for i in (7, 8)],
        "2 files are new among the labeled, validation and test images (such as 'test/dog/7.bmp', test image of 'dog')",
    ),
    "a new class": (lambda root: put(root / "labeled/emu/0.bmp", 99), "(such as 'labeled/emu/0.bmp', 'emu')"),
    "other pixels": (
        lambda root: put(root / "unlabeled/2.bmp", 99),
        "1 file has other content (such as 'unlabeled/2.bmp')",
    ),
    "two files swapped": (swap, "2 files have other content (such as 'labeled/cat/0.bmp')"),
    "another folder of the same names, sizes and times": (another_folder, "14 files have other content"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_is_refused(tmp_path: Path, change: str) -> None:
    root, run_dir = folder_of(tmp_path / "data"), tmp_path / "run"
    start(root, run_dir)
    act, said = CHANGES[change]
    act(root)
    before = (run_dir / "files.json").read_bytes()
    error = refused(root, run_dir)
    assert f"data.root={root} has changed since the run began: " in error and said in error
    assert error.endswith(
        f"; choose another run_dir for a new run, or put the data back to go on with the one in run_dir={run_dir}"
    )
    assert (run_dir / "files.json").read_bytes() == before


def test_all_changes_are_counted_in_one_sentence(tmp_path: Path) -> None:
    root, run_dir = folder_of(tmp_path / "data"), tmp_path / "run"
    start(root, run_dir)
    for change in ("another class", "a new class", "other pixels"):
        CHANGES[change][0](root)
    error = refused(root, run_dir)
    assert all(CHANGES[change][1] in error for change in ("another class", "a new class", "other pixels"))


def edit(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new)


TABLES: dict[str, tuple[Callable[[str], str], str]] = {
    "exchanged": (
        lambda text: text.replace("cat", "x").replace("dog", "cat").replace("x", "dog"),
        "8 files have another class or part (such as '1.bmp', then 'cat', now 'dog')",
    ),
    "corrected": (
        edit("1.bmp,cat", "1.bmp,dog"),
        "1 file has another class or part (such as '1.bmp', then 'cat', now 'dog')",
    ),
    "a class added": (edit("8.bmp,", "8.bmp,emu"), "(such as '8.bmp', then unlabeled, now 'emu')"),
    "all labels removed": (
        edit(",cat,\n", ",,\n"),
        "3 files have another class or part (such as '1.bmp', then 'cat'",
    ),
    "another split": (
        edit("1.bmp,cat,", "1.bmp,cat,test"),
        "(such as '1.bmp', then 'cat', now test image of 'cat')",
    ),
    "a row deleted": (
        edit("3.bmp,cat,\n", ""),
        "1 file is still there, but no longer listed (such as '3.bmp')",
    ),
    "other blanks in a class": (edit("cat", "c at"), "now 'c at')"),
    "nonsense": (lambda text: "nonsense", "must begin with a line of column names"),
    "empty": (lambda text: "", "must begin with a line of column names"),
    "its head alone": (lambda text: "path,label", "12 files are still there, but no longer listed"),
}


@pytest.mark.parametrize("name", ["labels.csv", "labels_v2.csv"])
@pytest.mark.parametrize("change", TABLES)
def test_a_changed_table_is_refused(tmp_path: Path, change: str, name: str) -> None:
    first, run_dir = table_of(tmp_path / "data"), tmp_path / "run"
    start(first, run_dir)
    act, said = TABLES[change]
    first.with_name(name).write_text(act(first.read_text()))
    assert said in refused(first.with_name(name), run_dir)


def test_a_table_that_is_gone_is_refused(tmp_path: Path) -> None:
    first, run_dir = table_of(tmp_path / "data"), tmp_path / "run"
    start(first, run_dir)
    first.unlink()
    assert "there is no folder or CSV file" in refused(first, run_dir)


@pytest.mark.parametrize("loader", ["plain", "resident"])
def test_the_same_bytes_go_on_wherever_and_whenever_they_lie(tmp_path: Path, loader: str) -> None:
    root, run_dir = folder_of(tmp_path / "data", test=False), tmp_path / "run"
    first, _ = start(root, run_dir, loader)
    line = fingerprint(first)
    for file in root.rglob("*.bmp"):
        os.utime(file, ns=(7, 7))
    assert fingerprint(start(root, run_dir, loader)[0]) == line
    copy = shutil.copytree(root, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    shutil.rmtree(root)
    again, said = start(copy, run_dir, loader)
    assert fingerprint(again) == line and "the run goes on with the files of its first start" in said
    assert again.names == first.names and again.test_names == first.test_names
    assert again.mean == first.mean and again.std == first.std and again.notes == first.notes
    assert any("held out" in note for note in again.notes)
    put(copy / "labeled/cat/0.bmp", 99)
    assert "1 file has other content" in refused(copy, run_dir)


@pytest.mark.parametrize("loader", ["plain", "resident"])
@pytest.mark.parametrize("table", [False, True])
def test_a_copy_may_have_names_of_another_unicode_form(tmp_path: Path, loader: str, table: bool) -> None:
    here, there, run_dir = tmp_path / "here", tmp_path / "there", tmp_path / "run"
    for root, form in ((here, "NFC"), (there, "NFD")):
        rows = ["path,label"]
        for i, part in enumerate(["labeled/Käfer", "labeled/Bär", "unlabeled"] * 3):
            name = f"{part}/größe {i}.bmp"
            put(root / unicodedata.normalize(form, name), i)
            rows.append(f"{name},{part.partition('/')[2]}")
        (root / "table.csv").write_text("\n".join(rows))
    at = "table.csv" if table else ""
    first, _ = start(here / at, run_dir, loader)
    again, _ = start(there / at, run_dir, loader)
    assert fingerprint(again) == fingerprint(first) and again.classes == first.classes
    assert (
        torch.equal(again.train_images, first.train_images)
        and not again.unreadable
        and not again.test_unreadable
    )
    assert again.names == [unicodedata.normalize("NFD", name) for name in first.names or []] != first.names
    put(there / unicodedata.normalize("NFD", "labeled/Käfer/größe 0.bmp"), 99)
    assert "1 file has other content" in refused(there / at, run_dir)


def test_a_table_may_be_written_anew(tmp_path: Path) -> None:
    first, run_dir = table_of(tmp_path / "data"), tmp_path / "run"
    line = fingerprint(start(first, run_dir)[0])
    head, *rows = first.read_text().splitlines()
    for text in (
        "\n".join([head, *rows[::-1]]),
        "\r\n".join([head, *rows]).replace(",", ";"),
        "\n".join([f"{head},,", *(f"{row},," for row in rows)]),
    ):
        first.write_text(text)
        assert fingerprint(start(first, run_dir)[0]) == line
    first.with_name("11.bmp").unlink()  # gone, and its row with it
    first.write_text("\n".join([head, *rows[:-1]]))
    assert start(first, run_dir)[0].unreadable == {7: "'11.bmp' is gone"}


def test_new_unlabeled_files_are_said_and_left(tmp_path: Path) -> None:
    root, run_dir = folder_of(tmp_path / "data"), tmp_path / "run"
    line = fingerprint(start(root, run_dir)[0])
    put(root / "unlabeled/new.bmp", 99)
    data, _ = start(root, run_dir)
    assert fingerprint(data) == line and data.names is not None and "unlabeled/new.bmp" not in data.names
    assert [note for note in data.notes if "new" in note] == [
        "1 unlabeled file is new, such as 'unlabeled/new.bmp': the run goes on without it. "
        "Choose another run_dir to use all files"
    ]


def test_what_vanishes_is_lost_and_what_vanishes_for_the_most_part_is_refused(tmp_path: Path) -> None:
    root, run_dir = folder_of(tmp_path / "data"), tmp_path / "run"
    line = fingerprint(start(root, run_dir)[0])
    shutil.rmtree(root / "labeled/dog")  # a whole class
    shutil.rmtree(root / "test")
    data, _ = start(root, run_dir)
    assert (
        fingerprint(data) == line
        and sorted(data.unreadable) == [4, 5, 6, 7]
        and sorted(data.test_unreadable) == [0, 1]
    )
    (root / "unlabeled/0.bmp").unlink()
    (root / "unlabeled/1.bmp").unlink()
    assert f"data.root={root} lacks 8 of the 14 files of the run; choose another" in refused(root, run_dir)


def test_damaged_files_stay_left_out(tmp_path: Path) -> None:
    root, run_dir = folder_of(tmp_path / "data"), tmp_path / "run"
    (root / "labeled/cat/3.bmp").write_bytes(b"")
    first, _ = start(root, run_dir)
    assert len(first.damaged) == 1
    again, _ = start(root, run_dir)
    assert fingerprint(again) == fingerprint(first) and again.damaged == first.damaged
    (root / "labeled/cat/3.bmp").unlink()
    assert fingerprint(start(root, run_dir)[0]) == fingerprint(first)
    put(root / "labeled/dog/3.bmp", 99)
    refused(root, run_dir)


def test_a_list_that_is_gone_is_made_again_and_compared_with_the_checkpoint(tmp_path: Path) -> None:
    root, run_dir = folder_of(tmp_path / "data"), tmp_path / "run"
    first, _ = start(root, run_dir)
    (run_dir / "files.json").unlink()
    assert fingerprint(start(root, run_dir)[0]) == fingerprint(first)
    (run_dir / "files.json").unlink()
    put(root / "unlabeled/0.bmp", 99)
    now = fingerprint(start(root, run_dir)[0])
    said = differences(first, now, fingerprint(first), run_dir / "images.npz")
    assert "other content of the files" in said and "12 training and 2 test images" in said


VALIDATION: dict[str, tuple[Callable[[Path], object], str]] = {
    "no longer trained on": (
        rename("labeled/cat/0.bmp", "val/cat/9.bmp"),
        "1 file has another class or part (such as 'labeled/cat/0.bmp', then 'cat', now 'val/cat/9.bmp', validation "
        "image of 'cat')",
    ),
    "trained on": (
        rename("val/cat/0.bmp", "labeled/cat/9.bmp"),
        "then validation image of 'cat', now 'labeled/cat/9.bmp', 'cat')",
    ),
    "a label withdrawn": (rename("val/cat/0.bmp", "unlabeled/9.bmp"), "then validation image of 'cat', now"),
    "a label corrected": (
        rename("val/cat/0.bmp", "val/dog/9.bmp"),
        "image of 'cat', now 'val/dog/9.bmp', validation",
    ),
    "tested": (rename("val/cat/0.bmp", "test/cat/9.bmp"), "now 'test/cat/9.bmp', test image of 'cat')"),
    "a new one": (
        lambda root: put(root / "val/dog/9.bmp", 99),
        "1 file is new among the labeled, validation and test images (such as 'val/dog/9.bmp', validation image of",
    ),
    "other pixels": (
        lambda root: put(root / "val/dog/0.bmp", 99),
        "1 file has other content (such as 'val/dog/0.bmp')",
    ),
}


def with_validation(root: Path, *, test: bool = True) -> Path:
    put(root / "val/cat/0.bmp", 40)
    put(root / "val/dog/0.bmp", 41)
    return folder_of(root, test=test)


@pytest.mark.parametrize("change", VALIDATION)
def test_a_changed_validation_part_is_refused(tmp_path: Path, change: str) -> None:
    root, run_dir = with_validation(tmp_path / "data"), tmp_path / "run"
    start(root, run_dir)
    act, said = VALIDATION[change]
    act(root)
    assert said in refused(root, run_dir)


@pytest.mark.parametrize("loader", ["plain", "resident"])
def test_a_run_goes_on_with_its_validation_part(tmp_path: Path, loader: str) -> None:
    root, run_dir = with_validation(tmp_path / "data"), tmp_path / "run"
    (root / "val/dog/cut.bmp").write_bytes(b"BM")
    first, _ = start(root, run_dir, loader)
    assert first.manifest is not None and first.manifest.left_out == {"val/dog/cut.bmp": ("val", "dog")}
    assert Manifest.read(first.manifest.write()) == first.manifest
    assert first.val is not None and first.val.tolist() == [12, 13]
    assert fingerprint(first).startswith("12 training, 2 validation and 2 test images; ")
    again, _ = start(root, run_dir, loader)
    assert fingerprint(again) == fingerprint(first) and torch.equal(again.val, first.val)
    assert again.mean == first.mean
    (root / "val/cat/0.bmp").unlink()
    gone, _ = start(root, run_dir, loader)
    assert list(gone.unreadable) == [12] and fingerprint(gone) == fingerprint(first)
    assert gone.train_labels.tolist() == first.train_labels.tolist()


def test_a_validation_part_beside_a_share_that_is_held_out(tmp_path: Path) -> None:
    root, run_dir = with_validation(tmp_path / "data", test=False), tmp_path / "run"
    first, _ = start(root, run_dir)
    assert first.val is not None and first.val.tolist() == [10, 11]
    assert [name.split("/")[0] for name in first.test_names or []] == ["labeled", "labeled"]
    again, _ = start(root, run_dir)
    assert fingerprint(again) == fingerprint(first) and torch.equal(again.val, first.val)
    rename("val/cat/0.bmp", "labeled/cat/9.bmp")(root)
    assert "then validation image of 'cat', now 'labeled/cat/9.bmp', 'cat')" in refused(root, run_dir)


def test_a_table_has_a_validation_part(tmp_path: Path) -> None:
    first, run_dir = table_of(tmp_path / "data"), tmp_path / "run"
    first.write_text(
        first.read_text().replace("1.bmp,cat,", "1.bmp,cat,val", 1).replace("5.bmp,dog,", "5.bmp,dog,VAL")
    )
    data, _ = start(first, run_dir)
    assert data.names is not None and [data.names[i] for i in data.val.tolist()] == ["1.bmp", "5.bmp"]
    assert torch.equal(start(first, run_dir)[0].val, data.val)
    first.write_text(first.read_text().replace("1.bmp,cat,val", "1.bmp,cat,", 1))
    assert (
        "1 file has another class or part (such as '1.bmp', then validation image of 'cat', now 'cat')"
        in refused(first, run_dir)
    )


def test_a_validation_part_that_is_added_later_is_another_run(tmp_path: Path) -> None:
    root, run_dir = folder_of(tmp_path / "data"), tmp_path / "run"
    start(root, run_dir)
    with_validation(root)
    assert "2 files are new among the labeled, validation and test images" in refused(root, run_dir)


def test_a_rotten_validation_part_is_one_sentence(tmp_path: Path) -> None:
    root, run_dir = with_validation(tmp_path / "data"), tmp_path / "run"
    start(root, run_dir)
    path = run_dir / "files.json"
    about = json.loads(path.read_bytes())
    for value in (None, True, -1, 0, 1, 3, 6, 7, 14, 99, 0.5, "2", [2]):
        path.write_text(json.dumps({**about, "val": value}))
        assert "files.json, the list of the run's files, is damaged" in refused_list(root, run_dir), value


def refused_list(root: Path, run_dir: Path) -> str:
    with pytest.raises(ValueError) as caught:
        start(root, run_dir)
    return str(caught.value)


# --- a list from a stranger, or from a bad day ---------------------------------------------------------------


def mutations(about: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    odd = [None, True, -1, 10**30, 0.5, "x", [], {}, [[]], [None], {"a": 1}, float("nan")]
    found = [(f"{key} = {value!r}"[:60], {**about, key: value}) for key in about for value in odd]
    found += [(f"no {key}", {k: v for k, v in about.items() if k != key}) for key in about]
    found += [("one more", {**about, "more": 1})]
    for place in (0, 9, -1):
        for column in range(len(about["files"][0])):
            for value in [None, True, -7, 10**30, 0.5, "x", [], "\0"]:
                files = [list(file) for file in about["files"]]
                if files[place][column] == value:
                    continue
                files[place][column] = value
                found.append((f"files[{place}][{column}] = {value!r}", {**about, "files": files}))
        found.append((f"files[{place}] twice", {**about, "files": [*about["files"], about["files"][place]]}))
    found.append(("reversed", {**about, "files": about["files"][::-1]}))
    found += [(f"labeled {n}", {**about, "labeled": n}) for n in (0, 7, 9, 12, 14, 99)]
    found += [(f"train {n}", {**about, "train": n}) for n in (0, 8, 11, 13, 14, 99)]
    found += [
        ("classes swapped", {**about, "classes": about["classes"][::-1]}),
        ("a class more", {**about, "classes": [*about["classes"], "emu"]}),
        ("held out", {**about, "held_out": True}),
        ("left out", {**about, "left_out": {"unlabeled/0.bmp": ["unlabeled", ""]}}),
        ("std 0", {**about, "std": [0.0, 0.5, 0.5]}),
        ("std negative", {**about, "std": [-0.1, 0.5, 0.5]}),
        ("mean inf", {**about, "mean": [float("inf"), 0.5, 0.5]}),
    ]
    return found


def test_a_rotten_list_is_one_sentence_or_changes_nothing(tmp_path: Path) -> None:
    root, run_dir = folder_of(tmp_path / "data"), tmp_path / "run"
    first, _ = start(root, run_dir)
    path = run_dir / "files.json"
    about, line = json.loads(path.read_bytes()), fingerprint(first)
    believed = []
    for what, changed in mutations(about):
        path.write_text(json.dumps(changed))
        try:
            data, _ = start(root, run_dir)
        except ValueError as error:
            assert "\n" not in str(error) and ("files.json" in str(error) or "has changed" in str(error)), (
                what
            )
            continue
        believed.append(what)
        # Sizes, times and hashes are only for comparing; the rest is in the checkpoint's fingerprint.
        assert fingerprint(data) != line or data.names == first.names, what
        assert all(type(note) is str for note in data.notes)
    assert all(re.match(r"files\[|notes|damaged|left_out|mean|std|held", what) for what in believed), believed


def test_a_list_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    root, run_dir = folder_of(tmp_path / "data"), tmp_path / "run"
    start(root, run_dir)
    path = run_dir / "files.json"
    whole = path.read_bytes()
    older = json.dumps({"root": str(root), "classes": ["cat", "dog"], "files": [["a", 0, 1, 2]]}).encode()
    for content, said in (
        (b"", "is damaged"),
        (whole[:-9], "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b"[]", "is damaged"),
        (older, "is of an older ups_fast, which knew no images for validation"),
    ):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"files\.json, the list of the run's files, {said}.*; choose another"
        ):
            start(root, run_dir)
    path.unlink()
    os.mkfifo(path)  # which would hang for ever
    with pytest.raises(ValueError, match=r"files\.json, the list of the run's files, is no file"):
        start(root, run_dir)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data")
    put(root / "unlabeled" / os.fsdecode(b"\xff e\xcc\x81 \n.bmp"), 50)
    (root / "unlabeled/cut.bmp").write_bytes(b"BM")
    data, _ = start(root, tmp_path / "run")
    assert data.manifest is not None and data.manifest.left_out == {"unlabeled/cut.bmp": ("unlabeled", "")}
    assert Manifest.read(data.manifest.write()) == data.manifest
    start(root, tmp_path / "run")


# --- arrays --------------------------------------------------------------------------------------------------


def changed(tensor: torch.Tensor, *places: int) -> torch.Tensor:
    other = tensor.clone()
    for i in places:
        other[i] = (other[i] + 1) % 3
    return other


def test_what_changes_in_arrays_is_counted(tmp_path: Path) -> None:
    data = tiny_set()
    then, record = fingerprint(data), tmp_path / "images.npz"
    write_files(tmp_path, data)
    assert record.exists() and fingerprint(tiny_set()) == then
    for other, said in (
        (
            replace(data, train_images=changed(data.train_images, 3, 59)),
            "2 of 60 training images differ (the first is image 3)",
        ),
        (
            replace(data, train_labels=changed(data.train_labels, 59)),
            "1 of 60 training labels differ (the first is image 59, then 'bottom', now 'top')",
        ),
        (
            replace(data, train_labels=torch.full((60,), -1)),
            "60 of 60 training labels differ (the first is image 0, then 'top', now without a label)",
        ),
        (replace(data, test_images=changed(data.test_images, 0)), "1 of 30 test images differ"),
        (replace(data, test_labels=changed(data.test_labels, 1, 2)), "2 of 30 test labels differ"),
        (replace(data, classes=["a", "b", "c"]), "other classes"),
        (replace(data, labeled=torch.arange(6)), "other labeled part"),
        (
            replace(data, test_images=data.test_images[:9], test_labels=data.test_labels[:9]),
            "other test images, other test labels (now 60 training and 9 test images, then 60 training and 30",
        ),
    ):
        now = fingerprint(other)
        assert now != then
        assert differences(other, now, then, record).startswith(said)
        for content in (b"", b"PK", None):  # the record only explains
            (tmp_path / "bad.npz").unlink(missing_ok=True)
            if content is not None:
                (tmp_path / "bad.npz").write_bytes(content)
            assert differences(other, now, then, tmp_path / "bad.npz").startswith("other ")
    assert differences(data, then, "60 training and 30 test images, hash 00ff", record).startswith("other ")


def test_what_changes_in_a_validation_part_is_counted(tmp_path: Path) -> None:
    data = replace(tiny_set(), val=torch.tensor([50, 51, 59]))
    then, record = fingerprint(data), tmp_path / "images.npz"
    assert then.startswith("57 training, 3 validation and 30 test images; ")
    assert then.split("; ")[1].startswith(fingerprint(tiny_set()).split("; ")[1]), "all else as without them"
    write_files(tmp_path, data)
    for other, said in (
        (
            replace(data, train_images=changed(data.train_images, 3, 51, 59)),
            "1 of 57 training images differ (the first is image 3), "
            "2 of 3 validation images differ (the first is image 1)",
        ),
        (
            replace(data, train_labels=changed(data.train_labels, 51)),
            "1 of 3 validation labels differ (the first is image 1, then 'top', now 'middle')",
        ),
        (
            replace(data, train_labels=changed(data.train_labels, 52)),
            "1 of 57 training labels differ (the first is",
        ),
        (replace(data, val=torch.tensor([50, 51, 58])), "other validation part (57 training, 3"),
        (replace(data, val=None), "other validation part (now 60 training and 30 test images, then 57"),
    ):
        assert differences(other, fingerprint(other), then, record).startswith(said)


def test_a_record_that_grows_in_memory_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, record = tiny_set(), tmp_path / "images.npz"
    other = replace(data, train_labels=torch.full((60,), -1))
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("it was read"))
    np.savez_compressed(record, train=np.zeros(1 << 22, np.int64))
    assert differences(other, fingerprint(other), fingerprint(data), record).startswith(
        "other training labels"
    )


def test_other_channels_are_for_the_comparison_of_configs(tmp_path: Path) -> None:
    root, run_dir = folder_of(tmp_path / "data"), tmp_path / "run"
    first, _ = start(root, run_dir)
    assert len(first.mean) == 3
    again, _ = start(root, run_dir, "plain", channels=1)
    assert len(again.mean) == 1


def test_weights_are_part_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"1")
    (tmp_path / "v.pth").write_bytes(b"2")
    data = tiny_set()
    one, two = (fingerprint(data, str(tmp_path / name)) for name in ("w.pth", "v.pth"))
    assert one != two != fingerprint(data)
    assert differences(data, two, one, tmp_path / "no").startswith("other pretrained weights (")


def test_equal_images_are_found_in_arrays_as_in_files() -> None:
    data = replace(tiny_set(), labeled=torch.arange(6))
    assert notes_on_equal_arrays(data, torch.arange(6)) == []
    train, test = data.train_images.clone(), data.test_images.clone()
    test[4], train[2], train[9], train[7] = train[0], train[1], test[5], train[5]
    data = replace(data, train_images=train, test_images=test)
    assert notes_on_equal_arrays(data, torch.arange(6)) == [
        "1 test image equal to labeled ones: the test accuracy will look too good (such as x_test[4] and x_labeled[0])",
        "2 images equal to ones of another class: one of the two labels is wrong "
        "(such as x_labeled[2] and x_labeled[1])",
        "1 unlabeled image equal to test images: the test is not only of unseen images "
        "(such as x_unlabeled[3] and x_test[5])",
        "1 unlabeled image equal to labeled ones: they count twice (such as x_unlabeled[1] and x_labeled[5])",
    ]
    assert len(array_record(data)["train"].unique()) == 58
    data = replace(data, labeled=None)
    assert "(such as test image 4 and training image 0)" in notes_on_equal_arrays(data, torch.arange(6))[0]


def test_equal_images_of_a_validation_part_are_found_in_arrays() -> None:
    data = replace(tiny_set(), labeled=torch.arange(6), val=torch.arange(50, 60))
    train, test = data.train_images.clone(), data.test_images.clone()
    train[51], train[20], test[2] = train[0], train[53], train[59]
    data = replace(data, train_images=train, test_images=test)
    assert notes_on_equal_arrays(data, torch.arange(6)) == [
        "1 test image equal to validation images: the test accuracy will look too good "
        "(such as x_test[2] and x_val[9])",
        "1 validation image equal to labeled ones: the validation accuracy will look too good "
        "(such as x_val[1] and x_labeled[0])",
        "1 unlabeled image equal to validation images: the validation is not only of unseen images "
        "(such as x_unlabeled[14] and x_val[3])",
    ]
