"""Sources of uncertainty: what each drops or draws, equal in any batch, in labeling, networks and runs."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from rich.console import Console
from test_resume import ALWAYS, FINISHED, assert_same_run, kill, run
from test_rounds import one_thread, tiny_config, tiny_set
from torch import Tensor
from tracing import traced

from ups_fast import augment, config, counter_dropout, dropout_keys, rounds
from ups_fast.build import prepare
from ups_fast.data import Noise
from ups_fast.data.features import ResidentFeatures
from ups_fast.data.images import Draws
from ups_fast.data.resident import ResidentImages
from ups_fast.data.stream import PlainImages
from ups_fast.files import RunFolderError
from ups_fast.models import DropBlock, Ensemble, Network, SpatialDropout, build
from ups_fast.models.saved import load_model
from ups_fast.policy import Policy
from ups_fast.predict import Predictor
from ups_fast.pseudo_labels import PseudoLabels
from ups_fast.selection import passes_over, pseudo_label

__all__ = ["one_thread"]  # the fixture
MAPS = [SpatialDropout, DropBlock]
SHAPES = [(3, 5, 8, 8), (2, 3, 16, 6), (4, 2, 3, 3), (2, 4, 1, 1), (1, 1, 1, 9), (0, 4, 4, 4)]
LOOSE: dict[str, Any] = {"tau_p": 0.0, "tau_n": 0.0, "kappa_p": math.inf, "kappa_n": math.inf}
PIXELS = torch.randint(0, 256, (20, 8, 8, 1), generator=torch.Generator().manual_seed(0)).byte()
SCALE: dict[str, Any] = {"mean": (0.4,), "std": (0.25,)}
WEAK = Policy(flip=True, crop=2)


def keys_of(n: int, draw: int = 0) -> Tensor:
    return dropout_keys(torch.arange(n), seed=5, draw=draw)


# What is dropped -------------------------------------------------------------------------------------------


def blocks_by_hand(x: Tensor, keys: Tensor, p: float, layer: int) -> Tensor:
    """Each square that begins anywhere is painted; then each row is scaled."""
    n, channels, height, width = x.shape
    side = max(1, min(7, height // 2, width // 2))
    up, across = height - side + 1, width - side + 1
    rate = p * (height * width / side**2) / (up * across)
    begins = counter_dropout(torch.ones(n, channels, up, across), keys, p=rate, layer=layer) == 0
    mask = np.ones(x.shape, np.float32)
    for row, channel, i, j in begins.nonzero().tolist():
        mask[row, channel, i : i + side, j : j + side] = 0
    for row in mask:
        row *= row.size / max(1.0, row.sum())
    return x * torch.from_numpy(mask)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.1, 0.95])
def test_dropblock_against_its_slow_twin(shape: tuple[int, ...], p: float) -> None:
    x, keys = torch.randn(shape), keys_of(shape[0])
    torch.testing.assert_close(DropBlock(p, 3)(x, keys), blocks_by_hand(x, keys, p, 3))


def test_dropblock_drops_about_its_rate() -> None:
    for side in (2, 8, 32):
        y = DropBlock(0.1)(torch.ones(64, 16, side, side), keys_of(64))
        assert 0.08 < (y == 0).double().mean() < 0.11  # squares that overlap drop less


def test_spatial_dropout_drops_whole_channels() -> None:
    x = torch.rand(64, 32, 3, 5) + 0.1
    y = SpatialDropout(0.25, 3)(x, keys_of(64))
    kept = (y != 0).flatten(2)
    assert torch.equal(kept.all(2), kept.any(2)) and 0.72 < kept.double().mean() < 0.78
    assert torch.equal(
        y, x * counter_dropout(torch.ones(64, 32), keys_of(64), p=0.25, layer=3)[..., None, None]
    )


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_depends_on_its_key_and_layer_alone(kind: type, shape: tuple[int, ...]) -> None:
    drop, x, keys = kind(0.5, 2), torch.randn(shape), keys_of(shape[0])
    whole = drop(x, keys)
    parts = [drop(x[i : i + 1], keys[i : i + 1]) for i in range(len(x))]
    assert torch.equal(torch.cat([x[:0], *parts]), whole) and whole.isfinite().all()
    assert torch.equal(drop.eval()(x.to(memory_format=torch.channels_last), keys), whole)
    half = drop(x.bfloat16(), keys)
    assert half.dtype == torch.bfloat16 and torch.equal(half == 0, whole == 0)
    if shape == SHAPES[0]:
        assert not torch.equal(kind(0.5, 3)(x, keys), whole)
        assert not torch.equal(drop(x, keys_of(len(x), draw=1)), whole)


@pytest.mark.parametrize("kind", MAPS)
def test_without_keys_it_acts_in_training_mode_alone(kind: type) -> None:
    x = torch.ones(8, 16, 6, 6)
    drop = kind(0.5)
    torch.manual_seed(0)
    first = drop(x)
    assert not torch.equal(drop(x), first)
    torch.manual_seed(0)
    assert torch.equal(drop(x), first)
    assert drop.eval()(x) is x and kind(0.0)(x, keys_of(8)) is x


@pytest.mark.parametrize("kind", MAPS)
def test_gradients_are_dropped_alike(kind: type) -> None:
    x = torch.randn(3, 4, 6, 6, requires_grad=True)
    y = kind(0.5)(x, keys_of(3))
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad * x, y)  # type: ignore[operator]


# Labeling --------------------------------------------------------------------------------------------------


def network(kind: str = "dropout", **more: Any) -> Network:
    torch.manual_seed(0)
    shape = {"columns": 6} if more.get("name") else {"channels": 1, "size": 8}
    return build(
        **{"name": "wrn-10-1", "n_classes": 3, "dropout": 0.3, "dropout_kind": kind, **shape, **more}
    ).eval()


def case(source: str) -> tuple[Network, Any, dict[str, Any]]:
    """A network, its images, and how to label them."""
    images: Any = ResidentImages(PIXELS, device="cpu", **SCALE)
    how: dict[str, Any] = {"passes": 4, "uncertainty": source.partition(" ")[0], "seed": 9, **LOOSE}
    if source == "augment rows":
        rows = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
        images = ResidentFeatures(rows, mean=[0.0] * 6, std=[1.0] * 6, device="cpu")
        return network(name="mlp-16"), images, {**how, "policy": Noise(0.5, 0.2)}
    if source == "augment":
        return network(dropout=0.0), images, {**how, "policy": WEAK}
    if source == "heads":
        return network(heads=4), images, how
    return network(source), images, how


SOURCES = ["spatial", "dropblock", "augment", "augment rows", "heads"]


@pytest.mark.parametrize("source", SOURCES)
def test_labels_depend_on_no_batch(source: str) -> None:
    model, images, how = case(source)
    whole = pseudo_label(model, images, torch.arange(20), **how)
    assert whole.std.min() > 1e-6 and len(whole.std.unique()) > 10
    for batch_size in (12, 40):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(batch_size))
        got = pseudo_label(model, images, order, batch_size=batch_size, **how)
        torch.testing.assert_close(got.confidence, whole.confidence[order], rtol=0, atol=1e-5)
        torch.testing.assert_close(got.std, whole.std[order], rtol=0, atol=1e-5)
    again = pseudo_label(model, images, torch.arange(20), **how)
    assert same(again, whole)
    other = pseudo_label(model, images, torch.arange(20), **{**how, "seed": 10})
    assert same(other, whole) == (source == "heads")
    none = pseudo_label(model, images, torch.arange(0), **how)
    assert len(none.std) == 0


def same(a: PseudoLabels, b: PseudoLabels) -> bool:
    return torch.equal(a.std, b.std) and torch.equal(a.confidence, b.confidence)


def std_of(logits: Tensor) -> Tensor:  # [P, B, C] -> [B]
    p = logits.softmax(-1)
    label = p.mean(0).argmax(-1)
    return p.std(0).gather(1, label[:, None])[:, 0]


def test_a_pass_is_one_draw_of_the_op() -> None:
    model, images, how = case("augment")
    found = pseudo_label(model, images, torch.arange(20), **how)
    index = torch.arange(20)
    with torch.no_grad():
        seen = [augment(PIXELS, index, policy=WEAK, seed=9, draw=p, **SCALE) for p in range(4)]
        torch.testing.assert_close(found.std, std_of(torch.stack([model(x) for x in seen])))


def test_a_pass_is_one_head_without_dropout() -> None:
    model, images, how = case("heads")
    assert isinstance(model, Ensemble)
    found = pseudo_label(model, images, torch.arange(20), **how)
    with torch.no_grad():
        each = torch.stack([own(images.clean(torch.arange(20))) for own in model.networks])
    torch.testing.assert_close(found.std, std_of(each))


def test_images_in_files_are_drawn_as_those_in_memory() -> None:
    """And shown in their middle, whatever part of them training shows."""
    here = ResidentImages(PIXELS, device="cpu", **SCALE)
    there = PlainImages(
        None, [], size=8, channels=1, device="cpu", images=PIXELS, resized_crop=(0.3, 0.9), **SCALE
    )
    draws, index = Draws(3, WEAK, 7), torch.tensor([5, 1, 1, 19, 0])
    want = list(here.drawn_batches(index, 2, draws))
    for a, b in zip(there.drawn_batches(index, 2, draws), want, strict=True):
        assert torch.equal(a, b)
    assert [len(each) for each in want] == [6, 6, 3]
    assert not torch.equal(want[0][:2], want[0][2:4])
    with pytest.raises(ValueError, match="index must hold sample ids of"):
        next(there.drawn_batches(torch.tensor([20]), 2, draws))


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_compiled_labels_are_the_eager_ones(source: str) -> None:
    model, images, how = case(source)
    want = pseudo_label(model, images, torch.arange(20), batch_size=32, **how)
    with torch._dynamo.config.patch(error_on_recompile=True):  # nor does the last, smaller batch
        got = pseudo_label(model, images, torch.arange(20), batch_size=32, forward=traced(passes_over), **how)
    torch.testing.assert_close(got.std, want.std, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.confidence, want.confidence, rtol=0, atol=1e-5)


def test_what_cannot_be_labeled() -> None:
    model, images, how = case("augment")
    for changes, sentence in (
        ({"policy": None}, "policy must say how uncertainty='augment' changes images, got None"),
        ({"uncertainty": "heads"}, "passes must be the network's 1 heads with uncertainty='heads', got 4"),
        ({"uncertainty": "dropout"}, "model must have a Dropout"),
    ):
        with pytest.raises(ValueError, match=sentence):
            pseudo_label(model, images, torch.arange(20), **{**how, **changes})


# Keys, networks --------------------------------------------------------------------------------------------

ROWS = {"data.name": "features", "data.n_labels": 0, "model.name": "mlp-16"}
FROZEN = {"model.name": "lite0", "model.freeze": True}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            {"select.uncertainty": "swag"},
            "select.uncertainty must be one of dropout, spatial, dropblock, augment",
        ),
        ({"select.uncertainty": "spatial", **ROWS}, "spatial drops parts of feature maps, .* got 'mlp-16'"),
        (
            {"select.uncertainty": "dropblock", **FROZEN},
            "dropblock drops parts of feature maps, .* got 'lite0'",
        ),
        ({"select.uncertainty": "spatial", "model.dropout": 0}, "spatial needs model.dropout above 0, got 0"),
        ({"select.uncertainty": "augment", **ROWS}, "by data.noise and data.drop_columns, but both are 0"),
        ({"select.uncertainty": "augment", **FROZEN}, "by data.noise and data.drop_columns, but both are 0"),
        ({"select.uncertainty": "augment", "select.passes": 1}, "augment needs select.passes above 1, got 1"),
        (
            {"select.uncertainty": "augment", "select.mc_layers": 2},
            "or select.uncertainty=dropout, got select.mc_layers=2",
        ),
        ({"select.uncertainty": "heads", "select.mc_layers": 1}, "got select.mc_layers=1"),
        ({"select.uncertainty": "heads"}, "heads needs select.heads above 1, got 1"),
        ({"select.uncertainty": "heads", "select.heads": 5}, "set select.passes=5, got 10"),
    ],
)
def test_contradictions_are_one_sentence(words: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        config.make({"data.name": "digits", "data.n_labels": 40, **words})
    assert "\n" not in str(error.value)


def test_augmented_passes_need_no_dropout_but_a_change() -> None:
    words = {"select.uncertainty": "augment", "data.name": "digits", "data.n_labels": 6, "model.dropout": 0.0}
    cfg = config.make({**words, "model.name": "wrn-10-1", "train.batch_size": 6})
    assert prepare(cfg, tiny_set()).policies["passes"] == Policy(crop=1)


@pytest.mark.slow
def test_images_too_small_to_be_shifted() -> None:
    words = {"select.uncertainty": "augment", "data.name": "digits", "data.n_labels": 6}
    cfg = config.make({**words, "model.name": "torchvision:resnet18", "train.batch_size": 6})
    small = tiny_set()
    images = {name: getattr(small, name)[:, :7, :7] for name in ("train_images", "test_images")}
    with pytest.raises(ValueError, match="augment mirrors and shifts images"):
        prepare(cfg, replace(small, **images))


def test_networks_without_maps_refuse() -> None:
    for name, sentence in (("spatial", "as wrn-d-k, .* have, got mlp-16"), ("swag", "one of dropout")):
        with pytest.raises(ValueError, match=f"dropout_kind.*{sentence}"):
            network(name, name="mlp-16")


def test_every_dropout_of_a_network_is_of_its_kind() -> None:
    for name, heads in (("wrn-10-1", 2), ("cnn13", 1), ("shake-8-2x8d", 1), ("resnext-11-2x2d", 1)):
        model = build(
            name, n_classes=2, channels=1, size=12, dropout=0.5, dropout_kind="dropblock", heads=heads
        )
        drops = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
        assert len(drops) == heads * model.n_dropouts and {type(each) for each in drops} == {DropBlock}
    with torch.no_grad():
        parts = passes_over(network("spatial"), torch.rand(4, 1, 8, 8), torch.arange(4), 3, 0, skip=2)
    assert parts.std(0).min() > 0  # the last layer alone acts


# Runs ------------------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "spatial": {},
    "dropblock": {"select__mc_layers": 1},
    "augment": {},
    "heads": {"select__heads": 2, "select__passes": 2},
}


def settings(source: str) -> dict[str, Any]:
    few = {"train__round0_epochs": 2, "train__epochs": 1, "select__passes": 4}
    return {"select__uncertainty": source, **few, **RUNS[source]}


@pytest.mark.slow
@pytest.mark.parametrize("source", RUNS)
@pytest.mark.parametrize("plan", [("step", 7, kill), ("mc_select", 3, kill)], ids=["training", "labeling"])
def test_a_killed_run_ends_as_if_nothing_was(source: str, plan: Any, tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    how = {**settings(source), "checkpoint_seconds": ALWAYS}
    del how["train__round0_epochs"]  # that of `test_resume.settings` counts
    assert run(whole, **how) == FINISHED
    assert run(folder, plan, **how) == -signal.SIGKILL
    assert run(folder, **how) == FINISHED
    assert_same_run(folder, whole)


@pytest.mark.parametrize(
    "source", [*(pytest.param(each, marks=pytest.mark.slow) for each in RUNS if each != "augment"), "augment"]
)
def test_a_run_and_its_network(source: str, tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path / "run", train__rounds=1, **settings(source))
    result = rounds.run(cfg, tiny_set(), console=Console(quiet=True))
    assert result.pseudo_labels.std.max() > 1e-4
    model = load_model(tmp_path / "run")
    kinds = {type(module) for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert (kinds == {SpatialDropout}) == (source == "spatial")
    assert (kinds == {DropBlock}) == (source == "dropblock")
    predictor, pixels = Predictor(tmp_path / "run", "cpu"), tiny_set().test_images[:6].numpy()
    whole = predictor(pixels)
    assert whole.std.min() > 0 or source in ("spatial", "dropblock")
    assert whole.std.max() > 1e-5
    for i in (3, 0):
        torch.testing.assert_close(predictor(pixels[i : i + 1]).std[0], whole.std[i], rtol=0, atol=1e-5)
    changed = (
        (tmp_path / "run/config.yaml").read_text().replace(f"uncertainty: {source}", "uncertainty: swag")
    )
    (tmp_path / "run/config.yaml").write_text(changed)
    with pytest.raises(RunFolderError, match="by which thresholds"):
        Predictor(tmp_path / "run", "cpu")


def test_a_crafted_kind_is_refused(tmp_path: Path) -> None:
    from ups_fast.models.saved import rebuild, save_model

    cfg = config.make({"data.name": "digits", "data.n_labels": 40, "model.name": "wrn-10-1"})
    about = {"model": asdict(cfg.model), "classes": ["a", "b"], "channels": 1, "size": [8, 8], **SCALE}
    save_model(tmp_path, rebuild({**about, "dropout_kind": "spatial"}), {**about, "dropout_kind": "spatial"})
    assert SpatialDropout in {type(module) for module in load_model(tmp_path).modules()}
    file = tmp_path / "model.safetensors"
    with safetensors.safe_open(file, "pt") as opened:
        told = json.loads(opened.metadata()["ups_fast"])
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for bad in ("heads", 7, ["spatial"], None):
        told["dropout_kind"] = bad
        file.write_bytes(safetensors.torch.save(weights, {"ups_fast": json.dumps(told)}))
        with pytest.raises(RunFolderError, match="dropout_kind in its metadata is unknown"):
            load_model(tmp_path)


@pytest.mark.slow
def test_rows_with_noise_are_labeled_and_predicted(tmp_path: Path) -> None:
    from ups_fast.data import ImageSet

    labels = torch.arange(90) % 3
    rows = torch.randn(90, 5, generator=torch.Generator().manual_seed(0)) + 2 * torch.eye(3, 5)[labels]
    data = ImageSet(
        "rows", ["a", "b", "c"], rows[:60], labels[:60], rows[60:], labels[60:], (0.0,) * 5, (1.0,) * 5
    )
    data = replace(data, labeled=torch.arange(9))
    words = {
        "select.uncertainty": "augment",
        "data.noise": 0.4,
        "model.name": "mlp-16",
        "data.name": "features",
    }
    words |= {
        "recipe": "features",
        "train.rounds": 1,
        "train.batch_size": 8,
        "run_dir": str(tmp_path / "run"),
    }
    rounds.run(config.make(words), data, console=Console(quiet=True))
    predictor = Predictor(tmp_path / "run", "cpu")
    whole = predictor(rows[60:].numpy())
    assert whole.std.min() > 0
    torch.testing.assert_close(predictor(rows[63:64].numpy()).std[0], whole.std[3], rtol=0, atol=1e-5)
