"""The command line: what it prints, what it leaves, and how it ends."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import ups_fast
from ups_fast import inputs, rounds, train
from ups_fast.config import KEYS
from ups_fast.files import RunFolderError
from ups_fast.report import page
from ups_fast.terminal import COMMANDS
from ups_fast.words import many

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "configs" / "digits.yaml")
TINY = ["model.name=wrn-10-1", "train.epochs=1", "train.round0_epochs=1", "select.passes=2", "device=cpu"]
# With these all samples are positive, so that the rounds differ.
TINY += ["select.tau_p=0", "select.tau_n=0", "select.kappa_p=inf", "select.balance_rounds=0"]
FILES = ["checkpoint.pt", "config.yaml", "metrics.jsonl", "model.safetensors", "pseudo_labels.csv"]
FILES += ["report.html", "report.png", "selection.npz", "split.npz"]


def start(*words: str, **how) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    return subprocess.Popen([sys.executable, "-m", "ups_fast.train", *words], **pipes, **how)


def refusal(capsys, *words: str) -> str:
    """The sentence with which the command refuses `words`."""
    try:
        status = train.main(words)
    except SystemExit as end:  # argparse's own way
        status = end.code
    err = capsys.readouterr().err
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_an_old_name_is_a_line_without_code(capsys):
    assert train.main([DIGITS, "engine.step=foo"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "warning: engine.step is now runtime.step: the old name works for one release"
    assert second.startswith("error: runtime.step must be one of ")


def test_help_explains_every_key_in_80_columns(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and max(map(len, out.splitlines())) <= 80
    assert out.startswith("usage: python -m ups_fast.train CONFIG [key=value ...]\n")
    for key in KEYS.values():
        assert f"\n  {key.name}=" in out and key.help in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: CONFIG"),
        (["nowhere.yaml"], "there is no config file nowhere.yaml"),
        (["seed=1"], "there is no config file seed=1"),
        (["configs"], "configs"),
        ([DIGITS, "--seed=1"], "unrecognized arguments: --seed=1; keys are written as key=value"),
        ([DIGITS, "sed=1"], "unknown key 'sed' (did you mean seed?)"),
        ([DIGITS, "select.tau_n=0.8"], "select.tau_n must not exceed select.tau_p"),
        (
            [DIGITS, "data.n_labels=41"],
            "error: data.n_labels: n_labels must be a positive multiple of the 10 classes, got 41",
        ),
        ([DIGITS, "data.n_labels=5000"], "n_labels must be at most the 1437 training images, got 5000"),
        ([DIGITS, "data.ops=Blur 1"], "error: data.ops: an operation must be one of AutoContrast, Equalize"),
        ([DIGITS, "data.crop=8"], "error: data.crop: policy.crop must be below the image size 8x8"),
        ([DIGITS, "model.name=cnn13"], "error: model.name: size: cnn13 needs images from 12x12, got 8x8"),
        ([DIGITS, "model.name=vgg"], "error: model.name: model name must be 'cnn13' or 'wrn-d-k'"),
        ([DIGITS, "model.name=wrn-11-2"], "error: model.name: depth of a WRN must be 6n + 4"),
        ([DIGITS, "model.name=wrn-1000002-2"], "depth at most 1000 and width in [1, 100], got 1000002 and 2"),
        ([DIGITS, "model.name=wrn-10-100000"], "depth at most 1000 and width in [1, 100], got 10 and 100000"),
        ([DIGITS, f"run_dir={'x' * 300}"], "could not be written: File name too long"),
        ([DIGITS, "data.name=npz", "data.n_labels=0", "data.root=missing.npz"], "missing.npz"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(capsys, monkeypatch, tmp_path, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    assert said in refusal(capsys, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["configs"]  # no half-made folder


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        torch.OutOfMemoryError("CUDA is full"),
        MemoryError("Unable to allocate 9 EiB"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
    ],
)
def test_a_full_machine_is_one_sentence(capsys, monkeypatch, error):
    monkeypatch.setattr(rounds, "run", lambda *_, **__: (_ for _ in ()).throw(error))
    assert str(error.args[-1]) in refusal(capsys, DIGITS)


def test_a_missing_gpu_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "device=cuda needs a GPU" in refusal(capsys, DIGITS, "device=cuda")


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(inputs, "load_set", lambda *_, **__: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        train.main([DIGITS])


def test_a_report_that_cannot_be_written_says_that_the_run_is_complete(capsys, tmp_path, monkeypatch):
    def full(path, content):
        raise RunFolderError(f"{path} could not be written: No space left on device")

    monkeypatch.setattr(page, "write_atomic", full)
    said = refusal(capsys, DIGITS, *TINY, "train.rounds=1", f"run_dir={tmp_path / 'run'}")
    assert (
        "the run is complete, but its report is not" in said and "the same command makes the report" in said
    )


def test_ctrl_c_while_torch_is_imported():
    process = start(DIGITS)
    libraries = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in libraries.read_text():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "stopped\n")


def test_every_command_can_be_stopped_while_torch_is_imported():
    modules = Path(ups_fast.__file__).parent.glob("*.py")
    commands = {f"ups_fast.{path.stem}" for path in modules if "sys.exit(ended(main()))" in path.read_text()}
    assert commands == COMMANDS and len(commands) > 3


def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(inputs, "load_set", interrupt)
    assert train.main([DIGITS, "run_dir=a folder", "seed=3"]) == 130
    err = capsys.readouterr().err
    assert f" -m ups_fast.train {DIGITS} 'run_dir=a folder' seed=3" in err
    python = err.split("to go on: ")[1].split(" -m ")[0]
    assert Path(python).samefile(sys.executable), "what is printed can be pasted"


@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_from_start_to_report_and_again(tmp_path, capsys, alone):
    """In a process of its own, as users start it, and in this one, which has imported all libraries."""
    folder = tmp_path / "run"
    words = [DIGITS, *TINY, "train.rounds=2", f"run_dir={folder}"]
    if alone:
        process = start(*words)
        out, err = process.communicate(timeout=120)
        status, threads = process.returncode, 1
    else:
        status, threads = train.main(words), torch.get_num_threads()
        out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    assert out.startswith(
        f"ups_fast {ups_fast.__version__} with torch {torch.__version__} on cpu ({many(threads, 'thread')})\n"
    )
    assert f"ops on cpu: {ups_fast.backend()['cpu']}" in out
    assert "40 labeled" in out and "wrn-10-1" in out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 1] and rows[0]["positives"] == 1397
    for row in rows:
        assert f"{100 * row['test_acc']:.1f}%" in out
    assert set(FILES) <= {path.name for path in folder.iterdir()}
    assert all(str(folder / name) in out for name in ("report.html", "report.png", "pseudo_labels.csv"))
    page = (folder / "report.html").read_text()
    assert "Positive labels, by class" in page and "Taken for another class" in page and len(page) < 5_000_000

    # Once more: nothing is trained, what reports the run is made anew, and the rest is not touched.
    kept = {name: (folder / name).read_bytes() for name in FILES}
    for name in ("report.html", "report.png", "pseudo_labels.csv"):
        (folder / name).unlink()
    assert train.main(words) == 0
    assert "all rounds are done" in capsys.readouterr().out
    assert {name: (folder / name).read_bytes() for name in FILES} == kept

    assert "train.lr" in refusal(capsys, *words, "train.lr=3")
    assert {name: (folder / name).read_bytes() for name in FILES} == kept


@pytest.mark.slow
def test_ctrl_c_in_a_real_run_and_going_on(tmp_path, capsys):
    folder = tmp_path / "run"
    words = [DIGITS, *TINY, "train.rounds=2", f"run_dir={folder}"]
    process = start(*words, "train.round0_epochs=100000")
    for line in process.stdout:
        if line.startswith("round"):  # the table's head: from here on it trains
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert "round 0" in err and "to go on: " in err and f" -m ups_fast.train {DIGITS}" in err
    assert (folder / "checkpoint.pt").exists() and not (folder / "report.html").exists()
    assert "train.round0_epochs" in refusal(capsys, *words)  # another config must not go on with it


def test_the_table_of_ones_own_arrays_counts_as_x_unlabeled_does(tmp_path, monkeypatch):
    """Each unlabeled image is one gray level, its class is dark or light: the row at its index must say so."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    level = generator.permutation(np.r_[0:100, 156:256])
    pixels = np.repeat(level.astype(np.uint8), 64).reshape(-1, 8, 8)
    labels = (level > 128).astype(np.int64)
    arrays = {"x_labeled": pixels[:20], "y_labeled": labels[:20], "x_unlabeled": pixels[20:150]}
    np.savez("own.npz", **arrays, x_test=pixels[150:], y_test=labels[150:])
    words = [
        "data.root=own.npz",
        "model.name=wrn-10-1",
        "train.rounds=1",
        "train.round0_epochs=60",
        "data.crop=0",
    ]
    assert (
        train.main([str(Path(DIGITS).parent / "npz.yaml"), *words, "train.batch_size=20", "run_dir=run"]) == 0
    )
    with open("run/pseudo_labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(130))
    right = [int(row["label"]) == labels[20:150][int(row["index"])] for row in rows]
    assert np.mean(right) > 0.9
