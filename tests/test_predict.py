"""From a folder of image files to a finished run, and from that to labels for new files."""

from __future__ import annotations

import csv
import html
import json
import math
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ups_fast import predict, train
from ups_fast.checkpoint import read_config
from ups_fast.data import read_image, resize_crop
from ups_fast.files import load_arrays
from ups_fast.predict import HEAD, Predictor, find

FAST = [
    "threads=1",
    "data.size=8",
    "data.channels=1",
    "model.name=wrn-10-1",
    "train.rounds=1",
    "train.epochs=12",
]
FAST += ["train.batch_size=12", "train.lr=0.1", "train.cosine=0.5", "model.activation=leaky_relu"]
CONFIG = Path(__file__).parents[1] / "configs" / "folder.yaml"


def picture(value: int, seed: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-20, 20, size)
    return Image.fromarray((value + noise).astype(np.uint8))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark and light pictures, and one file that is none."""
    root = tmp_path_factory.mktemp("images")
    for part, n in (("labeled", 6), ("test", 3), ("unlabeled", 5)):
        for name, value in (("dark", 50), ("light & bright", 200)):
            for i in range(n):
                folder = root / part / (name if part != "unlabeled" else "")
                folder.mkdir(parents=True, exist_ok=True)
                kind = ("png", "jpg", "webp")[i % 3]
                picture(value, i).save(folder / f"{name} {i}.{kind}", quality=95)
    (root / "unlabeled" / "torn.jpg").write_bytes((root / "labeled/dark/dark 1.jpg").read_bytes()[:300])
    return root


@pytest.fixture(scope="module")
def folder(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    assert train.main([str(CONFIG), f"data.root={images}", f"run_dir={run_dir}", *FAST]) == 0
    return run_dir


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(encoding="utf-8", errors="surrogateescape")))


def test_a_folder_becomes_a_run(folder: Path, images: Path) -> None:
    rows = table(folder / "pseudo_labels.csv")
    assert [row["path"] for row in rows] == sorted(
        str(path.relative_to(images)) for path in (images / "unlabeled").iterdir() if path.name != "torn.jpg"
    )
    assert all(row["name"] in row["path"] for row in rows), "dark and light are easy to tell"
    page = (folder / "report.html").read_text()
    assert "torn.jpg" in page and "light &amp; bright" in page and "About the data" in page
    (row,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert row["test_acc"] == 1.0 and row["positive_acc"] is None
    assert f"The same thresholds select {row['test_positives']} of 6 test images" in page
    assert "Taken for another class" not in page, "the truth is not known"
    assert all(float(row["unfamiliar"]) >= 0 for row in rows)
    shown = re.findall(r'<img alt="(unlabeled/[^"]*)"[^>]* src="data:image/png;base64,([^"]*)"', page)
    assert len({name for name, _ in shown}) == len(rows), "every image is small, and somewhere"
    for name, encoded in shown:
        want = resize_crop(read_image(images / html.unescape(name), 1), 8)[..., 0]
        assert np.array_equal(np.asarray(Image.open(BytesIO(b64decode(encoded)))), want)


def test_the_same_command_again_changes_nothing(folder: Path, images: Path, capsys) -> None:
    before = (folder / "metrics.jsonl").read_bytes()
    assert train.main([str(CONFIG), f"data.root={images}", f"run_dir={folder}", *FAST]) == 0
    said = capsys.readouterr().out
    assert "all rounds are done" in said and "1 damaged file left out" in said
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_labels_of_files_folders_and_patterns(
    folder: Path, images: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    out = tmp_path / "labels.csv"
    words = [
        str(images / "test"),
        str(images / "unlabeled" / "*.jpg"),
        str(images / "unlabeled" / "dark 0.png"),
    ]
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "phone.heic").write_bytes(b"")
    (evil / "=1+1.png").write_bytes((images / "unlabeled" / "dark 0.png").read_bytes())
    assert predict.main([str(folder), *words, str(images / "test"), "--out", str(out)]) == 0
    assert "1 with an error" in capsys.readouterr().err
    monkeypatch.chdir(evil)
    assert predict.main([str(folder), "*.png", ".", "--out", str(tmp_path / "evil.csv")]) == 0
    assert "1 file ignored for the suffix: 1 '.heic'" in capsys.readouterr().err
    assert [row["path"] for row in table(tmp_path / "evil.csv")] == ["'=1+1.png", "./=1+1.png"]
    rows = table(out)
    assert list(rows[0]) == HEAD and len(rows) == 6 + 5 + 1
    for row in rows:
        if row["path"].endswith("torn.jpg"):
            assert "cannot be decoded" in row["error"] and row["label"] == row["confidence"] == ""
        else:
            assert row["name"] in row["path"] and row["error"] == "" and 0.5 < float(row["confidence"]) <= 1
            assert row["label"] == str(["dark", "light & bright"].index(row["name"]))
            assert float(row["std"]) >= 0 and row["positive"] in "01"
    assert predict.main([str(folder), *words, "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err and table(out) == rows


@pytest.mark.slow
def test_an_answer_depends_on_the_image_alone(folder: Path, images: Path) -> None:
    predictor = Predictor(folder)
    paths = [str(path) for path in sorted((images / "test").rglob("*.*"))]
    alone = [next(iter(predict.predict(predictor, [path]))) for path in paths]
    assert list(predict.predict(predictor, paths[::-1]))[::-1] == alone
    predictor.rows = 4
    heard: list[int] = []
    for a, b in zip(predict.predict(predictor, paths, progress=heard.append), alone, strict=True):
        assert a.row[:2] == b.row[:2] and math.isclose(float(a.row[2]), float(b.row[2]), rel_tol=1e-5)
    assert heard == [4, 2]
    copy = predictor.read(paths[0])
    assert np.array_equal(copy, predictor.read(paths[0])) and copy.shape == (8, 8, 1)


@pytest.mark.slow
def test_standard_output_and_no_reader(folder: Path, images: Path) -> None:
    command = [sys.executable, "-m", "ups_fast.predict", str(folder), str(images / "test")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == ",".join(HEAD) and len(done.stdout.splitlines()) == 7
    piped = f"set -o pipefail; {' '.join(map(repr, command))} | head -1"
    done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == ",".join(HEAD), done.stderr


def test_a_curriculum_labels_others_by_the_least_confidence_it_kept(folder: Path, tmp_path: Path) -> None:
    """Its run keeps by rank, so its config has no threshold that says which."""
    copy = shutil.copytree(folder, tmp_path / "run")
    path = copy / "config.yaml"
    path.write_text(path.read_text().replace("name: ups\n", "name: self_training\n  schedule: curriculum\n"))
    found = load_arrays(copy / "selection.npz")
    kept = found["confidence"][found["positive"]]
    assert len(kept) and Predictor(copy).thresholds["tau_p"] == float(kept.min())
    assert Predictor(folder).thresholds["tau_p"] == read_config(folder / "config.yaml")["select"]["tau_p"]


def test_find(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.JPG", "notes.txt", ".hidden.png", "sub/c.webp", "[x].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert find(["."]) == ["./[x].png", "./a.JPG", "./b.png", "./sub/c.webp"]
    assert find(["b.png", "*.png", "notes.txt", "[x].png"]) == ["b.png", "[x].png", "notes.txt"]
    assert find(["**/*.webp"]) == ["sub/c.webp"]
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(images / "test" / "dark")
    assert find(["linked"]) == [f"linked/dark {i}.{kind}" for i, kind in enumerate(("png", "jpg", "webp"))]
    assert find(["sub"])[0] == "sub/c.webp" and len(find(["sub"])) == len(set(find(["sub"]))) == 7
    (tmp_path / "empty").mkdir()
    passed: Counter[str] = Counter()
    (tmp_path / "more").mkdir()
    for name in ("a.HEIC", "b.heic", "c", "d.png", "Thumbs.db", ".e.raw"):
        (tmp_path / "more" / name).write_bytes(b"")
    assert find(["more", "more", "notes.txt"], passed) == ["more/d.png", "notes.txt"]
    assert passed == {".heic": 2, "": 1}
    (tmp_path / "more" / "d.png").unlink()
    unread = "'more' holds no images of a kind that is read, but 2 '.heic', 1 without one; convert them to JPEG or PNG"
    for word, said in (
        ("more", unread),
        ("empty", "'empty' holds no images$"),
        ("gone.png", "'gone.png' is no file or folder"),
    ):
        with pytest.raises(ValueError, match=said):
            find(["b.png", word])


def test_what_the_user_can_mend(folder: Path, images: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    np.save(tmp_path / "rows.npy", np.ones((2, 3), np.float32))
    for words, said in (
        ([str(tmp_path / "nothing"), str(images)], "holds no trained network"),
        (
            [str(folder), str(images), str(tmp_path / "rows.npy")],
            "rows.npy' must be an image: the run's network is for images, and not for features",
        ),
        (
            [str(folder), str(images), "--best"],
            "it has no best.safetensors, which only a run with a validation part has (data.val_share)",
        ),
        (
            [str(tmp_path / "run"), str(images)],
            "by which thresholds to label, or metrics.jsonl beside it is gone",
        ),
        (
            [str(folder), str(images), "--device", "gpu"],
            "device must be auto, cpu, cuda or cuda:N, got 'gpu'",
        ),
        (
            [str(folder), str(images), "--out", str(tmp_path / "no" / "where.csv")],
            "where.csv could not be written: No such file or directory; 0 rows",
        ),
    ):
        assert predict.main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_a_file_that_vanishes_is_a_row(folder: Path, images: Path, tmp_path: Path) -> None:
    good = next((images / "test").rglob("*.png"))
    answers = list(predict.predict(Predictor(folder), [str(tmp_path / "gone.png"), str(good)]))
    assert "gone.png" in answers[0].row[-1] and answers[1].row[-1] == ""
    assert read_image(good, 1).shape[2] == 1
