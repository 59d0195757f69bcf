"""The validation part: held out of the labeled images of each class, never learned from, and what it is for."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_rounds import one_thread, run, tiny_config, tiny_set

import ups_fast
from ups_fast import build, inputs, rounds
from ups_fast.build import prepare
from ups_fast.data import ResidentImages
from ups_fast.inputs import hold_out
from ups_fast.seeds import derive

__all__ = ["one_thread"]  # the fixture
VAL = {"data__n_labels": 24, "data__val_share": 0.25, "train__round0_epochs": 4, "train__epochs": 1}


def split_of(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "split.npz") as arrays:
        return dict(arrays)


# What is held out.


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.99])
def test_a_share_of_each_class_is_held_out(share: float) -> None:
    labels = torch.arange(600) % 3
    labels[::7] = 0  # classes of different sizes
    labeled = torch.randperm(600, generator=torch.Generator().manual_seed(0))[:200].sort().values
    kept, val = hold_out(labeled, labels, share, seed=5)
    assert torch.equal(torch.cat([kept, val]).sort().values, labeled), "together all, and none twice"
    for part in (kept, val):
        assert torch.equal(part, part.sort().values) and part.dtype == torch.int64
    for c in range(3):
        n = int((labels[labeled] == c).sum())
        assert int((labels[val] == c).sum()) == int(share * n) and int((labels[kept] == c).sum()) > 0
    again = hold_out(labeled, labels, share, seed=5)
    assert torch.equal(again[0], kept) and torch.equal(again[1], val)
    assert not torch.equal(hold_out(labeled, labels, share, seed=6)[1], val)


@pytest.mark.parametrize(("share", "n"), [(0.29, 29), (0.57, 57), (0.58, 58), (0.28, 28)])
def test_a_share_that_no_float_holds_is_that_of_its_decimals(share: float, n: int) -> None:
    """0.29 * 100 is 28.999999999999996."""
    assert len(hold_out(torch.arange(100), torch.zeros(100, dtype=torch.int64), share, seed=0)[1]) == n


def test_no_class_loses_its_last_label() -> None:
    labels = torch.tensor([0, 1, 1, 2, 2, 2])
    kept, val = hold_out(torch.arange(6), labels, 0.99, seed=0)
    assert labels[kept].unique().tolist() == [0, 1, 2] and labels[val].bincount().tolist() == [0, 1, 2]


def test_only_labels_of_labeled_images_count() -> None:
    labels = torch.full((50,), -1)
    labeled = torch.arange(10, 30)
    labels[labeled] = torch.arange(20) % 2
    kept, val = hold_out(labeled, labels, 0.5, seed=0)
    assert len(kept) == len(val) == 10 and set(val.tolist()) < set(labeled.tolist())


def test_no_share_is_no_part_and_a_share_of_nothing_is_a_sentence() -> None:
    labels, labeled = torch.arange(20) % 2, torch.arange(6)
    kept, val = hold_out(labeled, labels, 0.0, seed=0)
    assert torch.equal(kept, labeled) and len(val) == 0 and val.dtype == torch.int64
    with pytest.raises(
        ValueError, match=r"^data\.val_share=0\.1 holds out no sample, because no class has enough"
    ):
        hold_out(labeled, labels, 0.1, seed=0)


# A run with one.


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, str]:
    cfg = tiny_config(tmp_path_factory.mktemp("val") / "run", train__rounds=3, **VAL)
    return cfg, *run(cfg)


def test_the_split_has_three_parts(finished: tuple[Any, Any, str], tmp_path: Path) -> None:
    cfg, result, text = finished
    split, labels = split_of(result.folder), tiny_set().train_labels.numpy()
    assert set(split) == {"labeled", "unlabeled", "val"}
    assert sorted(np.concatenate(list(split.values())).tolist()) == list(range(60)), "and no image is in two"
    assert np.bincount(labels[split["val"]]).tolist() == [2, 2, 2]
    assert np.bincount(labels[split["labeled"]]).tolist() == [6, 6, 6]
    assert "18 labeled, 36 unlabeled, 6 validation, 30 test images" in text
    fresh = prepare(cfg, tiny_set()).state
    assert all(np.array_equal(split[name], getattr(fresh, name).numpy()) for name in split)
    other = prepare(tiny_config(tmp_path, **VAL, seed=7), tiny_set()).state
    assert not torch.equal(other.val, fresh.val), "it is drawn from the seed"
    without = prepare(tiny_config(tmp_path, **{**VAL, "data__val_share": 0.0}), tiny_set()).state
    assert torch.equal(torch.cat([fresh.labeled, fresh.val]).sort().values, without.labeled)
    assert torch.equal(without.unlabeled, fresh.unlabeled), "the unlabeled images are the same"


def test_a_run_without_one_says_nothing_of_it(tmp_path: Path) -> None:
    result, text = run(tiny_config(tmp_path / "run", train__rounds=1, train__round0_epochs=1))
    assert set(split_of(result.folder)) == {"labeled", "unlabeled"} and "validation" not in text
    assert result.rows[0]["val_acc"] is None and not (result.folder / "best.safetensors").exists()
    sentence = (
        r"holds no best network: it has no best\.safetensors, which only a run with a validation part has "
        r"\(data\.val_share\)$"
    )
    with pytest.raises(FileNotFoundError, match=sentence):
        ups_fast.load_model(result.folder, best=True)
    ups_fast.load_model(result.folder)


def test_its_accuracy_is_that_of_the_network_on_it(finished: tuple[Any, Any, str]) -> None:
    _, result, _ = finished
    data, val = tiny_set(), torch.from_numpy(split_of(result.folder)["val"])
    images = ResidentImages(data.train_images, mean=data.mean, std=data.std, device="cpu")
    with torch.no_grad():
        right = ups_fast.load_model(result.folder)(images.clean(val)).argmax(1) == data.train_labels[val]
    assert float(right.double().mean()) == pytest.approx(result.rows[-1]["val_acc"])


def test_the_best_network_is_that_of_the_round_of_best_val_acc(
    finished: tuple[Any, Any, str], tmp_path: Path
) -> None:
    """As shown by runs that end there: of equal rounds the last one counts."""
    _, result, _ = finished
    accuracies = [row["val_acc"] for row in result.rows]
    best = max(range(3), key=lambda i: (accuracies[i], i))
    short, _ = run(tiny_config(tmp_path / "run", train__rounds=best + 1, **VAL))
    want, got = load_file(short.folder / "model.safetensors"), load_file(result.folder / "best.safetensors")
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_nothing_is_learned_from_it(finished: tuple[Any, Any, str], tmp_path: Path) -> None:
    """With other labels, and other pixels, of these images all weights are the same, bit for bit."""
    _, result, _ = finished
    data, val = tiny_set(), torch.from_numpy(split_of(result.folder)["val"])
    labels, images = data.train_labels.clone(), data.train_images.clone()
    labels[val] = (labels[val] + 1) % 3
    images[val] = 255 - images[val]
    given = prepare(tiny_config(tmp_path / "x", **VAL), data).state
    seen: list[torch.Tensor] = []
    real = inputs.hold_out

    def same_parts(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(real(*args)[0])
        return given.labeled, given.val

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(inputs, "hold_out", same_parts)  # which the labels would change
        patched.setattr(build, "split_of", lambda *_: (torch.cat([given.labeled, val]), given.unlabeled))
        other, _ = run(
            tiny_config(tmp_path / "run", train__rounds=3, **VAL),
            replace(data, train_labels=labels, train_images=images),
        )
    assert seen
    for a, b in zip(result.rows, other.rows, strict=True):
        clock = {"seconds": 0, "outside": 0, "val_acc": 0}
        assert a | clock == b | clock
    assert [row["val_acc"] for row in result.rows] != [row["val_acc"] for row in other.rows]
    want, got = (load_file(each.folder / "model.safetensors") for each in (result, other))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_it_is_neither_labeled_nor_read_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[int] = set()
    augmented = ResidentImages.read

    def watched(self: ResidentImages, index: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        read.update(index.tolist())
        augmented(self, index, *args, **kwargs)

    monkeypatch.setattr(ResidentImages, "read", watched)
    result, _ = run(tiny_config(tmp_path / "run", train__rounds=2, **VAL))
    val = set(split_of(result.folder)["val"].tolist())
    assert read and not read & val and not set(result.pseudo_labels.index.tolist()) & val


def test_it_is_the_same_where_images_stream(finished: tuple[Any, Any, str], tmp_path: Path) -> None:
    _, result, _ = finished
    streamed, _ = run(tiny_config(tmp_path / "run", train__rounds=3, data__loader="plain", **VAL))
    clock = {"seconds": 0, "outside": 0}
    assert [row | clock for row in streamed.rows] == [row | clock for row in result.rows]
    want, got = (load_file(each.folder / "best.safetensors") for each in (result, streamed))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_an_unreadable_image_of_it_does_not_count(tmp_path: Path) -> None:
    job = prepare(tiny_config(tmp_path / "run", **{**VAL, "train__rounds": 1}), tiny_set())
    gone = job.state.val[:2].tolist()
    job.images.unreadable.update({i: "gone" for i in gone})
    (row,) = rounds.rounds(job, Console(file=io.StringIO()))
    assert row["val_acc"] in [pytest.approx(n / 4) for n in range(5)]


def test_a_share_that_takes_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.val_share=0\.25 holds out no sample"):
        run(tiny_config(tmp_path / "run", data__val_share=0.25))
    assert not list(tmp_path.iterdir())


def test_the_share_of_a_run_stays(finished: tuple[Any, Any, str]) -> None:
    cfg, _, _ = finished
    changed = replace(cfg, data=replace(cfg.data, val_share=0.5))
    with pytest.raises(rounds.RunFolderError, match=r"data\.val_share is 0\.5 and was 0\.25"):
        run(changed)


def test_seeds_of_the_parts_differ() -> None:
    assert len({derive(3, name) for name in ("split", "val")}) == 2
