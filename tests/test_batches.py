"""What a UPS round learns from, how batches are made up and seen, and the schedule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ups_fast import reference
from ups_fast.batches import EPOCH_BITS, epoch_order, lr_at, occurrences, views_of
from ups_fast.data.images import VIEW_BITS, View
from ups_fast.methods import UPS, Group, Known, Layout, Options, Setting, Targets
from ups_fast.methods.ups import expand
from ups_fast.models import build
from ups_fast.policy import POLICIES
from ups_fast.pseudo_labels import PseudoLabels
from ups_fast.selection import Thresholds


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ups(n_classes: int = 40, repeat: int = 1) -> UPS:
    def network() -> Any:
        return build("wrn-10-1", n_classes=n_classes, channels=1, size=8, dropout=0.3)

    return UPS(Setting(network, Options("ups"), Thresholds(), len(LABELS), n_classes, labeled_repeats=repeat))


# What a round learns from.

LABELS = torch.tensor([0, 1, 2, 39, 7, 7, 7, -1, 7, 7])
LABELED = torch.tensor([0, 1, 2, 3])


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


def targets(
    found: PseudoLabels | None, labeled: Tensor = LABELED, *, n_classes: int = 40, repeat: int = 1
) -> Targets:
    unlabeled = torch.arange(len(labeled), len(LABELS))
    known = Known(int(found is not None), False, LABELS, labeled, unlabeled, found, generator())
    return ups(n_classes, repeat).targets(known)


def test_round_0_learns_from_the_labels_alone() -> None:
    lists, tables = targets(None)
    assert tables["target"].tolist() == [0, 1, 2, 39] + [-1] * 6, "no other truth may leak in"
    assert lists["positive"].tolist() == [0, 1, 2, 3] and len(lists["negative"]) == 0
    assert tables["negative"].shape == (10, 2) and not tables["negative"].any()
    assert (tables["target"].dtype, tables["negative"].dtype) == (torch.int64, torch.int32)


def test_later_rounds_add_positives_and_negatives() -> None:
    found = pseudo_labels([1, 0, 0, 1, 0], [5, 6, 1, 38, -1], [[], [0, 33], [], [], []], 40)
    lists, tables = targets(found)
    assert tables["target"].tolist() == [0, 1, 2, 39, 5, -1, -1, 38, -1, -1]
    assert lists["positive"].tolist() == [0, 1, 2, 3, 4, 7]
    assert lists["negative"].tolist() == [5]
    assert reference.unpack_mask(tables["negative"], 40).nonzero().tolist() == [[5, 0], [5, 33]]
    assert set(lists) == {"positive", "negative"} and set(tables) == {"target", "negative"}


def test_the_positives_are_expanded_to_the_number_of_negatives() -> None:
    found = pseudo_labels([0] * 6, [0] * 6, [[1]] * 6, 3)
    lists, _ = targets(found, LABELED[:1], n_classes=3)
    assert lists["positive"].tolist() == [0] * 6 and lists["negative"].tolist() == [4, 5, 6, 7, 8, 9]


def test_labeled_images_may_come_several_times() -> None:
    found = pseudo_labels([1, 0], [5, -1], [[], [3]], 40)
    lists, _ = targets(found, repeat=3)
    assert lists["positive"].tolist() == [0, 1, 2, 3] * 3 + [4] and lists["negative"].tolist() == [5]
    assert targets(None, repeat=3).lists["positive"].tolist() == [0, 1, 2, 3], "round 0 has nothing else"


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


def lay_out(n_pos: int, n_neg: int, batch_size: int) -> Layout:
    return UPS.lay_out(None, {"positive": n_pos, "negative": n_neg}, batch_size)  # type: ignore[arg-type]


def order(layout: Layout, seed: int = 0, epoch: int = 0, **lists: Tensor) -> tuple[Tensor, Tensor]:
    return epoch_order(lists, layout, generator(seed), epoch)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 128])
@pytest.mark.parametrize("n_pos", [1, 4000, 44_000])
def test_the_layout_is_the_published_one(n_pos: int, batch_size: int) -> None:
    for n_neg in (0, 1, 57, 3999, 44_000):
        length = max(n_pos, n_neg)  # the published list is expanded before its length is read
        got = lay_out(length, n_neg, batch_size)
        nl_bs = int(float(batch_size) * n_neg / (length + n_neg))
        assert got.groups == (Group("positive", batch_size - nl_bs), Group("negative", nl_bs))
        assert got.steps == max(1, (length + n_neg) // batch_size) and got.rows == batch_size
        assert bool(got.note) == (length + n_neg < batch_size or (n_neg > 0 and nl_bs == 0))


def rows_of(layout: Layout) -> list[int]:
    return [group.rows for group in layout.groups]


def test_the_layout_says_what_is_unusual() -> None:
    assert lay_out(40, 0, 40) == Layout((Group("positive", 40), Group("negative", 0)), 1, "")
    few = lay_out(40, 0, 64)
    assert rows_of(few) == [64, 0] and few.steps == 1 and "40" in few.note and "64" in few.note
    unused = lay_out(1000, 3, 64)
    assert rows_of(unused) == [64, 0] and "3 negative samples" in unused.note
    whole = Layout((Group("positive", 0), Group("negative", 10)), 5, "")
    assert lay_out(0, 50, 10) == whole, "negatives alone make whole batches"
    with pytest.raises(ValueError, match="n_pos=0"):
        lay_out(0, 0, 64)


def test_an_epoch_is_a_permutation_of_either_group() -> None:
    positives, negatives = torch.arange(100, 130), torch.arange(20)
    layout = lay_out(30, 20, 10)
    assert rows_of(layout) == [6, 4] and layout.steps == 5
    ids, draws = order(layout, positive=positives, negative=negatives)
    assert ids.shape == draws.shape == (5, 10) and ids.dtype == draws.dtype == torch.int64
    flag = torch.arange(10) < 6
    assert sorted(ids[:, flag].flatten().tolist()) == positives.tolist()
    assert sorted(ids[:, ~flag].flatten().tolist()) == negatives.tolist()
    assert not torch.equal(ids, order(layout, 1, positive=positives, negative=negatives)[0])
    assert torch.equal(ids, order(layout, positive=positives, negative=negatives)[0])


def test_an_epoch_drops_the_last_incomplete_batch() -> None:
    ids, _ = order(lay_out(30, 0, 8), positive=torch.arange(30), negative=torch.arange(0))
    assert ids.shape == (3, 8) and ids.unique().numel() == 24


def test_an_epoch_goes_on_with_another_permutation() -> None:
    # 53 + 47 samples in batches of 10 are 10 steps of 6 positives, and 60 > 53.
    layout = lay_out(53, 47, 10)
    assert rows_of(layout) == [6, 4] and layout.steps == 10
    ids, _ = order(layout, positive=torch.arange(53), negative=torch.arange(47))
    positive = ids[:, :6].flatten()
    assert positive[:53].unique().numel() == 53 and positive[53:].unique().numel() == 7
    few, _ = order(lay_out(3, 0, 8), positive=torch.arange(3), negative=torch.arange(0))
    assert few.shape == (1, 8) and few.flatten().bincount().tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_draws_count_the_epoch_and_what_came_before_in_it() -> None:
    layout = Layout((Group("few", 5), Group("many", 3)), 4)
    ids, draws = order(layout, epoch=7, few=torch.arange(3), many=torch.arange(2, 40))  # 2 is in both
    assert (draws & ((1 << EPOCH_BITS) - 1) == 7).all()
    assert torch.equal(draws >> EPOCH_BITS, occurrences(ids)) and (draws >> EPOCH_BITS).max() >= 6


# Views.

VIEWS = Layout(
    (
        Group("labeled", 3, "weak"),
        Group("unlabeled", 4, "weak"),
        Group("unlabeled", 4, "strong", view_of=1),
        Group("unlabeled", 4, "strong", view_of=1),
        Group("labeled", 3, "strong", view_of=0),
        Group("unlabeled", 2, "strong"),
    ),
    steps=6,
)
LISTS = {"labeled": torch.arange(5), "unlabeled": torch.arange(5, 25)}
POLICY_OF = {"weak": POLICIES["none"], "strong": POLICIES["ups"]}


def test_a_view_has_the_samples_of_its_group_and_draws_of_its_own() -> None:
    layout = Layout((Group("all", 7, "weak"), Group("all", 7, "strong", view_of=0)), 5)
    ids, draws = order(layout, epoch=3, all=torch.arange(20))
    weak, strong = ids.split(7, dim=1)
    assert torch.equal(weak, strong)
    alone, drawn = order(Layout(layout.groups[:1], 5), epoch=3, all=torch.arange(20))
    assert torch.equal(weak, alone), "a view takes nothing from the generator"
    assert torch.equal(draws[:, :7], drawn)
    assert torch.equal(draws[:, 7:], drawn + (1 << VIEW_BITS)) and (draws > 0).all()


def test_views_of_views_and_several_groups() -> None:
    ids, draws = order(VIEWS, **LISTS)
    groups = ids.split(rows_of(VIEWS), dim=1)
    assert torch.equal(groups[1], groups[2]) and torch.equal(groups[1], groups[3])
    assert torch.equal(groups[0], groups[4]) and not torch.equal(groups[1][:, :2], groups[5])
    assert ids.shape == draws.shape == (6, VIEWS.rows) == (6, 20)
    numbers = [set((each >> VIEW_BITS).flatten().tolist()) for each in draws.split(rows_of(VIEWS), dim=1)]
    assert numbers == [{0}, {0}, {2}, {3}, {4}, {0}]


def test_draws_of_views_never_collide() -> None:
    """No sample is twice augmented, or dropped out, by the same numbers: over epochs, repeats and views."""
    seen: set[tuple[int, int]] = set()
    for epoch in range(4):
        ids, draws = order(VIEWS, seed=epoch, epoch=epoch, **LISTS)
        seen |= set(zip(ids.flatten().tolist(), draws.flatten().tolist(), strict=True))
    assert len(seen) == 4 * VIEWS.steps * VIEWS.rows
    # Nor at the ends of what a run can count: its last epoch, and a sample that fills a whole one.
    last, repeats, view = (1 << EPOCH_BITS) - 1, (1 << (VIEW_BITS - EPOCH_BITS)) - 1, 127
    assert last >= 1_000_000 - 1 and last + (repeats << EPOCH_BITS) < 1 << VIEW_BITS
    assert last + (repeats << EPOCH_BITS) + (view << VIEW_BITS) < 1 << 63


def test_an_order_is_the_same_after_any_interruption() -> None:
    whole = [order(VIEWS, seed=epoch, epoch=epoch, **LISTS) for epoch in range(3)]
    for epoch in (2, 0, 1):  # each epoch is drawn from its own stream
        again = order(VIEWS, seed=epoch, epoch=epoch, **LISTS)
        assert all(map(torch.equal, again, whole[epoch]))
    assert not torch.equal(whole[0][0], whole[1][0])


def test_views_know_their_rows_and_where_their_images_are_read() -> None:
    weak, strong = POLICY_OF["weak"], POLICY_OF["strong"]
    assert views_of(VIEWS.groups, POLICY_OF) == (
        View(0, 7, weak, 0),
        View(7, 11, strong, 3, 2),
        View(11, 15, strong, 3, 3),
        View(15, 18, strong, 0, 4),
        View(18, 20, strong, 7),
    ), "the second group of 4 is read once, behind the first 3"
    assert [view.again for view in views_of(VIEWS.groups, POLICY_OF)] == [False] + [True] * 3 + [False]
    assert views_of((), POLICY_OF) == ()


def test_groups_that_are_seen_alike_are_one_view_whatever_their_shares() -> None:
    weak, strong = POLICY_OF["weak"], POLICY_OF["strong"]
    for shares in ((6, 0), (5, 1), (0, 6)):
        groups = Group("a", shares[0]), Group("b", shares[1])
        assert views_of(groups, POLICY_OF) == (View(0, 6, strong, 0),)
    again = (
        Group("a", 2, "weak"),
        Group("b", 3, "weak"),
        Group("b", 3, "weak", view_of=1),
        Group("c", 1, "weak"),
    )
    found = (View(0, 5, weak, 0), View(5, 8, weak, 2, 2), View(8, 9, weak, 5))
    assert views_of(again, POLICY_OF) == found, "what is shown again has draws of its own"


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


def test_occurrences_count_what_came_before() -> None:
    plan = torch.tensor([[5, 2, 5], [5, 7, 2], [2, 5, 0]])
    assert occurrences(plan).tolist() == [[0, 0, 1], [2, 0, 1], [2, 3, 0]]
    assert occurrences(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 4)
    long = torch.randint(0, 50, (40, 30), generator=generator())
    seen: dict[int, int] = {}
    for sample, count in zip(long.flatten().tolist(), occurrences(long).flatten().tolist(), strict=True):
        assert count == seen.get(sample, 0)
        seen[sample] = count + 1
