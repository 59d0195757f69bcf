"""Data sets, the split, and batches augmented on the device, against plain per-image references."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import re
import struct
import tarfile
import urllib.error
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ups_fast.data import ImageSet, ResidentImages, load_set, stratified_split
from ups_fast.policy import Policy

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def random_images(n: int, height: int, width: int, channels: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, height, width, channels), dtype=torch.uint8, generator=generator)


def resident(
    images: Tensor, *, device="cpu", flip=False, crop=0, cutout=0, mean=None, std=None
) -> ResidentImages:
    channels = images.shape[-1]
    mean = mean or (0.4, 0.5, 0.6)[:channels]
    std = std or (0.2, 0.25, 0.3)[:channels]
    policy = Policy(flip=flip, crop=crop, cutout=cutout)
    return ResidentImages(images, mean=mean, std=std, device=device, policy=policy)


def drawn(data: ResidentImages, index: Tensor, seed: int) -> Tensor:
    """Each row in another epoch, so that equal indices are augmented apart."""
    return data.augmented(index, seed=seed, epoch=torch.arange(len(index), device=index.device))


def seeded(seed: int, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


# --- the split ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_labels", [3, 30, 300])
def test_split_is_stratified_disjoint_and_complete(n_labels):
    labels = torch.randint(0, 3, (1000,), generator=seeded(0))
    labeled, unlabeled = stratified_split(labels, n_labels, 3, seed=5)
    assert labeled.dtype == unlabeled.dtype == torch.int64
    assert labels[labeled].bincount(minlength=3).tolist() == [n_labels // 3] * 3
    assert torch.equal(torch.cat([labeled, unlabeled]).sort().values, torch.arange(1000))
    assert (labeled.diff() > 0).all() and (unlabeled.diff() > 0).all()


def test_split_follows_the_seed_and_nothing_else():
    labels = torch.arange(400) % 4
    first = stratified_split(labels, 40, 4, seed=1)
    torch.manual_seed(99)
    np.random.seed(99)
    state = torch.get_rng_state()
    again = stratified_split(labels, 40, 4, seed=1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert torch.equal(state, torch.get_rng_state())
    for other in (0, 2, 1 + 2**32, 2**63 - 1):
        assert not torch.equal(first[0], stratified_split(labels, 40, 4, seed=other)[0])


def test_split_of_a_seed_never_changes():
    """A run of last year can be split again: this is the stored answer, to be kept for good."""
    assert stratified_split(torch.arange(20) % 2, 6, 2, seed=3)[0].tolist() == [2, 5, 10, 13, 18, 19]


def test_split_draws_every_image_alike():
    """Each of 10 images of a class is drawn in 3 of 10 splits, within 5 standard errors."""
    labels, trials = torch.arange(20) % 2, 600
    drawn = torch.cat([stratified_split(labels, 6, 2, seed=s)[0] for s in range(trials)]).bincount(
        minlength=20
    )
    assert ((drawn / trials - 0.3).abs() < 5 * (0.3 * 0.7 / trials) ** 0.5).all()


def test_split_takes_everything_that_is_there():
    labeled, unlabeled = stratified_split(torch.tensor([1, 0, 1, 0]), 4, 2, seed=0)
    assert labeled.tolist() == [0, 1, 2, 3] and unlabeled.tolist() == []


@pytest.mark.parametrize(
    ("labels", "n_labels", "n_classes", "sentence"),
    [
        ([0, 1, 2] * 4, 10, 3, "n_labels must be a positive multiple of the 3 classes, got 10"),
        ([0, 1, 2] * 4, 0, 3, "n_labels must be a positive multiple of the 3 classes, got 0"),
        ([0, 1, 2] * 4, -3, 3, "n_labels must be a positive multiple of the 3 classes, got -3"),
        ([0, 1, 2] * 4, 15, 3, "n_labels must be at most the 12 training images, got 15"),
        ([], 3, 3, "n_labels must be at most the 0 training images, got 3"),
        ([0] * 9 + [1] * 2, 6, 2, "n_labels=6 asks for 3 images of each class, class 1 has 2"),
        ([0] * 9, 6, 2, "n_labels=6 asks for 3 images of each class, class 1 has 0"),
        ([0, 1, -1], 2, 2, "labels must be in 0..1, got -1..1"),
        ([0, 1, 2], 2, 2, "labels must be in 0..1, got 0..2"),
        ([0, 1, 2], 2, 0, "n_classes must be positive, got 0"),
    ],
)
def test_split_refuses(labels, n_labels, n_classes, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        stratified_split(torch.tensor(labels, dtype=torch.int64), n_labels, n_classes, seed=0)


# --- batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (3, 9, 14)])
@pytest.mark.parametrize("index", [[3, 0, 3, 6], [5], []])
def test_clean_only_normalizes(device, channels, height, width, index):
    images = random_images(7, height, width, channels)
    data = resident(images, device=device)
    batch = data.clean(torch.tensor(index, dtype=torch.int64, device=device))
    mean, std = torch.tensor((0.4, 0.5, 0.6)[:channels]), torch.tensor((0.2, 0.25, 0.3)[:channels])
    expected = ((images[index].float() / 255 - mean) / std).permute(0, 3, 1, 2)
    assert len(data) == 7
    assert batch.shape == (len(index), channels, height, width) and batch.dtype == torch.float32
    assert batch.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(batch.cpu(), expected, rtol=0, atol=1e-6)


def test_without_augmentation_a_batch_is_clean():
    data, index = resident(random_images(5, 8, 8, 3)), torch.tensor([4, 1, 1])
    assert torch.equal(drawn(data, index, 0), data.clean(index))


def candidates(image: Tensor, crop: int, flips: tuple[bool, ...]) -> dict[tuple[bool, int, int], Tensor]:
    """Every flip and crop of one normalized [C, H, W] image, by torch's own reflection padding."""
    _, height, width = image.shape
    out = {}
    for flipped in flips:
        padded = F.pad(image.flip(2) if flipped else image, (crop, crop, crop, crop), mode="reflect")
        for y in range(2 * crop + 1):
            for x in range(2 * crop + 1):
                out[flipped, y, x] = padded[:, y : y + height, x : x + width]
    return out


def ways_taken(data: ResidentImages, batch: int) -> Tensor:
    """For `batch` draws of each image: bool [ways, images * batch], the flips and crops that give it."""
    n, height, width, channels = data.images.shape
    index = torch.arange(n, device=data.images.device).repeat_interleave(batch)
    images = drawn(data, index, 1)
    assert images.shape == (len(index), channels, height, width) and images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    clean, taken = data.clean(torch.arange(n, device=data.images.device)), []
    for i in range(n):
        ways = candidates(
            clean[i], data.policy.crop, (False, True) if data.policy.flip else (False,)
        ).values()
        taken.append(torch.stack([(images[index == i] == way).flatten(1).all(1) for way in ways]))
    return torch.cat(taken, 1).cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("channels", "height", "width", "crop", "flip"),
    [(1, 8, 8, 0, True), (1, 8, 8, 1, False), (3, 6, 9, 2, True), (1, 9, 12, 3, True)],
)
def test_flip_and_crop_are_even(device, channels, height, width, crop, flip):
    """Each output is exactly one flip and crop of its own image; every one is drawn, equally often."""
    data = resident(random_images(3, height, width, channels), device=device, flip=flip, crop=crop)
    n_ways = (1 + flip) * (2 * crop + 1) ** 2
    taken = ways_taken(data, 12 * n_ways)
    assert (taken.sum(0) == 1).all()
    # Each way is expected 36 times with a standard error of at most 6, and may be 5 of those away.
    assert taken.sum(1).min() > 6 and taken.sum(1).max() < 66


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("channels", "height", "width", "crop", "flip"),
    [(3, 5, 7, 4, True), (1, 12, 8, 7, False), (1, 2, 2, 1, True)],
)
def test_crop_up_to_the_largest(device, channels, height, width, crop, flip):
    """Reflected by almost its own size an image repeats: several crops may be equal, none is foreign."""
    data = resident(random_images(3, height, width, channels), device=device, flip=flip, crop=crop)
    assert ways_taken(data, 40).any(0).all()


def test_images_of_a_batch_draw_apart_from_each_other():
    """One image many times over: all but the few that meet by chance come out different."""
    data = resident(random_images(1, 16, 16, 1), flip=True, crop=4, cutout=8)
    batch = drawn(data, torch.zeros(256, dtype=torch.int64), 0)
    assert len({image.numpy().tobytes() for image in batch}) > 240


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("height", "width", "cutout"), [(8, 8, 16), (10, 6, 4), (9, 9, 3), (8, 8, 2), (8, 8, 1)]
)
def test_cutout_geometry(device, height, width, cutout):
    """Every hole is one of the squares that a loop cuts, and big samples show every one of those."""
    data = resident(torch.full((1, height, width, 3), 255, dtype=torch.uint8), device=device, cutout=cutout)
    n_ways = height * width * (cutout // 2 + 1)
    batch = drawn(data, torch.zeros(40 * n_ways, dtype=torch.int64, device=device), 2).cpu()
    clean = data.clean(torch.zeros(1, dtype=torch.int64, device=device)).cpu()
    hole = (batch == 0).all(1)
    assert torch.equal(
        batch, clean.masked_fill(hole[:, None], 0)
    )  # zero in the hole, all channels, else untouched

    weight: dict[bytes, float] = {}
    for side in range(1, cutout + 1):
        for y in range(height):
            for x in range(width):
                expected = np.zeros((height, width), dtype=bool)
                half = side // 2
                expected[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = True
                key = expected.tobytes()
                weight[key] = weight.get(key, 0) + 1 / (cutout * height * width)
    seen: dict[bytes, int] = {}
    for h in hole.numpy():
        seen[h.tobytes()] = seen.get(h.tobytes(), 0) + 1
    assert set(seen) <= set(weight)
    for key, p in weight.items():
        assert abs(seen.get(key, 0) - p * len(hole)) <= 6 * (p * len(hole)) ** 0.5 + 6


def test_cutout_comes_last():
    """The hole is 0, which no normalized pixel is here; the rest is one flip and crop of the whole image."""
    columns = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 16, 1).expand(1, 16, 16, 1).contiguous()
    data = resident(columns, flip=True, crop=3, cutout=6, mean=(0.9,), std=(0.1,))
    clean = data.clean(torch.zeros(1, dtype=torch.int64))[0]
    ways = torch.stack(list(candidates(clean, 3, (False, True)).values()))
    for image in drawn(data, torch.zeros(64, dtype=torch.int64), 4):
        hole = image == 0
        assert ((ways == image) | hole).flatten(1).all(1).any()


@pytest.mark.parametrize("device", DEVICES)
def test_seed_and_epoch_alone_decide(device):
    data = resident(random_images(9, 12, 10, 3), device=device, flip=True, crop=3, cutout=5)
    index = torch.tensor([0, 8, 4, 4, 1], device=device)
    first = data.augmented(index, seed=7, epoch=0)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(first, data.augmented(index, seed=7, epoch=0))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first[2], first[3])
    assert not torch.equal(first, data.augmented(index, seed=8, epoch=0))
    assert not torch.equal(first, data.augmented(index, seed=7, epoch=1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n", [0, 1])
def test_small_batches(channels, n):
    data = resident(random_images(2, 8, 8, channels), flip=True, crop=2, cutout=3)
    batch = drawn(data, torch.zeros(n, dtype=torch.int64), 0)
    assert batch.shape == (n, channels, 8, 8) and batch.dtype == torch.float32


def test_the_stored_images_stay_as_they_were():
    wide = random_images(6, 8, 16, 3)
    images = wide[1:5, :, ::2]  # a slice: neither contiguous nor at the start
    before = wide.clone()
    data = resident(images, flip=True, crop=2, cutout=8)
    assert torch.equal(data.clean(torch.arange(4)), resident(images.clone()).clean(torch.arange(4)))
    drawn(data, torch.arange(4), 0)
    assert torch.equal(wide, before) and torch.equal(data.images, images)


def test_no_host_synchronization():
    """Fake tensors have no values: whatever asks for one (.item(), `if tensor`, nonzero) raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    data = resident(random_images(4, 8, 8, 3), flip=True, crop=2, cutout=3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        index = torch.zeros(5, dtype=torch.int64)
        assert data.augmented(index, seed=0, epoch=0).shape == data.clean(index).shape == (5, 3, 8, 8)


@pytest.mark.gpu
def test_no_host_synchronization_on_a_gpu():
    data = resident(random_images(4, 8, 8, 3), device="cuda", flip=True, crop=2, cutout=3)
    index = torch.zeros(5, dtype=torch.int64, device="cuda")
    data.augmented(index, seed=0, epoch=0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        data.augmented(index, seed=0, epoch=0)
        data.clean(index)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("images", "changes", "error", "sentence"),
    [
        (torch.zeros(2, 8, 8, 3), {}, TypeError, r"images must be uint8 .* torch.float32 \[2, 8, 8, 3\]"),
        (random_images(2, 8, 8, 1)[..., 0], {}, TypeError, r"images must be uint8 .* \[2, 8, 8\]"),
        (random_images(2, 8, 9, 1), {"crop": 8}, ValueError, "policy.crop must be below the image size 8x9, got 8"),
        (random_images(2, 9, 8, 1), {"crop": -1}, ValueError, "policy.crop must be .*, got -1"),
        (random_images(2, 8, 8, 1), {"cutout": -2}, ValueError, "policy.cutout must be .*, got -2"),
        (random_images(2, 8, 8, 3), {"mean": (0.5,)}, ValueError, r"mean must be 3 finite numbers.*\(0.5,\)"),
        (random_images(2, 8, 8, 1), {"std": (0.0,)}, ValueError, r"std must be above 0, got \(0.0,\)"),
        (random_images(2, 8, 8, 1), {"std": (float("nan"),)}, ValueError, r"std must be .*, got \(nan,\)"),
    ],
)  # fmt: skip
def test_resident_refuses(images, changes, error, sentence):
    with pytest.raises(error, match=f"^{sentence}"):
        resident(images, **changes)


# --- data sets by name -------------------------------------------------------------------------------------


def check(data: ImageSet, n_classes: int, train: list[int], test: list[int]) -> None:
    assert len(data.classes) == n_classes and all(isinstance(name, str) for name in data.classes)
    assert list(data.train_images.shape) == train and list(data.test_images.shape) == test
    assert data.train_images.dtype == data.test_images.dtype == torch.uint8
    assert data.train_images.is_contiguous() and data.test_images.is_contiguous()
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    assert data.train_labels.shape == (train[0],) and data.test_labels.shape == (test[0],)
    assert len(data.mean) == len(data.std) == train[-1] and min(data.std) > 0


def moments(images: Tensor) -> tuple[list[float], list[float]]:
    pixels = images.double().flatten(0, 2) / 255
    return pixels.mean(0).tolist(), pixels.std(0, correction=0).tolist()


def test_unknown_set_lists_what_there_is():
    with pytest.raises(
        ValueError,
        match="digits, mosaics, moving_digits, cifar10, cifar100, svhn, fashion_mnist, npz, features, got 'mnist'",
    ):
        load_set("mnist", "data")


def test_digits():
    data = load_set("digits", "no/such/folder")
    check(data, 10, [1437, 8, 8, 1], [360, 8, 8, 1])
    assert data.name == "digits" and data.labeled is None
    assert data.test_labels.bincount().tolist() == [36] * 10
    assert data.train_images.min() == 0 and data.train_images.max() == 255
    mean, std = moments(data.train_images)
    assert data.mean == pytest.approx(mean) and data.std == pytest.approx(std)

    from sklearn.datasets import load_digits

    everything = load_digits()
    ours = torch.cat([data.train_images, data.test_images]).squeeze(-1).double() * (16 / 255)
    labels = torch.cat([data.train_labels, data.test_labels])
    as_rows = torch.cat([ours.round().flatten(1), labels[:, None].double()], 1).numpy()
    theirs = np.concatenate([everything.data, everything.target[:, None]], 1)
    assert np.array_equal(as_rows[np.lexsort(as_rows.T)], theirs[np.lexsort(theirs.T)])  # each image once


def test_digits_are_the_same_for_every_seed():
    torch.manual_seed(1)
    first = load_set("digits", "")
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(first.test_images, load_set("digits", "").test_images)


# Writers of the real formats, with few images. torchvision compares MD5 sums, which the fakes bring along.


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(kind, folder: Path, monkeypatch) -> tuple[np.ndarray, list[int]]:
    """CIFAR's pickles and archive in `folder`; a row is 3 planes of 1,024 bytes. Returns the test part."""
    base = folder / kind.base_folder
    base.mkdir(parents=True)
    random = np.random.RandomState(0)
    files = {}
    label_key = "labels" if kind.__name__ == "CIFAR10" else "fine_labels"
    for file, _ in kind.train_list + kind.test_list:
        rows = random.randint(0, 256, (4, 3072), dtype=np.uint8)
        labels = random.randint(0, 10, 4).tolist()
        (base / file).write_bytes(pickle.dumps({"data": rows, label_key: labels}))
        files[file] = md5(base / file)
    names = [f"class {c}" for c in range(10 if label_key == "labels" else 100)]
    (base / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}))
    with tarfile.open(folder / kind.filename, "w:gz") as archive:
        archive.add(base, kind.base_folder)
    monkeypatch.setattr(kind, "train_list", [[file, files[file]] for file, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[file, files[file]] for file, _ in kind.test_list])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(base / kind.meta["filename"])})
    monkeypatch.setattr(kind, "tgz_md5", md5(folder / kind.filename))
    return rows, labels


@pytest.fixture
def offline(monkeypatch):
    def refuse(request, *args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name, tmp_path, monkeypatch, offline):
    import torchvision

    kind = getattr(torchvision.datasets, name.upper())
    rows, labels = write_cifar(kind, tmp_path, monkeypatch)
    n = 4 * len(kind.train_list)
    for _ in range(2):
        data = load_set(name, str(tmp_path))
        check(data, int(name[5:]), [n, 32, 32, 3], [4, 32, 32, 3])
        assert data.name == name and data.labeled is None
        assert data.test_labels.tolist() == labels
        assert torch.equal(
            data.test_images[1, 2, 5], torch.from_numpy(rows[1].reshape(3, 32, 32)[:, 2, 5].copy())
        )
        for file in (tmp_path / kind.base_folder).iterdir():
            file.unlink()  # the second time: only the archive, as somebody without a network puts it there
    assert data.mean == {"cifar10": (0.4914, 0.4822, 0.4465), "cifar100": (0.5071, 0.4867, 0.4408)}[name]
    assert data.std == {"cifar10": (0.2471, 0.2435, 0.2616), "cifar100": (0.2675, 0.2565, 0.2761)}[name]


def test_an_interrupted_download_does_not_break_the_next_try(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10, utils

    source = tmp_path / "source"
    rows, _ = write_cifar(CIFAR10, source, monkeypatch)
    archive = (source / CIFAR10.filename).read_bytes()
    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, max_hops: url)

    def cut_short(url, filename):
        Path(filename).write_bytes(archive[: len(archive) // 2])
        raise urllib.error.URLError("connection lost")

    monkeypatch.setattr(utils, "_urlretrieve", cut_short)
    root = tmp_path / "root"
    with pytest.raises(ValueError, match="connection lost"):
        load_set("cifar10", str(root))

    monkeypatch.setattr(utils, "_urlretrieve", lambda url, filename: Path(filename).write_bytes(archive))
    assert load_set("cifar10", str(root)).test_images.shape[0] == len(rows)


def test_svhn(tmp_path, monkeypatch, offline):
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    images, splits = {}, {}
    for part, n in (("train", 12), ("test", 5)):
        url, file, _ = SVHN.split_list[part]
        images[part] = random_images(n, 32, 32, 3, seed=n).numpy()
        y = np.arange(n, dtype=np.uint8)[:, None] % 10 + 1  # the file calls digit 0 "10"
        savemat(tmp_path / file, {"X": images[part].transpose(1, 2, 3, 0), "y": y})
        splits[part] = [url, file, md5(tmp_path / file)]
    monkeypatch.setattr(SVHN, "split_list", splits)
    data = load_set("svhn", str(tmp_path))
    check(data, 10, [12, 32, 32, 3], [5, 32, 32, 3])
    assert data.train_labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert np.array_equal(data.train_images.numpy(), images["train"])
    assert np.array_equal(data.test_images.numpy(), images["test"])
    mean, std = moments(data.train_images)
    assert data.mean == pytest.approx(mean) and data.std == pytest.approx(std)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("cifar10", ["cifar-10-python.tar.gz"]),
        ("cifar100", ["cifar-100-python.tar.gz"]),
        ("svhn", ["train_32x32.mat", "test_32x32.mat"]),
        (
            "fashion_mnist",
            ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz", "dataset-fashion-mnist"],
        ),
    ],
)
def test_offline_says_what_to_put_where(name, files, tmp_path, offline):
    root = tmp_path / "data"
    for _ in range(2):
        with pytest.raises(ValueError) as caught:
            load_set(name, str(root))
        message = str(caught.value)
        assert "\n" not in message and message.startswith(
            f"{name} is not complete in {str(root)!r} (data.root)"
        )
        assert "Name or service not known" in message and all(file in message for file in files)
        assert not [path for path in root.rglob("*") if path.is_file()]


# --- Fashion-MNIST -----------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def fashion_files(n_train: int = 6, n_test: int = 3) -> dict[str, bytes]:
    return {
        "train-images-idx3-ubyte": idx(random_images(n_train, 28, 28, 1, seed=1).numpy()[..., 0]),
        "train-labels-idx1-ubyte": idx(np.arange(n_train, dtype=np.uint8)),
        "t10k-images-idx3-ubyte": idx(random_images(n_test, 28, 28, 1, seed=2).numpy()[..., 0]),
        "t10k-labels-idx1-ubyte": idx(np.arange(n_test, dtype=np.uint8) + 7),
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("folder", [".", "FashionMNIST/raw"])
def test_fashion_mnist_layouts(folder, zipped, tmp_path, monkeypatch, offline):
    from torchvision.datasets import FashionMNIST

    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    resources = []
    for file, raw in fashion_files().items():
        path = tmp_path / folder / (f"{file}.gz" if zipped else file)
        path.write_bytes(gzip.compress(raw) if zipped else raw)
        resources.append((f"{file}.gz", md5(path)))
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    data = load_set("fashion_mnist", str(tmp_path))
    check(data, 10, [6, 28, 28, 1], [3, 28, 28, 1])
    assert torch.equal(data.train_images, random_images(6, 28, 28, 1, seed=1))
    assert torch.equal(data.test_images, random_images(3, 28, 28, 1, seed=2))
    assert data.train_labels.tolist() == [0, 1, 2, 3, 4, 5] and data.test_labels.tolist() == [7, 8, 9]
    if folder == ".":  # a package's folder: nothing may be written there
        assert sorted(os.listdir(tmp_path)) == sorted(
            f"{file}.gz" if zipped else file for file in fashion_files()
        )


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: gzip.compress(raw)[:-9],  # cut short
        lambda raw: raw,  # not gzipped
        lambda raw: b"",
        lambda raw: gzip.compress(raw[:-1]),  # fewer bytes than the header promises
        lambda raw: gzip.compress(raw + b"0"),
        lambda raw: gzip.compress(raw[:6]),
        lambda raw: gzip.compress(raw[:16]),  # a header and nothing else
        lambda raw: gzip.compress(b"\0\0\x0d\x03" + raw[4:]),  # floats
        lambda raw: gzip.compress(b"\0\0\x08\x01" + raw[4:]),  # labels for images
        lambda raw: gzip.compress(raw)[:40] + b"garbage" + gzip.compress(raw)[47:],
    ],
)
def test_fashion_mnist_damaged_file_is_named(damage, tmp_path):
    for file, raw in fashion_files().items():
        content = damage(raw) if file == "t10k-images-idx3-ubyte" else gzip.compress(raw)
        (tmp_path / f"{file}.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz' is damaged or no IDX file"):
        load_set("fashion_mnist", str(tmp_path))


def test_fashion_mnist_missing_file_is_named(tmp_path):
    for file, raw in list(fashion_files().items())[:3]:
        (tmp_path / f"{file}.gz").write_bytes(gzip.compress(raw))
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz is missing in .*data\.root"):
        load_set("fashion_mnist", str(tmp_path))


@pytest.mark.skipif(not DEBIAN_FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian(offline):
    data = load_set("fashion_mnist", str(DEBIAN_FASHION))
    check(data, 10, [60000, 28, 28, 1], [10000, 28, 28, 1])
    assert data.train_labels.bincount().tolist() == [6000] * 10
    assert data.test_labels.bincount().tolist() == [1000] * 10
    assert data.classes[data.train_labels[0]] == "Ankle boot" and data.classes[0] == "T-shirt/top"
    # The published moments of this data set, four digits.
    assert data.mean == pytest.approx((0.2860,), abs=5e-5) and data.std == pytest.approx((0.3530,), abs=5e-5)


# --- the user's own arrays ---------------------------------------------------------------------------------


def npz_arrays(**changes) -> dict[str, np.ndarray]:
    arrays = {
        "x_labeled": random_images(6, 8, 9, 3, seed=1).numpy(),
        "y_labeled": np.array([2, 0, 1, 1, 0, 2]),
        "x_unlabeled": random_images(5, 8, 9, 3, seed=2).numpy(),
        "x_test": random_images(4, 8, 9, 3, seed=3).numpy(),
        "y_test": np.array([0, 1, 1, 0]),
        **changes,
    }
    return {key: array for key, array in arrays.items() if array is not None}


def load_npz(tmp_path: Path, **changes) -> ImageSet:
    np.savez(tmp_path / "mine.npz", **npz_arrays(**changes))
    return load_set("npz", str(tmp_path / "mine.npz"))


def test_npz(tmp_path):
    data = load_npz(tmp_path)
    arrays = npz_arrays()
    check(data, 3, [11, 8, 9, 3], [4, 8, 9, 3])
    assert data.labeled is not None and data.labeled.tolist() == [0, 1, 2, 3, 4, 5]
    assert data.train_labels.tolist() == [2, 0, 1, 1, 0, 2] + [-1] * 5
    assert np.array_equal(
        data.train_images.numpy(), np.concatenate([arrays["x_labeled"], arrays["x_unlabeled"]])
    )
    assert np.array_equal(data.test_images.numpy(), arrays["x_test"])
    assert data.classes == ["0", "1", "2"] and data.test_labels.tolist() == [0, 1, 1, 0]
    mean, std = moments(data.train_images)
    assert data.mean == pytest.approx(mean) and data.std == pytest.approx(std)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_into_one_array(save, tmp_path, monkeypatch):
    """So a million rows take the memory of a million rows; arrays in Fortran's order are copied instead."""
    arrays = npz_arrays(**validation())
    want = np.concatenate([arrays["x_labeled"], arrays["x_unlabeled"], arrays["x_val"]])
    save(tmp_path / "mine.npz", **arrays)
    joined = torch.cat
    monkeypatch.setattr(
        torch, "cat", lambda parts: joined(parts) if parts[0].ndim == 1 else pytest.fail("copied")
    )
    assert np.array_equal(load_set("npz", str(tmp_path / "mine.npz")).train_images, want)
    monkeypatch.undo()
    save(tmp_path / "f.npz", **{**arrays, "x_unlabeled": np.asfortranarray(arrays["x_unlabeled"])})
    assert np.array_equal(load_set("npz", str(tmp_path / "f.npz")).train_images, want)


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_npz_whose_directory_claims_more_than_there_is(kind, tmp_path):
    """Its check sum is that of what is there. What memory held before must not become an image."""
    path = tmp_path / "mine.npz"
    with zipfile.ZipFile(path, "w", kind) as archive:
        for key, array in npz_arrays().items():
            file = io.BytesIO()
            np.save(file, array)
            archive.writestr(f"{key}.npy", file.getvalue()[: -300 if key == "x_unlabeled" else None])
        archive.getinfo("x_unlabeled.npy").file_size += 300
    with pytest.raises(ValueError, match=r"mine.npz' at x_unlabeled: it ends 300 bytes early"):
        load_set("npz", str(path))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, ">i8", np.uint64])
def test_npz_labels_of_any_integer_type(dtype, tmp_path):
    data = load_npz(
        tmp_path, y_labeled=np.array([2, 0, 1, 1, 0, 2], dtype=dtype), y_test=np.ones(4, dtype=dtype)
    )
    assert data.train_labels[:6].tolist() == [2, 0, 1, 1, 0, 2] and data.test_labels.tolist() == [1] * 4


def test_npz_with_the_truth_of_the_unlabeled(tmp_path):
    data = load_npz(tmp_path, y_unlabeled=np.array([0, -1, 2, -1, 1]))
    assert data.train_labels[6:].tolist() == [0, -1, 2, -1, 1]


def validation(**changes) -> dict[str, np.ndarray | None]:
    return {"x_val": random_images(3, 8, 9, 3, seed=4).numpy(), "y_val": np.array([1, 0, 2]), **changes}


def test_npz_with_a_validation_part(tmp_path):
    before, data = load_npz(tmp_path), load_npz(tmp_path, **validation())
    assert before.val is None and data.val is not None and data.val.tolist() == [11, 12, 13]
    assert torch.equal(data.train_images[:11], before.train_images) and torch.equal(
        data.labeled, before.labeled
    )
    assert np.array_equal(data.train_images[11:].numpy(), validation()["x_val"])
    assert data.train_labels.tolist() == [*before.train_labels.tolist(), 1, 0, 2]
    assert data.mean == before.mean and data.std == before.std
    red = validation(x_val=np.full((3, 8, 9, 3), 9, np.uint8))
    assert (
        load_npz(tmp_path, **red)
        .notes[0]
        .startswith("3 images are of a single color (3 validation), such as validation image 0:")
    )


@pytest.mark.parametrize("own", [False, True])
def test_validation_images_are_neither_labeled_nor_unlabeled(own):
    labels, val = torch.arange(60) % 3, torch.tensor([1, 17, 58, 59])
    images = torch.zeros(60, 2, 2, 1, dtype=torch.uint8)
    labeled = torch.tensor([0, 2, 4]) if own else None
    data = ImageSet("made", list("abc"), images, labels, images, labels, (0.0,), (1.0,), labeled, val)
    pytest.importorskip("yaml", reason="the trainer's packages are not installed")
    from ups_fast.config import Config
    from ups_fast.inputs import split_of

    cfg = Config(seed=3)
    cfg.data.n_labels = 6
    found, rest = split_of(cfg, data)
    assert len(found) == (3 if own else 6) and labels[found].bincount().tolist() == [len(found) // 3] * 3
    assert torch.cat([found, rest, val]).sort().values.tolist() == list(range(60))
    without = replace(data, val=torch.zeros(0, dtype=torch.int64))
    assert all(map(torch.equal, split_of(cfg, without), split_of(cfg, replace(data, val=None))))


@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 1)])
def test_npz_gray_images(shape, tmp_path):
    gray = {key: np.asfortranarray(np.ones((n, *shape), np.uint8)) for key, n in
            (("x_labeled", 6), ("x_unlabeled", 5), ("x_test", 4))}  # fmt: skip
    data = load_npz(tmp_path, **gray)
    check(data, 3, [11, 8, 9, 1], [4, 8, 9, 1])
    assert data.mean == pytest.approx((1 / 255,)) and data.std == (1.0,)  # a constant channel


def u8(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.uint8)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"x_test": None, "y_test": None}, r"lacks x_test, y_test; it has x_labeled, y_labeled, x_unlabeled"),
        ({"y_unlabelled": np.zeros(5, int)}, r"has y_unlabelled; known arrays are x_.* y_unlabeled, x_val and y_val$"),
        ({"x_test": np.array([None, 1, 2, 3])}, r"\.npz' at x_test: it holds Python objects$"),
        ({"x_labeled": np.zeros((6, 8, 9, 3), np.float32)}, r"^x_labeled must be .* float32 \[6, 8, 9, 3\]"),
        ({"x_labeled": np.zeros((6, 8, 9, 3), np.int8)}, r"^x_labeled must be uint8 .* int8 \[6, 8, 9, 3\]"),
        ({"x_unlabeled": u8(5, 8, 9, 4)}, r"^x_unlabeled must be uint8 .*, got uint8 \[5, 8, 9, 4\]"),
        ({"x_unlabeled": u8(5, 72)}, r"^x_unlabeled must be uint8 .*, got uint8 \[5, 72\]"),
        ({"x_test": u8(4, 3, 8, 9)}, r"^x_test must have its channels last, .* 3, 8, 9\]: use x_test\.tr"),
        ({"x_test": u8(4, 1, 8, 9)}, r"^x_test must have its channels last, .* \[4, 1, 8, 9\]"),
        ({"x_unlabeled": u8(0, 8, 9, 3)}, r"^x_unlabeled must not be empty, got uint8 \[0, 8, 9, 3\]"),
        ({"x_labeled": u8(0, 8, 9, 3), "y_labeled": np.zeros(0, int)}, r"^x_labeled must not be empty"),
        ({"x_test": u8(0, 8, 9, 3), "y_test": np.zeros(0, int)}, r"^x_test must not be empty"),
        ({"x_test": u8(4, 8, 8, 3)}, r"one size .*, got x_labeled \[6, 8, 9, 3\] and x_test \[4, 8, 8, 3\]"),
        ({"x_unlabeled": u8(5, 8, 9)}, r"one size .* \[6, 8, 9, 3\] and x_unlabeled \[5, 8, 9, 1\]"),
        ({"y_labeled": np.zeros(6)}, r"^y_labeled must be integer labels \[N\], got float64 \[6\]"),
        ({"y_labeled": np.zeros(6, bool)}, r"^y_labeled must be integer labels \[N\], got bool \[6\]"),
        ({"y_test": np.zeros((4, 1), int)}, r"^y_test must be integer labels \[N\], got int64 \[4, 1\]"),
        ({"y_labeled": np.zeros(5, int)}, r"^y_labeled must have one label .* of x_labeled, got 5 for 6"),
        ({"y_unlabeled": np.zeros(6, int)}, r"^y_unlabeled must have one .* x_unlabeled, got 6 for 5"),
        ({"y_labeled": np.array([0, 1, -1, 1, 0, 0])}, r"^y_labeled must be at least 0, got -1"),
        ({"y_labeled": np.array([0, 1, 2, 1, 0, 2**64 - 1], np.uint64)}, r"most .*, got 18446744073709551615$"),
        ({"y_test": np.array([0, 1, -1, 1])}, r"^y_test must be at least 0, got -1"),
        ({"y_unlabeled": np.array([0, 1, -2, 1, 0])}, r"^y_unlabeled must be at least -1, got -2"),
        ({"y_labeled": np.array([0, 1, 3, 1, 0, 5])}, r"every class of 0\.\.5, got none of class 2, 4$"),
        ({"y_labeled": np.array([1, 2, 3, 1, 2, 3])}, r"every class of 0\.\.3, got none of class 0$"),
        ({"y_labeled": np.array([0, 0, 0, 0, 0, 10**9])}, r"0\.\.1000000000, .* of class 1, 2, 3, 4, 5$"),
        ({"y_labeled": np.zeros(6, int), "y_test": np.zeros(4, int)}, r"at least two classes, got only"),
        ({"y_test": np.array([0, 1, 4, 3])}, r"^y_test has class 3, 4, of which x_labeled has no image"),
        (validation(y_val=None), r"\.npz' \(data\.root\) has x_val but lacks y_val: give both or neither$"),
        (validation(x_val=None), r"has y_val but lacks x_val: give both or neither$"),
        (validation(x_val=u8(0, 8, 9, 3), y_val=np.zeros(0, int)), r"^x_val must not be empty"),
        (validation(x_val=u8(3, 8, 8, 3)), r"one size .*, got x_labeled \[6, 8, 9, 3\] and x_val \[3, 8, 8, 3\]"),
        (validation(x_val=np.zeros((3, 8, 9, 3), np.float32)), r"^x_val must be uint8 .*, got float32"),
        (validation(y_val=np.zeros(2, int)), r"^y_val must have one label for each image of x_val, got 2 for 3"),
        (validation(y_val=np.array([0, -1, 0])), r"^y_val must be at least 0, got -1"),
        (validation(y_val=np.array([0, 4, 0])), r"^y_val has class 4, of which x_labeled has no image"),
        ({"y_unlabeled": np.array([0, 1, 3, 1, 0])}, r"^y_unlabeled has class 3, of which x_labeled has no"),
    ],
)  # fmt: skip
def test_npz_refuses(changes, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence) as caught:
        load_npz(tmp_path, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["nothing", "folder", "empty", "text", "pickle", "npy", "cut", "flipped"])
def test_npz_that_is_no_npz(content, tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, **npz_arrays())
    whole = bytearray(path.read_bytes())
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif content != "nothing":
        whole[300] ^= 255  # inside the pixels of the first array: the zip's checksum tells
        contents = {"empty": b"", "text": b"x_labeled = 3\n", "pickle": pickle.dumps([1, 2])}
        path.write_bytes({**contents, "cut": bytes(whole[:900]), "flipped": bytes(whole)}[content])
    sentence = r"^data\.root must be an \.npz file of plain arrays, got '.*mine\.npz'"
    if content == "nothing":
        sentence = r"^there is no file '.*mine\.npz' \(data\.root\)"
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
        load_set("npz", str(path))
    assert "allow_pickle" not in str(caught.value)


def test_a_device_without_kernels_gets_batches_of_the_host():
    """Such as a GPU where nvcc was missing: never image by image through the reference."""
    images = random_images(5, 8, 8, 3)
    data = ResidentImages(images, mean=(0.5,) * 3, std=(0.5,) * 3, device="meta", policy=Policy(crop=2))
    assert data.images.device.type == "cpu"
    index = torch.tensor([4, 0, 4])
    for batch in (data.clean(index), data.augmented(index, seed=0, epoch=torch.arange(3))):
        assert batch.device.type == "meta"
        assert batch.shape == (3, 3, 8, 8)
        assert batch.is_contiguous(memory_format=torch.channels_last)
