"""The data sets by name, each read into one ImageSet: plain uint8 arrays with their labels."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ups_fast.data.looks import PLAIN, notes_on_looks, plain_rows
from ups_fast.data.split import stratified_split
from ups_fast.files import home
from ups_fast.machine import memory_bytes
from ups_fast.words import line_of

if TYPE_CHECKING:
    from ups_fast.data.manifest import Manifest


@dataclass(frozen=True)
class ImageSet:
    """A data set in memory, on the CPU.

    train_labels are the truth: they give the labeled part its labels and serve reports on the rest.
    `labeled` holds the labeled indices into train where the data set itself decides them (npz), else None.
    """

    name: str
    classes: list[str]
    train_images: Tensor  # [N, H, W, C] uint8
    train_labels: Tensor  # [N] int64, -1 where the truth is unknown
    test_images: Tensor  # [M, H, W, C] uint8
    test_labels: Tensor  # [M] int64
    mean: tuple[float, ...]  # [C], of pixels in [0, 1]
    std: tuple[float, ...]  # [C], above 0
    labeled: Tensor | None = None  # [L] int64, ascending
    # [V] int64, ascending: validation images among the training set's ids; nothing trains on them.
    val: Tensor | None = None
    names: list[str] | None = None  # [N] the file of each training image, where it has one of its own
    test_names: list[str] | None = None  # [M] likewise
    root: str | None = None  # folder of these files
    in_files: bool = False  # images stay in them: train_images and test_images are [0, S, S, C]
    notes: tuple[str, ...] = ()  # sentences for the user
    damaged: tuple[str, ...] = ()  # likewise, one for each file that could not be read and was left out
    # Images that are gone since a run began, black here: their positions, each with a sentence.
    unreadable: Mapping[int, str] = field(default_factory=dict)  # of the training set
    test_unreadable: Mapping[int, str] = field(default_factory=dict)
    manifest: Manifest | None = None  # of files: what a run compares at every start


def load_set(name: str, root: str) -> ImageSet:
    """Reads the data set `name` from `root` (data.root), downloading it there first where that is possible.

    digits         the 1,797 8x8 handwritten digits that scikit-learn ships; root is not used
    cifar10, cifar100, svhn
                   as torchvision stores them, downloaded on first use
    fashion_mnist  the four IDX files, gzipped or not, directly in root (as Debian's dataset-fashion-mnist has
                   them) or as torchvision stores them; otherwise downloaded
    npz            root is the user's .npz file: images x_labeled, x_unlabeled, x_test (uint8 [N, H, W],
                   [N, H, W, 1] or [N, H, W, 3]), labels y_labeled, y_test (integers 0..K-1); perhaps x_val and y_val,
                   images for validation; and, where the truth of unlabeled images is known, y_unlabeled (-1: unknown
                   for this image)

    Raises ValueError with one sentence that says what is missing or wrong, and where to put it.
    """
    readers: dict[str, Callable[[Path], ImageSet]] = {
        "digits": _digits,
        "cifar10": _cifar10,
        "cifar100": _cifar100,
        "svhn": _svhn,
        "fashion_mnist": _fashion_mnist,
        "npz": _npz,
    }
    if name not in readers:
        raise ValueError(f"data.name must be one of {', '.join(readers)}, got {name!r}")
    return _looked_at(readers[name](home(root)))


def _looked_at(data: ImageSet) -> ImageSet:
    """With a note on images of a single color."""
    n, n_labeled = len(data.train_images), 0 if data.labeled is None else len(data.labeled)
    n_val = 0 if data.val is None else len(data.val)
    rows = plain_rows(data.train_images.numpy()) + [n + i for i in plain_rows(data.test_images.numpy())]
    starts = {"labeled": 0, "unlabeled": n_labeled} if data.labeled is not None else {"training": 0}
    starts |= {"validation": n - n_val} if n_val else {}
    starts["test"] = n
    ends = [*list(starts.values())[1:], n + len(data.test_images)]
    parts = {part: range(start, end) for (part, start), end in zip(starts.items(), ends, strict=True)}

    def name(i: int) -> str:
        part, ids = next(each for each in parts.items() if i in each[1])
        return f"{part} image {i - ids.start:,}"

    return replace(data, notes=(*data.notes, *notes_on_looks({i: [PLAIN] for i in rows}, parts, name)))


def moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:  # [N, H, W, C] uint8
    """Mean and std per channel of pixels in [0, 1], from exact sums. A constant channel gets std 1."""
    n = images[..., 0].numel()
    total = torch.zeros(images.shape[-1], dtype=torch.int64)
    squares = torch.zeros_like(total)
    for chunk in images.split(4096):  # a wide copy of all images at once would take gigabytes
        wide = chunk.to(torch.int32)
        total += wide.sum((0, 1, 2))
        squares += wide.square().sum((0, 1, 2))
    mean = tuple(s / n / 255 for s in total.tolist())
    variance = [
        (n * q - s * s) / n**2 / 255**2 for s, q in zip(total.tolist(), squares.tolist(), strict=True)
    ]
    return mean, tuple(v**0.5 if v > 0 else 1.0 for v in variance)


# --- digits -------------------------------------------------------------------------------------------------

# scikit-learn's digits have no test part. This draw of one belongs to the data set: it is the same whatever
# the run's seed, so that results of different seeds compare.
_DIGITS_TEST_SEED = 0
_DIGITS_TEST_IMAGES = 360


def _digits(root: Path) -> ImageSet:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
    images = torch.from_numpy(pixels).unsqueeze(-1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    test, train = stratified_split(labels, _DIGITS_TEST_IMAGES, 10, _DIGITS_TEST_SEED)
    mean, std = moments(images[train])
    classes = [str(c) for c in range(10)]
    return ImageSet("digits", classes, images[train], labels[train], images[test], labels[test], mean, std)


# --- torchvision --------------------------------------------------------------------------------------------


def _torchvision(name: str, kind: Any, root: Path, by_hand: str, **part: Any) -> Any:
    """The torchvision data set `kind`, downloaded to root where needed; an error says what to do instead.

    torchvision compares MD5 sums: an archive put there by hand is used, and a partial one is fetched anew.
    """
    try:
        return kind(root, download=True, **part)
    except (OSError, RuntimeError, HTTPException) as error:
        raise ValueError(
            f"{name} is not complete in {str(root)!r} (data.root) and could not be downloaded ({line_of(error)}); "
            f"without a network, put {by_hand} into that folder"
        ) from error


def _cifar10(root: Path) -> ImageSet:
    from torchvision.datasets import CIFAR10

    return _cifar("cifar10", CIFAR10, root, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))


def _cifar100(root: Path) -> ImageSet:
    from torchvision.datasets import CIFAR100

    return _cifar("cifar100", CIFAR100, root, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def _cifar(name: str, kind: Any, root: Path, mean: tuple[float, ...], std: tuple[float, ...]) -> ImageSet:
    by_hand = f"{kind.filename} from {kind.url}"
    train, test = (_torchvision(name, kind, root, by_hand, train=is_train) for is_train in (True, False))
    data = ImageSet(
        name,
        list(train.classes),
        torch.from_numpy(np.ascontiguousarray(train.data)),
        torch.tensor(train.targets, dtype=torch.int64),
        torch.from_numpy(np.ascontiguousarray(test.data)),
        torch.tensor(test.targets, dtype=torch.int64),
        mean,
        std,
    )
    return _check_belongs(data, root)


def _svhn(root: Path) -> ImageSet:
    from torchvision.datasets import SVHN

    (train_url, train_file, _), (test_url, test_file, _) = SVHN.split_list["train"], SVHN.split_list["test"]
    by_hand = f"{train_file} from {train_url} and {test_file} from {test_url}"
    train, test = (_torchvision("svhn", SVHN, root, by_hand, split=split) for split in ("train", "test"))
    train_images, test_images = (
        torch.from_numpy(np.ascontiguousarray(part.data.transpose(0, 2, 3, 1))) for part in (train, test)
    )
    mean, std = moments(train_images)
    data = ImageSet(
        "svhn",
        [str(c) for c in range(10)],
        train_images,
        torch.from_numpy(train.labels),
        test_images,
        torch.from_numpy(test.labels),
        mean,
        std,
    )
    return _check_belongs(data, root)


# --- Fashion-MNIST ------------------------------------------------------------------------------------------

_FASHION_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_FASHION_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]


def _fashion_mnist(root: Path) -> ImageSet:
    folder, raw = (
        root,
        root / "FashionMNIST" / "raw",
    )  # where torchvision believes files that it finds unzipped
    if all((raw / file).is_file() for file in _FASHION_FILES):
        folder = raw
    elif not any(_idx_path(root, file) for file in _FASHION_FILES):
        from torchvision.datasets import FashionMNIST

        by_hand = (
            f"{', '.join(f'{file}.gz' for file in _FASHION_FILES)} from {FashionMNIST.mirrors[0]} "
            "(Debian's package dataset-fashion-mnist has them in /usr/share/datasets/fashion-mnist)"
        )
        folder = Path(_torchvision("fashion_mnist", FashionMNIST, root, by_hand).raw_folder)
    train_images, train_labels, test_images, test_labels = (
        _read_idx(folder, file) for file in _FASHION_FILES
    )
    train_images, test_images = train_images.unsqueeze(-1), test_images.unsqueeze(-1)
    mean, std = moments(train_images)
    data = ImageSet(
        "fashion_mnist",
        list(_FASHION_CLASSES),
        train_images,
        train_labels.to(torch.int64),
        test_images,
        test_labels.to(torch.int64),
        mean,
        std,
    )
    return _check_belongs(data, folder)


def _idx_path(folder: Path, file: str) -> Path | None:
    """The gzipped file before the plain one: its checksum would show a copy that was cut short."""
    return next((path for path in (folder / f"{file}.gz", folder / file) if path.is_file()), None)


def _read_idx(folder: Path, file: str) -> Tensor:
    """An IDX file of bytes: 0, 0, 8, the number of sizes, each size as a big-endian uint32, then the data."""
    path = _idx_path(folder, file)
    if path is None:
        raise ValueError(f"{file}.gz is missing in {str(folder)!r} (data.root)")
    ndim = int(file[file.index("idx") + 3])  # the name says it too: images idx3, labels idx1
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as stream:
            head = stream.read(4 + 4 * ndim)
            if head[:4] != bytes((0, 0, 8, ndim)):
                raise ValueError(f"header {head[:4].hex()}")
            shape = struct.unpack_from(f">{ndim}I", head, 4)
            size = math.prod(shape)
            if size > memory_bytes():
                raise ValueError(f"its header says {list(shape)}, more than fits into memory")
            raw = bytearray(stream.read(size + 1))  # a byte too many is found, and a checksum is read
        if len(raw) != size:
            raise ValueError(
                f"its header says {list(shape)}, and {'more' if len(raw) > size else 'fewer'} bytes follow"
            )
        if size == 0:
            raise ValueError(f"its header says {list(shape)}, so it is empty")
        return torch.frombuffer(raw, dtype=torch.uint8).view(shape)
    except (OSError, EOFError, zlib.error, struct.error, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged or no IDX file of bytes ({error}); delete or replace it"
        ) from error


def _check_belongs(data: ImageSet, root: Path) -> ImageSet:
    """The data set itself. ValueError where its files were put together from different ones."""
    parts = (
        ("training", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    )
    for part, images, labels in parts:
        if len(images) != len(labels):
            what = f"{len(images):,} {part} images and {len(labels):,} labels"
        elif images.shape[1:] != data.train_images.shape[1:]:
            sizes = ["x".join(map(str, x.shape[1:3])) for x in (images, data.train_images)]
            what = f"test images of {sizes[0]} and training images of {sizes[1]}"
        elif not 0 <= int(labels.min()) <= int(labels.max()) < len(data.classes):
            lowest, highest = int(labels.min()), int(labels.max())
            what = f"{part} labels {lowest}..{highest}, where {data.name} has 0..{len(data.classes) - 1}"
        else:
            continue
        raise ValueError(
            f"the files in {str(root)!r} (data.root) do not belong together as {data.name}: they have {what}"
        )
    return data


# --- the user's own arrays ----------------------------------------------------------------------------------

_NPZ_ARRAYS = ("x_labeled", "y_labeled", "x_unlabeled", "x_test", "y_test")
_NPZ_OPTIONAL = ("y_unlabeled", "x_val", "y_val")


def _npz(path: Path) -> ImageSet:
    arrays = _npz_arrays(path)
    x_labeled, x_unlabeled, x_test = (
        _npz_images(arrays, key) for key in ("x_labeled", "x_unlabeled", "x_test")
    )
    x_val = _npz_images(arrays, "x_val") if "x_val" in arrays else x_labeled[:0]
    for key, images in (("x_unlabeled", x_unlabeled), ("x_test", x_test), ("x_val", x_val)):
        if images.shape[1:] != x_labeled.shape[1:]:
            raise ValueError(
                "all images must have one size and number of channels, "
                f"got x_labeled {list(x_labeled.shape)} and {key} {list(images.shape)}"
            )

    y_labeled = _npz_labels(arrays, "y_labeled", len(x_labeled), lowest=0)
    y_test = _npz_labels(arrays, "y_test", len(x_test), lowest=0)
    y_val = _npz_labels(arrays, "y_val", len(x_val), lowest=0) if len(x_val) else y_labeled[:0]
    y_unlabeled = torch.full((len(x_unlabeled),), -1)
    if "y_unlabeled" in arrays:
        y_unlabeled = _npz_labels(arrays, "y_unlabeled", len(x_unlabeled), lowest=-1)

    known = set(y_labeled.tolist())
    n_classes = max(known) + 1
    if missing := list(islice((c for c in range(n_classes) if c not in known), 5)):
        some = ", ".join(map(str, missing))
        raise ValueError(f"y_labeled must hold every class of 0..{n_classes - 1}, got none of class {some}")
    if n_classes < 2:
        raise ValueError("y_labeled must hold at least two classes, got only class 0")
    for key, labels in (("y_test", y_test), ("y_val", y_val), ("y_unlabeled", y_unlabeled)):
        if strange := labels[labels >= n_classes].unique().tolist():
            some = ", ".join(map(str, strange[:5]))
            raise ValueError(f"{key} has class {some}, of which x_labeled has no image")

    train_images, n = torch.cat([x_labeled, x_unlabeled, x_val]), len(x_labeled) + len(x_unlabeled)
    mean, std = moments(train_images[:n])
    return ImageSet(
        "npz",
        [str(c) for c in range(n_classes)],
        train_images,
        torch.cat([y_labeled, y_unlabeled, y_val]),
        x_test,
        y_test,
        mean,
        std,
        labeled=torch.arange(len(x_labeled)),
        val=torch.arange(n, n + len(x_val)) if len(x_val) else None,
    )


def _npz_arrays(path: Path) -> dict[str, np.ndarray]:
    """The file's arrays by name, the expected ones and no others. Nothing is ever unpickled.

    What the archive and the arrays' headers claim is held against the file, and against memory, before an array is
    made.
    """
    arrays: dict[str, np.ndarray] = {}
    place = ""
    if not path.exists():
        raise FileNotFoundError(f"there is no file {str(path)!r} (data.root)")
    try:
        if not path.is_file():
            raise ValueError("it is a folder" if path.is_dir() else "it is no regular file")
        with open(path, "rb") as start:
            if start.read(2) != b"PK":
                raise ValueError("it is not an .npz archive")
        with zipfile.ZipFile(path) as archive:
            members = _npz_members(archive)
            if lacking := [key for key in _NPZ_ARRAYS if key not in members]:
                return _npz_refused(
                    path, f"lacks {', '.join(lacking)}; it has {', '.join(members) or 'nothing'}"
                )
            known = (*_NPZ_ARRAYS, *_NPZ_OPTIONAL)
            if unknown := [key for key in members if key not in known]:
                said = f"{', '.join(known[:-1])} and {known[-1]}"
                return _npz_refused(path, f"has {', '.join(unknown)}; known arrays are {said}")
            if ("x_val" in members) != ("y_val" in members):
                got, other = ("x_val", "y_val") if "x_val" in members else ("y_val", "x_val")
                return _npz_refused(path, f"has {got} but lacks {other}: give both or neither")
            sizes = {}
            for key, member in members.items():
                place = f" at {key}"
                sizes[key] = _npz_size(archive, member)
            # These become one array.
            needed = sum(sizes.values()) + sum(
                sizes.get(key, 0) for key in ("x_labeled", "x_unlabeled", "x_val")
            )
            if needed > memory_bytes():
                raise MemoryError
            for key, member in members.items():
                place = f" at {key}"
                with archive.open(member) as file:
                    arrays[key] = np.lib.format.read_array(file, allow_pickle=False)
    except MemoryError:
        raise ValueError(
            f"the arrays of {str(path)!r} (data.root) take {needed / 2**30:,.1f} GiB to read, and this machine has "
            f"{memory_bytes() / 2**30:,.1f}: keep fewer or smaller images in x_unlabeled, or store them as image files "
            "for data.name=folder, which need not be in memory"
        ) from None
    except _NpzRefused:
        raise
    except Exception as error:  # whatever a stranger's bytes may cause
        raise ValueError(
            f"data.root must be an .npz file of plain arrays, got {str(path)!r}{place}: {line_of(error)}"
        ) from error
    return arrays


class _NpzRefused(ValueError):
    """The archive is sound, and is not what is asked for."""


def _npz_refused(path: Path, why: str) -> dict[str, np.ndarray]:
    raise _NpzRefused(f"{str(path)!r} (data.root) {why}")


def _npz_members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        key = member.filename.removesuffix(".npy")
        if key in members:
            raise ValueError(f"it has two arrays of the name {key!r}")
        if member.flag_bits & 1:
            raise ValueError(f"{key!r} is encrypted: store it without a password")
        members[key] = member
    return members


def _npz_size(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """Bytes of an array by its header, which must be that of plain numbers and fit the file."""
    if member.compress_size > os.path.getsize(str(archive.filename)):
        raise ValueError("it is longer than the file")
    if member.compress_type == zipfile.ZIP_DEFLATED and member.file_size > 1040 * (member.compress_size + 64):
        raise ValueError("its size cannot be right: no data shrink so far")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"its format {version[0]}.{version[1]} is not one of plain arrays")
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
        follows = member.file_size - file.tell()
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if dtype.kind not in "biuf" or dtype.subdtype:
        raise ValueError(f"it must hold plain numbers, got {str(dtype)[:100]}")
    if min(shape, default=0) < 0 or (claimed := math.prod(shape) * dtype.itemsize) != follows:
        raise ValueError(
            f"its header says {dtype!s} {list(shape)[:8]}, which the {follows:,} bytes after it are not"
        )
    return claimed


def _npz_images(arrays: dict[str, np.ndarray], key: str) -> Tensor:  # [N, H, W, C] uint8
    array = arrays[key]
    got = f"{array.dtype} {list(array.shape)}"
    channels_last = array.ndim == 4 and array.shape[3] in (1, 3)
    if array.ndim == 4 and array.shape[1] in (1, 3) and not channels_last:
        raise ValueError(f"{key} must have its channels last, got {got}: use {key}.transpose(0, 2, 3, 1)")
    if array.dtype != np.uint8 or not (array.ndim == 3 or channels_last):
        raise ValueError(f"{key} must be uint8 images [N, H, W], [N, H, W, 1] or [N, H, W, 3], got {got}")
    if array.size == 0:
        raise ValueError(f"{key} must not be empty, got {got}")
    images = torch.from_numpy(np.ascontiguousarray(array))
    return images if images.ndim == 4 else images.unsqueeze(-1)


def _npz_labels(arrays: dict[str, np.ndarray], key: str, n_images: int, lowest: int) -> Tensor:  # [N] int64
    array = arrays[key]
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"{key} must be integer labels [N], got {array.dtype} {list(array.shape)}")
    if len(array) != n_images:
        raise ValueError(
            f"{key} must have one label for each image of x{key[1:]}, got {len(array)} for {n_images}"
        )
    if array.min() < lowest:
        raise ValueError(f"{key} must be at least {lowest}, got {array.min()}")
    if array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{key} must be at most 2**63 - 1, got {array.max()}")
    return torch.from_numpy(array.astype(np.int64))
