"""Whole runs whose images stay in their files: the same by either decoder, after a kill, and when files vanish."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_predict import CONFIG, FAST, images, table

from ups_fast import inputs, rounds, train
from ups_fast.methods import Method
from ups_fast.selection import evaluate

__all__ = ["images"]  # the fixture
SPAWN = multiprocessing.get_context("spawn")
SET = [
    *FAST,
    "train.rounds=2",
    "train.epochs=4",
    "train.round0_epochs=8",
    "select.passes=4",
    "select.tau_p=0.5",
]
SET += ["select.kappa_p=inf", "runtime.precision=float32", "data.crop=1", "checkpoint_seconds=0"]


def words(images: Path, folder: Path, *more: str) -> list[str]:
    return [str(CONFIG), f"data.root={images}", f"run_dir={folder}", *SET, *more]


def child(arguments: list[str], kill_at: int) -> None:
    real, calls = Method.step, 0

    def counted(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    Method.step = counted
    raise SystemExit(train.main(arguments))


def run(arguments: list[str], kill_at: int = 0) -> int | None:
    process = SPAWN.Process(target=child, args=(arguments, kill_at))
    process.start()
    process.join(timeout=200)
    return process.exitcode


def rows_of(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key not in ("seconds", "outside")} for row in found]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def plain(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    assert run(words(images, folder, "data.loader=plain", "data.resized_crop=0.6")) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 9, 11])
def test_a_killed_run_ends_as_if_nothing_was(at: int, images: Path, plain: Path, tmp_path: Path) -> None:
    arguments = words(images, tmp_path / "run", "data.loader=plain", "data.resized_crop=0.6")
    assert run(arguments, kill_at=at) == -signal.SIGKILL
    assert run(arguments) == 0
    assert rows_of(tmp_path / "run") == rows_of(plain)
    assert all(map(torch.equal, weights(tmp_path / "run").values(), weights(plain).values()))


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("nvidia") is None or find_spec("nvidia.dali") is None, reason="DALI is not installed"
)
def test_dali_and_pillow_train_alike(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without scaling, as here of 8x8 pixels cut to themselves, they read the same pixels, bit for bit."""
    for loader in ("dali", "plain"):
        assert train.main(words(images, tmp_path / loader, f"data.loader={loader}", "data.size=16")) == 0
        assert f"images stay in their files: data.loader={loader}" in capfd.readouterr().out
    a, b = rows_of(tmp_path / "dali"), rows_of(tmp_path / "plain")
    assert [row["test_acc"] for row in a] == [row["test_acc"] for row in b]
    for x, y in zip(a, b, strict=True):
        assert x["train_loss"] == pytest.approx(y["train_loss"], rel=0.05)


def test_a_file_that_vanishes_does_not_stop_the_run(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    mine = shutil.copytree(images, tmp_path / "images")
    real = Method.step

    def sabotaged(*args: Any) -> torch.Tensor:
        (mine / "unlabeled" / "dark 0.png").unlink(missing_ok=True)
        return real(*args)

    monkeypatch.setattr(Method, "step", sabotaged)
    assert train.main(words(mine, tmp_path / "run", "data.loader=plain", "train.rounds=1")) == 0
    said = capfd.readouterr().out
    assert "1 file cannot be read any more and is no longer trained on, such as" in said and "NaN" not in said
    page = (tmp_path / "run" / "report.html").read_text()
    assert "dark 0.png" in page and '<img alt="unlabeled/dark 1.jpg"' in page
    labels = {row["path"]: row for row in table(tmp_path / "run" / "pseudo_labels.csv")}
    gone = labels.pop(os.path.join("unlabeled", "dark 0.png"))
    assert [gone[key] for key in ("label", "confidence", "positive", "negative", "name")] == [
        "-1",
        "nan",
        "0",
        "",
        "",
    ]
    assert all(row["label"] in "01" and row["confidence"] != "nan" for row in labels.values())
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["no_label"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["plain", "resident"])
def test_files_that_vanish_between_two_starts_do_not_stop_the_run(
    loader: str,
    images: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import shutil

    mine = shutil.copytree(images, tmp_path / "images")
    arguments = words(mine, tmp_path / "run", f"data.loader={loader}")
    assert run(arguments, kill_at=9) == -signal.SIGKILL
    (mine / "unlabeled" / "dark 0.png").unlink()
    (mine / "labeled" / "dark" / "dark 3.png").write_bytes(b"")
    os.utime(mine / "labeled" / "dark" / "dark 3.png", ns=(0, 0))
    assert train.main(arguments) == 2
    said = "has changed since the run began: 1 file has other content (such as 'labeled/dark/dark 3.png')"
    assert said in capfd.readouterr().err
    (mine / "labeled" / "dark" / "dark 3.png").unlink()
    (mine / "test" / "dark" / "dark 0.png").unlink()
    real, seen = evaluate, []
    monkeypatch.setattr(
        rounds, "evaluate", lambda *args, **kwargs: seen.append(real(*args, **kwargs)) or seen[-1]
    )  # there is no validation part, which it would be asked for, too
    assert train.main(arguments) == 0
    assert all(found.found.index.tolist() == [1, 2, 3, 4, 5] for found in seen) and seen, (
        "the others are tested"
    )
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(f"dark {i}.png" in page for i in (0, 3))
    labels = {row["path"]: row["label"] for row in table(tmp_path / "run" / "pseudo_labels.csv")}
    assert len(labels) == 10 and [path for path, label in labels.items() if label == "-1"] == [
        os.path.join("unlabeled", "dark 0.png")
    ], "still in its place"
    copy = shutil.copytree(mine, tmp_path / "copy", copy_function=shutil.copyfile)
    assert train.main(words(copy, tmp_path / "run", f"data.loader={loader}")) == 0, "data may move"
    shutil.rmtree(copy / "unlabeled")
    shutil.rmtree(copy / "labeled")
    assert train.main(words(copy, tmp_path / "run", f"data.loader={loader}")) == 2
    assert "lacks 23 of the 28 files of the run" in capfd.readouterr().err


@pytest.mark.slow
def test_a_disk_that_is_taken_away_ends_the_run_with_a_sentence(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All labeled images, or more than half of all; once they are back the run goes on."""
    import shutil

    for part, what in (("labeled", "all 12 labeled images"), ("unlabeled", "12 images")):
        mine, away, run_dir = (tmp_path / part / name for name in ("images", "away", "run"))
        shutil.copytree(images, mine)
        arguments = words(mine, run_dir, "data.loader=plain")
        real, calls = Method.step, [0]

        def sabotaged(*args: Any, mine=mine, away=away, part=part, real=real, calls=calls) -> torch.Tensor:
            calls[0] += 1
            if calls[0] == 3:
                (mine / part).rename(away)
                if part == "unlabeled":
                    for i in range(2):
                        (mine / "labeled" / "dark" / f"dark {3 * i}.png").unlink()
            return real(*args)

        monkeypatch.setattr(Method, "step", sabotaged)
        assert train.main(arguments) == 2
        error = capfd.readouterr().err
        assert f"{what} cannot be read any more, such as" in error and error.count("\n") == 1
        monkeypatch.setattr(Method, "step", real)
        away.rename(mine / part)
        assert train.main(arguments) == 0


def test_a_run_whose_test_images_are_gone_ends_all_the_same(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    mine = shutil.copytree(images, tmp_path / "images")
    real = Method.step

    def sabotaged(*args: Any) -> torch.Tensor:
        shutil.rmtree(mine / "test", ignore_errors=True)
        return real(*args)

    monkeypatch.setattr(Method, "step", sabotaged)
    short = ["train.epochs=1", "train.round0_epochs=1"]
    assert train.main(words(mine, tmp_path / "run", "data.loader=plain", *short)) == 0
    assert "No test image could be read" in (tmp_path / "run" / "report.html").read_text()
    assert [row["test_acc"] for row in rows_of(tmp_path / "run")] == [None, None]


def test_what_does_not_fit_into_memory_stays_in_its_files(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "memory", lambda device: 2000)
    assert train.main(words(images, tmp_path / "run", "train.rounds=1", "data.loader=auto")) == 0
    said = capfd.readouterr().out
    assert "images stay in their files: they would take" in said
    assert "readable.json" in {path.name for path in (tmp_path / "run").iterdir()}


def test_arrays_may_stream_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    digits = str(CONFIG.parent / "digits.yaml")
    tiny = ["train.rounds=1", "train.round0_epochs=1", "model.name=wrn-10-1", "select.passes=2", "seed=1"]
    for loader in ("plain", "resident"):
        assert train.main([digits, f"data.loader={loader}", f"run_dir={tmp_path / loader}", *tiny]) == 0
    assert all(
        map(torch.equal, weights(tmp_path / "plain").values(), weights(tmp_path / "resident").values())
    ), "the same draws make the same batches"


def test_resized_crops_are_of_files_alone(
    capsys: pytest.CaptureFixture[str], images: Path, tmp_path: Path
) -> None:
    assert train.main(words(images, tmp_path, "data.loader=resident", "data.resized_crop=0.5")) == 2
    assert "data.resized_crop is for images that are read from a folder's files" in capsys.readouterr().err


def test_dali_that_is_not_there_is_one_sentence(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nvidia.dali", "nvidia.dali.pipeline"):
        monkeypatch.setitem(sys.modules, name, None)
    assert train.main(words(images, tmp_path / "run", "data.loader=dali")) == 2
    error = capsys.readouterr().err
    assert "data.loader=dali: DALI is not installed: `pip install nvidia-dali-cuda130`" in error
    assert error.count("\n") == 1


def test_a_run_does_not_lie_in_its_own_data(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run_dir in (images, images / "unlabeled" / "run"):
        assert train.main(words(images, run_dir)) == 2
        assert "must not lie in data.root" in capsys.readouterr().err
    assert not (images / "unlabeled" / "run").exists()


def test_a_folder_of_somebody_else_stays_as_it_is(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, said in (("thesis.txt", "holds files but no run"), ("config.yaml", "another config")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("seed: 77\n")
        assert train.main(words(images, folder, "data.loader=plain")) == 2
        assert said in capsys.readouterr().err
        assert {path.name for path in folder.iterdir()} - {".lock"} == {name}
