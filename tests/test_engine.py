"""What a round learns from, how its batches are made up, the schedule, one step and evaluation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ups_fast import engine, reference
from ups_fast.data import ResidentImages
from ups_fast.engine import (
    Mix,
    batch_mix,
    epoch_plan,
    evaluate,
    expand,
    loss_function,
    lr_at,
    occurrences,
    plan_step,
    set_lr,
    supervise,
    train_step,
)
from ups_fast.models import build
from ups_fast.policy import Policy
from ups_fast.reference import dropout_keys
from ups_fast.selection import Labelling


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labelling(positive: list[int], label: list[int], negative: list[list[int]], n_classes: int) -> Labelling:
    """Samples 4, 5, 6, ... of the training set."""
    mask = torch.zeros(len(label), n_classes, dtype=torch.bool)
    for row, classes in enumerate(negative):
        mask[row, classes] = True
    kept = torch.tensor(positive, dtype=torch.bool)
    nothing = torch.zeros(len(label))
    return Labelling(
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
    found = labelling([1, 0, 0, 1, 0], [5, 6, 1, 38, -1], [[], [0, 33], [], [], []], 40)
    told = supervise(LABELS, LABELED, found, 40, device="cpu", generator=generator())
    assert told.target.tolist() == [0, 1, 2, 39, 5, -1, -1, 38, -1, -1]
    assert told.positives.tolist() == [0, 1, 2, 3, 4, 7]
    assert told.negatives.tolist() == [5]
    assert reference.unpack_mask(told.negative, 40).nonzero().tolist() == [[5, 0], [5, 33]]


def test_supervision_expands_the_positives_to_the_number_of_negatives() -> None:
    found = labelling([0] * 6, [0] * 6, [[1]] * 6, 3)
    told = supervise(LABELS, LABELED[:1], found, 3, device="cpu", generator=generator())
    assert told.positives.tolist() == [0] * 6 and told.negatives.tolist() == [4, 5, 6, 7, 8, 9]


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
    assert unused.nl_bs == 0 and "negative samples (3)" in unused.note
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
    ours = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    for step in range(total):
        set_lr(ours, lr_at(step, total, lr=0.03, warmup=warmup))
        assert ours.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_lr_by_hand() -> None:
    assert lr_at(0, 100, lr=0.03) == 0.03
    assert lr_at(50, 100, lr=0.03) == pytest.approx(0.03 * math.cos(7 * math.pi / 32))
    assert lr_at(5, 100, lr=0.03, warmup=10) == pytest.approx(0.015)
    assert lr_at(300, 100, lr=0.03) == 0.0, "never below 0"
    assert lr_at(50, 100, lr=0.03, cosine=0.5) == pytest.approx(0.03 * math.sqrt(0.5))
    assert lr_at(99, 100, lr=0.03, cosine=0.5) < 0.0005 < lr_at(99, 100, lr=0.03)


# One step.


def mixed_batch(n_classes: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = generator(3)
    images = torch.randn(12, 1, 8, 8, generator=g)
    positive = torch.arange(12) < 7
    target = torch.where(positive, torch.randint(0, n_classes, (12,), generator=g), -1)
    mask = torch.rand(12, n_classes, generator=g) < 0.5
    return images, target, positive, reference.pack_mask(mask & ~positive[:, None])


def test_train_step_against_one_written_out() -> None:
    images, target, positive, negative = mixed_batch()
    torch.manual_seed(0)
    ours = build("wrn-10-1", n_classes=5, channels=1, size=8, dropout=0.0)
    twin = build("wrn-10-1", n_classes=5, channels=1, size=8, dropout=0.0)
    twin.load_state_dict(ours.state_dict())
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    first, second = (
        train_step(loss_function(ours), optimizer, images, None, target, positive, negative) for _ in range(2)
    )

    for want in (first, second):
        logits = twin(images)  # both kinds in one pass, so that batch-norm sees both
        mask = reference.unpack_mask(negative[7:], 5).float()
        ce = nn.functional.cross_entropy(logits[:7], target[:7])
        not_p = (1 - torch.softmax(logits[7:], dim=1)).clamp(1e-7, 1.0)
        nce = -(mask * not_p.log()).sum(dim=1) / (mask.sum(dim=1) + 1e-7)
        loss = ce + nce[mask.any(dim=1)].mean()
        assert torch.allclose(want, loss, rtol=1e-4)
        twin.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter -= 0.1 * parameter.grad
    for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_train_step_never_waits_for_the_device() -> None:
    """A fake tensor has no values: reading one on the host, as .item() or `if tensor` do, raises."""
    pixels = torch.zeros(20, 8, 8, 1, dtype=torch.uint8)
    policy = Policy(flip=True, crop=1, cutout=2)
    images = ResidentImages(pixels, mean=(0.5,), std=(0.5,), device="cpu", policy=policy)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build("wrn-10-1", n_classes=5, channels=1, size=8, dropout=0.3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        loss_of = loss_function(model)
        positive, target = torch.zeros(12, dtype=torch.bool), torch.zeros(20, dtype=torch.int64)
        negative = torch.zeros(20, 1, dtype=torch.int32)
        for _ in range(2):
            index = torch.zeros(12, dtype=torch.int64)
            batch = images.augmented(index, seed=0, epoch=0)
            keys = torch.zeros(12, dtype=torch.int32)
            loss = train_step(loss_of, optimizer, batch, keys, target[index], positive, negative[index])
        assert loss.shape == ()
        with pytest.raises(DataDependentOutputException):
            loss.item()  # the test itself must be able to see a wait


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


# Ways to run the step.


def losses(
    n: int,
    *,
    name: str = "wrn-10-1",
    compiled: bool = False,
    dtype: torch.dtype = torch.float32,
    shaken: int = 0,
) -> torch.Tensor:
    """Of n steps on fresh batches, in which half of the rows are positive; `shaken`: from weights 2^-23 away."""
    torch.manual_seed(0)
    model = build(name, n_classes=5, channels=1, size=12, dropout=0.3).train()
    model = model.to(memory_format=torch.channels_last)
    if shaken:
        with torch.no_grad():
            for weight in model.parameters():
                weight *= 1 + 2**-23 * torch.randint(-1, 2, weight.shape, generator=generator(shaken))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    loss_of = loss_function(model, compiled=compiled, dtype=dtype)
    g, found = generator(1), []
    for step in range(n):
        images = torch.randn(16, 1, 12, 12, generator=g).to(memory_format=torch.channels_last)
        keys = dropout_keys(torch.arange(16), seed=0, draw=step)
        target = torch.randint(5, (16,), generator=g)
        negative = torch.randint(0, 32, (16, 1), generator=g, dtype=torch.int32)
        found.append(train_step(loss_of, optimizer, images, keys, target, torch.arange(16) < 8, negative))
    return torch.stack(found).double()


@pytest.mark.parametrize(("name", "steps"), [("wrn-10-1", 50), ("cnn13", 8)])
def test_compiled_steps_are_the_eager_ones(name: str, steps: int) -> None:
    """With the same dropout, so they drift apart by rounding alone.

    How fast rounding grows is measured: by the drift of eager runs whose weights start one rounding away. A compiled
    step rounds in some ten places as often.
    """
    eager = losses(steps, name=name)
    drifts = [(losses(steps, name=name, shaken=seed) - eager).abs() for seed in (1, 2, 3)]
    allowed = 1e-6 + 10 * torch.stack(drifts).amax(dim=0).cummax(dim=0).values
    compiled = losses(steps, name=name, compiled=True)
    assert ((compiled - eager).abs() <= allowed).all(), (compiled - eager, allowed)
    assert allowed[: steps // 4].max() < 0.05, "the bound must mean something"


def test_bfloat16_steps_are_near_the_float32_ones() -> None:
    """Logits rounded to 8 bits: a loss of size 2 errs by some 2^-8 of a logit's size, here below 4."""
    half = losses(20, dtype=torch.bfloat16)
    full = losses(20)
    assert 0 < (half - full).abs().max() < 4 * 2**-6


def test_a_new_round_compiles_nothing() -> None:
    """The network starts anew in place; only another batch size is another shape."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        model = build("wrn-10-1", n_classes=5, channels=1, size=8, dropout=0.3).train()
        loss_of = loss_function(model, compiled=True)
        for seed in range(3):
            torch.manual_seed(seed)
            model.load_state_dict(
                build("wrn-10-1", n_classes=5, channels=1, size=8, dropout=0.3).state_dict()
            )
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
            for step in range(2):
                keys = dropout_keys(torch.arange(6), seed=seed, draw=step)
                positive = torch.arange(6) < 2 * seed  # the shares of a batch differ from round to round
                target, negative = torch.zeros(6, dtype=torch.int64), torch.ones(6, 1, dtype=torch.int32)
                train_step(loss_of, optimizer, torch.randn(6, 1, 8, 8), keys, target, positive, negative)
        with pytest.raises(torch._dynamo.exc.RecompileError):  # the test itself must be able to see one
            loss_of(torch.randn(7, 1, 8, 8), torch.zeros(7, dtype=torch.int32), *torch.zeros(3, 7).unbind())


def test_plan_step() -> None:
    cpu = torch.device("cpu")
    assert plan_step("eager", "float32", cpu)[:2] == (False, torch.float32)
    assert plan_step("compile", "bfloat16", cpu)[:2] == (True, torch.bfloat16)
    compiled, dtype, why = plan_step("auto", "auto", cpu)
    assert not compiled
    assert dtype == (torch.bfloat16 if engine.has_bfloat16(cpu) else torch.float32)
    assert "CPU" in why
