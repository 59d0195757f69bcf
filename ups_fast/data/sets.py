"""The data sets by name, each read into one ImageSet: plain uint8 arrays with their labels."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ups_fast.data.arrays import read_arrays, read_features
from ups_fast.data.image_set import ImageSet, moments
from ups_fast.data.looks import PLAIN, notes_on_looks, plain_rows
from ups_fast.data.mosaics import mosaics_of
from ups_fast.data.moving_digits import moving
from ups_fast.data.split import stratified_split
from ups_fast.files import home
from ups_fast.machine import memory_bytes
from ups_fast.words import line_of


def load_set(name: str, root: str, *, test_share: float = 0.2, seed: int = 0) -> ImageSet:
    """Reads the data set `name` from `root` (data.root), downloading it there first where that is possible.

    digits         the 1,797 8x8 handwritten digits that scikit-learn ships; root is not used
    mosaics        two by two of them in an image of 16x16, which has several labels; likewise
    moving_digits  clips of these that move: 1,437 to train and 360 to test, 8 frames of 16x16; the class is the
                   direction
    cifar10, cifar100, svhn
                   as torchvision stores them, downloaded on first use
    fashion_mnist  the four IDX files, gzipped or not, directly in root (as Debian's dataset-fashion-mnist has
                   them) or as torchvision stores them; otherwise downloaded
    npz            root is the user's .npz file: images x_labeled, x_unlabeled, x_test (uint8 [N, H, W],
                   [N, H, W, 1] or [N, H, W, 3]; clips [N, T, H, W, 1] or [N, T, H, W, 3]), labels y_labeled, y_test
                   (integers 0..K-1); perhaps x_val and y_val, images for validation; and, where the truth of
                   unlabeled images is known, y_unlabeled (-1: unknown for this image). Of several
                   labels all of them are [N, C]: 1, 0, or -1 where it is unknown
    features       the same with rows of numbers in place of images: float32 or float16 [N, d]; or root is an .npy or
                   .parquet file of all rows, with a CSV file of their labels beside it. Without test rows,
                   `test_share` of the labeled ones is held out, drawn by `seed`

    Raises ValueError with one sentence that says what is missing or wrong, and where to put it.
    """
    readers: dict[str, Callable[[Path], ImageSet]] = {
        "digits": _digits,
        "mosaics": lambda root: mosaics_of(_digits(root)),
        "moving_digits": lambda root: moving(_digits(root)),
        "cifar10": _cifar10,
        "cifar100": _cifar100,
        "svhn": _svhn,
        "fashion_mnist": _fashion_mnist,
        "npz": read_arrays,
        "features": partial(read_features, test_share=test_share, seed=seed),
    }
    if name not in readers:
        raise ValueError(f"data.name must be one of {', '.join(readers)}, got {name!r}")
    data = readers[name](home(root))
    return data if len(data.shape) == 1 else _looked_at(data)


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
        return f"{part} {data.noun} {i - ids.start:,}"

    looks = notes_on_looks({i: [PLAIN] for i in rows}, parts, name, data.noun)
    return replace(data, notes=(*data.notes, *looks))


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
