"""The images of a batch whose groups are views of each other: from memory, from files, and as `augment` makes them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import ups_fast
from ups_fast.batches import epoch_order, views_of
from ups_fast.data import FileImages, PlainImages, ResidentImages, stream
from ups_fast.data.images import VIEW_BITS, View
from ups_fast.methods import Group, Layout
from ups_fast.policy import Policy

N, SIZE, SEED = 24, 12, 2**60 + 7
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
POLICIES = {
    "weak": Policy(flip=True, crop=2),
    "strong": Policy(
        flip=True, crop=2, ops=(("Rotate", (-20.0, 20.0)), ("Invert", (0.0,))), n_ops=1, cutout=4
    ),
}
LAYOUT = Layout(
    (
        Group("labeled", 3, "weak"),
        Group("unlabeled", 5, "weak"),
        Group("unlabeled", 5, "strong", view_of=1),
        Group("unlabeled", 5, "strong", view_of=1),
    ),
    steps=4,
)
LISTS = {"labeled": torch.arange(4), "unlabeled": torch.arange(4, N)}
VIEWS = views_of(LAYOUT.groups, POLICIES)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (N, SIZE, SIZE, 3), generator=g, dtype=torch.uint8)


@pytest.fixture(scope="module")
def files(pixels: Tensor, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    root, names = tmp_path_factory.mktemp("files"), [f"{i}.png" for i in range(N)]
    for name, image in zip(names, pixels.numpy(), strict=True):
        Image.fromarray(image).save(root / name)
    return root, names


def resident(pixels: Tensor) -> ResidentImages:
    return ResidentImages(pixels, mean=MEAN, std=STD, device="cpu", policy=POLICIES["strong"])


def streamed(files: tuple[Path, list[str]], **settings: Any) -> FileImages:
    kind: dict[str, Any] = {"size": SIZE, "channels": 3, "mean": MEAN, "std": STD, "device": "cpu"}
    return PlainImages(*files, **kind, policy=POLICIES["strong"], **settings)


def room(rows: int = LAYOUT.rows) -> Tensor:
    return torch.zeros(rows, 3, SIZE, SIZE).to(memory_format=torch.channels_last)


def batches(
    images: Any, steps: list[tuple[Tensor, Tensor]], views: tuple[View, ...] = VIEWS, seed: int = SEED
) -> Tensor:  # [steps, B, C, H, W]
    """As a run makes them: `ahead` before each step, `read` in it."""
    out, found = room(views[-1].last), []
    fetched = images.ahead(iter(steps), views, seed=seed, out=out)
    for ids, draw in steps:
        next(fetched)
        images.read(ids, draw, views, seed=torch.tensor(seed), out=out)
        found.append(out.clone())
    return torch.stack(found)


def steps_of(epoch: int = 3) -> list[tuple[Tensor, Tensor]]:
    order = epoch_order(LISTS, LAYOUT, torch.Generator().manual_seed(epoch), epoch)
    return list(zip(*order, strict=True))


def by_hand(pixels: Tensor, ids: Tensor, draw: Tensor) -> Tensor:
    """Each view by its own call of the public op, and its own seed."""
    rows, first = [], 0
    for number, group in enumerate(LAYOUT.groups):
        part = slice(first, first + group.rows)
        seed = SEED if group.view_of is None else SEED ^ (number << 56)
        rule = {"policy": POLICIES[group.view], "seed": seed, "epoch": draw[part], "mean": MEAN, "std": STD}
        rows.append(ups_fast.augment(pixels, ids[part], **rule))
        first += group.rows
    return torch.cat(rows)


def test_memory_and_files_give_the_batch_that_augment_gives(
    pixels: Tensor, files: tuple[Path, list[str]]
) -> None:
    steps = steps_of()
    want = torch.stack([by_hand(pixels, *each) for each in steps])
    assert torch.equal(batches(resident(pixels), steps), want)
    assert torch.equal(batches(streamed(files), steps), want)
    arrays = PlainImages(None, [], images=pixels, size=SIZE, channels=3, mean=MEAN, std=STD, device="cpu")
    assert torch.equal(batches(arrays, steps), want), "the images' own policy is not that of the views"


def test_views_of_an_image_differ(pixels: Tensor) -> None:
    """Two strong ones, too, and a weak one is not a strong one's beginning: each is drawn by itself."""
    same = POLICIES["weak"]
    groups = (Group("all", 8, "a"), Group("all", 8, "a", view_of=0), Group("all", 8, "a", view_of=0))
    layout = Layout(groups, 12)
    order = epoch_order({"all": torch.arange(N)}, layout, torch.Generator().manual_seed(0), 0)
    steps = list(zip(*order, strict=True))
    found = batches(resident(pixels), steps, views_of(groups, {"a": same}))
    first, second, third = found.split(8, dim=1)
    for a, b in ((first, second), (first, third), (second, third)):
        equal = sum(torch.equal(x, y) for x, y in zip(a.flatten(0, 1), b.flatten(0, 1), strict=True))
        # Mirrored or not and 25 places: one pair of 50 is equal by chance, here some 2 of 96.
        assert equal <= 8


def test_one_view_is_what_it_always_was(pixels: Tensor) -> None:
    """A group that shows no other one again is drawn by the run's seed itself."""
    groups = (Group("positive", 6), Group("negative", 0))
    views = views_of(groups, POLICIES)
    ids, draw = torch.arange(6), torch.arange(6) << 20
    images = resident(pixels)
    assert torch.equal(batches(images, [(ids, draw)], views)[0], images.augmented(ids, seed=SEED, epoch=draw))


@pytest.mark.parametrize("number", [0, 1, 5, 127])
def test_seeds_of_views(number: int) -> None:
    view = View(0, 1, POLICIES["weak"], 0, number)
    for seed in (0, 5, 2**63 - 1):
        got = view.seed(seed)
        assert 0 <= int(got) < 2**63 and int(got) == int(view.seed(torch.tensor(seed)))
        assert (int(got) ^ seed) == number << VIEW_BITS
    assert view.again == (number > 0)


def test_a_file_is_decoded_once_for_all_its_views(
    files: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()
    real = stream.read_bytes

    def counted(name: str) -> Any:
        read[name] += 1
        return real(name)

    monkeypatch.setattr(stream, "read_bytes", counted)
    steps = steps_of()
    batches(streamed(files, threads=1), steps)
    wanted = Counter(str(files[0] / files[1][i]) for ids, _ in steps for i in ids[:8].tolist())
    assert read == wanted and read.total() == 4 * (3 + 5), "18 rows, of which 10 show others again"


def test_a_view_of_a_random_part_shows_the_same_part(files: tuple[Path, list[str]]) -> None:
    """The part is cut when the file is decoded, and that is done once."""
    groups = (Group("all", 6, "a"), Group("all", 6, "a", view_of=0))
    views = views_of(groups, {"a": Policy()})
    ids = torch.arange(6).repeat(2)
    draw = torch.cat([torch.zeros(6, dtype=torch.int64), torch.full((6,), 1 << VIEW_BITS)])
    (found,) = batches(streamed(files, resized_crop=(0.3, 0.5)), [(ids, draw)], views)
    assert torch.equal(found[:6], found[6:])


def test_an_interrupted_epoch_goes_on_with_its_next_step(
    pixels: Tensor, files: tuple[Path, list[str]]
) -> None:
    steps = steps_of()
    whole = batches(resident(pixels), steps)
    for images in (resident(pixels), streamed(files, threads=2, prefetch=1)):
        assert torch.equal(batches(images, steps_of()[2:]), whole[2:])


def test_a_file_that_is_gone_is_black_in_all_its_views(
    pixels: Tensor, files: tuple[Path, list[str]], tmp_path: Path
) -> None:
    (tmp_path / "7.png").symlink_to(tmp_path / "nothing")
    for i in (n for n in range(N) if n != 7):
        (tmp_path / files[1][i]).symlink_to(files[0] / files[1][i])
    images = streamed((tmp_path, files[1]))
    groups = (Group("all", 3, "a"), Group("all", 3, "a", view_of=0))
    views = views_of(groups, {"a": Policy()})
    ids = torch.tensor([6, 7, 8, 6, 7, 8])
    (found,) = batches(images, [(ids, ids * 0)], views)
    assert set(images.unreadable) == {7}
    black = ((0 - torch.tensor(MEAN)) / torch.tensor(STD)).view(3, 1, 1).expand(3, SIZE, SIZE)
    for row in (1, 4):
        assert torch.allclose(found[row], black, atol=1e-6)
    assert not np.allclose(found[0], black) and torch.equal(found[0], found[3])


def test_an_op_on_a_view_keeps_the_batch_in_place(pixels: Tensor) -> None:
    """A CUDA graph goes on writing there."""
    images, out = resident(pixels), room()
    place = out.data_ptr()
    for ids, draw in steps_of():
        images.read(ids, draw, VIEWS, seed=torch.tensor(SEED), out=out)
    assert out.data_ptr() == place and out.is_contiguous(memory_format=torch.channels_last)
