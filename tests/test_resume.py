"""Nothing is lost: real processes are killed and go on, and whatever may be wrong with a run's folder.

Each run here is a process of its own, forked from a server that has imported torch already: half a second, not five.
"""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from test_rounds import one_thread, tiny_config, tiny_set

from ups_fast import checkpoint, display, files, rounds
from ups_fast.checkpoint import RunFolderError, open_folder, write_atomic
from ups_fast.display import TensorBoard
from ups_fast.methods import Method
from ups_fast.tasks import single

__all__ = ["one_thread"]  # the fixture
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(
    ["torch._dynamo", "ups_fast.rounds"]
)  # torch imports the former with the first optimizer
RARELY, ALWAYS = (
    3600.0,
    0.0,
)  # checkpoint_seconds: only at the ends of training and of rounds; after every step
FINISHED, FAILED, STOPPED = 0, 2, 130

CLOCKS = {"seconds": 0, "outside": 0}  # of a row: what no two runs have in common


def settings(folder: Path, **changes: Any) -> Any:
    """15 steps in round 0, three an epoch, and a round 1 of its positives and negatives."""
    return tiny_config(folder, train__round0_batch_size=2, train__round0_epochs=5, **changes)


# What is done to a process. `call` names a function; `what` happens before its n-th call.


def kill(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tear(file: int) -> None:
    """A power cut: half of the file that is being written reaches the disk."""
    os.ftruncate(file, os.fstat(file).st_size // 2)
    kill()


def interrupt(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt_twice(*args: Any) -> None:
    interrupt()
    interrupt()


def limit_files(*args: Any) -> None:
    """From now on the system refuses to write a file of more than 200 kB; a checkpoint has 600."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))


CALLS = {
    "step": Method,
    "mc_select": single,  # once to test the network, then once per batch of labeling
    "fsync": os,  # twice per file written
    "replace": os,  # once per file written
}


def sabotage(call: str, n: int, what: Callable[..., None]) -> None:
    real, calls = getattr(CALLS[call], call), 0

    def replacement(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n:
            what(*args)
        return real(*args, **kwargs)

    setattr(CALLS[call], call, replacement)


Plan = tuple[str, int, Callable[..., None]]
SLOW = pytest.mark.slow


def child(folder: Path, plan: Plan | None, changes: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    if plan:
        sabotage(*plan)
    try:
        rounds.run(settings(folder, **changes), tiny_set(), console=Console(file=io.StringIO()))
    except (KeyboardInterrupt, RunFolderError) as error:
        message_of(folder).write_text(str(error))
        sys.exit(STOPPED if isinstance(error, KeyboardInterrupt) else FAILED)


def message_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.message")


def run(folder: Path, plan: Plan | None = None, **changes: Any) -> int:
    """The exit status of a run in a process of its own; the negative number of the signal that killed it."""
    process = SPAWN.Process(target=child, args=(folder, plan, changes))
    process.start()
    process.join(timeout=120)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def finish(folder: Path, **changes: Any) -> None:
    """Goes on to the end, in this process: nothing is done to it."""
    rounds.run(settings(folder, **changes), tiny_set(), console=Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run(folder, checkpoint_seconds=RARELY) == FINISHED
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in round 1, in the middle of an epoch."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    assert run(folder, ("step", 18, kill), checkpoint_seconds=ALWAYS) == -signal.SIGKILL
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars(folder: Path, part: str) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(folder / "tb" / part)).Reload()
    tags = [tag for tag in board.Tags()["scalars"] if tag not in CLOCKS]
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in tags}


def test_processes_of_one_second_hide_nothing_in_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later one's number comes first in the order of letters."""
    for epoch, process in enumerate((99999, 100000)):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        with TensorBoard(tmp_path / "tb", epoch, 0) as board:
            board.add_epoch(epoch + 1, {"loss": epoch + 0.5})
    assert scalars(tmp_path, "epochs") == {"loss": [(1, 0.5), (2, 1.5)]}


def assert_same_run(folder: Path, want: Path) -> None:
    """Bit for bit the same weights and pseudo-labels, and the same numbers but for the time they took."""
    assert (folder / "model.safetensors").read_bytes() == (want / "model.safetensors").read_bytes()
    with np.load(folder / "selection.npz") as got, np.load(want / "selection.npz") as expected:
        assert set(got) == set(expected)
        assert all(got[name].tobytes() == expected[name].tobytes() for name in got)
    assert [row | CLOCKS for row in rows(folder)] == [row | CLOCKS for row in rows(want)]
    for part in ("epochs", "rounds"):
        assert scalars(folder, part) == scalars(want, part), "no scalar is missing, and none is there twice"
    assert {path.name for path in folder.iterdir()} == {path.name for path in want.iterdir()}, (
        "nothing is left over"
    )


# Killed, at any moment.


@pytest.mark.slow
def test_one_run_killed_nine_times(tmp_path: Path, uninterrupted: Path) -> None:
    folder = tmp_path / "run"
    plans: list[Plan] = [
        ("step", 5, kill),  # in the middle of epoch 1
        ("fsync", 9, kill),  # a checkpoint is written but does not have its name yet
        ("replace", 6, kill),  # nor now
        ("fsync", 5, tear),  # a checkpoint is half written
        ("mc_select", 3, kill),  # in the second batch of labeling
        ("replace", 5, kill),  # labeled: the network is saved, the selection is not
        ("replace", 6, kill),  # both are, the checkpoint is not
        ("step", 4, kill),  # in the middle of an epoch of round 1
        ("replace", 7, kill),
    ]
    for plan in plans:
        assert run(folder, plan, checkpoint_seconds=ALWAYS) == -signal.SIGKILL, plan
    finish(folder, checkpoint_seconds=RARELY)
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(("fsync", 1, kill), marks=SLOW),  # before config.yaml is there
        pytest.param(("replace", 2, kill), marks=SLOW),  # before split.npz is there
        pytest.param(("step", 9, kill), marks=SLOW),  # before there is a checkpoint
        ("mc_select", 2, kill),  # in labeling, with the checkpoint of the training's end
        pytest.param(("replace", 7, kill), marks=SLOW),  # the network is saved, the selection is not
        ("replace", 9, kill),  # round 0 is in the checkpoint, but not in metrics.jsonl
        pytest.param(("step", 19, kill), marks=SLOW),  # in round 1, which starts again
    ],
    ids=lambda plan: f"{plan[0]}-{plan[1]}",
)
def test_killed_with_few_checkpoints(plan: Plan, tmp_path: Path, uninterrupted: Path) -> None:
    folder = tmp_path / "run"
    assert run(folder, plan, checkpoint_seconds=RARELY) == -signal.SIGKILL
    finish(folder, checkpoint_seconds=RARELY)
    assert_same_run(folder, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("n", [15, 16, 18])  # at the end of round 0, at the start of round 1 and later
def test_killed_around_a_warm_start(n: int, tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    warm = {"train__warm_start": True, "train__labeled_repeats": 3, "checkpoint_seconds": ALWAYS}
    assert run(whole, **warm) == FINISHED
    assert run(folder, ("step", n, kill), **warm) == -signal.SIGKILL
    assert run(folder, **warm) == FINISHED
    assert_same_run(folder, whole)


def test_time_spent_before_the_kill_counts(killed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(killed, tmp_path / "run")
    state = checkpoint.load_checkpoint(folder)
    assert state is not None and state.round == 1 and state.step > 0 and state.seconds > 0
    checkpoint.save_checkpoint(folder, replace(state, seconds=1000.0))
    finish(folder, checkpoint_seconds=RARELY)
    assert rows(folder)[0]["seconds"] < 1000 < rows(folder)[1]["seconds"]


# Asked to stop.


@pytest.mark.parametrize(
    "plan",
    [
        ("step", 8, interrupt),
        pytest.param(("step", 8, terminate), marks=SLOW),
        pytest.param(("mc_select", 3, interrupt), marks=SLOW),
    ],
    ids=["SIGINT", "SIGTERM", "SIGINT in labeling"],
)
def test_a_signal_saves_and_says_so(plan: Plan, tmp_path: Path, uninterrupted: Path) -> None:
    folder = tmp_path / "run"
    assert run(folder, plan, checkpoint_seconds=RARELY) == STOPPED
    state = checkpoint.load_checkpoint(folder)
    assert state is not None
    if plan[0] == "step":
        assert 3 * state.epoch + state.step == 8, "the step that was under way is done and saved"
    message = message_of(folder).read_text()
    assert str(folder) in message and f"round 0, epoch {state.epoch}" in message
    finish(folder, checkpoint_seconds=RARELY)
    assert_same_run(folder, uninterrupted)


def test_a_second_signal_kills_at_once(tmp_path: Path) -> None:
    plan = ("step", 8, interrupt_twice)
    assert run(tmp_path / "run", plan, checkpoint_seconds=RARELY) == -signal.SIGINT
    assert not (tmp_path / "run" / "checkpoint.pt").exists(), "not even this step was waited for"


def test_a_signal_that_the_parent_ignores_stays_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with display.stop_signal(Console(file=io.StringIO())) as stop:
            interrupt()
            assert not stop.is_set() and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            terminate()
            assert stop.is_set()
    finally:
        signal.signal(signal.SIGINT, before)


def test_signals_are_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    rounds.run(settings(tmp_path, train__rounds=1), tiny_set(), console=Console(file=io.StringIO()))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# A disk that takes no more.


def test_a_full_disk_ends_the_run_and_loses_nothing(
    killed: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    folder = shutil.copytree(killed, tmp_path / "run")
    before = (folder / "checkpoint.pt").read_bytes()
    assert run(folder, ("step", 1, limit_files), checkpoint_seconds=ALWAYS) == FAILED
    message = message_of(folder).read_text()
    assert "checkpoint.pt" in message and "File too large" in message
    assert (folder / "checkpoint.pt").read_bytes() == before
    finish(folder, checkpoint_seconds=RARELY)
    assert_same_run(folder, uninterrupted)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_no_space_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_atomic(file, b"old")
    full = Path("/dev/full").open("wb")  # noqa: SIM115 (closed by write_atomic); the system refuses each byte
    monkeypatch.setattr(files, "_new", lambda path: full)
    with pytest.raises(RunFolderError, match="file could not be written: No space left on device"):
        write_atomic(file, b"new" * 10_000)
    assert contents(tmp_path) == {Path("file"): b"old"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_no_space_left_at_the_last_moment(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_atomic(tmp_path / "file", b"old")
    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        with pytest.raises(RunFolderError, match="No space left"):
            write_atomic(tmp_path / "file", b"new")
    assert contents(tmp_path) == {Path("file"): b"old"}
    write_atomic(tmp_path / "file", b"new")
    assert contents(tmp_path) == {Path("file"): b"new"}


def test_no_space_left_for_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "write", refuse)
    monkeypatch.setattr(
        threading, "excepthook", lambda error: None
    )  # TensorBoard writes in a thread of its own
    with pytest.raises(RunFolderError, match="tb could not be written: No space left"):
        rounds.run(settings(tmp_path), tiny_set(), console=Console(file=io.StringIO()))


# A folder that is damaged, foreign, taken, or of another run.


def refused(folder: Path, sentence: str, *, data: Any = None, **changes: Any) -> str:
    """The run must stop with `sentence` and leave every file as it is."""
    before = contents(folder)
    with pytest.raises(RunFolderError, match=sentence) as caught:
        rounds.run(settings(folder, **changes), data or tiny_set(), console=Console(file=io.StringIO()))
    after = contents(folder)
    after.pop(Path(".lock"), None)
    before.pop(Path(".lock"), None)
    assert after == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def one_bit_wrong(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def foreign(content: bytes) -> bytes:
    file = io.BytesIO()
    torch.save({"weights": torch.zeros(3)}, file)
    return file.getvalue()


def another_zip(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("hello.txt", "hello")
    return file.getvalue()


def code_in_a_pickle(content: bytes) -> bytes:
    file = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, "version": checkpoint.VERSION, "data": print}, file)
    return file.getvalue()


def of_next_year(content: bytes) -> bytes:
    file = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, "version": 6}, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (truncated, "damaged"),
        (one_bit_wrong, "damaged"),
        (lambda content: b"", "damaged"),
        (lambda content: b"\0" * len(content), "damaged"),
        (another_zip, "damaged"),
        (code_in_a_pickle, "damaged"),
        (foreign, "not a checkpoint of ups_fast"),
        (of_next_year, "version 6, but this ups_fast reads version 5"),
    ],
)
def test_a_damaged_or_foreign_checkpoint(
    damage: Callable[[bytes], bytes], sentence: str, killed: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(killed, tmp_path / "run")
    file = folder / "checkpoint.pt"
    file.write_bytes(damage(file.read_bytes()))
    assert str(file) in refused(folder, sentence)


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"round": "a"}, "round, epoch or step"),
        ({"round": True}, "round, epoch or step"),
        ({"step": -1}, "round, epoch or step"),
        ({"round": 2}, "rows"),
        ({"rows": [{}]}, "rows"),
        ({"rows": None}, "rows"),
        ({"pseudo_labels": None}, "pseudo_labels"),
        ({"pseudo_labels": {"index": torch.zeros(3)}}, r"pseudo_labels \(the list of its parts\)"),
        ({"unlabeled": torch.arange(3)}, "unlabeled, which is not the split that config and data give,"),
        ({"labeled": torch.zeros(3)}, "labeled, unlabeled or val"),
        ({"labeled": "abc"}, "labeled, unlabeled or val"),
        ({"seconds": float("nan")}, "seconds or loss"),
        ({"loss": 0.5}, "seconds or loss"),
        ({"momentum": None}, "method or momentum"),
        ({"method": None, "momentum": None}, "method or momentum"),
    ],
)
def test_a_checkpoint_that_contradicts_itself(
    changes: dict[str, Any], wrong: str, killed: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(killed, tmp_path / "run")
    state = checkpoint.load_checkpoint(folder)
    assert state is not None
    checkpoint.save_checkpoint(folder, replace(state, **changes))
    refused(folder, f"{wrong} cannot be right; move it away to start over")


def test_a_folder_of_an_older_version(uninterrupted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("mc_layers:", "dropouts:"))
    refused(
        folder,
        "was begun by an older ups_fast, whose runs this one cannot go on with: choose another run_dir",
    )


def test_a_checkpoint_beyond_the_last_round(uninterrupted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    state = checkpoint.load_checkpoint(folder)
    assert state is not None
    n = state.round
    checkpoint.save_checkpoint(folder, replace(state, round=n + 1, rows=[*state.rows, {"round": n}]))
    refused(folder, f"has {n + 1} rounds done, but train.rounds is {n}: raise it")


def test_a_finished_run_makes_its_files_again_but_for_the_network(
    uninterrupted: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    lost = ("selection.npz", "split.npz", "metrics.jsonl", "model.safetensors")
    for name in lost:
        (folder / name).unlink()
    console = Console(file=io.StringIO(), width=1000)
    rounds.run(settings(folder, checkpoint_seconds=RARELY), tiny_set(), console=console)
    for name in lost[:-1]:
        assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes()
    assert "model.safetensors is gone. Only a new run can make it again" in console.file.getvalue()


def test_another_config(killed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(killed, tmp_path / "run")
    sentence = refused(folder, "another config", train__lr=0.1, select__tau_p=0.9)
    assert "train.lr is 0.1 and was 0.05" in sentence and "select.tau_p is 0.9 and was 0.95" in sentence
    assert sentence.count(" and was ") == 2
    assert refused(folder, "another config", seed=1).count(" and was ") == 1


def test_more_rounds_go_on_where_fewer_ended(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finish(folder, train__rounds=1)
    assert len(rows(folder)) == 1
    finish(folder)
    assert_same_run(folder, uninterrupted)
    refused(folder, "has 2 rounds done, but train.rounds is 1", train__rounds=1)


def test_a_config_that_lacks_a_key_or_cannot_be_read(killed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(killed, tmp_path / "run")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("  lr: 0.05\n", ""))
    assert "train.lr is 0.05 and was absent" in refused(folder, "another config")
    (folder / "config.yaml").write_text("{[")
    refused(folder, "config.yaml is damaged")
    (folder / "config.yaml").write_text("- 1\n- 2\n")
    refused(folder, r"config.yaml is damaged: it is not a mapping")
    (folder / "config.yaml").write_text("")
    refused(folder, r"its config\.yaml, which says of which run, is gone or has no keys: put it back")
    (folder / "config.yaml").unlink()
    refused(folder, r"its config\.yaml, which says of which run, is gone or has no keys: put it back")


def test_where_and_how_often_may_change(killed: Path, tmp_path: Path, uninterrupted: Path) -> None:
    folder = shutil.copytree(killed, tmp_path / "elsewhere" / "run")
    finish(folder, checkpoint_seconds=12.0, data__root="moved", device="auto")
    if not torch.cuda.is_available():
        assert_same_run(folder, uninterrupted)


def test_other_data(killed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(killed, tmp_path / "run")
    data = tiny_set()
    images = data.train_images.clone()
    images[59, 7, 7, 0] ^= 1
    labels = data.train_labels.roll(3)
    more = torch.cat([data.test_images, data.test_images[:3]])
    for other in (
        replace(data, train_images=images),
        replace(data, train_labels=labels.roll(1)),
        replace(data, test_images=more, test_labels=torch.cat([data.test_labels, data.test_labels[:3]])),
        replace(data, classes=["a", "b", "c"]),
    ):
        assert "60 training" in refused(folder, "other data", data=other)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert str(tmp_path) in refused(tmp_path, "no run of ups_fast")
    assert not (tmp_path / ".lock").exists()
    (tmp_path / "config.yaml").write_text("chapters: 7\n")
    refused(tmp_path, "no run of ups_fast")
    with pytest.raises(RunFolderError, match=r"thesis\.tex is a file"):
        rounds.run(settings(tmp_path / "thesis.tex"), tiny_set(), console=Console())


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with open_folder(folder, asdict(settings(folder))):
        assert run(folder) == FAILED
        assert "in use by another process" in message_of(folder).read_text()
        assert not (folder / "checkpoint.pt").exists()
    with open_folder(folder, asdict(settings(folder))):
        pass  # free again
