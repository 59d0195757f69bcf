"""augment and augment_plan against the chain in Pillow, bit for bit, and what is drawn against what should be."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import functional as tv

from ups_fast import ops, reference
from ups_fast.policy import (
    FILL,
    ONE,
    OPERATIONS,
    POLICIES,
    PUBLISHED,
    Policy,
    blend_table,
    normalization,
    parse_ops,
    randaugment,
)
from ups_fast.reference_augment import operate, philox

VALUES = {  # of each operation, with the awkward ones
    "AutoContrast": (0,),
    "Equalize": (0,),
    "Invert": (0,),
    "Rotate": (4, -4, 0, 0.3, 30, 45, 90, -90, 180, 270, 360, 123.4),
    "Posterize": (0, 1, 2, 4, 7, 8),
    "Solarize": (0, 34.13, 128, 255, 256),
    "SolarizeAdd": (0, 14.67, 110, -40),
    "Color": (0, 0.1, 0.34, 1, 1.9, 7.3),
    "Contrast": (0, 0.1, 0.34, 1, 1.9, 7.3),
    "Brightness": (0, 0.1, 0.34, 1, 1.9, 7.3),
    "Sharpness": (0, 0.1, 0.34, 1, 1.9, 7.3),
    "ShearX": (0.04, -0.04, 0, 0.3, -0.3, 1),
    "ShearY": (0.04, -0.04, 0, 0.3, -0.3, 1),
    "CutoutAbs": (5.33, 0, 0.5, 1, 40),
    "TranslateX": (13.33, -13.33, 0, 0.5, 2.5, -0.5, -2.5, 500, -500),
    "TranslateY": (13.33, -13.33, 0, 0.5, 2.5, -0.5, -2.5, 500, -500),
    "Gamma": (0.01, 0.6, 1, 1.6, 100),
    "CutoutPublished": (5.33, 0, 0.5, 1, 40),
}


def hostile_images(n: int, height: int, width: int, channels: int) -> Tensor:  # uint8 [n, H, W, C]
    """Noise; the first dozen flat, of two colors, gradients, of few values, nearly black or white."""
    g = torch.Generator().manual_seed(height * 100 + width)
    images = torch.randint(0, 256, (n, height, width, channels), dtype=torch.uint8, generator=g)
    y = torch.arange(height)[:, None, None].expand(height, width, channels)
    x = torch.arange(width)[None, :, None].expand(height, width, channels)
    special = [
        torch.zeros(height, width, channels),
        torch.full((height, width, channels), 255),
        torch.full((height, width, channels), 128),
        torch.where(x > width // 2, 200, 30),
        torch.where((x + y) % 2 == 0, 255, 0),
        torch.where((x == 0) & (y == 0), 1, 0),
        x * 255 // max(1, width - 1),
        y * 255 // max(1, height - 1),
        (x + y) * 3,
        100 + (x + y) % 3,
        254 + (x % 2),
        (x * 7 + y * 13 + torch.arange(channels) * 80) % 256,
    ]
    for i, image in enumerate(special[:n]):
        images[i] = image.to(torch.uint8)
    return images


def pixels_of(function, images: Tensor, index: Tensor, policy: str | Policy, **kwargs) -> Tensor:
    """What it makes of the images, hardly normalized."""
    channels = images.shape[3]
    kwargs = {"seed": 3, "draw": 1, "mean": (0.0,) * channels, "std": (1 / 255,) * channels, **kwargs}
    return function(images, index, policy=policy, **kwargs)


def fused(images: Tensor, index: Tensor, policy: str | Policy, **kwargs) -> Tensor:
    return pixels_of(ops.augment, images, index, policy, **kwargs)


def both(images: Tensor, index: Tensor, policy: str | Policy, **kwargs) -> tuple[Tensor, Tensor]:
    return fused(images, index, policy, **kwargs), pixels_of(
        reference.augment, images, index, policy, **kwargs
    )


@cache
def in_pillow(n: int, size: tuple[int, int], channels: int, policy: str | Policy) -> tuple[Tensor, Tensor]:
    """Hostile images and the reference's result, computed once for all instruction sets."""
    images = hostile_images(n, *size, channels)
    return images, pixels_of(reference.augment, images, torch.arange(n), policy)


def assert_equal(got: Tensor, want: Tensor) -> None:
    wrong = (got != want).flatten(1).any(dim=1).nonzero()[:, 0].tolist()
    assert not wrong, f"images {wrong[:10]} differ, by up to {(got.double() - want.double()).abs().max()}"


# Pixels --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_pillows(isa, name, channels):
    for size, value in itertools.product(((32, 32), (8, 8), (9, 31), (64, 17), (1, 1), (2, 3)), VALUES[name]):
        policy = Policy(ops=((name, (value,)),), n_ops=1)
        images, want = in_pillow(24, size, channels, policy)
        assert_equal(fused(images, torch.arange(24), policy), want)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_chain_is_pillows(isa, policy, channels):
    images, want = in_pillow(1000, (32, 32), channels, policy)
    got = fused(images, torch.arange(1000), policy)
    assert got.shape == (1000, channels, 32, 32)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert_equal(got, want)


@pytest.mark.parametrize("size", [(8, 8), (5, 64), (64, 64), (33, 20)])
def test_the_chain_is_pillows_at_other_sizes(size):
    for channels in (1, 3):
        images = hostile_images(60, *size, channels)
        assert_equal(*both(images, torch.arange(60), "published"))
        longer = replace(POLICIES["ups"], n_ops=9, crop=3, ops=randaugment(21), jitter=(1, 1, 1), cutout=50)
        assert_equal(*both(images, torch.arange(60), longer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalising_is_one_rounding_of_float32(dtype):
    images = hostile_images(50, 32, 32, 3)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
    got, want = both(images, torch.arange(50), "ups", mean=mean, std=std, dtype=dtype)
    assert got.dtype == dtype
    assert_equal(got, want)


def test_the_reference_does_what_the_published_chain_calls():
    """Its jitter, crop and flip against torchvision's on Pillow images; Posterize against Pillow's own."""
    for pixels in hostile_images(40, 32, 32, 3):
        picture = Image.fromarray(pixels.numpy())
        for factor in (0.6, 0.75, 1.0, 1.37):
            pairs = (
                ("Brightness", tv.adjust_brightness),
                ("Contrast", tv.adjust_contrast),
                ("Color", tv.adjust_saturation),
            )
            for name, theirs in pairs:
                assert operate(picture, name, factor) == theirs(picture, factor)
        assert operate(picture, "Posterize", 3) == ImageOps.posterize(picture, 3)
        assert np.asarray(operate(picture, "Posterize", 0)).max() == 0

        plan = reference.augment_plan(torch.tensor([0]), policy="weak", size=32, seed=0, draw=0)
        plan.flip[0], plan.crop[0] = 1, torch.tensor([-3, 4])
        moved = tv.crop(tv.pad(tv.hflip(picture), 4, padding_mode="reflect"), 4 - 3, 4 + 4, 32, 32)
        assert (reference.replay(pixels, plan, 0).numpy() == np.asarray(moved)).all()


def test_jitter_factors_leave_pillow_nothing_to_round():
    """All 65,536 pairs for many factors: the integers of the kernel are Pillow's float32 numbers."""
    a, b = torch.arange(256)[:, None], torch.arange(256)[None, :]
    for factor in [0, 1, ONE - 1, ONE, ONE + 1, 2 * ONE - 1, 2 * ONE, *range(7, 2 * ONE, 499)]:
        exact = ((a * ONE + factor * (b - a)) >> 14).clamp(0, 255)
        assert torch.equal(blend_table(factor / ONE).long(), exact), factor
    assert (blend_table(0.34) != ((a * ONE + round(0.34 * ONE) * (b - a)) >> 14).clamp(0, 255)).any()


# Draws ---------------------------------------------------------------------------------------------------------------


def test_philox_gives_its_authors_numbers():
    """The known answers of the Random123 library."""
    most = 0xFFFFFFFF
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((most,) * 4, (most,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox(pi, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@pytest.mark.parametrize("policy", POLICIES)
def test_plans_are_the_references(isa, policy):
    index = torch.tensor([0, 1, 5, 2**31, 2**40 + 3, 2**62, 0, *range(300)])
    for seed, draw, size in ((0, 0, 32), (2**63 - 1, 2**32 - 1, (40, 9)), (12345678901, 7, (5, 64))):
        got = ops.augment_plan(index, policy=policy, size=size, seed=seed, draw=draw)
        want = reference.augment_plan(index, policy=policy, size=size, seed=seed, draw=draw)
        assert torch.equal(got.draws, want.draws)
        assert got.size == want.size


def test_a_draw_depends_on_seed_draw_and_sample_alone():
    images = hostile_images(200, 32, 32, 3)
    index = torch.randperm(200)
    whole = fused(images, index, "ups")
    for size in (1, 7, 64):
        assert torch.equal(torch.cat([fused(images, part, "ups") for part in index.split(size)]), whole)
    assert torch.equal(fused(images, index.flip(0), "ups").flip(0), whole)
    repeated = fused(images, index[:1].expand(9).contiguous(), "ups")
    assert torch.equal(repeated, whole[:1].expand(9, -1, -1, -1))
    assert torch.equal(fused(images, index, "ups", draw=torch.tensor(1)), whole)
    assert torch.equal(fused(images, index, "ups", draw=torch.ones(200, dtype=torch.int64)), whole)
    assert torch.equal(fused(images, index, "ups", seed=torch.tensor(3)), whole)
    mixed, want = both(images, index[:1].expand(40).contiguous(), "ups", draw=torch.arange(40))
    assert_equal(mixed, want)
    assert torch.equal(mixed[1], whole[0])
    assert len(mixed.unique(dim=0)) > 35
    for changed in ({"seed": 4}, {"draw": 2}, {"seed": 3 + 2**32}):
        other = fused(images, index, "ups", **changed)
        assert (other != whole).flatten(1).any(dim=1).float().mean() > 0.9


def test_threads_change_nothing():
    images = hostile_images(100, 32, 32, 3)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(fused(images, torch.arange(100), "published"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_draws_are_spread_as_they_should_be():
    """Counts of 40,000 images within five standard deviations of what they should be."""
    n = 40_000
    plan = ops.augment_plan(torch.arange(n), policy="published", size=32, seed=1, draw=2)

    def uniform(values: Tensor, low: int, high: int) -> None:
        counts = torch.bincount(values.flatten() - low, minlength=high - low + 1)
        share = 1 / (high - low + 1)
        bound = 5 * (values.numel() * share * (1 - share)) ** 0.5
        assert len(counts) == high - low + 1
        assert (counts - values.numel() * share).abs().max() <= bound

    names = [name for name, _ in plan.names]
    position = torch.tensor([PUBLISHED.index(name.replace("Published", "Abs")) for name in names])
    uniform(position[plan.variant], 0, 15)
    signed = plan.variant[(plan.variant == 3) | (plan.variant == 4)]
    assert names[3] == names[4] == "Rotate"
    uniform(signed, 3, 4)
    uniform(plan.flip, 0, 1)
    uniform(plan.crop, -4, 4)
    uniform(plan.jitter_order, 0, 5)
    assert plan.jitter.min() >= 0.6 * ONE
    assert plan.jitter.max() <= 1.4 * ONE
    uniform((plan.jitter - round(0.6 * ONE)) * 16 // round(0.8 * ONE + 2), 0, 15)
    height, width = (plan.cutout[:, 2:] - plan.cutout[:, :2]).unbind(1)
    assert height.min() == 0
    assert height.max() == width.max() == 16

    g = np.random.default_rng(0)  # the published cutout, drawn a million times
    half = g.integers(1, 17, 1_000_000) // 2
    center = g.integers(0, 32, 1_000_000)
    sides = np.minimum(32, center + half) - np.maximum(0, center - half)
    for side in (height, width):
        assert abs(side.float().mean() - sides.mean()) < 5 * sides.std() / n**0.5

    fills = plan.corner[plan.variant == names.index("CutoutPublished")]
    corners = np.maximum(0, np.random.RandomState(0).uniform(32, 1, 1_000_000) - 5.3333 / 2).astype(int)
    for column in fills.unbind(1):
        assert abs(column.float().mean() - corners.mean()) < 5 * corners.std() / len(fills) ** 0.5
    rest = plan.corner[plan.variant != names.index("CutoutPublished")]
    assert (rest == 0).all()


def test_black_images_are_the_published_policys_alone():
    """Posterize to 0 bits meets 1 - (15/16)^3 = 17.6 % of the images."""
    names = [dict(POLICIES[policy].ops)["Posterize"] for policy in ("published", "ups")]
    assert names == [(0,), (1,)]
    plan = ops.augment_plan(torch.arange(20_000), policy="published", size=32, seed=0, draw=0)
    met = (plan.variant == plan.names.index(("Posterize", 0))).any(dim=1).float().mean()
    assert abs(met - 0.176) < 0.014


# Plans that are given ------------------------------------------------------------------------------------------------


def test_a_plan_replaces_the_draws():
    images = hostile_images(64, 32, 32, 3)
    index = torch.arange(64)
    plan = ops.augment_plan(index, policy="published", size=32, seed=3, draw=1)
    drawn = fused(images, index, "published")
    assert torch.equal(fused(images, index, "published", plan=plan, seed=99), drawn)

    plan.variant[:] = -1
    plan.flip[:] = 0
    plan.crop[:] = 0
    plan.jitter[:] = ONE
    plan.cutout[:] = 0
    untouched = both(images, index, "published", plan=plan)
    for each in untouched:
        assert torch.equal(each.round(), images.permute(0, 3, 1, 2).float())
    plan.flip[::2] = 1
    mirrored = fused(images, index, "published", plan=plan).round()
    assert torch.equal(mirrored[6], images[6].flip(1).permute(2, 0, 1).float())
    assert torch.equal(mirrored[7], images[7].permute(2, 0, 1).float())
    assert plan.operations(0) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("variant", 21),
        ("variant", -2),
        ("corner", 33),
        ("corner", -1),
        ("crop", 32),
        ("crop", -32),
        ("jitter_order", 6),
        ("jitter", -1),
        ("jitter", 2 * ONE + 1),
        ("cutout", 33),
        ("cutout", -1),
    ],
)
def test_a_plan_that_cannot_be_is_refused(field, value):
    images = hostile_images(8, 32, 32, 3)
    plan = ops.augment_plan(torch.arange(8), policy="published", size=32, seed=0, draw=0)
    view = getattr(plan, field)
    view[(3,) + (0,) * (view.ndim - 1)] = value
    with pytest.raises(RuntimeError, match="plan: row 3 holds what augment_plan would not draw"):
        both(images, torch.arange(8), "published", plan=plan)


# Arguments -----------------------------------------------------------------------------------------------------------

GOOD = {
    "images": torch.zeros(4, 32, 32, 3, dtype=torch.uint8),
    "index": torch.arange(4),
    "policy": "ups",
    "seed": 0,
    "draw": 0,
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "dtype": torch.float32,
}
FOREIGN = ops.augment_plan(torch.arange(4), policy="weak", size=32, seed=0, draw=0)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"images": torch.zeros(4, 32, 32, 3)}, "images must be uint8 [N, H, W, C] with C = 1 or 3"),
        (
            {"images": torch.zeros(4, 32, 32, 2, dtype=torch.uint8)},
            "images must be uint8 [N, H, W, C] with C =",
        ),
        ({"images": [1]}, "images must be a tensor, got list"),
        (
            {"images": torch.zeros(4, 3, 32, 32, dtype=torch.uint8).permute(0, 2, 3, 1)},
            "images must be contig",
        ),
        ({"index": torch.arange(4, dtype=torch.int32)}, "index must be int64 [B], got torch.int32 [4]"),
        ({"index": torch.zeros(2, 2, dtype=torch.int64)}, "index must be int64 [B], got torch.int64 [2, 2]"),
        ({"index": [0]}, "index must be a tensor, got list"),
        ({"index": torch.tensor([0, 4])}, "index must lie in 0..3, got 4"),
        ({"index": torch.tensor([-1])}, "index must lie in 0..3, got -1"),
        ({"policy": "strong"}, "policy must be one of published, ups, weak, none or a Policy, got 'strong'"),
        ({"policy": None}, "policy must be a Policy or a name, got NoneType"),
        ({"policy": Policy(crop=32)}, "policy.crop must be below the image size 32x32, got 32"),
        ({"seed": -1}, "seed must be an integer of 0 .. 2^63 - 1, got -1"),
        ({"seed": 1.5}, "seed must be an integer of 0 .. 2^63 - 1, got 1.5"),
        ({"draw": 2**32}, "draw must be an integer of 0 .. 2^32 - 1, got 4294967296"),
        (
            {"draw": torch.tensor(1.0)},
            "draw must be an int or an int64 tensor [] or [4] on cpu, got torch.fl",
        ),
        ({"policy": "Publised"}, "got 'Publised' (did you mean published?)"),
        ({"seed": True}, "seed must be an integer of 0 .. 2^63 - 1, got True"),
        ({"seed": 2**63}, "seed must be an integer of 0 .. 2^63 - 1, got 9223372036854775808"),
        ({"seed": torch.zeros(4, dtype=torch.int64)}, "seed must be an int or an int64 tensor [] on cpu"),
        (
            {"mean": (0.5,)},
            "mean must be 3 finite numbers, such as (0.5, 0.5, 0.5), one for each channel, got (0.5,)",
        ),
        (
            {"mean": 0.5},
            "mean must be 3 finite numbers, such as (0.5, 0.5, 0.5), one for each channel, got 0.5",
        ),
        ({"mean": "abc"}, "one for each channel, got 'abc'"),
        ({"mean": None}, "one for each channel, got None"),
        ({"mean": torch.tensor(0.5)}, "one for each channel, got 0.5"),
        ({"mean": torch.full((3, 1, 1), 0.5)}, "one for each channel, got [[[0.5]]"),
        ({"mean": (0.5, float("nan"), 0.5)}, "one for each channel, got (0.5, nan, 0.5)"),
        ({"std": (0.5, float("inf"), 0.5)}, "std must be 3 finite numbers"),
        ({"std": (0.5, True, 0.5)}, "std must be 3 finite numbers"),
        ({"std": (0.5, -1.0, 0.5)}, "std must be above 0"),
        ({"std": (0.5, 1e-50, 0.5)}, "std must be above 0"),
        ({"dtype": "float32"}, "dtype must be float32, float16 or bfloat16, got float32"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be above 0"),
        ({"dtype": torch.float64}, "dtype must be float32, float16 or bfloat16, got torch.float64"),
        ({"plan": 3}, "plan must be an AugmentPlan, got int"),
        ({"plan": FOREIGN}, "plan must be of this policy and of size (32, 32)"),
        ({"plan": FOREIGN, "policy": "weak", "index": torch.arange(3)}, "plan must have a row for each of 3"),
    ],
)
def test_bad_arguments_are_named(changed, sentence):
    kwargs = {**GOOD, **changed}
    functions = [ops.augment] if "must lie" in sentence else [ops.augment, reference.augment]
    for function in functions:
        with pytest.raises((TypeError, ValueError, RuntimeError), match=re.escape(sentence)):
            function(kwargs["images"], kwargs["index"], **{k: v for k, v in kwargs.items() if k[:1] != "i"})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"ops": (("Rotat", (1,)),)}, "got 'Rotat' (did you mean Rotate?)"),
        ({"ops": (("Rotate", ()),)}, "Rotate must have values in -360..360, got none"),
        ({"ops": (("Posterize", (9,)),)}, "Posterize must have values in 0..8, got 9"),
        ({"ops": (("Color", (float("nan"),)),)}, "Color must have values in 0..100"),
        ({"n_ops": 1}, "policy.ops must not be empty where n_ops is 1"),
        ({"n_ops": 65, "ops": randaugment(4)}, "policy.n_ops must be an integer of 0..64, got 65"),
        ({"crop": -1}, "policy.crop must be an integer of 0..2047, got -1"),
        ({"cutout": 1.5}, "policy.cutout must be an integer of 0..2048, got 1.5"),
        ({"jitter": (0.4, 0.4)}, "policy.jitter must be three numbers in [0, 1], got (0.4, 0.4)"),
        ({"jitter": (0, 0, 1.5)}, "policy.jitter must be three numbers in [0, 1]"),
    ],
)
def test_impossible_policies_are_named(fields, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Policy(**fields)


def test_ops_from_words():
    assert parse_ops("") == parse_ops("  ") == ()
    assert parse_ops("ups") == randaugment(4)
    assert parse_ops("published") == randaugment(4, least_bits=0, square="CutoutPublished")
    text = "TranslateX -1 0 1,Invert,  Gamma .6 1.6"
    assert parse_ops(text) == (("TranslateX", (-1, 0, 1)), ("Invert", (0,)), ("Gamma", (0.6, 1.6)))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Blur 1", "an operation must be one of AutoContrast"),
        ("Rotate 4, ", "an operation must be one of AutoContrast"),
        (
            "Rotate four",
            "and a comma ends it; got 'Rotate four'",
        ),
        ("Rotate", "Rotate must have values in -360..360, got none"),
        ("Rotate 4 nan", "Rotate must have values in -360..360"),
        ("Gamma 0", "Gamma must have values in 0.01..100"),
    ],
)
def test_impossible_words_are_named(text, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        parse_ops(text)


def test_nothing_to_do():
    images = hostile_images(3, 32, 32, 3)
    empty = torch.zeros(0, dtype=torch.int64)
    got, want = both(images, empty, "ups")
    assert got.shape == want.shape == (0, 3, 32, 32)
    assert ops.augment_plan(empty, policy="ups", size=32, seed=0, draw=0).draws.shape == (0, 20)
    copies = fused(images, torch.arange(3), "none")
    assert torch.equal(copies.round(), images.permute(0, 3, 1, 2).float())


@pytest.mark.slow
def test_the_ops_are_torchs():
    """Schema, fake kernels and their use in a graph."""
    from ups_fast.policy import normalization, tables

    cpu = torch.device("cpu")
    images, index, seed = hostile_images(9, 8, 8, 3), torch.arange(9), torch.tensor(3)
    for policy, dtype in itertools.product(("published", "none"), (torch.float32, torch.bfloat16)):
        crop = replace(POLICIES[policy], crop=min(2, POLICIES[policy].crop))
        table = tables(crop, 8, 8, 3, cpu)
        norm = normalization((0.5,) * 3, (0.5,) * 3, dtype, cpu)
        drawn = (index, table.variants, table.operations, seed, index + 4, 8, 8, list(table.settings))
        plan = torch.ops.ups_fast.augment_plan(*drawn)
        torch.library.opcheck(torch.ops.ups_fast.augment_plan, drawn)
        for given in (None, plan):
            args = (
                torch.empty(9, 8, 8, 3, dtype=dtype),
                images,
                index,
                *drawn[1:3],
                table.blends,
                norm,
                seed,
                torch.tensor(4),
                given,
                list(table.settings),
            )
            torch.library.opcheck(torch.ops.ups_fast.augment, args)


def test_index_and_counters_of_any_strides():
    images, perm = hostile_images(24, 8, 8, 3), torch.randperm(24)
    numbers = torch.arange(48)
    for index in (perm[1::2], perm[:1].expand(12), torch.stack([perm, perm], 1)[:12, 0], perm.flip(0)[:12]):
        for draw in (numbers[::4], numbers[:1].expand(12), numbers[3], torch.tensor(2**40 + 5)):
            seed = torch.stack([numbers, numbers])[1, 7]
            rule = {"policy": "ups", "seed": seed, "draw": draw}
            got, want = both(images, index, **rule)
            assert_equal(got, want)
            assert_equal(fused(images, index.clone(), **{**rule, "draw": draw.clone()}), want)
            plans = [f(index, size=8, **rule) for f in (ops.augment_plan, reference.augment_plan)]
            assert torch.equal(plans[0].draws, plans[1].draws)
            twice = replace(plans[0], draws=plans[0].draws.repeat_interleave(2, 0)[::2])
            assert_equal(fused(images, index, plan=twice, **rule), want)


def test_numbers_in_any_form():
    images, index = hostile_images(9, 8, 8, 3), torch.arange(5)
    want = fused(images, index, "ups", mean=(0.25, 0.5, 0.75), std=(0.5, 0.25, 0.125), seed=7, draw=3)
    for form in (
        list,
        torch.tensor,
        np.array,
        lambda x: np.array(x, np.float32),
        lambda x: list(np.array(x)),
    ):
        for function in (ops.augment, reference.augment):
            mean, std = form((0.25, 0.5, 0.75)), form((0.5, 0.25, 0.125))
            rule = {"mean": mean, "std": std, "seed": np.int64(7), "draw": np.uint8(3)}
            assert torch.equal(pixels_of(function, images, index, "ups", **rule), want)
    made = normalization.cache_info().misses
    for _ in range(3):
        fused(images, index, "ups", mean=torch.tensor([0.25, 0.5, 0.75]), std=np.array((0.5, 0.25, 0.125)))
    assert normalization.cache_info().misses == made
    sizes = [8, (8, 8), [8, 8], np.int64(8), torch.Size((8, 8)), images.shape[1:3]]
    for size in sizes:
        assert ops.augment_plan(index, policy="ups", size=size, seed=0, draw=0).size == (8, 8)
    for size in (True, 8.0, "88", (8,), (8, 8, 3), 0, 2049, None, torch.tensor([8, 8])):
        with pytest.raises(ValueError, match=r"^size must be height and width in 1\.\.2048, got "):
            ops.augment_plan(index, policy="none", size=size, seed=0, draw=0)


@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_the_published_square_is_drawn_as_numpy_draws_it(size):
    """np.random.uniform(w) is uniform(low=w, high=1): from (1, w]. The square of `ups` has its center in [0, w)."""
    side, n = 5.3333, 20_000
    for name, low in (("CutoutAbs", 0), ("CutoutPublished", 1)):
        rule = {"policy": Policy(ops=((name, (side,)),), n_ops=1), "size": size, "seed": 0, "draw": 0}
        drawn = ops.augment_plan(torch.arange(n), **rule).corner[:, 0]
        assert torch.equal(drawn[:300], reference.augment_plan(torch.arange(300), **rule).corner[:, 0])
        g = np.random.RandomState(0)  # as the published code: a Generator refuses low > high
        center = g.uniform(size, 1, (200_000, 2)) if low else g.uniform(0, size, (200_000, 2))
        want = np.maximum(0, center - side / 2).astype(int)
        for value in range(size):
            share, got = (want == value).mean(), (drawn == value).float().mean()
            assert abs(got - share) < 5 * (share * (1 - share) / n) ** 0.5 + 2e-3, (name, value)
    assert dict(POLICIES["published"].ops).keys() - dict(POLICIES["ups"].ops).keys() == {"CutoutPublished"}


@pytest.mark.slow
def test_neither_kernels_nor_pillow():
    """The sentence says what to install; augment_plan needs neither."""
    code = """
import sys
sys.modules["ups_fast._C"] = sys.modules["PIL"] = None
import torch, ups_fast
index, images = torch.arange(2), torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
ups_fast.augment_plan(index, policy="ups", size=8, seed=0, draw=0)
ups_fast.augment(images, index, policy="ups", seed=0, draw=0, mean=[0] * 3, std=[1] * 3)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: augment needs Pillow where it runs without its compiled kernels: run `pip install pillow`, or "
        "build the kernels (ups_fast.backend() says how)"
    )


@pytest.mark.parametrize("augment", [ops.augment, reference.augment], ids=["fused", "reference"])
def test_the_result_may_go_to_a_given_place(augment):
    images, index = hostile_images(9, 8, 6, 3), torch.arange(5)
    rule = {"policy": "none", "seed": 0, "draw": 0, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    place = torch.zeros(7, 3, 8, 6).to(memory_format=torch.channels_last)
    assert augment(images, index, **rule, out=place[1:6]).data_ptr() == place[1:6].data_ptr()
    assert (
        torch.equal(place[1:6], augment(images, index, **rule)) and not place[0].any() and not place[6].any()
    )
    for wrong in (
        place[:4],
        place[:5].double(),
        torch.zeros(5, 3, 8, 6),
        place[:5].expand(5, 3, 8, 6)[:, :, ::2],
        torch.zeros(5, 3, 8, 6, device="meta"),
        place[:5].clone().requires_grad_(),
        images.view(-1)[: 5 * 8 * 6 * 3].view(torch.uint8),
        [1],
    ):
        with pytest.raises((ValueError, TypeError), match=r"^out must "):
            augment(images, index, **rule, out=wrong)


def test_a_place_that_a_backward_needs_is_not_overwritten_unheard():
    images, index = hostile_images(9, 8, 8, 3), torch.arange(5)
    rule = {"policy": "none", "seed": 0, "draw": 0, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    batch, weight = ops.augment(images, index, **rule), torch.ones(3, 1, 1, requires_grad=True)
    loss = (batch * weight).sum()
    ops.augment(images, index + 1, **rule, out=batch)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        ops.augment(images, index, **rule, out=ops.augment(images, index, **rule))
    memory = torch.zeros(5 * 8 * 8 * 3 * 4, dtype=torch.uint8)
    place = memory.view(torch.float32).view(5, 8, 8, 3).permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match=r"^out must not share memory with images"):
        ops.augment(memory[: 9 * 8 * 8 * 3].view(9, 8, 8, 3), index, **rule, out=place)


@pytest.mark.parametrize("augment", [ops.augment, reference.augment], ids=["fused", "reference"])
@pytest.mark.parametrize("index", [[-1], [0, 9]])
def test_an_index_out_of_range_is_an_error(augment, index):
    rule = {"policy": "none", "seed": 0, "draw": 0, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(RuntimeError, match=r"index must lie in 0\.\.8, got"):
        augment(hostile_images(9, 8, 8, 3), torch.tensor(index), **rule)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_augment_compiles():
    images, index = hostile_images(9, 8, 8, 3), torch.arange(5)

    def twice(images, index):
        rule = {"policy": "weak", "seed": 0, "draw": 0, "mean": (0.5,) * 3, "std": (0.5,) * 3}
        return ops.augment(images, index, **rule) * 2

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images, index), twice(images, index))


def test_gray_squares_have_the_luma_of_the_colored_ones():
    color = Image.new("RGB", (1, 1), FILL).convert("L").getpixel((0, 0))
    policy = Policy(ops=(("CutoutAbs", (40,)),), n_ops=1)
    gray = fused(torch.zeros(1, 8, 8, 1, dtype=torch.uint8), torch.tensor([0]), policy)
    assert gray.max().round() == color


@pytest.mark.parametrize("module", [ops, reference])
def test_the_old_name_of_draw_works_and_says_so(module):
    images, index = hostile_images(4, 8, 8, 3), torch.arange(4)
    rule = {"policy": "ups", "seed": 3}
    norm = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    want = module.augment(images, index, **rule, **norm, draw=2)
    with pytest.warns(FutureWarning, match="epoch of augment is now draw") as said:
        assert torch.equal(module.augment(images, index, **rule, **norm, epoch=2), want)
    assert said[0].filename == __file__
    plan = module.augment_plan(index, **rule, size=8, draw=2)
    with pytest.warns(FutureWarning, match="epoch of augment_plan is now draw"):
        assert torch.equal(module.augment_plan(index, **rule, size=8, epoch=2).draws, plan.draws)
    with pytest.raises(TypeError, match="both draw and epoch"):
        module.augment(images, index, **rule, **norm, draw=2, epoch=2)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'draw'"):
        module.augment(images, index, **rule, **norm)
