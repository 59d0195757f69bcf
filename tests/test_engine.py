"""What a round learns from, how its batches are made up, the schedule and evaluation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ups_fast import engine, reference
from ups_fast.data import ResidentImages
from ups_fast.engine import (
    Mix,
    batch_mix,
    epoch_plan,
    evaluate,
    expand,
    lr_at,
    occurrences,
    supervise,
)
from ups_fast.models import build
from ups_fast.policy import Policy
from ups_fast.selection import PseudoLabels


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pseudo_labels(
    positive: list[int], label: list[int], negative: list[list[int]], n_classes: int
) -> PseudoLabels:
    """Samples 4, 5, 6, ... of the training set."""
    mask = torch.zeros(len(label), n_classes, dtype=torch.bool)
    for row, classes in enumerate(negative):
        mask[row, classes] = True
    kept = torch.tensor(positive, dtype=torch.bool)
    nothing = torch.zeros(len(label))
    return PseudoLabels(
        torch.arange(4, 4 + len(label)),
        torch.tensor(label),
        nothing,
        nothing,
        kept,
        kept,
        reference.pack_mask(mask),
    )


# What a round learns from.

LABELS = torch.tensor([0, 1, 2, 39, 7, 7, 7, -1, 7, 7])
LABELED = torch.tensor([0, 1, 2, 3])


def test_round_0_learns_from_the_labels_alone() -> None:
    told = supervise(LABELS, LABELED, None, 40, device="cpu", generator=generator())
    assert told.target.tolist() == [0, 1, 2, 39] + [-1] * 6, "no other truth may leak in"
    assert told.positives.tolist() == [0, 1, 2, 3] and len(told.negatives) == 0
    assert told.negative.shape == (10, 2) and not told.negative.any()


def test_later_rounds_add_positives_and_negatives() -> None:
    found = pseudo_labels([1, 0, 0, 1, 0], [5, 6, 1, 38, -1], [[], [0, 33], [], [], []], 40)
    told = supervise(LABELS, LABELED, found, 40, device="cpu", generator=generator())
    assert told.target.tolist() == [0, 1, 2, 39, 5, -1, -1, 38, -1, -1]
    assert told.positives.tolist() == [0, 1, 2, 3, 4, 7]
    assert told.negatives.tolist() == [5]
    assert reference.unpack_mask(told.negative, 40).nonzero().tolist() == [[5, 0], [5, 33]]


def test_supervision_expands_the_positives_to_the_number_of_negatives() -> None:
    found = pseudo_labels([0] * 6, [0] * 6, [[1]] * 6, 3)
    told = supervise(LABELS, LABELED[:1], found, 3, device="cpu", generator=generator())
    assert told.positives.tolist() == [0] * 6 and told.negatives.tolist() == [4, 5, 6, 7, 8, 9]


def test_labeled_images_may_come_several_times() -> None:
    found = pseudo_labels([1, 0], [5, -1], [[], [3]], 40)
    told = supervise(LABELS, LABELED, found, 40, repeat=3, device="cpu", generator=generator())
    assert told.positives.tolist() == [0, 1, 2, 3] * 3 + [4] and told.negatives.tolist() == [5]
    assert supervise(
        LABELS, LABELED, None, 40, repeat=3, device="cpu", generator=generator()
    ).positives.tolist() == [0, 1, 2, 3], "round 0 has nothing else"


@pytest.mark.parametrize(
    ("n_pos", "n_neg", "size"), [(3, 8, 8), (3, 9, 9), (3, 3, 3), (5, 3, 5), (1, 7, 7), (4, 0, 4), (0, 9, 0)]
)
def test_expand_to_exactly_n_neg(n_pos: int, n_neg: int, size: int) -> None:
    positives = torch.arange(100, 100 + n_pos)
    got = expand(positives, n_neg, generator())
    assert len(got) == size
    whole = size // max(1, n_pos) * n_pos
    assert torch.equal(got[:whole], positives.repeat(size // max(1, n_pos)))
    assert set(got.tolist()) <= set(positives.tolist())


def test_expand_tops_up_with_replacement() -> None:
    got = expand(torch.arange(1000), 1999, generator())[1000:]
    assert got.unique().numel() < 999
    assert not torch.equal(got, expand(torch.arange(1000), 1999, generator(1))[1000:])


# Batches.


@pytest.mark.parametrize("batch_size", [1, 7, 64, 128])
@pytest.mark.parametrize("n_pos", [1, 4000, 44_000])
def test_batch_mix_is_the_published_one(n_pos: int, batch_size: int) -> None:
    for n_neg in (0, 1, 57, 3999, 44_000):
        length = max(n_pos, n_neg)  # the published list is expanded before its length is read
        got = batch_mix(length, n_neg, batch_size)
        nl_bs = int(float(batch_size) * n_neg / (length + n_neg))
        assert (got.nl_bs, got.pos_bs) == (nl_bs, batch_size - nl_bs)
        assert got.steps == max(1, (length + n_neg) // batch_size)
        assert bool(got.note) == (length + n_neg < batch_size or (n_neg > 0 and nl_bs == 0))


def test_batch_mix_says_what_is_unusual() -> None:
    assert batch_mix(40, 0, 40) == Mix(40, 0, 1, "")
    few = batch_mix(40, 0, 64)
    assert (few.pos_bs, few.steps) == (64, 1) and "40" in few.note and "64" in few.note
    unused = batch_mix(1000, 3, 64)
    assert unused.nl_bs == 0 and "3 negative samples" in unused.note
    assert batch_mix(0, 50, 10) == Mix(0, 10, 5, ""), "negatives alone make whole batches"
    with pytest.raises(ValueError, match="n_pos=0"):
        batch_mix(0, 0, 64)


def test_epoch_plan_is_a_permutation_of_either_group() -> None:
    positives, negatives = torch.arange(100, 130), torch.arange(20)
    mix = batch_mix(30, 20, 10)
    assert (mix.pos_bs, mix.nl_bs, mix.steps) == (6, 4, 5)
    plan = epoch_plan(positives, negatives, mix, generator())
    assert plan.shape == (5, 10) and plan.dtype == torch.int64
    flag = mix.positive("cpu")
    assert sorted(plan[:, flag].flatten().tolist()) == positives.tolist()
    assert sorted(plan[:, ~flag].flatten().tolist()) == negatives.tolist()
    assert not torch.equal(plan, epoch_plan(positives, negatives, mix, generator(1)))
    assert torch.equal(plan, epoch_plan(positives, negatives, mix, generator()))


def test_epoch_plan_drops_the_last_incomplete_batch() -> None:
    plan = epoch_plan(torch.arange(30), torch.arange(0), batch_mix(30, 0, 8), generator())
    assert plan.shape == (3, 8) and plan.unique().numel() == 24


def test_epoch_plan_goes_on_with_another_permutation() -> None:
    # 53 + 47 samples in batches of 10 are 10 steps of 6 positives, and 60 > 53.
    mix = batch_mix(53, 47, 10)
    assert (mix.pos_bs, mix.nl_bs, mix.steps) == (6, 4, 10)
    positive = epoch_plan(torch.arange(53), torch.arange(47), mix, generator())[:, :6].flatten()
    assert positive[:53].unique().numel() == 53 and positive[53:].unique().numel() == 7
    few = epoch_plan(torch.arange(3), torch.arange(0), batch_mix(3, 0, 8), generator())
    assert few.shape == (1, 8) and few.flatten().bincount().tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


# The schedule.


@pytest.mark.parametrize(("warmup", "total"), [(0, 50), (10, 50), (2.5, 30), (50, 50), (0, 1)])
def test_lr_is_the_published_schedule(warmup: float, total: int) -> None:
    def published(step: int) -> float:  # get_cosine_schedule_with_warmup, num_cycles = 7 / 16
        if step < warmup:
            return float(step) / float(max(1, warmup))
        progress = float(step - warmup) / float(max(1, total - warmup))
        return max(0.0, math.cos(math.pi * 7.0 / 16.0 * progress))

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.03)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, published)
    for step in range(total):
        want = optimizer.param_groups[0]["lr"]
        assert lr_at(step, total, lr=0.03, warmup=warmup) == pytest.approx(want, abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_lr_by_hand() -> None:
    assert lr_at(0, 100, lr=0.03) == 0.03
    assert lr_at(50, 100, lr=0.03) == pytest.approx(0.03 * math.cos(7 * math.pi / 32))
    assert lr_at(5, 100, lr=0.03, warmup=10) == pytest.approx(0.015)
    assert lr_at(300, 100, lr=0.03) == 0.0, "never below 0"
    assert lr_at(50, 100, lr=0.03, cosine=0.5) == pytest.approx(0.03 * math.sqrt(0.5))
    assert lr_at(99, 100, lr=0.03, cosine=0.5) < 0.0005 < lr_at(99, 100, lr=0.03)


# Evaluation.


class Reader(nn.Module):
    """Says class k with certainty for an image of pixel k; NaN for pixel 9."""

    def forward(self, images: Tensor) -> Tensor:
        pixel = (images[:, 0, 0, 0] * 255).round()
        logits = 20 * nn.functional.one_hot(pixel.long(), 10).float()
        return torch.where(pixel[:, None] == 9, math.nan, logits)


def evaluate_pixels(pixels: list[int], labels: list[int]) -> engine.Evaluation:
    images = torch.tensor(pixels, dtype=torch.uint8).view(-1, 1, 1, 1)
    resident = ResidentImages(images, mean=(0.0,), std=(1.0,), device="cpu")
    return evaluate(Reader(), resident, torch.tensor(labels, dtype=torch.int64), batch_size=3)


def test_evaluate() -> None:
    got = evaluate_pixels([0, 1, 2, 3, 9, 9, 4], [0, 1, 5, 3, 9, 0, 4])
    assert got.correct.tolist() == [True, True, False, True, False, False, True], "a NaN is never right"
    assert got.confidence.isnan().tolist() == [False] * 4 + [True, True, False]
    assert torch.allclose(got.confidence[~got.confidence.isnan()], torch.ones(5))


def test_lost_images_are_not_tested() -> None:
    images = torch.tensor([0, 1, 2, 3], dtype=torch.uint8).view(-1, 1, 1, 1)
    resident = ResidentImages(
        images, mean=(0.0,), std=(1.0,), device="cpu", unreadable={2: "gone", 0: "gone"}
    )
    got = evaluate(Reader(), resident, torch.tensor([5, 1, 5, 0]), batch_size=3)
    assert (
        got.index.tolist() == [1, 3]
        and got.correct.tolist() == [True, False]
        and got.label.tolist() == [1, 3]
    )


def test_evaluate_is_without_dropout_and_leaves_the_model_training() -> None:
    torch.manual_seed(0)
    model = build("wrn-10-1", n_classes=5, channels=1, size=8, dropout=0.5).train()
    pixels = torch.randint(0, 256, (9, 8, 8, 1), generator=generator()).to(torch.uint8)
    images = ResidentImages(
        pixels, mean=(0.5,), std=(0.5,), device="cpu", policy=Policy(flip=True, crop=1, cutout=2)
    )
    first, second = (evaluate(model, images, torch.zeros(9, dtype=torch.int64)) for _ in range(2))
    assert torch.equal(first.confidence, second.confidence)
    assert model.training
    with torch.no_grad():
        probability = torch.softmax(model.eval()(images.clean(torch.arange(9))), dim=1)
    assert torch.allclose(first.confidence, probability.max(dim=1).values, atol=1e-6)
    assert torch.equal(first.correct, probability.argmax(dim=1) == 0)


def test_occurrences_count_what_came_before() -> None:
    plan = torch.tensor([[5, 2, 5], [5, 7, 2], [2, 5, 0]])
    assert occurrences(plan).tolist() == [[0, 0, 1], [2, 0, 1], [2, 3, 0]]
    assert occurrences(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 4)
    long = torch.randint(0, 50, (40, 30), generator=generator())
    seen: dict[int, int] = {}
    for sample, count in zip(long.flatten().tolist(), occurrences(long).flatten().tolist(), strict=True):
        assert count == seen.get(sample, 0)
        seen[sample] = count + 1
