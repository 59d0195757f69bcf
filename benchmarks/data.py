"""Real data that ship in packages, as .npz files that a run can read. Nothing is downloaded.

fashion_mnist  Debian's package dataset-fashion-mnist, or the folder in FASHION_MNIST: 4,000 + 2,000 of its images
animals        `pip install --no-deps animal-mnist`, or its folder in ANIMAL_MNIST: 4,000 + 2,000 of its gray
               silhouettes of 28x28
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ups_fast.data import load_set


def write(name: str, path: Path, labels: int, seed: int) -> None:
    """A split of the data with so many labels in all, equally many of each class, drawn from the seed.

    Images of 28x28 become 14x14, the mean of 2x2 pixels each.
    """
    images, truth, test_images, test_truth = {"fashion_mnist": fashion, "animals": animals}[name]()
    images, test_images = halved(images), halved(test_images)
    random, classes = np.random.default_rng(seed), truth.max() + 1
    labeled = np.concatenate(
        [random.permutation(np.flatnonzero(truth == c))[: labels // classes] for c in range(classes)]
    )
    rest = np.setdiff1d(np.arange(len(truth)), labeled)
    np.savez(
        path,
        x_labeled=images[labeled],
        y_labeled=truth[labeled],
        x_unlabeled=images[rest],
        y_unlabeled=truth[rest],
        x_test=test_images,
        y_test=test_truth,
    )


def halved(images: np.ndarray) -> np.ndarray:  # uint8 [N, 2 H, 2 W (, 1)] -> [N, H, W]
    n, height, width = images.shape[:3]
    return images.reshape(n, height // 2, 2, width // 2, 2).mean((2, 4)).round().astype(np.uint8)


def fashion() -> tuple[np.ndarray, ...]:
    data = load_set("fashion_mnist", os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
    train = np.random.default_rng(0).permutation(len(data.train_labels))[:4_000]
    test = np.random.default_rng(1).permutation(len(data.test_labels))[:2_000]
    parts = data.train_images[train], data.train_labels[train], data.test_images[test], data.test_labels[test]
    return tuple(part.numpy() for part in parts)


def animals() -> tuple[np.ndarray, ...]:
    spec = find_spec("animal_mnist")
    folder = Path(
        os.environ.get("ANIMAL_MNIST") or (spec and spec.origin and Path(spec.origin).parent) or "."
    )
    files = [folder / f"data/Animal_MNIST/animal_{part}_version_3.gz" for part in ("data", "label")]
    if not files[0].exists():
        raise FileNotFoundError(
            f"there is no {files[0]}: pip install --no-deps animal-mnist, or set ANIMAL_MNIST"
        )
    images, labels = (_Arrays(io.BytesIO(gzip.decompress(file.read_bytes()))).load() for file in files)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images.reshape(-1, 28, 28)[order], labels.astype(np.int64)[order]
    return images[2000:6000], labels[2000:6000], images[:2000], labels[:2000]


class _Arrays(pickle.Unpickler):
    """Makes numpy's arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        raise pickle.UnpicklingError(f"{module}.{name} is no array of numpy")
