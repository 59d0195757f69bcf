"""Files of strangers: nothing is written through a link, nothing waits for a pipe, nothing grows beyond its file."""

from __future__ import annotations

import errno
import io
import itertools
import os
import pickle
import socket
import stat
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from test_rounds import tiny_config, tiny_set

from ups_fast import checkpoint, config, display, files, load_model, rounds
from ups_fast.checkpoint import RUN_FILES, open_folder
from ups_fast.data.reading import _remember, _remembered
from ups_fast.display import TensorBoard
from ups_fast.files import RunFolderError, load_torch, open_regular, read_bytes, write_atomic
from ups_fast.models.pretrained import load_weights
from ups_fast.modules import Mish
from ups_fast.predict import Predictor

CONFIG = {"seed": 1}


# What lies in place of a file. Each function gives the path what nobody may write to, or wait for.


def link(path: Path) -> None:
    path.symlink_to(path.parents[1] / "precious")


def dangling(path: Path) -> None:
    path.symlink_to(path.parents[1] / "nothing")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()
    (path / "mine").write_text("mine")


def unix_socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # a socket's name has at most 100 characters
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(before)


ODD = {"a link": link, "a pipe": pipe, "a folder": folder, "a socket": unix_socket}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder beside a file that must stay as it is."""
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def start(place: Path) -> None:
    with open_folder(place, CONFIG):
        pass


def untouched(place: Path) -> bool:
    above = {path.name: path for path in place.parent.iterdir()}
    return set(above) == {"precious", "run"} and above["precious"].read_text() == "precious"


@pytest.mark.parametrize("kind", [*ODD, "a link to nothing"])
def test_a_write_replaces_regular_files_alone(kind: str, place: Path) -> None:
    ODD.get(kind, dangling)(place / "file")
    before = (place / "file").lstat()
    with pytest.raises(
        RunFolderError, match=rf"file is {kind[:6]}.* must be a regular file in a run's folder"
    ):
        write_atomic(place / "file", b"new")
    assert untouched(place) and (place / "file").lstat() == before and len(list(place.iterdir())) == 1


def test_a_write_goes_through_no_link_that_somebody_has_put_there(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link(place / ".file.tmp")
    write_atomic(place / "file", b"new")
    assert untouched(place) and (place / "file").read_bytes() == b"new"
    # Even one that guesses the name.
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "00")
    link(place / ".other.00.tmp")
    with pytest.raises(RunFolderError, match="other could not be written: File exists"):
        write_atomic(place / "other", b"new")
    assert untouched(place) and not (place / "other").exists()


def test_a_write_leaves_other_names_of_a_file_alone_and_heeds_the_umask(place: Path) -> None:
    os.link(place.parent / "precious", place / "file")
    before = os.umask(0o027)
    try:
        write_atomic(place / "file", b"new")
    finally:
        os.umask(before)
    assert untouched(place) and stat.S_IMODE((place / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("kind", [*ODD, "a link to nothing"])
@pytest.mark.parametrize("name", sorted(RUN_FILES))
def test_what_lies_in_place_of_a_runs_file_is_refused(name: str, kind: str, place: Path) -> None:
    with open_folder(place, CONFIG):
        pass
    (place / name).unlink(missing_ok=True)
    ODD.get(kind, dangling)(place / name)
    with (
        pytest.raises(RunFolderError, match="delete it, or choose another run_dir") as caught,
        open_folder(place, CONFIG),
    ):
        pass
    assert str(place / name) in str(caught.value) and untouched(place)


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
@pytest.mark.parametrize("name", ["tb", "tb/epochs", "tb/rounds"])
def test_tensorboard_stays_in_its_folder(name: str, kind: str, place: Path) -> None:
    (place / "tb").mkdir() if "/" in name else None
    target = place.parent / "outside"
    target.mkdir() if kind == "link" else None
    os.mkfifo(place / name) if kind == "pipe" else (place / name).symlink_to(target)
    for start in (lambda: TensorBoard(place / "tb", 0, 0), lambda: open_folder(place, CONFIG).__enter__()):
        (place / "config.yaml").write_text("seed: 1\n")
        with pytest.raises(RunFolderError, match=rf"{name} is .* must be a folder in a run's folder"):
            start()
    assert not target.exists() or not list(target.iterdir())


def test_tensorboard_writes_into_no_file_that_was_there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that it would choose by itself are easy to foresee."""
    now = 1_000_000_000
    monkeypatch.setattr("socket.gethostname", lambda: "host")
    monkeypatch.setattr("time.time", lambda: now)
    (place / "tb" / "epochs").mkdir(parents=True)
    for i in range(50):
        link(place / f"tb/epochs/events.out.tfevents.{now}.host.{os.getpid()}.{i}")
    for path in (place / "tb" / "epochs").iterdir():
        path.unlink()
        path.symlink_to(place.parent / "precious")
    monkeypatch.setattr("ups_fast.display._wait_for_a_later_name", lambda folder: None)
    with TensorBoard(place / "tb", 0, 0) as board:
        board.add_epoch(1, {"loss": 0.5})
    assert untouched(place)


def test_files_of_the_future_are_not_waited_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        display, "time", SimpleNamespace(time=lambda: 7, monotonic=itertools.count().__next__, sleep=abs)
    )
    (place / "epochs").mkdir()
    (place / "epochs" / "events.out.tfevents.7.x").touch()
    display._wait_for_a_later_name(place)
    assert display.time.monotonic() < 10


def test_what_killed_processes_left_is_removed_and_nothing_else(place: Path) -> None:
    mine = ["notes.tmp", ".notes.0123456789abcdef.tmp", ".checkpoint.pt.mine.tmp", "x.checkpoint.pt.tmp"]
    for name in mine:
        (place / name).write_text("mine")
    (place / "config.yaml").write_text("seed: 1\n")
    for name in (".checkpoint.pt.0123456789abcdef.tmp", ".report.html.00.tmp", ".metrics.jsonl.tmp"):
        (place / name).write_text("half")
    link(place / ".selection.npz.tmp")
    folder(place / ".split.npz.tmp")
    with open_folder(place, CONFIG):
        pass
    assert {path.name for path in place.iterdir()} == {*mine, ".split.npz.tmp", "config.yaml", ".lock"}
    assert untouched(place)


def test_a_run_folder_may_be_a_link_that_the_user_made(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with open_folder(tmp_path / "run", CONFIG) as warning:
        assert warning == ""
    assert (tmp_path / "disk" / "config.yaml").exists()
    (tmp_path / "lost").symlink_to(tmp_path / "gone")
    with (
        pytest.raises(RunFolderError, match="lost could not be written"),
        open_folder(tmp_path / "lost", CONFIG),
    ):
        pass
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP", "ENOSYS", "EINVAL", ""])
def test_without_locks_the_run_goes_on_and_says_so(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(getattr(errno, name), "no locks")

    if name:
        monkeypatch.setattr(files.fcntl, "flock", refuse)
    else:
        monkeypatch.setattr(files, "fcntl", None)  # as on Windows
    with open_folder(place, CONFIG) as warning:
        assert f"run_dir={place} cannot be locked, as " in warning
    assert not list(place.glob(".*.tmp"))


def test_a_run_without_locks_says_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    console = Console(file=io.StringIO(), width=1000)
    rounds.run(tiny_config(place, train__rounds=1, train__round0_epochs=1), tiny_set(), console=console)
    assert "The run goes on. Start no second process in this folder" in console.file.getvalue()


def test_another_error_of_a_lock_is_a_sentence(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with (
        pytest.raises(RunFolderError, match=r"\.lock could not be locked: Input/output error"),
        open_folder(place, CONFIG),
    ):
        pass


# Reading.


def promptly(call: Callable[[], Any]) -> BaseException:
    """What `call` raises; it must do so before a pipe gets its other end, which it never does."""
    caught: list[BaseException] = []

    def target() -> None:
        try:
            call()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive(), "it waits for a pipe"
    return caught[0]


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a socket", "a device"])
def test_only_regular_files_are_read(kind: str, place: Path) -> None:
    path = place / "model.safetensors"
    (path.symlink_to("/dev/zero") if kind == "a device" else ODD[kind](path))
    for call in (
        lambda: open_regular(path),
        lambda: read_bytes(path),
        lambda: load_torch(path),
        lambda: load_model(place),
        lambda: checkpoint.read_config(path),
    ):
        error = promptly(call)
        assert isinstance(error, RunFolderError) and f"{path} is {kind}, and only regular" in str(error)
    weights = promptly(lambda: load_weights(Mish(), str(path), "net", "head"))
    assert isinstance(weights, ValueError) and f"weights: there is no file to read: {path} is {kind}" in str(
        weights
    )
    assert isinstance(promptly(lambda: _remembered(path)), ValueError)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_predict_waits_for_no_pipe(name: str, place: Path) -> None:
    rounds.run(
        tiny_config(place, train__rounds=1, train__round0_epochs=1),
        tiny_set(),
        console=Console(file=io.StringIO()),
    )
    (place / name).unlink()
    pipe(place / name)
    assert isinstance(promptly(lambda: Predictor(place, "cpu")), RunFolderError)


def test_a_file_larger_than_any_of_its_kind(place: Path) -> None:
    (place / "config.yaml").write_bytes(b"#" * 100_001)
    with pytest.raises(RunFolderError, match="has 100,001 bytes, and no such file has more than 100,000"):
        checkpoint.read_config(place / "config.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [1, 1]\nb: &b [*a, *a]\n",
        "[" * 50_000,
        "a: !!python/object/apply:os.system [ls]\n",
        "? [1, 2]\n: 3\n",
        "\x00",
        "- 1",
    ],
)
def test_a_strangers_config_is_refused(text: str, place: Path) -> None:
    (place / "config.yaml").write_text(text)
    with pytest.raises(RunFolderError) as caught:
        checkpoint.read_config(place / "config.yaml")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_what_a_strangers_config_says_moves_no_cursor(place: Path) -> None:
    (place / "config.yaml").write_text('seed: "\\x1b[2J\\nerased"\n' + f"data.root2: {'x' * 5000}\n")
    with pytest.raises(RunFolderError, match="another config") as caught, open_folder(place, CONFIG):
        pass
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


# What torch.save made.


def repacked(content: Any, change: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], None]) -> bytes:
    """The archive of torch.save(content), each part written as `change` likes."""
    first, second = io.BytesIO(), io.BytesIO()
    torch.save(content, first)
    with zipfile.ZipFile(first) as source, zipfile.ZipFile(second, "w") as target:
        for member in source.infolist():
            change(target, member, source.read(member))
    return second.getvalue()


def deflated(target: zipfile.ZipFile, member: zipfile.ZipInfo, data: bytes) -> None:
    target.writestr(member.filename, data, zipfile.ZIP_DEFLATED)


def pickled(code: bytes) -> Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], None]:
    def change(target: zipfile.ZipFile, member: zipfile.ZipInfo, data: bytes) -> None:
        target.writestr(member.filename, code if member.filename.endswith("data.pkl") else data)

    return change


def twice(target: zipfile.ZipFile, member: zipfile.ZipInfo, data: bytes) -> None:
    target.writestr(member.filename, data)
    if "data/0" in member.filename:
        target.writestr(member.filename, data)


BOMBS: dict[str, bytes] = {
    "compressed or larger": repacked({"a": torch.zeros(10_000_000)}, deflated),
    "builtins bytearray": repacked(
        {}, pickled(b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.")
    ),
    "torch Tensor": repacked({}, pickled(b"\x80\x02ctorch\nTensor\n\x8a\x05\x00\x00\x00\x00\x10\x85R.")),
    "posix system": repacked({}, pickled(b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00ls\x85R.")),
    "more elements than bytes": repacked(
        {"a": torch.zeros(1000).expand(3_000_000, 1000)}, lambda z, m, data: z.writestr(m.filename, data)
    ),
    "in a list in itself": repacked(
        {"a": [[torch.zeros(1).expand(10**12)]]}, lambda z, m, data: z.writestr(m.filename, data)
    ),
    "two parts of one name": repacked({"a": torch.zeros(3)}, twice),
    "not dense": repacked({"a": torch.zeros(3).to_sparse()}, lambda z, m, data: z.writestr(m.filename, data)),
    "that is not dense": repacked(
        {"a": torch.empty(10**10, device="meta")}, lambda z, m, data: z.writestr(m.filename, data)
    ),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("what", BOMBS)
def test_a_small_file_takes_little_memory(what: str, place: Path) -> None:
    for name in ("checkpoint.pt", "weights.pth"):
        (place / name).write_bytes(BOMBS[what])
    with pytest.raises(ValueError, match="more elements" if "itself" in what else what):
        load_torch(place / "checkpoint.pt")
    with pytest.raises(RunFolderError, match=r"checkpoint\.pt is damaged or no checkpoint \(.*start over"):
        checkpoint.load_checkpoint(place)
    with pytest.raises(ValueError, match=r"weights: .*weights\.pth is (damaged|no state_dict)"):
        load_weights(torch.nn.Linear(2, 2), str(place / "weights.pth"), "net", "head")


def test_a_pickle_of_torch_before_its_archives(place: Path) -> None:
    good = {"weight": torch.randn(2, 2), "bias": torch.nn.Parameter(torch.zeros(2))}
    torch.save(good, place / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(load_torch(place / "old.pth")["weight"], good["weight"])
    magic = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}]
    bomb = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R."
    (place / "bomb.pth").write_bytes(b"".join(pickle.dumps(each, 2) for each in magic) + bomb)
    with pytest.raises(ValueError, match="bytearray"):
        load_torch(place / "bomb.pth")


def test_an_archive_behind_a_pickle_and_a_pickle_of_another_case(place: Path) -> None:
    """Two readers of one file must not see two contents."""
    bomb = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R."
    magic = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}]
    harmless = repacked({}, lambda z, m, data: z.writestr(m.filename, data))
    (place / "a.pth").write_bytes(b"".join(pickle.dumps(each, 2) for each in magic) + bomb + harmless)
    (place / "b.pth").write_bytes(
        repacked({}, lambda z, m, data: z.writestr(m.filename.replace("data.pkl", "DATA.PKL"), bomb))
    )
    for name in ("a.pth", "b.pth"):
        with pytest.raises(ValueError, match="bytearray"):
            load_torch(place / name)


def test_pretrained_weights_that_are_not_finite(place: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Linear(2, 2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for value in (float("nan"), float("inf")):
        torch.save({**before, "0.weight": torch.full((2, 1, 3, 3), value)}, place / "w.pth")
        with pytest.raises(ValueError, match=r"0\.weight has NaN or infinite values"):
            load_weights(net, str(place / "w.pth"), "net", "1")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# ~


def test_a_home_folder_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(
        "data: {n_labels: 10, root: ~/d}\nmodel: {weights: ~/w.pth}\nrun_dir: ~/r\n"
    )
    cfg = config.load("c.yaml")
    assert (cfg.run_dir, cfg.data.root, cfg.model.weights) == tuple(
        f"{tmp_path}/{x}" for x in ("r", "d", "w.pth")
    )
    words = ["data.root=~/d", "model.weights=~/w.pth", "run_dir=~/r"]
    (tmp_path / "d.yaml").write_text("data: {n_labels: 10}\n")
    assert config.load("~/d.yaml", words) == cfg
    assert config.load("d.yaml", ["run_dir=./~x"]).run_dir == "./~x"
    for key in ("run_dir", "data.root", "model.weights"):
        with pytest.raises(
            ValueError, match=rf"{key} must begin with a home folder that is there, got '~no-such-user/x'"
        ):
            config.load("d.yaml", [f"{key}=~no-such-user/x"])


def test_a_trained_network_below_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    small = tiny_config(tmp_path / "run", train__rounds=1, train__round0_epochs=1)
    rounds.run(small, tiny_set(), console=Console(file=io.StringIO()))
    assert load_model("~/run").classes == load_model(tmp_path / "run").classes
    with pytest.raises(FileNotFoundError, match="run_dir=~no-such-user/run holds no trained network"):
        load_model("~no-such-user/run")


def test_a_cache_is_written_through_no_link(place: Path) -> None:
    dangling(place / "cache")
    (note,) = _remember(place / "cache", {"a": [1, 2]})
    assert "is a link and must be a regular file" in note and untouched(place)
