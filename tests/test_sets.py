"""Files of arrays that cannot be what they say: each is one sentence, before memory is taken and training begins."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ups_fast.data import arrays as npz
from ups_fast.data import load_set

LABELS = {"train": "train-labels-idx1-ubyte", "test": "t10k-labels-idx1-ubyte"}
IMAGES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}


def refusal(name: str, root: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load_set(name, str(root))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


# IDX ------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_fashion(root: Path, **changes: bytes) -> Path:
    files = {
        IMAGES["train"]: idx(np.arange(6 * 784, dtype=np.uint8).reshape(6, 28, 28)),
        LABELS["train"]: idx(np.arange(6, dtype=np.uint8)),
        IMAGES["test"]: idx(np.ones((3, 28, 28), np.uint8)),
        LABELS["test"]: idx(np.arange(3, dtype=np.uint8)),
    }
    root.mkdir(exist_ok=True, parents=True)
    for file, content in {**files, **changes}.items():
        (root / file).write_bytes(content)
    return root


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (LABELS["train"], idx(np.zeros(5, np.uint8)), "they have 6 training images and 5 labels"),
        (LABELS["test"], idx(np.zeros(10, np.uint8)), "they have 3 test images and 10 labels"),
        (LABELS["train"], idx(np.arange(6, dtype=np.uint8) + 21), "training labels 21..26, where fashion_mnist has"),
        (LABELS["test"], idx(np.full(3, 10, np.uint8)), "test labels 10..10, where fashion_mnist has 0..9"),
        (IMAGES["test"], idx(np.ones((3, 32, 32), np.uint8)), "test images of 32x32 and training images of 28x28"),
        (IMAGES["test"], idx(np.ones((3, 28, 27), np.uint8)), "test images of 28x27 and training images of 28x28"),
        (IMAGES["train"], idx(np.ones((0, 28, 28), np.uint8)), "says [0, 28, 28], so it is empty"),
        (LABELS["train"], idx(np.ones(0, np.uint8)), "says [0], so it is empty"),
        (IMAGES["train"], idx(np.ones((6, 0, 28), np.uint8)), "so it is empty"),
        (IMAGES["train"], idx(np.ones((6, 784), np.uint8)), "no IDX file of bytes (header 00000802)"),
        (IMAGES["train"], idx(np.ones((6, 28, 28), np.uint8))[:-1], "says [6, 28, 28], and fewer bytes follow"),
        (IMAGES["train"], idx(np.ones((6, 28, 28), np.uint8)) + b"0", "says [6, 28, 28], and more bytes follow"),
        (IMAGES["train"], bytes((0, 0, 8, 3)) + b"\xff" * 12, "more than fits into memory"),
        (IMAGES["train"], bytes((0, 0, 8, 3)) + b"\0\0\0\1", "is damaged or no IDX file"),
        (LABELS["train"], b"", "is damaged or no IDX file of bytes (header )"),
    ],
)  # fmt: skip
def test_idx_files_that_do_not_belong_together(tmp_path, file, content, said):
    write_fashion(tmp_path, **{file: content})
    assert said in refusal("fashion_mnist", tmp_path)


@pytest.mark.parametrize("file", [*IMAGES.values(), *LABELS.values()])
def test_unzipped_files_in_the_folder_of_torchvision_are_read_with_the_same_care(tmp_path, file):
    raw = tmp_path / "FashionMNIST" / "raw"
    write_fashion(raw)
    assert load_set("fashion_mnist", str(tmp_path)).train_images.shape == (6, 28, 28, 1)
    (raw / file).write_bytes(b"\0\0\x08\x03garbage")
    assert f"{file}' is damaged" in refusal("fashion_mnist", tmp_path)


def test_a_gzipped_file_that_never_ends_is_not_read_to_its_end(tmp_path):
    write_fashion(tmp_path)
    long = idx(np.ones((6, 28, 28), np.uint8)) + bytes(64 * 2**20)
    (tmp_path / f"{IMAGES['train']}.gz").write_bytes(gzip.compress(long, 1))
    tracemalloc.start()
    assert "and more bytes follow" in refusal("fashion_mnist", tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()


# .npz -----------------------------------------------------------------------------------------------------


def arrays(**changes: np.ndarray) -> dict[str, np.ndarray]:
    u8 = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    labels = np.array([0, 1, 0, 1, 0, 1])
    return {
        "x_labeled": u8,
        "y_labeled": labels,
        "x_unlabeled": u8,
        "x_test": u8,
        "y_test": labels,
        **changes,
    }


def npy(array: np.ndarray, header: str = "") -> bytes:
    """The bytes of an .npy file, with another header where one is given."""
    whole = io.BytesIO()
    np.save(whole, array)
    if not header:
        return whole.getvalue()
    text = header.encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + array.tobytes()


def write(path: Path, method: int = zipfile.ZIP_STORED, **changes: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in {**{name: npy(x) for name, x in arrays().items()}, **changes}.items():
            archive.writestr(f"{name}.npy", content)
    return path


def patched(path: Path, change: Callable[[bytearray], None]) -> Path:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    return path


def in_directory(content: bytearray, offset: int, value: bytes) -> None:
    """Changes the archive's directory entry of its first member."""
    at = content.index(b"PK\1\2") + offset
    content[at : at + len(value)] = value


def in_both(content: bytearray, offset: int, value: bytes) -> None:
    content[offset : offset + len(value)] = value
    in_directory(content, offset + 2, value)


HEADER = "{'descr': '|u1', 'fortran_order': False, 'shape': %s, }\n"
U8 = np.zeros((6, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: in_both(raw, 6, b"\1\0"), "'x_labeled' is encrypted: store it without a password"),
        (lambda raw: in_both(raw, 8, b"\x63\0"), "compression"),
        (lambda raw: in_both(raw, 8, b"\x09\0"), "compression"),
        (lambda raw: in_directory(raw, 16, b"\0\0\0\0"), "at x_labeled: Bad CRC"),
        (lambda raw: in_directory(raw, 24, b"\xff\xff\xff\x7f"), "at x_labeled: "),
        (lambda raw: in_directory(raw, 20, b"\xff\xff\xff\x7f"), "longer than the file"),
        (lambda raw: in_directory(raw, 42, b"\xff\xff\xff\x7f"), ".npz' at x_labeled: "),
        (lambda raw: in_directory(raw, 24, b"\xff\xff\xff\xff"), ".npz'"),
        (lambda raw: raw.__delitem__(slice(-20, None)), ".npz': "),
        (lambda raw: raw.__setitem__(slice(-22, -18), b"PK\6\6"), ".npz': "),
        (lambda raw: in_directory(raw, 46, b"\xff"), ".npz'"),
    ],
)  # fmt: skip
def test_an_archive_that_cannot_be_opened(tmp_path, change, said):
    assert said in refusal("npz", patched(write(tmp_path / "a.npz"), change))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (npy(U8, HEADER % "(6, 8, 9)"), "at x_labeled: its header says uint8 [6, 8, 9], which the 384 bytes after it"),
        (npy(U8, HEADER % "(1000000000000, 8, 8)"), "which the 384 bytes after it are not"),
        (npy(U8, HEADER % "(-6, -8, 8)"), "at x_labeled: "),
        (npy(U8, HEADER % "(6, 8, 8.0)"), "at x_labeled: "),
        (npy(U8, HEADER % f"({'1, ' * 100}384)"), "at x_labeled: "),
        (npy(U8, HEADER % "()"), "which the 384 bytes after it are not"),
        (npy(np.uint8(3)), "x_labeled must be uint8 images [N, H, W], [N, H, W, 1] or [N, H, W, 3], got uint8 []"),
        (npy(U8, HEADER % ("(" * 200 + "6" + ")" * 200)), "at x_labeled: "),
        (npy(U8, HEADER % "(6, 8, 8)" + " " * 20000), "at x_labeled: "),
        (npy(U8, "{"), "at x_labeled: "),
        (npy(U8, "__import__('os').abort()\n"), "at x_labeled: "),
        (npy(U8, HEADER.replace("|u1", "|O") % "(6, 8, 1)"), "at x_labeled: it holds Python objects"),
        (npy(np.zeros(6, "u1,i4")), "it must hold plain numbers, got [('f0', 'u1'), ('f1', '<i4')]"),
        (npy(np.zeros((6, 8, 8), complex)), "it must hold plain numbers, got complex128"),
        (npy(np.zeros((6, 8), "U3")), "it must hold plain numbers, got <U3"),
        (npy(np.zeros((6, 8, 8), "V0")), "it must hold plain numbers, got |V0"),
        (npy(np.zeros(6, "M8[s]")), "it must hold plain numbers, got datetime64[s]"),
        (b"\x93NUMPY\3\0" + npy(U8)[8:], "its format 3.0 is not one of plain arrays"),
        (b"\x93NUMPY\x09\0" + npy(U8)[8:], "at x_labeled: "),
        (npy(U8) + b"more", "which the 388 bytes after it are not"),
        (npy(U8)[:-1], "which the 383 bytes after it are not"),
        (b"", "at x_labeled: "),
        (b"not an array", "at x_labeled: "),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_array_that_is_not_what_it_says(tmp_path, content, said, method):
    assert said in refusal("npz", write(tmp_path / "a.npz", method, x_labeled=content))


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_good_archives_of_every_kind(tmp_path, method):
    turned = np.asfortranarray(arrays()["x_test"])
    second = io.BytesIO()
    np.lib.format.write_array(second, arrays()["x_unlabeled"], version=(2, 0))
    path = write(tmp_path / "a.npz", method, x_test=npy(turned), x_unlabeled=second.getvalue())
    data = load_set("npz", str(path))
    assert np.array_equal(data.test_images.numpy()[..., 0], turned) and len(data.train_images) == 12


def test_names_in_an_archive(tmp_path):
    with (
        pytest.warns(UserWarning, match="Duplicate name"),
        zipfile.ZipFile(write(tmp_path / "a.npz"), "a") as archive,
    ):
        archive.writestr("x_test.npy", npy(U8))
    assert "it has two arrays of the name 'x_test'" in refusal("npz", tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        for name, array in arrays().items():
            archive.writestr(f"deep/{name}.npy", npy(array))
    assert "lacks x_labeled, y_labeled, x_unlabeled, x_test, y_test; it has deep/x_labeled" in refusal(
        "npz", tmp_path / "b.npz"
    )


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_not_waited_for(tmp_path, kind):
    path = tmp_path / "a.npz"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path(os.devnull)
    said = refusal("npz", path)
    assert said.endswith("it is a folder" if kind == "folder" else "it is no regular file")


def test_arrays_that_do_not_fit_into_memory_get_advice_before_they_are_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.npz")
    with np.load(path) as arrays:
        needed = sum(arrays[key].nbytes for key in arrays)
    monkeypatch.setattr(npz, "memory_bytes", lambda: needed)
    load_set("npz", str(path))
    monkeypatch.setattr(npz, "memory_bytes", lambda: needed - 1)
    for reader in ("read_into", "_one_array"):
        monkeypatch.setattr(npz, reader, lambda *_, **__: pytest.fail("it was read"))
    said = refusal("npz", path)
    assert "(data.root) take 0.0 GiB to read, and this machine has 0.0: keep fewer" in said
    assert "data.name=folder" in said


def test_a_small_file_that_grows_beyond_memory_is_refused_by_what_it_claims(tmp_path, monkeypatch):
    zeros = np.zeros((60_000, 32, 32), np.uint8)  # 59 MiB, of which 60 kB are stored
    path = write(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, x_unlabeled=npy(zeros))
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(npz, "memory_bytes", lambda: 2**25)
    tracemalloc.start()
    assert "take 0.1 GiB to read" in refusal("npz", path)
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()


def test_memory_that_ends_while_arrays_are_read(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr(np.lib.format, "read_array", full)
    assert "store them as image files for data.name=folder" in refusal("npz", write(tmp_path / "a.npz"))
