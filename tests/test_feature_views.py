"""Features of augmented views: what they are, which of them a step draws, their cache. And features in bfloat16."""

from __future__ import annotations

import pytest
import torch
from test_freeze import QUICK, computed, network, pixels, quick, recorder, small_set, text, weights
from torch import Tensor

from ups_fast import config, frozen, rounds
from ups_fast.build import prepare
from ups_fast.data import Noise, PlainImages, ResidentFeatures, ResidentImages, View
from ups_fast.inputs import image_policy
from ups_fast.ops import augment
from ups_fast.policy import Policy

assert computed and weights  # fixtures

AUGMENTED = {
    "data__views": 3,
    "data__flip": True,
    "data__crop": 2,
    "data__ops": "Rotate -20 20",
    "data__n_ops": 1,
}
PLAIN = {"mean": (0.0,), "std": (1.0,), "device": "cpu"}


def views_of(job) -> Tensor:  # [V, N, D]
    return job.images.seen.view(-1, *job.images.features.shape)


# The views -----------------------------------------------------------------------------------------------------


def test_views_are_the_network_s_features_of_augmented_images_whatever_the_run_s_seed(tmp_path, weights):
    cfg, data = quick(tmp_path, weights, **AUGMENTED, seed=5, data__cache=""), small_set()
    job = prepare(cfg, data)
    got, model, everything = views_of(job), network(weights), torch.arange(40)
    assert got.shape == (3, 40, 1024) and len(job.images) == 40
    assert torch.equal(job.images.features, got[0])
    assert torch.equal(got[0], prepare(quick(tmp_path, weights, data__cache=""), data).images.features)
    assert job.test_images.seen.shape == (10, 1024)
    for view in (1, 2):
        by_hand = augment(
            data.train_images,
            everything,
            policy=image_policy(cfg),
            seed=frozen.SEED,
            draw=view,
            mean=[0],
            std=[1],
        )
        torch.testing.assert_close(got[view], model.features(by_hand), rtol=1e-4, atol=1e-5)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert ((got[one] - got[other]).abs().amax(1) > 0.01).sum() > 35  # some turn, shift and mirror alike


@pytest.mark.parametrize("size", [1, 3, 20, 100])
def test_images_in_memory_and_in_files_are_augmented_alike_in_batches_of_any_size(size):
    x, policy = pixels(20)[0], Policy(flip=True, crop=2, cutout=4)
    here = ResidentImages(x, policy=policy, **PLAIN)
    files = PlainImages(None, [], size=8, channels=1, images=x, policy=policy, **PLAIN)
    cropped = PlainImages(None, [], size=8, channels=1, images=x, resized_crop=(0.2, 0.5), **PLAIN)
    wanted = here.augmented(torch.arange(20), seed=frozen.SEED, epoch=7)
    for images in (here, files, cropped):
        some = frozen.augmented_batches(images, torch.arange(20), policy, 7, size)
        batches = [each.clone() for each in some]
        assert [len(each) for each in batches] == [size] * (20 // size) + [20 % size] * (20 % size > 0)
        assert torch.equal(torch.cat(batches), wanted) == (images is not cropped)
    nothing = ResidentImages(x[:0], **PLAIN)
    assert not list(frozen.augmented_batches(nothing, torch.arange(0), policy, 7, size))


def drawn(policy: Noise, draw: int, number: int = 0, order: Tensor | None = None) -> Tensor:  # [N]
    """Which view of each of 4,000 rows is read."""
    rows = torch.arange(5.0).view(5, 1, 1).expand(5, 4000, 3)
    images = ResidentFeatures(rows, mean=[0.0] * 3, std=[1.0] * 3, device="cpu")
    ids = torch.arange(4000) if order is None else order
    out, view = torch.empty(len(ids), 3), View(0, len(ids), policy, 0, number)
    images.read(ids, torch.full_like(ids, draw), (view,), seed=torch.tensor(11), out=out)
    assert (out == out[:, :1]).all()
    return out[:, 0].long()


def test_each_sample_draws_one_of_its_views_in_each_epoch():
    all_of_them = Noise(views=5)
    found = [drawn(all_of_them, draw) for draw in range(4)] + [drawn(all_of_them, 0, number=1)]
    for each in found:
        counts = each.bincount(minlength=5)
        assert len(counts) == 5 and (counts - 800).abs().max() < 5 * (4000 * 0.2 * 0.8) ** 0.5
    for i, one in enumerate(found):
        for other in found[:i]:
            assert 0.15 < (one == other).double().mean() < 0.25
    order = torch.randperm(4000)[:77]
    assert torch.equal(drawn(all_of_them, 2, order=order), found[2][order])
    assert not drawn(Noise(), 0).any() and drawn(Noise(views=2), 0).max() == 1


def test_noise_is_added_to_the_view_and_labels_come_from_clean_rows():
    rows = torch.stack([torch.zeros(50, 4), torch.ones(50, 4)])
    images = ResidentFeatures(rows, mean=[0.0] * 4, std=[1.0] * 4, device="cpu")
    ids, out = torch.arange(50), torch.empty(2, 50, 4)
    for noise, x in zip((Noise(views=2), Noise(std=0.01, views=2)), out, strict=True):
        images.read(ids, ids, (View(0, 50, noise, 0),), seed=torch.tensor(3), out=x)
    assert 0 < (out[1] - out[0]).abs().max() < 0.1 and out[0].unique().tolist() == [0, 1]
    assert not images.clean(ids).any() and not next(images.clean_batches(ids, 50)).any() and len(images) == 50


@pytest.mark.slow
def test_a_run_on_views_goes_on_to_the_last_bit(tmp_path, weights, computed):
    long = quick(tmp_path, weights, **AUGMENTED, train__rounds=2, run_dir=str(tmp_path / "long"))
    whole = rounds.run(long, small_set(), console=recorder())
    rounds.run(quick(tmp_path, weights, **AUGMENTED), small_set(), console=recorder())
    assert sum(computed) == 130
    cfg = quick(tmp_path, weights, **AUGMENTED, train__rounds=2, data__cache="")
    second = rounds.run(cfg, small_set(), console=recorder())
    assert sum(computed) == 260
    for name, tensor in vars(whole.pseudo_labels).items():
        assert torch.equal(tensor, vars(second.pseudo_labels)[name]), name
    once = quick(tmp_path, weights, train__rounds=2, run_dir="")
    plain = rounds.run(once, small_set(), console=recorder())
    assert not torch.equal(plain.pseudo_labels.confidence, whole.pseudo_labels.confidence)


# The cache -----------------------------------------------------------------------------------------------------


def test_each_view_is_computed_once_for_all_runs_with_its_policy(tmp_path, weights, computed):
    console, cache = recorder(), tmp_path / "cache"

    def job(**changes) -> int:
        """How many images are computed."""
        before = sum(computed)
        prepare(quick(tmp_path, weights, **{**AUGMENTED, **changes}), small_set(), console)
        return sum(computed) - before

    assert job(data__views=2) == 90 and len(list(cache.iterdir())) == 3
    assert "features of 40 training images, view 2 of 2: computed in" in text(console)
    assert job(data__views=2, seed=9, train__lr=0.01) == 0
    assert f"features of 40 training images, view 2 of 2: from {cache}" in text(console)
    assert job(data__views=2, data__crop=1) == 40, "all but the clean ones"


@pytest.mark.slow
def test_other_policies_and_damaged_files_miss_the_cache(tmp_path, weights, computed):
    console, cache = recorder(), tmp_path / "cache"

    def job(**changes) -> int:
        before = sum(computed)
        prepare(quick(tmp_path, weights, **{**AUGMENTED, **changes}), small_set(), console)
        return sum(computed) - before

    assert job() == 130 and job(data__views=4) == 40
    assert prepare(quick(tmp_path, weights), small_set()) and sum(computed) == 170
    others = ({"data__flip": False}, {"data__ops": "Rotate -20 21"}, {"data__n_ops": 2}, {"data__cutout": 4})
    for change in others:
        assert job(**change, data__views=2) == 40, change
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert job() == 130 and text(console).count("is damaged (") == 4


# What is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data.views": 0}, r"data.views must be in \[1, 64\], got 0"),
        ({"data.views": 65}, r"data.views must be in \[1, 64\], got 65"),
        (
            {"model.freeze": False, "model.input_size": 0, "data.views": 2, "data.flip": True},
            "data.views is for model.freeze=true, got 2: other networks get new views in every epoch",
        ),
        ({"data.views": 2}, "data.views=2 needs views that differ, but data.flip, .* change nothing"),
        ({"data.views": 2, "data.ops": "ups", "data.n_ops": 0}, "data.views=2 needs views that differ"),
        ({"data.flip": True}, "data.flip=True is for images .* and data.views=4 is for augmented images"),
    ],
)
def test_configs_that_do_not_work(changes, says):
    with pytest.raises(ValueError, match=says) as said:
        config.make({**QUICK, "model.weights": "w.pth", **changes})
    assert "\n" not in str(said.value)


def test_views_that_take_too_much_memory_are_refused_before_anything_is_computed(
    tmp_path, weights, computed, monkeypatch
):
    monkeypatch.setattr(frozen, "memory_bytes", lambda: 2 * 3 * 40 * 4096 - 1)
    says = r"data.views=3 of 40 training images with 1,024 features each would take 0.0 GiB .*: lower it"
    with pytest.raises(ValueError, match=says):
        prepare(quick(tmp_path, weights, **AUGMENTED), small_set())
    assert not computed and not (tmp_path / "cache").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "says"),
    [({"data__ops": "Turn 3"}, r"data\.ops: "), ({"data__crop": 2000}, r"data\.crop: .*crop")],
)
def test_a_policy_that_does_not_work_is_named(tmp_path, weights, computed, changes, says):
    with pytest.raises(ValueError, match=says):
        prepare(quick(tmp_path, weights, data__views=2, **changes), small_set())
    assert not computed and not (tmp_path / "cache").exists()


# In bfloat16 ---------------------------------------------------------------------------------------------------


def test_only_a_gpu_with_bfloat16_may_compute_features_in_it(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for capability, auto in (((8, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert frozen.in_half("auto", gpu) == auto and not frozen.in_half("float32", gpu)
    assert frozen.in_half("bfloat16", gpu) and not frozen.in_half("bfloat16", cpu)


def test_the_first_batch_decides_between_bfloat16_and_float32(weights, computed, monkeypatch):
    model, (x, _) = network(weights), pixels(6)
    images = ResidentImages(x, **PLAIN).clean(torch.arange(6))
    wanted = model.features(images)
    for most, near in ((0.0, False), (float("nan"), False), (100.0, True)):
        monkeypatch.setattr(frozen, "LARGEST_DEVIATION", most)
        before, console = len(computed), recorder()
        forward = frozen.Forward(model, True, console)
        got = [forward(images), forward(images)]
        assert len(computed) - before == 3 and torch.equal(*got) and got[0].dtype == torch.float32
        assert torch.equal(got[0], wanted) != near
        assert (
            "features are computed in float32: bfloat16 changes those of the first 6 images" in text(console)
        ) != near
    assert 0 < (got[0] - wanted).square().mean().sqrt() < 0.2 * wanted.std()
    assert torch.equal(frozen.Forward(model, False, recorder())(images), wanted)


@pytest.mark.slow
def test_features_in_bfloat16_have_a_place_of_their_own_in_the_cache(
    tmp_path, weights, computed, monkeypatch
):
    monkeypatch.setattr(frozen, "LARGEST_DEVIATION", 100.0)
    for half in (False, True, True, False):
        monkeypatch.setattr(frozen, "in_half", lambda precision, device, half=half: half)
        prepare(quick(tmp_path, weights), small_set())
    assert sum(computed) == 50 + 90 and len(list((tmp_path / "cache").iterdir())) == 4


@pytest.mark.slow
def test_features_that_the_first_batch_puts_into_float32_are_kept(tmp_path, weights, computed, monkeypatch):
    """So a run that goes on has the same ones, of all its parts."""
    monkeypatch.setattr(frozen, "in_half", lambda precision, device: True)
    monkeypatch.setattr(frozen, "LARGEST_DEVIATION", 0.0)
    first = prepare(quick(tmp_path, weights), small_set())
    done = sum(computed)
    again = prepare(quick(tmp_path, weights), small_set())
    assert sum(computed) == done
    assert torch.equal(first.images.seen, again.images.seen)
