"""The labeling pass and the rules of selection, against slow twins and hand-made numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ups_fast import reference
from ups_fast.calibration import report
from ups_fast.data import ResidentImages
from ups_fast.fullgraph import fullgraph
from ups_fast.models import Dropout, Network, build
from ups_fast.policy import Policy
from ups_fast.pseudo_labels import PseudoLabels, balance, drop_negatives
from ups_fast.reference import dropout_keys
from ups_fast.selection import labeling_rows, mc_dropout, passes_over, pseudo_label

INF = math.inf


def resident(images: Tensor) -> ResidentImages:
    channels = images.shape[3]
    mean, std = (0.0,) * channels, (1.0,) * channels
    return ResidentImages(images, mean=mean, std=std, device="cpu")


class Scripted(nn.Module):
    """Prepared logits [P, N, C]: pass k over a batch returns logits[k]; the pixel is the sample's number."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.dropout = Dropout(0.5, layer=0)

    passes = Network.passes

    def forward(self, images: Tensor) -> Tensor:
        return self.suffix(self.prefix(images), None)

    def prefix(self, images: Tensor, skip: int = 0) -> Tensor:
        return (images[:, 0, 0, 0] * 255).round().long()

    def suffix(self, samples: Tensor, keys: Tensor | None, skip: int = 0) -> Tensor:
        passes = torch.arange(len(self.logits)).repeat_interleave(len(samples) // len(self.logits))
        return self.logits[passes, samples]


def label_scripted(logits: Tensor, **settings: object) -> PseudoLabels:
    """`label` over the prepared logits [P, N, C], N <= 256."""
    passes, n, _ = logits.shape
    images = resident(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1))
    return pseudo_label(Scripted(logits), images, torch.arange(n), passes=passes, **settings)  # type: ignore[arg-type]


def test_what_a_method_keeps_is_balanced_and_not_the_other_way_round() -> None:
    """The most confident labels have the largest stds here: balance alone would drop all of them."""
    n = 120
    sure = torch.linspace(1.0, 6.0, n)
    first = torch.arange(n) % 3 > 0  # class 0 twice as often as class 1
    spread = sure / 20
    rows = [torch.where(first, sure + step, -sure - step) for step in (-spread, spread)]
    logits = torch.stack([torch.stack([row, torch.zeros(n)], dim=1) for row in rows])
    asked = []

    def most_confident(found: PseudoLabels) -> PseudoLabels:
        asked.append(found)
        kept = found.confidence.argsort(descending=True)[:90]
        return replace(found, positive=torch.zeros(n, dtype=torch.bool).index_fill_(0, kept, True))

    limits = {"tau_p": 0.5, "kappa_p": INF, "tau_n": 0.5, "kappa_n": INF}
    got = label_scripted(logits, keep=most_confident, balanced=True, **limits)
    assert asked[0].positive.all()
    best = torch.zeros(n, dtype=torch.bool).index_fill_(0, got.confidence.argsort(descending=True)[:90], True)
    assert torch.equal(got.positive, balance(got.label, got.std, best, n_classes=2))
    assert got.label[got.positive].bincount().tolist() == [30, 30]
    assert torch.equal(got.candidate, asked[0].candidate)
    assert (got.negative[got.positive] == 0).all() and (got.negative[~got.positive] != 0).all()


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return build("wrn-10-1", n_classes=5, channels=1, size=8, dropout=0.3)


@pytest.fixture
def images() -> ResidentImages:
    pixels = torch.randint(0, 256, (23, 8, 8, 1), generator=torch.Generator().manual_seed(1))
    return resident(pixels.to(torch.uint8))


def equal(a: PseudoLabels, b: PseudoLabels) -> bool:
    return all(torch.equal(vars(a)[name].nan_to_num(), vars(b)[name].nan_to_num()) for name in vars(a))


# Dropout alone is active.


def test_mc_dropout_touches_dropout_only_and_gives_every_mode_back(net: nn.Module) -> None:
    net.train()
    frozen = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    frozen.eval()
    before = [module.training for module in net.modules()]
    with pytest.raises(KeyError), mc_dropout(net):
        active = {type(module) for module in net.modules() if module.training}
        assert active == {Dropout}
        raise KeyError
    assert [module.training for module in net.modules()] == before
    with mc_dropout(net, active=False):
        assert not any(module.training for module in net.modules())
    assert [module.training for module in net.modules()] == before


@pytest.mark.parametrize("p", [None, 0.0])
def test_several_passes_need_an_active_dropout(p: float | None) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 3), *([] if p is None else [nn.Dropout(p)]))
    images = resident(torch.zeros(4, 1, 1, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="must have a Dropout"):
        pseudo_label(model, images, torch.arange(4), passes=2)
    pseudo_label(model, images, torch.arange(4), passes=1, kappa_p=INF, kappa_n=INF)


def test_every_dropout_class_counts() -> None:
    for module in (nn.Dropout(0.1), nn.Dropout2d(0.1), nn.AlphaDropout(0.1)):
        with mc_dropout(nn.Sequential(module)):
            assert module.training
        assert module.training


# The labeling pass.


def test_label_is_p_full_passes_of_clean_images(net: nn.Module, images: ResidentImages) -> None:
    index = torch.tensor([22, 3, 5, 0, 7, 11, 2])
    settings = {"tau_p": 0.3, "tau_n": 0.25, "kappa_p": 0.1, "kappa_n": 0.03}
    images.policy = Policy(flip=True, crop=2, cutout=4)  # of training alone
    got = pseudo_label(net, images, index, passes=4, batch_size=12, seed=9, **settings)

    net.eval()
    with torch.no_grad():
        keys = [dropout_keys(index, seed=9, draw=k) for k in range(4)]
        logits = torch.stack([net(images.clean(index), each) for each in keys])
    want = reference.mc_select(logits, **settings)
    assert torch.equal(got.index, index)
    assert torch.equal(got.label, want.label)
    assert torch.allclose(got.confidence, want.confidence, atol=1e-6)
    assert torch.allclose(got.std, want.std, atol=1e-6)
    assert torch.equal(got.candidate, want.positive) and torch.equal(got.positive, want.positive)
    negative = want.negative & ~want.positive[:, None]
    assert torch.equal(reference.unpack_mask(got.negative, 5), negative)
    assert 0 < want.positive.sum() < 7 and negative.any(), (
        "the thresholds of this test must divide the samples"
    )


def test_label_depends_on_model_and_seed_alone(net: nn.Module, images: ResidentImages) -> None:
    index = torch.arange(23)
    first = pseudo_label(net, images, index, seed=1)
    torch.manual_seed(77)
    state, weights = torch.get_rng_state(), {k: v.clone() for k, v in net.state_dict().items()}
    net.train()
    again = pseudo_label(net, images, index, seed=1)
    assert torch.equal(torch.get_rng_state(), state), (
        "the caller's random numbers must go on as if nothing was"
    )
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items()), "batch-norm must not learn"
    assert net.training
    assert equal(first, again)
    assert not torch.equal(first.std, pseudo_label(net, images, index, seed=2).std)


@pytest.mark.parametrize("name", ["wrn-10-1", pytest.param("cnn13", marks=pytest.mark.slow)])
def test_labels_depend_on_no_batch(name: str) -> None:
    """Masks are equal, so logits differ by rounding alone, and verdicts only next to a threshold."""
    torch.manual_seed(0)
    net = build(name, n_classes=5, channels=1, size=12, dropout=0.3)
    images = resident(
        torch.randint(0, 256, (60, 12, 12, 1), generator=torch.Generator().manual_seed(1)).byte()
    )
    settings = {"tau_n": 0.0, "kappa_p": INF, "passes": 6, "seed": 3, "batch_size": 10_000}
    confidence = pseudo_label(net, images, torch.arange(60), tau_p=0.1, **settings).confidence
    settings["tau_p"] = float(confidence.median())
    whole = pseudo_label(net, images, torch.arange(60), **settings)
    for batch_size in (1, 30, 100):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(batch_size))
        got = pseudo_label(net, images, order, **{**settings, "batch_size": batch_size})
        # Some thousand float32 roundings of a logit of size 1, halved by a softmax.
        assert (got.confidence - whole.confidence[order]).abs().max() < 1e-5
        assert (got.std - whole.std[order]).abs().max() < 1e-5
        near = (whole.confidence - settings["tau_p"]).abs() < 1e-5
        assert torch.equal(got.positive[~near[order]], whole.positive[order][~near[order]])
        assert (got.label == whole.label[order]).all()
    assert 0 < whole.positive.sum() < 60
    assert not torch.equal(
        whole.std, pseudo_label(net, images, torch.arange(60), **{**settings, "seed": 4}).std
    )


@pytest.mark.parametrize("name", ["wrn-16-1", "cnn13"])
@pytest.mark.parametrize("mc_layers", [1, 2])
def test_only_the_last_dropouts_act(name: str, mc_layers: int) -> None:
    torch.manual_seed(0)
    net = build(name, n_classes=5, channels=1, size=12, dropout=0.3).eval()
    images = resident(torch.randint(0, 256, (9, 12, 12, 1)).byte())
    index, settings = (
        torch.arange(9),
        {"passes": 5, "kappa_p": INF, "kappa_n": INF, "tau_p": 0.2, "tau_n": 0.2},
    )
    got = pseudo_label(net, images, index, seed=3, mc_layers=mc_layers, batch_size=20, **settings)
    layers = [module for module in net.modules() if isinstance(module, Dropout)]
    assert len(layers) == {"wrn-16-1": 6, "cnn13": 2}[name]
    for layer in layers[: len(layers) - mc_layers]:
        layer.p = 0.0
    want = pseudo_label(net, images, index, seed=3, batch_size=45, **settings)
    assert torch.allclose(got.confidence, want.confidence, atol=1e-6) and torch.equal(got.label, want.label)
    assert torch.allclose(got.std, want.std, atol=1e-6) and want.std.min() > 1e-5


def test_a_network_has_only_so_many_dropouts(net: nn.Module, images: ResidentImages) -> None:
    for mc_layers in (-1, 4):
        with pytest.raises(ValueError, match=rf"mc_layers must be in 0 .. 3, .* got {mc_layers}"):
            pseudo_label(net, images, torch.arange(23), mc_layers=mc_layers)


@pytest.mark.slow
def test_compiled_labels_are_the_eager_ones_and_nothing_compiles_twice() -> None:
    torch.manual_seed(0)
    images = resident(torch.randint(0, 256, (23, 8, 8, 1)).byte())
    settings = {"passes": 3, "kappa_p": INF, "kappa_n": INF, "tau_p": 0.25, "tau_n": 0.2, "batch_size": 30}
    forward = fullgraph(passes_over)
    net = build("wrn-10-1", n_classes=5, channels=1, size=8, dropout=0.3)
    for seed in (1, 2):
        with torch._dynamo.config.patch(error_on_recompile=True):  # nor does the last, smaller batch
            got = pseudo_label(net, images, torch.arange(23), seed=seed, forward=forward, **settings)
        want = pseudo_label(net, images, torch.arange(23), seed=seed, **settings)
        assert torch.equal(got.label, want.label)
        assert torch.allclose(got.confidence, want.confidence, atol=1e-5)
        assert torch.allclose(got.std, want.std, atol=1e-5) and want.std.min() > 0
        with torch.no_grad():
            for weight in net.parameters():  # the next round's
                weight *= 1.1


def test_a_single_pass_is_deterministic_and_has_no_std(net: nn.Module, images: ResidentImages) -> None:
    settings = {"passes": 1, "kappa_p": INF, "kappa_n": INF, "tau_p": 0.2, "tau_n": 0.2}
    one = pseudo_label(net, images, torch.arange(23), seed=1, batch_size=23, **settings)
    two = pseudo_label(net, images, torch.arange(23), seed=2, batch_size=4, **settings)
    assert torch.equal(one.label, two.label) and torch.allclose(one.confidence, two.confidence, atol=1e-6)
    assert (one.std == 0).all() and one.positive.all()
    three = pseudo_label(net, images, torch.arange(23), **{**settings, "kappa_p": 0.0, "kappa_n": 0.0})
    assert equal(one, three)  # one pass has no std to hold against the kappas


def test_no_unlabeled_samples(net: nn.Module, images: ResidentImages) -> None:
    got = pseudo_label(net, images, torch.arange(0), balanced=True)
    assert got.label.shape == (0,) and got.negative.shape == (0, 1) and got.positive.dtype == torch.bool
    numbers = report(got, None, 5)
    assert numbers["positives"] == 0 and numbers["ece"] is None


def test_progress_hears_of_every_image(net: nn.Module, images: ResidentImages) -> None:
    heard: list[int] = []
    pseudo_label(net, images, torch.arange(23), passes=2, batch_size=20, progress=heard.append)
    assert heard == [10, 10, 3]
    pseudo_label(net, images, torch.arange(2), passes=9, batch_size=4, progress=heard.append)
    assert heard[3:] == [1, 1], "one image at least"


def test_labeling_is_never_in_bfloat16(net: nn.Module, images: ResidentImages) -> None:
    want = pseudo_label(net.eval(), images, torch.arange(23), passes=3)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(images.clean(torch.arange(2))).dtype == torch.bfloat16
        assert equal(pseudo_label(net, images, torch.arange(23), passes=3), want)


def test_labeling_and_balance_never_wait_for_the_device() -> None:
    """A fake tensor has no values: reading one on the host, as .item() or `if tensor` do, raises."""
    images = resident(torch.zeros(9, 8, 8, 1, dtype=torch.uint8))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build("wrn-10-1", n_classes=40, channels=1, size=8, dropout=0.3)
        got = pseudo_label(model, images, torch.arange(9), passes=3, batch_size=4, balanced=True)
    assert got.positive.shape == (9,) and got.negative.shape == (9, 2)


# Thresholds: probabilities of exactly one half and a std of exactly 0 lie on them.


@pytest.mark.parametrize(
    ("settings", "positive", "negative"),
    [
        ({"tau_p": 0.5, "tau_n": 0.5}, True, False),  # p >= tau_p holds, q < tau_n does not
        ({"tau_p": 0.5000001, "tau_n": 0.5}, False, False),
        ({"tau_p": 0.6, "tau_n": 0.5000001}, False, True),
        ({"tau_p": 0.5, "tau_n": 0.5, "kappa_p": 0.0}, False, False),  # std < kappa_p is strict
        ({"tau_p": 0.6, "tau_n": 0.6, "kappa_n": 0.0}, False, False),  # std < kappa_n is strict
        ({"tau_p": 0.5, "tau_n": 0.5, "kappa_p": 1e-9}, True, False),
    ],
)
def test_which_thresholds_are_strict(settings: dict[str, float], positive: bool, negative: bool) -> None:
    got = label_scripted(torch.zeros(10, 1, 2), **settings)
    assert got.label.tolist() == [0], "the lowest class wins a tie"
    assert got.positive.tolist() == [positive]
    assert reference.unpack_mask(got.negative, 2).tolist() == [[False, negative]], "never the label itself"


def test_lost_images_are_selected_for_nothing() -> None:
    """As if their logits were NaN: class 1 has 26 candidates, then 25."""
    logits = (
        torch.tensor([[9.0, 0.0], [0.0, 9.0]]).repeat_interleave(torch.tensor([30, 26]), 0).repeat(10, 1, 1)
    )
    images = resident(torch.arange(56, dtype=torch.uint8).view(56, 1, 1, 1))
    index = torch.arange(56).flip(0)
    for gone in (50, 3):
        images.unreadable, broken = {gone: "gone", 99: "not asked for"}, logits.clone()
        broken[3, gone, 1] = math.nan
        got = pseudo_label(Scripted(logits), images, index, passes=10, balanced=True)
        want = pseudo_label(Scripted(broken), resident(images.images), index, passes=10, balanced=True)
        assert equal(got, want) and got.label.eq(-1).nonzero().tolist() == [[55 - gone]]


def test_non_finite_samples_are_selected_for_nothing_and_counted() -> None:
    logits = torch.tensor([9.0, 0.0, 0.0]).repeat(10, 5, 1)
    logits[3, 1, 2], logits[0, 2, 0], logits[9, 4, 1] = math.nan, INF, -INF
    got = label_scripted(logits, balanced=True)
    assert got.label.tolist() == [0, -1, -1, 0, -1]
    assert got.positive.tolist() == [True, False, False, True, False]
    assert not got.negative.any()
    numbers = report(got, torch.zeros(5, dtype=torch.int64), 3)
    assert numbers["no_label"] == 3
    assert numbers["positive_acc"] == 1.0 and numbers["ece"] == pytest.approx(1 - float(got.confidence[0]))


# Class balance.


def balance_by_hand(
    label: list[int], std: list[float], candidate: list[bool], n_classes: int, floor: int
) -> set[int]:
    members = [[i for i, c in enumerate(label) if candidate[i] and c == k] for k in range(n_classes)]
    m = max(floor, min(len(of_class) for of_class in members))
    return {i for of_class in members for i in sorted(of_class, key=lambda i: std[i])[:m]}


@pytest.mark.parametrize("seed", range(12))
def test_balance_against_its_slow_twin(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    n, n_classes = int(torch.randint(0, 400, (), generator=g)), 1 + seed % 5
    labels = torch.randint(0, n_classes, (n,), generator=g)
    std = torch.randint(0, 12, (n,), generator=g) / 100  # many ties
    candidate = torch.rand(n, generator=g) < 0.6
    labels[~candidate & (std > 0.05)] = -1
    std[labels < 0] = math.nan
    floor = [0, 3, 25][seed % 3]
    kept = balance(labels, std, candidate, n_classes, floor)
    assert set(kept.nonzero()[:, 0].tolist()) == balance_by_hand(
        labels.tolist(), std.tolist(), candidate.tolist(), n_classes, floor
    )


@pytest.mark.parametrize(
    ("sizes", "kept"),
    [
        ([100, 40, 60], [40, 40, 40]),  # the smallest class decides
        ([100, 10, 60], [25, 10, 25]),  # but never cuts below 25
        ([100, 0, 60], [25, 0, 25]),  # a class without candidates counts
        ([26, 26, 26], [26, 26, 26]),
        ([0, 0, 0], [0, 0, 0]),
    ],
)
def test_balance_counts(sizes: list[int], kept: list[int]) -> None:
    labels = torch.cat([torch.full((size,), c) for c, size in enumerate(sizes)])
    got = balance(labels, torch.rand(len(labels)), torch.ones(len(labels), dtype=torch.bool), len(sizes))
    assert [int(got[labels == c].sum()) for c in range(len(sizes))] == kept


def test_balance_keeps_the_lowest_std_and_of_equals_the_first() -> None:
    labels = torch.tensor([0, 0, 1, 1, 0, 1, 1, 0])
    std = torch.tensor([0.2, 0.0, 0.1, -0.0, 0.1, 0.3, 0.0, 0.1])
    kept = balance(labels, std, torch.ones(8, dtype=torch.bool), n_classes=3, floor=2)
    assert kept.nonzero()[:, 0].tolist() == [1, 3, 4, 6]


def test_positives_that_balance_drops_become_negative_samples() -> None:
    logits = torch.zeros(10, 60, 3)
    logits[:, :30, 0], logits[:, 30:, 1] = 12.0, 12.0  # 30 of class 0, 30 of class 1, none of class 2: m = 25
    logits[:, 7, 0] += torch.linspace(-1, 1, 10)  # the least certain of class 0
    plain, cut = label_scripted(logits), label_scripted(logits, balanced=True)
    assert plain.positive.all() and not plain.negative.any(), "a positive has no negative classes"
    assert torch.equal(cut.candidate, plain.positive)
    assert cut.positive.sum() == 50 and not cut.positive[7]
    assert torch.equal(cut.negative[:, 0] != 0, ~cut.positive)
    assert reference.unpack_mask(cut.negative, 3)[7].tolist() == [False, True, True]
    assert report(cut, None, 3)["negative_samples"] == 10


def test_a_single_pass_balances_by_confidence() -> None:
    logits = torch.zeros(1, 40, 2)
    logits[0, :, 0] = torch.linspace(2, 6, 40)
    got = label_scripted(logits, kappa_p=INF, kappa_n=INF, balanced=True)
    assert got.positive.nonzero()[:, 0].tolist() == list(range(15, 40)), "the 25 most confident"


def test_drop_negatives_clears_all_words() -> None:
    negative = torch.tensor([[1, -1], [2, 3]], dtype=torch.int32)
    assert drop_negatives(negative, torch.tensor([True, False])).tolist() == [[0, 0], [2, 3]]


def test_rows_of_a_device() -> None:
    """Never more memory than 512 small images take on a CPU, and one at least."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    sizes = (8, 28, 32, 64, 96, 224, 512, 4000)
    assert [labeling_rows(cpu, (3, each, each)) for each in sizes] == [1536, 125, 96, 24, 10, 8, 2, 1]
    assert [labeling_rows(gpu, (1, each, each)) for each in (32, 224)] == [8192, 167]
    assert [labeling_rows(cpu, (each,)) for each in (1, 256, 4096)] == [2048, 2048, 128]
    assert labeling_rows(cpu, (3, 8, 16, 16)) == 48  # clips: as many pixels
