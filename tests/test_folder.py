"""A user's folder or CSV file: what is found, what is said, what is left out, and the whole as an ImageSet."""

from __future__ import annotations

import errno
import json
import os
import re
import time
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ups_fast.data import Folder, as_file_set, as_image_set, check, scan
from ups_fast.data import image as image_module
from ups_fast.data.classes import class_counts, classes_line, uneven


def put(root: Path, *names: str, size: tuple[int, int] = (6, 5)) -> None:
    """An image at each path, of content that depends on its path."""
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(list(name.encode()))
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, format="PNG")


def put_all(root: Path, *, test: bool = True) -> None:
    put(root, *(f"labeled/{c}/{i}.png" for c in ("cat", "dog") for i in range(5)))
    put(root, *(f"unlabeled/{i}.png" for i in range(4)))
    if test:
        put(root, "test/cat/0.png", "test/dog/0.png")


def parts(folder: Folder) -> tuple[list[str], list[str], list[str]]:
    labeled, unlabeled, test = (
        [folder.paths[i] for i in index] for index in (folder.labeled, folder.unlabeled, folder.test)
    )
    val = [folder.paths[i] for i in folder.val]
    assert sorted(labeled + unlabeled + test + val) == folder.paths == sorted(set(folder.paths))
    for index in (folder.label, folder.labeled, folder.unlabeled, folder.test, folder.val):
        assert index.dtype == torch.int64
    assert (folder.label[folder.unlabeled] == -1).all() and len(folder.label) == len(folder.paths)
    assert all((folder.label[index] >= 0).all() for index in (folder.labeled, folder.test, folder.val))
    return labeled, unlabeled, test


def said(folder: Folder, pattern: str) -> str:
    (note,) = [note for note in folder.notes if re.search(pattern, note)]
    assert "\n" not in note
    note.encode()
    return note


# --- folders -----------------------------------------------------------------------------------------------


def test_folders_are_read_in_the_order_of_their_names(tmp_path):
    put_all(tmp_path)
    folder = scan(tmp_path)
    labeled, unlabeled, test = parts(folder)
    assert labeled == [f"labeled/{c}/{i}.png" for c in ("cat", "dog") for i in range(5)]
    assert unlabeled == [f"unlabeled/{i}.png" for i in range(4)]
    assert test == ["test/cat/0.png", "test/dog/0.png"]
    assert folder.classes == ["cat", "dog"] and folder.root == tmp_path and folder.notes == []
    assert folder.label[folder.labeled].tolist() == [0] * 5 + [1] * 5
    assert folder.label[folder.test].tolist() == [0, 1]
    again = scan(str(tmp_path), seed=9, test_share=0.5)  # with test images nothing is drawn
    assert parts(again) == parts(folder)


def test_a_folder_may_begin_with_a_tilde(tmp_path, monkeypatch):
    """A config says ./~name for it, and nothing takes that for a home folder again."""
    put_all(tmp_path / "~nobody's")
    monkeypatch.chdir(tmp_path)
    assert scan("./~nobody's").root == Path("~nobody's")


def test_nested_hidden_and_foreign_files(tmp_path):
    put_all(tmp_path)
    put(tmp_path, "labeled/cat/a/b/c/deep.JPeG", "unlabeled/x/y.TIFF", "unlabeled/z.WebP")
    hidden = ["unlabeled/.h.png", "unlabeled/._y.png", "labeled/.ipynb_checkpoints/a.png", ".x/a.png"]
    put(tmp_path, *hidden, "labeled/@eaDir/a.jpg", "unlabeled/__MACOSX/a.png", "labeled/cat/.c/a.png")
    for name in ("labeled/cat/Thumbs.db", "unlabeled/.DS_Store", "unlabeled/desktop.ini"):
        (tmp_path / name).write_bytes(b"1")
    assert len(scan(tmp_path).paths) == 19 and scan(tmp_path).notes == []
    for name in ("unlabeled/notes.txt", "unlabeled/more.TXT", "unlabeled/phone.heic", "unlabeled/jpg"):
        (tmp_path / name).write_bytes(b"1")
    put(tmp_path, "labeled/stray.png", "test/stray2.png", "stray3.jpg", "extra/cat/a.png")
    folder = scan(tmp_path)
    assert len(folder.paths) == 19 and {"labeled/cat/a/b/c/deep.JPeG", "unlabeled/x/y.TIFF"} < set(
        folder.paths
    )
    assert said(folder, "suffix") == "4 files ignored for the suffix: 2 '.txt', 1 without one, 1 '.heic'"
    assert said(folder, "outside") == "3 images outside of any class left out, the first: 'stray3.jpg'"
    assert said(folder, "other folders").endswith("not read: 'extra'")
    assert len(folder.notes) == 3


ODD = [
    "zwei Wörter.png",
    "猫 🐈.png",
    "a'b\"c;,%s{x}\\n.png",
    " .png",
    "-rf.png",
    "e\u0301.png",
    os.fsdecode(b"\xff.png"),
]


def test_odd_names(tmp_path):
    put_all(tmp_path)
    for name in ODD:
        put(tmp_path, "unlabeled/a.png")
        os.rename(tmp_path / "unlabeled/a.png", tmp_path / "unlabeled" / name)
    put(tmp_path, *(f"labeled/Großer Hund, {{}} %s/{i}.png" for i in range(2)))
    folder = scan(tmp_path)
    assert {f"unlabeled/{name}" for name in ODD} < set(folder.paths)
    assert folder.classes == ["Großer Hund, {} %s", "cat", "dog"]
    said(folder, "^no test image is of class 'Großer Hund, {} %s'$")
    (tmp_path / "unlabeled" / ODD[-1]).write_bytes(b"")
    for _ in range(2):
        folder, damaged = check(folder, cache=tmp_path / "run/checked.json")
        assert [d.path for d in damaged] in ([f"unlabeled/{ODD[-1]}"], [])
        damaged and damaged[0].reason.encode()
    assert len(json.loads((tmp_path / "run/checked.json").read_text())["files"]) == len(folder.paths)


def test_a_class_must_be_utf8(tmp_path):
    put_all(tmp_path)
    put(tmp_path, "labeled/emu/0.png")
    os.rename(tmp_path / "labeled/emu", tmp_path / "labeled" / os.fsdecode(b"em\xfc"))
    with pytest.raises(ValueError, match=r"^names of classes must be UTF-8, '.*' has 'em\\udcfc'$"):
        scan(tmp_path)


def test_links_are_followed_and_loops_end(tmp_path):
    put_all(tmp_path)
    put(tmp_path, "elsewhere/a.png", "elsewhere/deep/b.png", "elsewhere2/c.png")
    (tmp_path / "unlabeled/link.png").symlink_to("../elsewhere/a.png")
    (tmp_path / "unlabeled/link").symlink_to("../elsewhere/deep")
    (tmp_path / "unlabeled/self").symlink_to(".")
    (tmp_path / "unlabeled/up").symlink_to("..")
    (tmp_path / "unlabeled/nothing.png").symlink_to("not there")
    (tmp_path / "unlabeled/ring.png").symlink_to("ring.png")
    (tmp_path / "unlabeled/ring").symlink_to("ring")
    (tmp_path / "labeled/cat/up").symlink_to(tmp_path / "labeled")  # else every dog were a cat
    (tmp_path / "labeled/emu").symlink_to(tmp_path / "elsewhere2")
    (tmp_path / "elsewhere2/root").symlink_to(tmp_path)
    for a in "pqr":  # each links to each: paths without end, but three folders
        (tmp_path / "unlabeled" / a).mkdir()
        for b in "pqr":
            (tmp_path / "unlabeled" / a / f"to_{b}").symlink_to(tmp_path / "unlabeled" / b)
    put(tmp_path, "unlabeled/p/p.png")
    os.mkfifo(tmp_path / "unlabeled/pipe.png")
    labeled, unlabeled, _ = parts(scan(tmp_path))
    assert labeled == [
        *(f"labeled/{c}/{i}.png" for c in ("cat", "dog") for i in range(5)),
        "labeled/emu/c.png",
    ]
    new = ["link.png", "link/b.png", "nothing.png", "p/p.png", "ring.png"]
    assert unlabeled == [*(f"unlabeled/{i}.png" for i in range(4)), *(f"unlabeled/{name}" for name in new)]
    folder, damaged = check(scan(tmp_path))
    assert [d.path for d in damaged] == ["unlabeled/nothing.png", "unlabeled/ring.png"]
    assert len(folder.paths) == len(labeled) + len(unlabeled)  # two of them gone, two test images
    said(folder, "^2 damaged files left out, such as '.*nothing.png' cannot be opened")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("rm -r labeled", r"'{root}' must have the folders labeled/<class>/ and unlabeled/, it lacks labeled and has "
                          r"'test', 'unlabeled'"),
        ("rm -r *", r"'{root}' must have .*, it lacks labeled and unlabeled and has no folder"),
        ("mv labeled labelled", r"'{root}' must have .*, it lacks labeled and has 'labelled', 'test', 'unlabeled'"),
        ("rm unlabeled/*", r"'{root}' has no unlabeled images, and UPS needs some"),
        ("mkdir labeled/emu", r"class folder 'labeled/emu' of '{root}' has no images: .*"),
        ("mkdir labeled/emu; echo hi > labeled/emu/a.txt", r"class folder 'labeled/emu' of .*"),
        ("rm -r labeled/cat test/cat", r"'{root}' must have labeled images of at least two classes, got only 'dog'"),
        ("rm -r labeled/*", r"'{root}' must have labeled images of at least two classes, got none"),
        ("mv test/cat test/lynx", r"the test images of '{root}' have class 'lynx', of which no image is labeled"),
        ("rm -r test/*", r"test/ of '{root}' has no images in class folders: .*"),
        ("rm -r labeled; echo > labeled", r"'{root}' must have .*, it lacks labeled .*"),
        ("mkdir val", r"val/ of '{root}' has no images in class folders: put some there, or delete it"),
        ("mkdir val; cp test/cat/0.png val", r"val/ of '{root}' has no images in class folders: .*"),
        ("mkdir -p val/cat; echo > val/cat/a.heic", r"val/ of '{root}' has no .*: 'val/' has 1 file of kinds that .*"),
        ("cp -r test val; mv val/cat val/lynx", r"the validation images of '{root}' have class 'lynx', of which no .*"),
        ("rm -r test labeled/*/[1-9].png", r"'{root}' has no test images, and no class has .*"),
    ],
)  # fmt: skip
def test_scan_refuses(tmp_path, change, sentence):
    put_all(tmp_path)
    assert os.system(f"cd '{tmp_path}' && {change}") == 0
    with pytest.raises(ValueError, match=f"^{sentence.replace('{root}', re.escape(str(tmp_path)))}$"):
        scan(tmp_path)


def test_scan_refuses_arguments(tmp_path):
    for root in (tmp_path / "nothing", str(tmp_path / "a\0b")):
        with pytest.raises(
            ValueError, match=f"^there is no folder or CSV file {re.escape(repr(str(root)))}$"
        ):
            scan(root)
    for share in (0, 1, -1, 2, float("nan")):
        with pytest.raises(ValueError, match=f"^test_share must be above 0 and below 1, got {share}$"):
            scan(tmp_path, test_share=share)


def test_a_folder_that_cannot_be_listed_is_said(tmp_path, monkeypatch):
    put_all(tmp_path)
    put(tmp_path, "unlabeled/locked/a.png")
    real = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    folder = scan(tmp_path)
    assert "unlabeled/locked/a.png" not in folder.paths
    said(folder, r"^folder 'unlabeled/locked' cannot be read \(Permission denied\) and is left out$")


def test_an_empty_class_of_test_is_a_note(tmp_path):
    put_all(tmp_path)
    put(tmp_path, "labeled/emu/0.png")
    (tmp_path / "test/emu").mkdir()
    folder = scan(tmp_path)
    assert said(folder, "class folder") == f"class folder 'test/emu' of {str(tmp_path)!r} has no images"
    said(folder, "^no test image is of class 'emu'$")


# --- a share held out --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "expected"), [(0.2, 1), (0.5, 3), (0.01, 1), (0.99, 4)])
def test_without_test_images_a_share_is_held_out(tmp_path, share, expected):
    put_all(tmp_path, test=False)
    put(tmp_path, "labeled/emu/only.png", "labeled/fox/a.png", "labeled/fox/b.png")
    folder = scan(tmp_path, test_share=share)
    labeled, _, test = parts(folder)
    assert folder.label[folder.test].bincount().tolist() == [expected, expected, 0, 1]
    assert folder.label[folder.labeled].bincount().tolist() == [5 - expected, 5 - expected, 1, 1]
    assert not set(labeled) & set(test)
    note = said(folder, "held out")
    assert f"{len(test)} of the 13 labeled ones ({share:.0%} of each class, drawn by seed 0)" in note
    said(folder, "^no test image is of class 'emu': it has a single labeled image$")


def test_what_is_held_out_follows_the_seed_and_the_names_alone(tmp_path):
    put(
        tmp_path / "a",
        *(f"labeled/{c}/{i}.png" for c in ("cat", "dog") for i in range(20)),
        "unlabeled/0.png",
    )
    state = torch.get_rng_state()
    first = parts(scan(tmp_path / "a", seed=1))[2]
    assert len(first) == 8 and parts(scan(tmp_path / "a", seed=1))[2] == first
    assert torch.equal(state, torch.get_rng_state())
    for other in (0, 2, 2**63 - 1):
        assert parts(scan(tmp_path / "a", seed=other))[2] != first
    os.rename(tmp_path / "a", tmp_path / "b")
    assert parts(scan(tmp_path / "b", seed=1))[2] == first
    put(tmp_path / "b", "labeled/cat/new.png", "labeled/bee/0.png", "labeled/bee/1.png")
    more = {name for name in parts(scan(tmp_path / "b", seed=1))[2] if "bee" not in name}
    assert len(more & set(first)) >= 7  # one more image changes at most one draw


def test_what_is_held_out_never_changes(tmp_path):
    """A run of last year can be drawn again: this is the stored answer, to be kept for good."""
    put_all(tmp_path, test=False)
    assert parts(scan(tmp_path, seed=3, test_share=0.4))[2] == [
        "labeled/cat/2.png",
        "labeled/cat/3.png",
        "labeled/dog/0.png",
        "labeled/dog/4.png",
    ]


def test_equal_files_are_held_out_together(tmp_path):
    put_all(tmp_path, test=False)
    for i in range(5):
        for copy in "ab":
            data = (tmp_path / f"labeled/cat/{i}.png").read_bytes()
            (tmp_path / f"labeled/cat/{i}{copy}.png").write_bytes(data)
    for seed in range(10):
        folder = scan(tmp_path, seed=seed)
        _, _, test = parts(folder)
        cats = {Path(name).stem for name in test if "cat" in name}
        assert len(cats) == 3 and len({name[0] for name in cats}) == 1
        assert len(folder.notes) == 1  # no leak


# --- equal content -----------------------------------------------------------------------------------------


def copy(root: Path, source: str, target: str) -> None:
    (root / target).write_bytes((root / source).read_bytes())


def test_equal_files_across_parts_are_said(tmp_path):
    put_all(tmp_path)
    copy(tmp_path, "labeled/cat/3.png", "test/cat/x.png")
    copy(tmp_path, "labeled/cat/1.png", "labeled/dog/wrong.png")
    copy(tmp_path, "test/dog/0.png", "unlabeled/y.png")
    copy(tmp_path, "labeled/dog/2.png", "unlabeled/z.png")
    copy(tmp_path, "labeled/dog/2.png", "unlabeled/zz.png")
    copy(tmp_path, "unlabeled/0.png", "unlabeled/same.png")  # harmless
    folder = scan(tmp_path)
    assert folder.notes == [
        "1 test image equal to labeled ones: the test accuracy will look too good "
        "(such as 'test/cat/x.png' and 'labeled/cat/3.png')",
        "1 image equal to ones of another class: one of the two labels is wrong "
        "(such as 'labeled/dog/wrong.png' and 'labeled/cat/1.png')",
        "1 unlabeled image equal to test images: the test is not only of unseen images "
        "(such as 'unlabeled/y.png' and 'test/dog/0.png')",
        "2 unlabeled images equal to labeled ones: they count twice "
        "(such as 'unlabeled/z.png' and 'labeled/dog/2.png')",
    ]


def test_files_of_equal_size_or_beginning_are_not_equal(tmp_path, monkeypatch):
    put_all(tmp_path)
    for name, tail in (("labeled/cat/b.png", b"1"), ("test/dog/b.png", b"2"), ("unlabeled/b.png", b"1")):
        (tmp_path / name).write_bytes(bytes(1 << 17) + tail)  # they differ in the last byte
    for name in ("labeled/cat/e.png", "test/dog/e.png", "unlabeled/e.png"):
        (tmp_path / name).write_bytes(b"")  # empty files are damaged, not equal
    folder = scan(tmp_path)
    assert len(folder.notes) == 1
    said(folder, "^1 unlabeled image equal to labeled ones.*'unlabeled/b.png' and 'labeled/cat/b.png'")


def test_files_of_other_sizes_are_never_opened(tmp_path, monkeypatch):
    put_all(tmp_path)
    sizes = [i for i, file in enumerate(sorted(tmp_path.rglob("*.png")))]
    for i, file in zip(sizes, sorted(tmp_path.rglob("*.png")), strict=True):
        file.write_bytes(bytes(100 + i))

    def never(*_):
        raise AssertionError("a file was opened")

    monkeypatch.setattr("ups_fast.data.equal.open", never, raising=False)
    assert scan(tmp_path).notes == []


# --- a CSV file --------------------------------------------------------------------------------------------


def table(root: Path, text: str | bytes) -> Path:
    file = root / "my.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_a_csv_file(tmp_path):
    put(tmp_path, "a b/ü.png", "c.png", "d.png", "e.png", "f.png", "no_suffix", "g/h,1.png")
    text = (
        "\ufeffpath, Label ,SPLIT,comment\r\n"
        'a b/ü.png, cat ,train,"two\r\nlines"\r\n'
        "./c.png,dog,,\r\n"
        "\r\n,,,\r\n"
        "d.png,,,unlabeled\r\n"
        "no_suffix,,train\r\n"
        "e.png,cat,Test,\r\n"
        "a b\\..\\f.png,dog, test ,\r\n"
        '"g/h,1.png",,,\r\n'
        "d.png,,,again\r\n"
        "gone.png,,,"
    )
    folder = scan(table(tmp_path, text))
    assert parts(folder) == (
        ["a b/ü.png", "c.png"], ["d.png", "g/h,1.png", "gone.png", "no_suffix"], ["e.png", "f.png"]
    )  # fmt: skip
    assert folder.classes == ["cat", "dog"] and folder.root == tmp_path
    assert folder.label.tolist() == [0, 1, -1, 0, 1, -1, -1, -1]
    said(folder, "^1 row of '.*my.csv' repeated others and were left out$")
    folder, damaged = check(folder)
    assert [d.path for d in damaged] == ["gone.png"] and "No such file" in damaged[0].reason


def test_a_csv_file_without_split_has_a_share_held_out(tmp_path):
    names = [f"{i}.png" for i in range(10)]
    put(tmp_path, *names, "u.png")
    rows = "".join(f"{name},{'ab'[i % 2]}\n" for i, name in enumerate(names))
    folder = scan(table(tmp_path, f"path,label\n{rows}u.png,\n"))
    assert [len(part) for part in parts(folder)] == [8, 1, 2]
    said(folder, "held out")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"'.*my\.csv' must begin with a line of column names, .* got ''"),
        ("path:label\n", r"'.*' must begin with a line of column names, .* got 'path:label'"),
        (b"PK\3\4" + bytes(99), r"'.*' must be a CSV file in UTF-8: it looks like a workbook; save it as .*"),
        ("path,label\n".encode("utf-16-le"), r"'.*' must be a CSV file in UTF-8: it holds zero bytes, .*"),
        ("path,label,path,,\n", r"'.*' must begin with .*, each once, .*"),
        ("sep=;\npath;label\na.png;x\n\n;y\n", r"line 5 of '.*' must have a path, got ''"),
        ("path,label,path\n", r"'.*' must begin with .*, each once, .*"),
        ("a.png,cat\n", r"'.*' must begin with .* got 'a\.png,cat'"),
        ("path,label\n", r"'.*' must have labeled images of at least two classes, got none"),
        ("path,label\na,x,b,c\n", r"line 2 of '.*' has 4 fields, but there are 2 columns"),
        ("path,label\na.png,x\n\n,y\n", r"line 4 of '.*' must have a path, got ''"),
        ("path,label,split\na.png,x,dev\n", r"line 2 of '.*' must have the split train, val, .*, got 'dev'"),
        ("path,label,split\na.png,,test\n", r"line 2 of '.*' is a test image and must have a label, got none"),
        ("path,label,split\na.png,,VAL\n", r"line 2 of '.*' is a validation image and must have a label, got none"),
        ("path,label,split\na.png,x,val\na.png,x,train\n", r"line 3 of '.*' contradicts an earlier one on 'a\.png'"),
        ("path,label,split\na.png,x\nb.png,y\nc.png,z,val\nd.png\n", r"the validation images .* have class 'z', .*"),
        ("path,label\na.png,x\n./a.png,y\n", r"line 3 of '.*' contradicts an earlier one on 'a\.png'"),
        (
            "path,label\nq.png,x\nr.png,y\n",
            r"none of the 2 files that '.*' lists is there, the first looked for is '.*/q\.png'",
        ),
        ("path,label\nA.PNG,x\nr.png,y\n", r"none of .*: 'A\.PNG' differs from 'a\.png' in upper and lower case"),
        ("path,label\na.png,x\nb.png,y\n", r"'.*' has no unlabeled images, and UPS needs some"),
        ("path,label,split\na.png,x\nb.png,y\nc.png,z,test\nd.png\n", r"the test images of '.*' have class 'z', .*"),
        ('path,label\n"a.png,x\n', r"'.*' must be a CSV file in UTF-8: .*"),
        (b"path,label\n\xff\xfe.png,x\n", r"'.*' must be a CSV file in UTF-8: .*"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), r"'.*' must be a CSV file in UTF-8: .*"),
        ("path,label\n" + "x" * 200_000 + ",a\n", r"'.*' must be a CSV file in UTF-8: field larger than .*"),
    ],
)  # fmt: skip
def test_a_csv_file_is_refused(tmp_path, text, sentence):
    put(tmp_path, "a.png", "b.png", "c.png", "d.png")
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        scan(table(tmp_path, text))


# --- a validation part -------------------------------------------------------------------------------------


VAL = ["val/cat/0.png", "val/dog/deep/1.png", "val/dog/x.png"]


def test_validation_images_are_in_no_other_part(tmp_path):
    put_all(tmp_path)
    before = scan(tmp_path)
    assert before.val.dtype == torch.int64 and len(before.val) == 0
    put(tmp_path, *VAL)
    folder = scan(tmp_path)
    assert [folder.paths[i] for i in folder.val] == VAL and folder.label[folder.val].tolist() == [0, 1, 1]
    assert parts(folder) == parts(before) and folder.notes == []
    rows = [f"{path},{path.split('/')[1]},val\n" for path in VAL]
    rows += [f"{path},{path.split('/')[1]},{path.split('/')[0].replace('labeled', 'train')}\n"
             for part in (0, 2) for path in parts(before)[part]]  # fmt: skip
    rows += [f"{path},,\n" for path in parts(before)[1]]
    listed = scan(table(tmp_path, "path,label,split\n" + "".join(rows)))
    assert parts(listed) == parts(before) and torch.equal(listed.val, folder.val) and listed.notes == []


def test_nothing_is_held_out_of_validation_images(tmp_path):
    put_all(tmp_path, test=False)
    before = scan(tmp_path)
    put(tmp_path, *VAL)
    folder = scan(tmp_path)
    assert parts(folder) == parts(before) and len(folder.val) == 3
    assert said(folder, "held out") == said(before, "held out") and "2 of the 10 labeled" in folder.notes[0]


def test_a_class_without_validation_images_is_said(tmp_path):
    put_all(tmp_path)
    put(tmp_path, *VAL, "labeled/emu/0.png", "test/emu/0.png")
    (tmp_path / "val/emu").mkdir()
    folder = scan(tmp_path)
    said(folder, "^no validation image is of class 'emu'$")
    said(folder, "^class folder 'val/emu' of '.*' has no images$")
    assert len(folder.notes) == 2


def test_equal_files_of_the_validation_part_are_said(tmp_path):
    put_all(tmp_path)
    put(tmp_path, *VAL)
    for source, target in (
        ("labeled/cat/3.png", "val/cat/x.png"),
        ("test/cat/0.png", "val/cat/y.png"),
        ("unlabeled/2.png", "val/dog/z.png"),
        ("val/cat/0.png", "val/dog/wrong.png"),
    ):
        copy(tmp_path, source, target)
    assert scan(tmp_path).notes == [
        "1 test image equal to validation images: the test accuracy will look too good "
        "(such as 'test/cat/0.png' and 'val/cat/y.png')",
        "1 validation image equal to labeled ones: the validation accuracy will look too good "
        "(such as 'val/cat/x.png' and 'labeled/cat/3.png')",
        "1 image equal to ones of another class: one of the two labels is wrong "
        "(such as 'val/dog/wrong.png' and 'val/cat/0.png')",
        "1 unlabeled image equal to validation images: the validation is not only of unseen images "
        "(such as 'unlabeled/2.png' and 'val/dog/z.png')",
    ]


@pytest.mark.parametrize("files", [False, True])
def test_validation_images_come_last_in_the_training_set(tmp_path, files):
    put_all(tmp_path)
    without = scan(tmp_path)
    put(tmp_path, *VAL)
    (tmp_path / "val/dog/cut.png").write_bytes(b"\x89PNG")
    Image.new("RGB", (6, 5), "red").save(tmp_path / "val/cat/red.png")
    folder, damaged = check(scan(tmp_path))
    assert [each.path for each in damaged] == ["val/dog/cut.png"]
    said(folder, r"^1 image is of a single color \(1 validation\), such as 'val/cat/red.png'")
    read = as_file_set if files else lambda *args: as_image_set(*args)[0]
    data, before = read(folder, 5, 3), read(without, 5, 3)
    assert before.val is None and data.val is not None and data.val.tolist() == [14, 15, 16, 17]
    assert data.names == [*before.names, "val/cat/0.png", "val/cat/red.png", *VAL[1:]]
    assert data.train_labels.tolist() == [*before.train_labels.tolist(), 0, 0, 1, 1]
    assert data.mean == before.mean and data.std == before.std, "nothing of them goes into training"
    assert torch.equal(data.labeled, before.labeled) and data.test_names == before.test_names
    if not files:
        assert torch.equal(data.train_images[:14], before.train_images) and len(data.train_images) == 18
        assert torch.equal(data.test_images, before.test_images)
        found, _ = as_image_set(scan(tmp_path), 5, 3)  # the damaged one is found here
        assert torch.equal(found.train_images, data.train_images) and torch.equal(found.val, data.val)
        (tmp_path / VAL[0]).unlink()
        kept, _ = as_image_set(folder, 5, 3, keep=True)
        assert (
            list(kept.unreadable) == [14]
            and torch.equal(kept.val, data.val)
            and not kept.train_images[14].any()
        )


# --- what spreadsheets and people write --------------------------------------------------------------------


def small(tmp_path: Path, *labels: str, **how: str) -> list[str]:
    """The notes on a table with these labels and an unlabeled image."""
    put(tmp_path, *(f"{i}.png" for i in range(len(labels))), "u.png", "t.png")
    rows = [f'{i}.png,"{label}",' for i, label in enumerate(labels)]
    table(tmp_path, "\n".join(["path,label,split", *rows, "u.png,,", f't.png,"{labels[0]}",test']))
    return [note for note in scan(tmp_path / "my.csv").notes if "no test image" not in note]


TABLE = "path,label,,\na.png,x,,\nb.png,y,,\nb2.png,y\nc.png,,,\nd.png,x,1,2\n"


@pytest.mark.parametrize(
    "text",
    [
        TABLE,
        TABLE.replace(",", ";"),
        TABLE.replace(",", "\t"),
        TABLE.replace(",", "|"),
        "sep=;\r\n" + TABLE.replace(",", ";").replace("\n", "\r\n"),
        TABLE.encode("utf-16"),
        b"\xfe\xff" + TABLE.encode("utf-16-be"),
        TABLE.encode("utf-8-sig"),
        TABLE.replace("path", '"Path"').replace("a.png", '"a.png"'),
        TABLE.replace("\nb.png", "\n , ,,\n;\nb.png".replace("\n;", "")),
        TABLE.replace("a.png", " a.png ").replace("x", " x\xa0"),
    ],
)
def test_tables_as_spreadsheets_write_them(tmp_path, text):
    put(tmp_path, *(f"{name}.png" for name in ("a", "b", "b2", "c", "d")))
    folder = scan(table(tmp_path, text))
    labeled, unlabeled, test = parts(folder)
    assert sorted(labeled + test) == ["a.png", "b.png", "b2.png", "d.png"] and unlabeled == ["c.png"]
    assert folder.classes == ["x", "y"] and folder.label.tolist() == [0, 1, 1, -1, 0]


def test_latin_1_is_refused_with_its_line(tmp_path):
    put(tmp_path, "a.png")
    with pytest.raises(ValueError, match=r"line 3 has the bytes b'\\xe4', .* save it as \"CSV UTF-8\""):
        scan(table(tmp_path, "path,label\na.png,Hund\na.png,K\xe4fer\n".encode("latin-1")))


def test_a_name_of_any_bytes_is_found_and_one_that_is_not_there_is_no_text(tmp_path):
    put(tmp_path, "a.png", "b.png", "c.png", "d.png")
    (tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"\xff\xe4.png"))
    text = b"path,label\n\xff\xe4.png,x\nb.png,y\nc.png,\nd.png,x\n"
    assert os.fsdecode(b"\xff\xe4.png") in scan(table(tmp_path, text)).paths
    with pytest.raises(ValueError, match=r"line 2 has the bytes b'\\xfe\\xe4', which are no text in UTF-8"):
        scan(table(tmp_path, text.replace(b"\xff", b"\xfe")))


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_paths_match_in_either_unicode_form(tmp_path, form):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    names = ["K\xe4fer/\xe9t\xe9.png", "K\xe4fer/\u1ec7.png", "\ud55c.png", "plain.png"]
    put(tmp_path, *(unicodedata.normalize(form, name) for name in names))
    labels = ["a", "b", "b", ""]
    rows = [
        f"{unicodedata.normalize(other, name)},{label}" for name, label in zip(names, labels, strict=True)
    ]
    folder = scan(table(tmp_path, "\n".join(["path,label", *rows])))
    assert folder.paths == sorted(unicodedata.normalize(form, name) for name in names)
    assert check(folder)[1] == []
    twice = [*rows, f"{unicodedata.normalize(form, names[0])},b"]  # one file by both its names
    with pytest.raises(ValueError, match=r"line 6 of .* contradicts an earlier one"):
        scan(table(tmp_path, "\n".join(["path,label", *twice])))


def test_both_unicode_forms_may_be_there(tmp_path):
    put(tmp_path, "\xe9.png", "e\u0301.png", "u.png", "v.png")
    folder = scan(table(tmp_path, "path,label\n\xe9.png,a\ne\u0301.png,b\nu.png,\nv.png,a\n"))
    assert {path: folder.label[i].item() for i, path in enumerate(folder.paths)} == {
        "\xe9.png": 0, "e\u0301.png": 1, "u.png": -1, "v.png": 0
    }  # fmt: skip


def test_paths_that_differ_in_case_are_said_but_not_read(tmp_path):
    put(tmp_path, "a.JPG", "b.png", "c.png", "u.png", "sub/d.png")
    notes = scan(
        table(tmp_path, "path,label\na.jpg,x\nSub/D.png,x\nb.png,x\nc.png,y\nc2.png,y\nu.png,\n")
    ).notes
    assert [note for note in notes if "case" in note] == [
        f"3 files that {str(tmp_path / 'my.csv')!r} lists are not there: 'a.jpg' differs from 'a.JPG' in upper and "
        "lower case"
    ]


@pytest.mark.parametrize(
    "word",
    ["nan", "NaN", "NA", "N/A", "NULL", "None", "-1", "?", "unknown", "#N/A", "Unlabeled", "Unlabelled"],
)
def test_a_class_that_means_no_label_is_said(tmp_path, word):
    (note,) = small(tmp_path, "cat", "cat", "dog", word, word)
    assert note == (
        f"2 images are of class {word!r}: if that means no label, leave the label empty (in folders: move the images "
        "to unlabeled/)"
    )


@pytest.mark.parametrize(
    "pair",
    [
        ("0", "0.0"),
        ("1", "01"),
        ("1", "1."),
        ("0", "-0"),
        ("1.5", "1,50"),
        ("100000", "1E+05"),
        ("cat", "Cat"),
        ("Stra\xdfe", "STRASSE"),
        ("black cat", "black  cat"),
        ("black cat", "black\xa0cat"),
        ("black cat", "black_cat"),
        ("black-cat", "Black cat"),
        ("caf\xe9", "cafe\u0301"),
        ("cat", "cat\u200b"),
        ("cat", "\uff43at"),
        ("\ufb01sh", "fish"),
        ("cat", "c\u0430t"),
        ("\u0441\u0430t", "CAT"),
    ],
)
def test_classes_that_look_alike_are_said(tmp_path, pair):
    (note,) = small(tmp_path, *pair, "another")
    assert note.startswith("classes ") and note.endswith(
        " look alike: if they are one class, give it one name"
    )
    assert note.count("'") == 4
    shown = note.split("'")[1], note.split("'")[3]
    assert shown[0] != shown[1] and "\xa0" not in note and "\u200b" not in note


@pytest.mark.parametrize(
    "names",
    [
        ("cat", "dog", "cow"),
        ("0", "1", "10", "11"),
        ("-2", "2", "-"[:0] + "3"),
        ("+", "*", "\xb1"),
        ("a.b", "ab"),
        ("1.5", "15"),
        ("class 1", "class 2"),
        ("boy", "bay"),
        ("\u65e5", "\u6708"),
    ],
)
def test_other_classes_are_not_said_to_look_alike(tmp_path, names):
    assert small(tmp_path, *names) == []


def test_a_typing_error_is_said(tmp_path):
    horses, zebras, levels = ["horse"] * 20, ["zebra"] * 19, ["level 2"] * 20
    assert small(tmp_path, *zebras, "zebre", *horses, "hoarse", *levels, "level 1", "zebu", "abc") == [
        f"class {rare!r} (1 image) differs from {name!r} (20) in one letter: if it is a typing error, correct it"
        for rare, name in (("hoarse", "horse"), ("zebre", "zebra"))
    ]


def test_look_alikes_in_folders(tmp_path):
    put_all(tmp_path, test=False)
    put(tmp_path, "labeled/Cat/0.png", "labeled/unknown/0.png", "labeled/cat /0.png")
    folder = scan(tmp_path)
    said(folder, r"^classes 'Cat', 'cat' and 'cat ' look alike")
    said(folder, r"^1 image is of class 'unknown': if that means no label")


@pytest.mark.parametrize("names", ["10 9 0 2 1", "1.5 -2 0.25 10", "007 8 09 10 1000000000000000000000000"])
def test_classes_that_are_numbers_sort_as_numbers(tmp_path, names):
    put(tmp_path, *(f"labeled/{name}/{i}.png" for name in names.split() for i in range(2)), "unlabeled/0.png")
    folder = scan(tmp_path)
    assert folder.classes == sorted(names.split(), key=float)
    for i in (*folder.labeled.tolist(), *folder.test.tolist()):
        assert folder.paths[i].split("/")[1] == folder.classes[folder.label[i]]
    put(tmp_path, "labeled/ten/0.png")
    assert scan(tmp_path).classes == sorted([*names.split(), "ten"])


@pytest.mark.parametrize("suffix", [".heic", ".CR2", ".svg", ""])
def test_images_of_kinds_that_are_not_read_are_not_advised_to_be_deleted(tmp_path, suffix):
    put_all(tmp_path)
    for i in range(3):
        put(tmp_path, f"labeled/emu/{i}{suffix}")
    kind = f"3 {suffix.lower()!r}" if suffix else "3 without one"
    to = rf"has 3 files of kinds that are not read \({re.escape(kind)}\); convert them to JPEG or PNG"
    with pytest.raises(
        ValueError, match=rf"^class folder 'labeled/emu' of .* has no images that can be read: .*{to}$"
    ):
        scan(tmp_path)
    for old, new in (("labeled/emu", "test/emu"), ("test/cat/0.png", "labeled/cat/t.png")):
        (tmp_path / old).rename(tmp_path / new)
    said(scan(tmp_path), rf"^class folder 'test/emu' .* {to}$")
    (tmp_path / "test/dog/0.png").unlink()
    with pytest.raises(
        ValueError, match=rf"^test/ of .* has no images in class folders: 'test/' {to}, or delete it"
    ):
        scan(tmp_path)
    os.system(f"cd '{tmp_path}' && rm -r test unlabeled && mkdir unlabeled")
    put(tmp_path, *(f"unlabeled/{i}{suffix}" for i in range(3)))
    with pytest.raises(
        ValueError, match=rf"^.* has no unlabeled images that can be read: 'unlabeled/' {to}$"
    ):
        scan(tmp_path)


def test_classes_and_their_counts_in_a_line():
    assert classes_line(["cat", "a\x1bb"], [1200, 6], [40, 0]) == (
        "classes (labeled + test images): 'cat' 1,200 + 40, 'a\\x1bb' 6 + 0"
    )
    line = classes_line([str(c) for c in range(100)], [1] * 100, [1] * 100)
    assert line.endswith("'19' 1 + 1 and 80 more, which the report lists")
    assert classes_line(["cat", "dog"], [1200, 6], [40, 0], [3, 1000]) == (
        "classes (labeled + validation + test images): 'cat' 1,200 + 3 + 40, 'dog' 6 + 1,000 + 0"
    )
    assert class_counts(torch.tensor([0, 2, -1, 2]), 4) == [1, 0, 2, 0]
    assert uneven(["a", "b"], [200, 6]).startswith(
        "the labels are uneven: 200 of class 'a', 6 of class 'b'. Look at"
    )
    assert uneven(["a", "b"], [20, 5]) == uneven(["a", "b"], [0, 0]) == ""


# --- damage ------------------------------------------------------------------------------------------------


def test_damaged_files_are_found_and_left_out(tmp_path):
    put_all(tmp_path)
    put(tmp_path, "labeled/ape/0.png", "labeled/ape/1.png", "unlabeled/gone.png", "unlabeled/cut.png")
    (tmp_path / "labeled/ape/0.png").write_bytes(b"")
    (tmp_path / "test/dog/1.jpg").write_text("no image")
    (tmp_path / "unlabeled/cut.png").write_bytes((tmp_path / "unlabeled/cut.png").read_bytes()[:60])
    before = scan(tmp_path)
    (tmp_path / "unlabeled/gone.png").unlink()
    calls: list[tuple[int, int]] = []
    folder, damaged = check(before, progress=lambda *args: calls.append(args), threads=3)
    reasons = {
        "labeled/ape/0.png": "is empty",
        "test/dog/1.jpg": "is not an image",
        "unlabeled/cut.png": "cannot be decoded",
        "unlabeled/gone.png": "No such file",
    }
    assert [d.path for d in damaged] == list(reasons)
    for found, what in zip(damaged, reasons.values(), strict=True):
        assert what in found.reason and str(tmp_path / found.path) in found.reason
    assert calls == [(i + 1, len(before.paths)) for i in range(len(before.paths))]
    kept = tuple([name for name in part if name not in [d.path for d in damaged]] for part in parts(before))
    assert parts(folder) == kept
    name_of = {path: before.label[i].item() for i, path in enumerate(before.paths)}
    assert folder.label.tolist() == [name_of[path] for path in folder.paths]
    said(folder, "^4 damaged files left out, such as '.*labeled/ape/0.png' is empty$")
    assert check(folder)[1] == [] and check(folder)[0].paths == folder.paths


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (
            ["labeled/dog"],
            r"no labeled image of class 'dog' in '.*' can be read: '.*0\.png' is empty",
        ),
        (["unlabeled"], r"no unlabeled image in '.*' can be read: .*"),
        (["test/cat", "test/dog"], r"no test image in '.*' can be read: .*"),
        (["val/cat"], r"no validation image in '.*' can be read: .*"),
    ],
)
def test_what_is_left_must_be_enough(tmp_path, names, sentence):
    put_all(tmp_path)
    put(tmp_path, "val/cat/0.png")
    for name in names:
        for file in (tmp_path / name).iterdir():
            file.write_bytes(b"")
    for read in (check, lambda folder: as_image_set(folder, 4, 3)):
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            read(scan(tmp_path))


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Files that were decoded, by name."""
    names: list[str] = []
    real = image_module.picture

    def read(path, *args, **kwargs):
        names.append(Path(path).name)
        return real(path, *args, **kwargs)

    monkeypatch.setattr("ups_fast.data.reading.picture", read)
    return names


def test_a_check_is_cheap_to_repeat(tmp_path, reads):
    put_all(tmp_path / "data")
    (tmp_path / "data/unlabeled/3.png").write_bytes(b"")
    folder, cache = scan(tmp_path / "data"), tmp_path / "run/deep/checked.json"
    first = check(folder, cache=cache)
    assert len(reads) == 16 and [file.name for file in cache.parent.iterdir()] == ["checked.json"]
    calls: list[tuple[int, int]] = []
    reads.clear()
    again = check(folder, cache=str(cache), progress=lambda *args: calls.append(args))
    assert reads == ["3.png"] and again[1] == first[1] and again[0].paths == first[0].paths
    assert calls == [(15, 16), (16, 16)]
    reads.clear()
    put(tmp_path / "data", "unlabeled/3.png", "unlabeled/new.png")  # mended, new, changed, touched
    (tmp_path / "data/labeled/cat/1.png").write_bytes(b"changed")
    os.utime(tmp_path / "data/labeled/cat/2.png", ns=(1, 1))
    folder, damaged = check(scan(tmp_path / "data"), cache=cache)
    assert sorted(reads) == ["1.png", "2.png", "3.png", "new.png"]
    assert [d.path for d in damaged] == ["labeled/cat/1.png"] and len(folder.paths) == 16
    reads.clear()
    check(folder)  # without a cache all are read
    assert len(reads) == 16


def test_an_interrupted_check_remembers_what_it_did(tmp_path, reads):
    put_all(tmp_path / "data")
    folder, cache = scan(tmp_path / "data"), tmp_path / "checked.json"

    def stop(done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(folder, cache=cache, progress=stop, threads=1)
    reads.clear()
    check(folder, cache=cache)
    assert len(reads) == 6


@pytest.mark.parametrize("content", ["", '{"ups_fast": "files that can be read"', "cut", "list", "deep"])
def test_a_cache_that_was_cut_is_written_anew(tmp_path, reads, content):
    put_all(tmp_path / "data")
    folder, cache = scan(tmp_path / "data"), tmp_path / "checked.json"
    check(folder, cache=cache)
    whole = cache.read_text()
    cache.write_text(
        {"cut": whole[:-20], "list": whole[:48] + "[]}", "deep": whole[:48] + "[" * 200_000}.get(
            content, content
        )
    )
    reads.clear()
    check(folder, cache=cache)
    assert len(reads) == 16 and cache.read_text() == whole


def test_a_foreign_file_is_never_overwritten(tmp_path):
    put_all(tmp_path)
    precious = tmp_path / "labeled/cat/0.png"
    before = precious.read_bytes()
    with pytest.raises(
        ValueError, match=r"^cache must be a new file or one that a check wrote, got '.*0\.png'$"
    ):
        check(scan(tmp_path), cache=precious)
    assert precious.read_bytes() == before
    with pytest.raises(ValueError, match=r" is a folder, and only regular files are read$"):
        check(scan(tmp_path), cache=tmp_path)


def test_a_cache_that_cannot_be_written_is_a_note(tmp_path, monkeypatch):
    put_all(tmp_path)
    (tmp_path / "file").write_text("in the way")
    cache = tmp_path / "run/checked.json"

    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    folder, damaged = check(scan(tmp_path), cache=cache)
    assert list(cache.parent.iterdir()) == []
    assert damaged == [] and len(folder.paths) == 16
    said(
        folder,
        r"checked\.json could not be written: No space left on device; .*: the next check begins anew$",
    )


def test_threads_must_be_some(tmp_path):
    put_all(tmp_path)
    with pytest.raises(ValueError, match=r"^threads must be at least 1, got 0$"):
        check(scan(tmp_path), threads=0)


# --- as an ImageSet ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_as_image_set(tmp_path, channels):
    put_all(tmp_path)
    put(tmp_path, "unlabeled/wide.png", size=(20, 90))
    (tmp_path / "labeled/cat/2.png").write_bytes(b"")
    (tmp_path / "unlabeled/1.png").write_text("text")
    (tmp_path / "test/cat/1.png").write_bytes(b"\x89PNG")
    folder = scan(tmp_path)
    calls: list[tuple[int, int]] = []
    data, damaged = as_image_set(folder, 5, channels, threads=3, progress=lambda *args: calls.append(args))
    assert [d.path for d in damaged] == ["labeled/cat/2.png", "test/cat/1.png", "unlabeled/1.png"]
    assert calls == [(i + 1, 18) for i in range(18)]
    left = check(folder)[0]
    labeled, unlabeled, test = parts(left)
    assert data.names == labeled + unlabeled and data.classes == ["cat", "dog"] and data.name == "folder"
    for images, names in ((data.train_images, data.names), (data.test_images, test)):
        assert images.shape == (len(names), 5, 5, channels) and images.dtype == torch.uint8
        for image, name in zip(images, names, strict=True):
            expected = image_module.resize_crop(image_module.read_image(tmp_path / name, channels), 5)
            assert np.array_equal(image, expected)
    assert data.labeled is not None and data.labeled.tolist() == list(range(9))
    assert data.train_labels.tolist() == [0] * 4 + [1] * 5 + [-1] * 4 and data.test_labels.tolist() == [0, 1]
    pixels = data.train_images.double().div(255).flatten(0, 2)
    torch.testing.assert_close(torch.tensor(data.mean).double(), pixels.mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        torch.tensor(data.std).double(), pixels.std(0, correction=0), rtol=1e-5, atol=0
    )


def test_as_image_set_refuses(tmp_path):
    put_all(tmp_path)
    folder = scan(tmp_path)
    for size, channels, sentence in (
        (0, 3, "size must be at least 1, got 0"),
        (8, 2, "channels must be 1 or 3, got 2"),
        (
            10**6,
            3,
            r"16 images of size=1000000 and channels=3 take 44,703 GiB, this machine has \d+: choose .*",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            as_image_set(folder, size, channels)


# --- many files --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_twenty_thousand_files_are_indexed_at_once(tmp_path):
    put_all(tmp_path)
    for part in range(4):
        folder = tmp_path / f"unlabeled/{part}"
        folder.mkdir()
        for i in range(5000):
            os.close(os.open(folder / f"{i}.jpg", os.O_CREAT | os.O_WRONLY))
    tracemalloc.start()
    start = time.perf_counter()
    index = scan(tmp_path)
    seconds = time.perf_counter() - start
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index.unlabeled) == 20_004 and index.notes == []
    assert seconds < 10, "0.3 s, or 2 s while memory is traced, on a busy core"
    assert size < 200 * len(index.paths)
