"""The device code of the CUDA kernels, run on the CPU by `cuda_shim`, against the reference and the float64 oracle.

This proves indexing and logic on hostile shapes; a GPU still has the last word (test_cuda_device.py).
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from test_augment import VALUES, assert_equal, hostile_images
from torch import Tensor

from ups_fast import ops, reference
from ups_fast.policy import POLICIES, Policy, normalization, randaugment, tables
from ups_fast.reference import MultiLabelSelection, Selection, pack_mask

inf, nan = math.inf, math.nan
SHIM = Path(__file__).parent / "cuda_shim"
CSRC = SHIM.parents[1] / "csrc"
CXX = os.environ.get("CXX", "c++").split()
FLAGS = ["-std=c++17", "-Wall", "-Wno-unknown-pragmas", "-ffp-contract=off", f"-I{SHIM}"]
FLAGS += ["-U_FORTIFY_SOURCE"]  # its longjmp refuses to change stacks
LIBRARY = ["driver.cpp", "fibers.cpp", "controls.cpp"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]  # their position is the driver's code
MANY = 2**31
LOOSE = {"tau_p": 0.4, "tau_n": 0.2, "kappa_p": 0.2, "kappa_n": 0.05}
# One C or more for each variant of the kernels, and their edges.
C_HOSTILE = [
    1,
    2,
    3,
    4,
    5,
    10,
    11,
    14,
    15,
    28,
    31,
    32,
    33,
    56,
    100,
    112,
    113,
    224,
    257,
    448,
    500,
    512,
    513,
    1000,
]
C_LARGE = [1025, 2047, 2049, 4097]


def classes_of_each_dtype(
    classes: list[int], now: tuple[int, ...], dtypes: list[torch.dtype] = DTYPES
) -> pytest.MarkDecorator:
    """Parameters c and dtype. Float32 has every variant of the kernels, the others only `now`; their rest is slow."""
    return pytest.mark.parametrize(
        ("c", "dtype"),
        [
            pytest.param(c, dtype, marks=() if dtype == torch.float32 or c in now else pytest.mark.slow)
            for c in classes
            for dtype in dtypes
        ],
    )


def compiled(request, name: str, sources: list[str], flags: list[str]) -> Path:
    """The program or library built from these sources: kept in pytest's cache until a source or a flag changes."""
    if sys.platform != "linux":
        pytest.skip("the shim needs Linux: the CUDA kernels are not proved here")
    if shutil.which(CXX[0]) is None:
        pytest.skip(f"no C++ compiler ({CXX[0]}): the CUDA kernels are not proved here")
    digest = hashlib.sha256(repr((CXX, sources, FLAGS, flags)).encode())
    for path in sorted([*SHIM.glob("*"), *CSRC.glob("*.h"), *CSRC.glob("cuda/*"), *CSRC.glob("math/*")]):
        digest.update(path.name.encode() + path.read_bytes())
    cache = getattr(request.config, "cache", None)
    folder = cache.mkdir("cuda_shim") if cache else request.getfixturevalue("tmp_path_factory").mktemp("shim")
    target = folder / f"{name}-{digest.hexdigest()[:16]}"
    if not target.exists():
        for old in folder.glob(f"{name}-*"):
            old.unlink(missing_ok=True)
        draft = folder / f"draft-{os.getpid()}-{name}"
        done = subprocess.run(
            [*CXX, *FLAGS, *flags, *(SHIM / s for s in sources), "-o", draft], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[:4000]
        draft.rename(target)
    return target


class Results:
    """Poisoned memory for a kernel's results, between guard zones that it must leave alone."""

    GUARD = 64

    def __init__(self) -> None:
        self.zones: list[Tensor] = []

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        zone = torch.full((size + 2 * self.GUARD,), 0xA5, dtype=torch.uint8)
        self.zones.append(zone)
        return zone[self.GUARD : self.GUARD + size].view(dtype).view(shape)

    def check(self) -> None:
        for zone in self.zones:
            assert (zone[: self.GUARD] == 0xA5).all(), "written before its beginning"
            assert (zone[-self.GUARD :] == 0xA5).all(), "written past its end"


def scalar_type(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


class Kernels:
    """The kernels as functions of tensors, like the ops in torch.ops.ups_fast; `seed` orders the threads."""

    def __init__(self, library: Path) -> None:
        self.lib = ctypes.CDLL(str(library))

    def call(self, name: str, *args: object) -> None:
        function = getattr(self.lib, name)
        function.restype = ctypes.c_char_p
        convert = {
            int: ctypes.c_int64,
            bool: ctypes.c_bool,
            float: ctypes.c_double,
            Tensor: lambda t: ctypes.c_void_p(t.data_ptr()),
            type(None): ctypes.c_void_p,
        }
        error = function(*(convert[type(a)](a) for a in args)).decode()
        assert not error, error

    def plan(self, op: int, rows: int, classes: int) -> dict[str, int]:
        found = (ctypes.c_int64 * 4)()
        self.lib.launch_plan(op, ctypes.c_int64(rows), ctypes.c_int64(classes), found)
        return dict(zip(("variant", "threads_per_row", "threads", "blocks"), found, strict=True))

    def mc_select(
        self,
        z: Tensor,
        *,
        seed=0,
        packed=False,
        tau_p=0.70,
        tau_n=0.05,
        kappa_p=0.05,
        kappa_n=0.005,
        temp_nl=2.0,
    ) -> Selection:
        p, n, c = z.shape
        results = Results()
        selection = Selection(
            results.new((n,), torch.int64),
            results.new((n,), torch.float32),
            results.new((n,), torch.float32),
            results.new((n,), torch.bool),
            results.new((n, (c + 31) // 32), torch.int32) if packed else results.new((n, c), torch.bool),
        )
        thresholds = torch.tensor([tau_p, tau_n, kappa_p, kappa_n, temp_nl], dtype=torch.float64)
        self.call(
            "mc_select", seed, DTYPES.index(z.dtype), z, z.stride(0), z.stride(1), p, n, c, thresholds,
            *selection, packed,
        )  # fmt: skip
        results.check()
        return selection

    def nce_loss(
        self,
        z: Tensor,
        mask: Tensor,
        reduction: int,
        weight: Tensor | None = None,
        *,
        seed=0,
        max_blocks=MANY,
    ) -> tuple[Tensor, Tensor]:
        results = Results()
        loss = results.new(tuple(z.shape[:1]) if reduction == 0 else (), scalar_type(z))
        scale = results.new((), scalar_type(z))
        packed = mask.dtype == torch.int32
        self.call(
            "nce_loss", seed, max_blocks, DTYPES.index(z.dtype), z, z.stride(0), *z.shape, mask, mask.stride(0), packed,
            weight, reduction, loss, scale,
        )  # fmt: skip
        results.check()
        return loss, scale

    def nce_loss_backward(
        self,
        d_loss: Tensor,
        z: Tensor,
        mask: Tensor,
        scale: Tensor,
        weight: Tensor | None = None,
        *,
        seed=0,
        max_blocks=MANY,
    ) -> Tensor:
        results = Results()
        d_logits = results.new(tuple(z.shape), z.dtype)
        stride = d_loss.stride(0) if d_loss.dim() else 0
        packed = mask.dtype == torch.int32
        self.call(
            "nce_loss_backward", seed, max_blocks, DTYPES.index(z.dtype), d_loss, stride, z, z.stride(0), *z.shape,
            mask, mask.stride(0), packed, weight, scale, d_logits,
        )  # fmt: skip
        results.check()
        return d_logits

    @staticmethod
    def ups_rows(
        target: Tensor,
        positive: Tensor,
        negative: Tensor | None,
        weight: Tensor | None,
        label_smoothing: float,
    ) -> list:
        soft = target if target.is_floating_point() else None
        mask = negative is not None
        return [
            None if soft is not None else target, soft, 0 if soft is None else soft.stride(0), float(label_smoothing),
            positive, negative, negative.stride(0) if mask else 0, mask and negative.dtype == torch.int32, weight,
        ]  # fmt: skip

    def ups_loss(
        self,
        z: Tensor,
        target: Tensor,
        positive: Tensor,
        negative: Tensor | None,
        *,
        weight=None,
        reduction=1,
        label_smoothing=0.0,
        seed=0,
        max_blocks=MANY,
    ):
        results = Results()
        loss = results.new(tuple(z.shape[:1]) if reduction == 0 else (), scalar_type(z))
        scale = results.new((2,), scalar_type(z))
        self.call(
            "ups_loss", seed, max_blocks, DTYPES.index(z.dtype), z, z.stride(0), *z.shape,
            *self.ups_rows(target, positive, negative, weight, label_smoothing), reduction, loss, scale,
        )  # fmt: skip
        results.check()
        return loss, scale

    def ups_loss_backward(
        self,
        d_loss: Tensor,
        z: Tensor,
        target: Tensor,
        positive: Tensor,
        negative: Tensor | None,
        scale: Tensor,
        *,
        weight=None,
        label_smoothing=0.0,
        seed=0,
        max_blocks=MANY,
    ) -> Tensor:
        results = Results()
        d_logits = results.new(tuple(z.shape), z.dtype)
        stride = d_loss.stride(0) if d_loss.dim() else 0
        self.call(
            "ups_loss_backward", seed, max_blocks, DTYPES.index(z.dtype), d_loss, stride, z, z.stride(0), *z.shape,
            *self.ups_rows(target, positive, negative, weight, label_smoothing), scale, d_logits,
        )  # fmt: skip
        results.check()
        return d_logits

    def fixmatch_loss(
        self,
        strong: Tensor,
        weak: Tensor,
        *,
        tau: float | Tensor = 0.95,
        temperature=1.0,
        weight: Tensor | None = None,
        reduction=3,
        seed=0,
        max_blocks=MANY,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        results = Results()
        n, c = strong.shape
        loss = results.new((n,) if reduction == 0 else (), scalar_type(strong))
        mask, target = results.new((n,), torch.bool), results.new((n,), torch.int64)
        scale = results.new((), scalar_type(strong))
        by_class = tau.to(scalar_type(strong)) if isinstance(tau, Tensor) else None
        self.call(
            "fixmatch_loss", seed, max_blocks, DTYPES.index(strong.dtype), strong, strong.stride(0), weak,
            weak.stride(0), n, c, by_class, 1.0 if isinstance(tau, Tensor) else tau, temperature, weight, reduction,
            loss, mask, target, scale,
        )  # fmt: skip
        results.check()
        return loss, mask, target, scale

    def fixmatch_loss_backward(
        self,
        d_loss: Tensor,
        strong: Tensor,
        target: Tensor,
        scale: Tensor,
        weight: Tensor | None = None,
        *,
        seed=0,
        max_blocks=MANY,
    ) -> Tensor:
        results = Results()
        d_strong = results.new(tuple(strong.shape), strong.dtype)
        self.call(
            "fixmatch_loss_backward", seed, max_blocks, DTYPES.index(strong.dtype), d_loss,
            d_loss.stride(0) if d_loss.dim() else 0, strong, strong.stride(0), *strong.shape, target, scale, weight,
            d_strong,
        )  # fmt: skip
        results.check()
        return d_strong

    def mc_select_multilabel(
        self,
        z: Tensor,
        of_class: Tensor | None = None,
        *,
        packed=False,
        tau_p=0.5,
        tau_n=0.05,
        kappa_p=0.05,
        kappa_n=0.005,
        temp_nl=2.0,
        seed=0,
        max_blocks=MANY,
    ) -> MultiLabelSelection:
        p, n, c = z.shape
        results = Results()
        mask = ((n, (c + 31) // 32), torch.int32) if packed else ((n, c), torch.bool)
        values = ((n, c), scalar_type(z))
        selection = MultiLabelSelection(*(results.new(*each) for each in (values, values, mask, mask)))
        thresholds = torch.tensor([tau_p, tau_n, kappa_p, kappa_n, temp_nl], dtype=torch.float64)
        self.call(
            "mc_select_multilabel", seed, max_blocks, DTYPES.index(z.dtype), z, z.stride(0), z.stride(1), p, n, c,
            thresholds, of_class, *selection, packed,
        )  # fmt: skip
        results.check()
        return selection

    @staticmethod
    def multilabel_rows(z: Tensor, positive: Tensor, negative: Tensor, weight: Tensor | None) -> list:
        masks = [x for m in (positive, negative) for x in (m, m.stride(0), m.dtype == torch.int32)]
        if weight is None or weight.dim() == 1:
            return [z, z.stride(0), *z.shape, *masks, weight, None, 0]
        return [z, z.stride(0), *z.shape, *masks, None, weight, weight.stride(0)]

    def ups_loss_multilabel(
        self, z: Tensor, *masks: Tensor, weight=None, reduction=1, seed=0, max_blocks=MANY
    ) -> tuple[Tensor, Tensor]:
        results = Results()
        loss = results.new(tuple(z.shape[:1]) if reduction == 0 else (), scalar_type(z))
        scale = results.new((), scalar_type(z))
        self.call(
            "ups_loss_multilabel", seed, max_blocks, DTYPES.index(z.dtype),
            *self.multilabel_rows(z, *masks, weight), reduction, loss, scale,
        )  # fmt: skip
        results.check()
        return loss, scale

    def ups_loss_multilabel_backward(
        self, d_loss: Tensor, z: Tensor, *masks: Tensor, scale: Tensor, weight=None, seed=0, max_blocks=MANY
    ) -> Tensor:
        results = Results()
        d_logits = results.new(tuple(z.shape), z.dtype)
        stride = d_loss.stride(0) if d_loss.dim() else 0
        self.call(
            "ups_loss_multilabel_backward", seed, max_blocks, DTYPES.index(z.dtype), d_loss, stride,
            *self.multilabel_rows(z, *masks, weight), scale, d_logits,
        )  # fmt: skip
        results.check()
        return d_logits

    def counter_dropout(
        self, x: Tensor, keys: Tensor, p: float, layer: int, *, seed=0, max_blocks=MANY
    ) -> Tensor:
        """x [B, C, S], contiguous or channels last; the result likewise."""
        rows, c, s = x.shape
        channels_last = not x.is_contiguous()
        results = Results()
        y = results.new((rows, s, c), x.dtype).mT if channels_last else results.new((rows, c, s), x.dtype)
        function = self.lib.counter_dropout
        function.restype, number, pointer = ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p
        error = function(
            ctypes.c_uint64(seed), number(max_blocks), ctypes.c_int(DTYPES.index(x.dtype)), pointer(x.data_ptr()),
            pointer(keys.data_ptr()), number(rows), number(c), number(s), ctypes.c_bool(channels_last),
            ctypes.c_double(p), number(layer), pointer(y.data_ptr()),
        ).decode()  # fmt: skip
        assert not error, error
        results.check()
        return y

    def mish(self, x: Tensor, d_y: Tensor | None = None, *, seed=0, max_blocks=MANY) -> Tensor:
        """The value, or with d_y the gradient."""
        results = Results()
        y = results.new(x.shape, x.dtype)
        function = self.lib.mish
        function.restype, number, pointer = ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p
        error = function(
            ctypes.c_uint64(seed), number(max_blocks), ctypes.c_int(DTYPES.index(x.dtype)), pointer(x.data_ptr()),
            pointer(None if d_y is None else d_y.data_ptr()), number(x.numel()), pointer(y.data_ptr()),
        ).decode()  # fmt: skip
        assert not error, error
        results.check()
        return y

    def augment(
        self,
        images: Tensor,
        index: Tensor,
        policy: Policy,
        plan: Tensor | None = None,
        *,
        seed=0,
        shared=1 << 30,
    ) -> Tensor:
        """Seed 3 and draw 1; pixels / 255 as float32 [B, H, W, C]. Where `shared` bytes are too few, by 3 blocks."""
        n, h, w, c = images.shape
        table = tables(policy, h, w, c, images.device)
        norm = normalization((0.0,) * c, (1.0,) * c, torch.float32, images.device)
        results = Results()
        out = results.new((len(index), h, w, c), torch.float32)
        settings = torch.tensor(table.settings, dtype=torch.int32)
        nothing = torch.empty(0)  # its data pointer is null
        most = 3 if shared == 0 else 1 << 30
        self.call(
            "augment", seed, shared, most, images, n, h, w, c, index, len(index), table.variants, len(table.variants),
            table.operations, len(table.operations), table.blends, norm, torch.tensor([3, 1]),
            nothing if plan is None else plan, settings, out,
        )  # fmt: skip
        results.check()
        return out

    def augment_plan(self, index: Tensor, policy: Policy, h: int, w: int, *, seed=0) -> Tensor:
        table = tables(policy, h, w, 3, index.device)
        results = Results()
        plan = results.new((len(index), 3 * policy.n_ops + 11), torch.int32)
        settings = torch.tensor(table.settings, dtype=torch.int32)
        self.call(
            "augment_plan_draws", seed, index, len(index), table.variants, len(table.variants), table.operations,
            len(table.operations), torch.tensor([3, 1]), h, w, settings, plan,
        )  # fmt: skip
        results.check()
        return plan


@pytest.fixture(scope="module")
def kernels(request) -> Kernels:
    return Kernels(compiled(request, "shim.so", LIBRARY, ["-O1", "-fPIC", "-shared"]))


# augment -------------------------------------------------------------------------------------------------------------


def check_augment(kernels: Kernels, images: Tensor, policy: Policy, *, seed=0) -> None:
    c = images.shape[3]
    index = torch.arange(len(images)).flip(0)
    kwargs = {"policy": policy, "seed": 3, "draw": 1, "mean": (0.0,) * c, "std": (1.0,) * c}
    want = ops.augment(images, index, **kwargs).permute(0, 2, 3, 1)
    for shared in (1 << 30, 0):
        assert_equal(kernels.augment(images, index, policy, seed=seed, shared=shared), want)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", VALUES)
def test_augment_by_each_operation(kernels, name, channels):
    for size in ((8, 8), (9, 31), (1, 1), (33, 5)):
        policy = Policy(ops=((name, VALUES[name]),), n_ops=2)
        check_augment(kernels, hostile_images(14, *size, channels), policy)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_augment_by_the_whole_chain(kernels, policy, channels):
    """Whatever the order of threads: a missing barrier would give other pixels for some."""
    for seed in range(3):
        check_augment(kernels, hostile_images(40, 32, 32, channels), POLICIES[policy], seed=seed)
    longer = Policy(randaugment(21), 9, True, 3, (1, 1, 1), 50)
    check_augment(kernels, hostile_images(12, 64, 17, channels), longer)


def test_augment_draws_the_plans(kernels):
    index = torch.tensor([0, 1, 2**31, 2**40 + 3, *range(200)])
    for policy in POLICIES.values():
        want = reference.augment_plan(index, policy=policy, size=(40, 9), seed=3, draw=1).draws
        assert torch.equal(kernels.augment_plan(index, policy, 40, 9), want)
        images = hostile_images(6, 40, 9, 3)
        plan = want[4:10]
        drawn = kernels.augment(images, index[4:10], policy)
        assert torch.equal(kernels.augment(images, torch.arange(6), policy, plan), drawn)


def test_augment_traps_what_it_cannot_do(kernels):
    images, policy = hostile_images(4, 8, 8, 3), Policy(randaugment(4), 3)
    with pytest.raises(AssertionError, match="traps"):
        kernels.augment(images, torch.tensor([0, 4]), policy)
    plan = reference.augment_plan(torch.arange(4), policy=policy, size=8, seed=0, draw=0)
    plan.variant[2, 1] = 21
    with pytest.raises(AssertionError, match="traps"):
        kernels.augment(images, torch.arange(4), policy, plan.draws)


# counter_dropout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 1), (3, 16, 25), (7, 1, 300), (2, 33, 70)])
def test_counter_dropout(kernels, shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    keys = torch.arange(shape[0], dtype=torch.int32) * 77777
    for p, layer, blocks in ((0.3, 0, MANY), (0.0, 1, 1), (0.9, 2**20 - 1, 2)):
        want = reference.counter_dropout(x, keys, p=p, layer=layer)
        for each in (x, x.mT.contiguous().mT):
            got = kernels.counter_dropout(each, keys, p, layer, max_blocks=blocks)
            assert torch.equal(got, want)


# mish ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 255, 3001])
def test_mish(kernels, n, dtype):
    x = torch.linspace(-100, 100, n).to(dtype)
    x[: min(n, 4)] = torch.tensor([0.0, nan, inf, -inf][:n]).to(dtype)
    eps, exact = torch.finfo(dtype).eps, x.double().requires_grad_()
    want = reference.mish(exact)
    d_y = torch.linspace(-3, 3, n).to(dtype)
    (slope,) = torch.autograd.grad(want, exact, d_y.double())
    for blocks in (MANY, 1):
        got = kernels.mish(x, max_blocks=blocks)
        small = max(torch.finfo(dtype).smallest_normal, 1e-35)  # what is below may be 0 or have few bits
        torch.testing.assert_close(got.double(), want.detach(), rtol=4 * eps, atol=small, equal_nan=True)
        got = kernels.mish(x, d_y, max_blocks=blocks)
        torch.testing.assert_close(got.double(), slope, rtol=8 * eps, atol=8 * eps, equal_nan=True)


# mc_select -----------------------------------------------------------------------------------------------------------


def logits_of(p, n, c, *, dtype=torch.float32, seed=0, noise=0.5) -> Tensor:
    """Rows from near-uniform to near-certain, with passes that agree or not."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(1, n, c, generator=g) * torch.rand(1, n, 1, generator=g) * 8
    return (base + noise * torch.rand(1, n, 1, generator=g) * torch.randn(p, n, c, generator=g)).to(dtype)


def inside(x: Tensor, offset: int) -> Tensor:
    """The same values as a slice of a larger tensor full of NaN: every stride is odd, the start is off by `offset`."""
    shape = [s + 1 for s in x.shape[:-1]] + [x.shape[-1] + offset + (x.shape[-1] + offset + 1) % 2]
    large = (
        torch.full(shape, nan, dtype=x.dtype) if x.is_floating_point() else torch.ones(shape, dtype=x.dtype)
    )
    view = large[tuple(slice(0, s) for s in x.shape[:-1])][..., offset : offset + x.shape[-1]]
    view.copy_(x)
    return view


def assert_same(got, want) -> None:
    """Equal bits, NaN included."""
    for name, a, b in zip(want._fields, got, want, strict=True):
        torch.testing.assert_close(
            a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


def check_mc_select(kernels: Kernels, z: Tensor, *, atol=1e-6, **thresholds) -> None:
    """Verdicts as the oracle's outside its narrow bands; bits and fiber orders agree."""
    got = kernels.mc_select(z, **thresholds)
    want = oracle.mc_select(z.double().numpy(), **thresholds)
    sure = ~want["doubt_label"]
    assert (got.label.numpy() == want["label"])[sure].all()
    assert (got.positive.numpy() == want["positive"])[~want["doubt_positive"]].all()
    assert (got.negative.numpy() == want["negative"])[~want["doubt_negative"]].all()
    assert not got.negative[got.label >= 0].gather(1, got.label[got.label >= 0, None]).any()
    np.testing.assert_allclose(got.confidence.numpy(), want["confidence"], atol=atol, rtol=0)
    np.testing.assert_allclose(got.std.numpy()[sure], want["std"][sure], atol=atol, rtol=0)
    bits = kernels.mc_select(z, seed=1, packed=True, **thresholds)
    assert_same(bits, got._replace(negative=pack_mask(got.negative)))


@pytest.mark.parametrize("c", C_HOSTILE)
def test_mc_select_on_hostile_shapes(kernels, c):
    for p, n in itertools.product((2, 3, 10), (1, 7) if c > 256 else (1, 7, 70)):
        for thresholds in ({}, LOOSE):
            check_mc_select(kernels, logits_of(p, n, c, seed=c + n), **thresholds)


@pytest.mark.parametrize("c", C_LARGE)
def test_mc_select_on_many_classes(kernels, c):
    check_mc_select(kernels, logits_of(3, 2, c, seed=c), **LOOSE)
    check_mc_select(kernels, 3 * logits_of(2, 1, c, seed=c), temp_nl=3.0)


def test_mc_select_uses_every_variant(kernels):
    plans = [kernels.plan(0, 7, c) for c in [*C_HOSTILE, *C_LARGE]]
    assert {plan["variant"] for plan in plans} == set(range(12))
    assert all(plan["threads"] % 32 == 0 and plan["threads"] >= plan["threads_per_row"] for plan in plans)


@pytest.mark.parametrize(
    ("c", "temp_nl"),
    [
        pytest.param(c, temp_nl, marks=() if temp_nl == 2.0 or c == 10 else pytest.mark.slow)
        for c in (2, 10, 33, 100, 1000)
        for temp_nl in (2.0, 1.0, 3.7)
    ],
)
def test_mc_select_error_is_at_most_twice_the_references(kernels, c, temp_nl):
    """Against float64, although the shim's exponential errs as much as the hardware's may."""
    z = logits_of(10, 1500 if c <= 100 else 50, c, seed=3)
    want = oracle.mc_select(z.double().numpy(), temp_nl=temp_nl)
    got, ref = kernels.mc_select(z, temp_nl=temp_nl), reference.mc_select(z, temp_nl=temp_nl)
    for field in ("confidence", "std"):
        error, allowed = (
            np.abs(getattr(x, field).numpy() - want[field])[~want["doubt_label"]].max() for x in (got, ref)
        )
        assert error <= 2 * allowed, (field, error, allowed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("c", [3, 10, 13, 32, 100, 224, 512, 1000, 1500, 2500])
def test_mc_select_in_16_bits_is_float32_on_the_same_values(kernels, dtype, c):
    z = logits_of(10 if c < 1000 else 3, 9 if c <= 224 else 2, c, dtype=dtype, seed=c)
    assert_same(kernels.mc_select(z, **LOOSE), kernels.mc_select(z.float(), **LOOSE))


@classes_of_each_dtype(
    [1, 4, 10, 13, 28, 100, 112, 257, 512, 1000, 2048, 2500], now=(10, 257), dtypes=DTYPES[:3]
)
def test_mc_select_reads_slices_of_larger_tensors(kernels, dtype, c):
    """Whichever of start and strides spoils the alignment, the arithmetic is the same: equal bits."""
    z = logits_of(3, 5 if c <= 112 else 2, c, dtype=dtype, seed=c)
    p, n, _ = z.shape
    want = kernels.mc_select(z, **LOOSE)
    for start, row_gap, pass_gap in (
        (0, 4, 4),
        (1, 0, 0),
        (2, 0, 0),
        (0, 1, 0),
        (0, 2, 0),
        (0, 0, 1),
        (0, 0, 2),
    ):
        row_stride = c + row_gap
        strides = (n * row_stride + pass_gap, row_stride, 1)
        large = torch.full((start + p * strides[0] + 8,), nan, dtype=dtype)
        view = large.as_strided(z.shape, strides, start)
        view.copy_(z)
        assert_same(kernels.mc_select(view, **LOOSE), want)
    assert_same(
        kernels.mc_select(z[:1].expand_as(z), **LOOSE), kernels.mc_select(z[:1].repeat(3, 1, 1), **LOOSE)
    )


@pytest.mark.parametrize("c", [2, 10, 13, 31, 100, 300, 512, 1000, 2500])
def test_mc_select_ties_go_to_the_lowest_class(kernels, c):
    z = logits_of(5, 20 if c <= 100 else 3, c, seed=1)
    twin = c - 1
    z[..., twin] = z[..., 0] = z.amax(-1) + 0.5
    got = kernels.mc_select(z, **LOOSE)
    assert (got.label == 0).all()
    got = kernels.mc_select(z.fill_(1.25), tau_n=0.6, tau_p=0.6, kappa_n=0.1)
    assert (got.label == 0).all() and (got.std == 0).all()
    assert (got.negative.sum(1) == (c - 1 if 1 / c < 0.6 else 0)).all()


@pytest.mark.parametrize("c", [3, 10, 100, 257, 1000, 2500])
def test_mc_select_equal_passes_have_no_std(kernels, c):
    for temp_nl in (2.0, 3.0):
        z = logits_of(1, 6 if c <= 100 else 2, c, seed=2).expand(7, -1, -1).contiguous()
        got = kernels.mc_select(z, temp_nl=temp_nl, tau_p=0.0, tau_n=0.0, kappa_p=1e-30)
        assert (got.std == 0).all() and got.positive.all()
        assert not kernels.mc_select(z, temp_nl=temp_nl, tau_p=0.0, tau_n=0.0, kappa_p=0.0).positive.any()


@pytest.mark.parametrize("c", [1, 2, 10, 100, 512, 2500])
def test_mc_select_of_one_pass(kernels, c):
    z = logits_of(1, 7 if c <= 100 else 2, c, seed=4)
    check_mc_select(kernels, z, kappa_p=inf, kappa_n=inf)
    assert (kernels.mc_select(z, kappa_p=inf, kappa_n=inf).std == 0).all()


@pytest.mark.parametrize("c", [1, 3, 10, 13, 32, 100, 257, 512, 1000, 2500])
def test_mc_select_passes_over_rows_that_are_not_finite(kernels, c):
    """A NaN or infinity at any place of a row, in any pass, spoils that row and no other."""
    n, passes = (12, 7) if c <= 100 else (3, 3)
    for bad, temp_nl in itertools.product((nan, inf, -inf), (2.0, 3.0)):
        z = logits_of(passes, n, c, seed=5)
        want = kernels.mc_select(z, temp_nl=temp_nl, **LOOSE)
        places = torch.linspace(0, c - 1, n - 1).long()
        for row, place in enumerate(places):
            z[row % passes, row, place] = bad
        got = kernels.mc_select(z, temp_nl=temp_nl, **LOOSE)
        assert (
            (got.label[:-1] == -1).all() and got.confidence[:-1].isnan().all() and got.std[:-1].isnan().all()
        )
        assert not got.positive[:-1].any() and not got.negative[:-1].any()
        assert_same(Selection(*(x[-1] for x in got)), Selection(*(x[-1] for x in want)))


@pytest.mark.parametrize("c", [1, 3, 10, 13, 100, 257, 1000, 2500])
def test_mc_select_of_extreme_logits(kernels, c):
    lowest = torch.finfo(torch.float32).min
    for fill in (lowest, -lowest, 0.0, 1e-45, 88.8):
        z = torch.full((3, 2, c), fill)
        check_mc_select(kernels, z, **LOOSE)
        z[..., c // 2] = -fill
        check_mc_select(kernels, z, **LOOSE)
        z[..., -1] = lowest
        check_mc_select(kernels, z, temp_nl=5.0, **LOOSE)
    check_mc_select(kernels, 1e4 * logits_of(3, 2, c, seed=6), **LOOSE)


# Losses --------------------------------------------------------------------------------------------------------------


def batch(n, c, *, dtype=torch.float32, seed=0, scale=3.0, packed=False):
    """Logits, target, positive, negative of a mixed batch: rows of both kinds and of neither, full and single masks."""
    g = torch.Generator().manual_seed(seed)
    z = (scale * torch.randn(n, c, generator=g)).to(dtype)
    target = torch.randint(c, (n,), generator=g)
    positive = torch.rand(n, generator=g) < 0.4
    negative = torch.rand(n, c, generator=g) < torch.rand(n, 1, generator=g)
    negative[::5] = False
    negative[1::7] = True
    target[~positive & (torch.rand(n, generator=g) < 0.5)] = -1
    return z, target, positive, pack_mask(negative) if packed else negative


def both_gradients(f, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of f in float64 (the truth) and in z's own type, and the truth of f itself."""
    exact, own = z.double().requires_grad_(), z.detach().clone().requires_grad_()
    value = f(exact)
    value.sum().backward()
    f(own).sum().backward()
    assert exact.grad is not None and own.grad is not None
    return value.detach(), exact.grad, own.grad


def assert_close(got: Tensor, truth: Tensor, reference_value: Tensor, roundings: int = 3) -> None:
    """An error of at most twice the reference's own in its type, or so many roundings of the largest value.

    Three: of the exponential, which each math library rounds in its own way, of the sum over the classes, which the
    reference forms in another order, and of the last product.
    """
    error, allowed = ((x.double() - truth).abs().amax() for x in (got, reference_value))
    # In float64 the truth has an error of its own, from 1 - p near p = 1.
    rounding = truth.abs().amax() * (1e-11 if got.dtype == torch.float64 else torch.finfo(got.dtype).eps)
    assert error <= max(2 * allowed, roundings * rounding), (error, allowed, rounding)


REDUCTIONS = ("none", "mean", "sum")  # their position is the kernel's argument


def check_nce_loss(
    kernels: Kernels, z: Tensor, mask: Tensor, reductions: tuple[str, ...] = REDUCTIONS
) -> None:
    for reduction in reductions:
        code = REDUCTIONS.index(reduction)

        def f(x, reduction=reduction):
            return reference.nce_loss(x, mask, reduction=reduction)

        truth, d_truth, d_reference = both_gradients(f, z)
        loss, scale = kernels.nce_loss(z, mask, code)
        assert loss.dtype == scalar_type(z)
        assert_close(loss, truth, f(z))
        rows = (mask != 0).any(dim=1).sum().clamp(min=1)
        assert scale == (1 / rows.to(scale.dtype) if reduction == "mean" else 1)
        d_loss = torch.ones((), dtype=scalar_type(z)).expand_as(loss)
        d_logits = kernels.nce_loss_backward(d_loss, z, mask, scale)
        assert_close(d_logits, d_truth, d_reference)
        torch.testing.assert_close(kernels.nce_loss(z, mask, code, seed=1), (loss, scale), rtol=0, atol=0)
        again = kernels.nce_loss_backward(d_loss, z, mask, scale, seed=1)
        torch.testing.assert_close(again, d_logits, rtol=0, atol=0)


def check_ups_loss(kernels: Kernels, z: Tensor, *rows: Tensor) -> None:
    truth, d_truth, d_reference = both_gradients(lambda x: reference.ups_loss(x, *rows), z)
    loss, scale = kernels.ups_loss(z, *rows)
    assert_close(loss, truth, reference.ups_loss(z, *rows))
    _, positive, negative = rows
    counts = torch.stack([positive.sum(), ((negative != 0).any(dim=1) & ~positive).sum()])
    torch.testing.assert_close(scale, 1 / counts.clamp(min=1).to(scale.dtype), rtol=0, atol=0)
    d_loss = torch.ones((), dtype=scalar_type(z))
    d_logits = kernels.ups_loss_backward(d_loss, z, *rows, scale)
    assert_close(d_logits, d_truth, d_reference)
    torch.testing.assert_close(kernels.ups_loss(z, *rows, seed=1), (loss, scale), rtol=0, atol=0)
    again = kernels.ups_loss_backward(d_loss, z, *rows, scale, seed=1)
    torch.testing.assert_close(again, d_logits, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "c"), [(7, 3), (40, 10), (12, 33), (5, 200), (3, 1025)])
def test_losses_with_weights_soft_targets_and_smoothing(kernels, n, c, dtype):
    """A product with the weight and one with the target more: five roundings."""
    z, target, positive, negative = batch(n, c, dtype=dtype, seed=n)
    g = torch.Generator().manual_seed(c)
    weight = torch.rand(n, dtype=scalar_type(z), generator=g)
    weight[::3] = 0
    soft = torch.randn(n, c + 2, dtype=scalar_type(z), generator=g).softmax(dim=-1)[:, 1 : c + 1]
    one = torch.ones((), dtype=scalar_type(z))
    for i, (y, mask, w, smoothing) in enumerate(
        itertools.product((target.clamp(min=0), soft), (None, negative), (None, weight), (0.0, 0.1))
    ):
        code = (0, 2, 3, 1)[i % 4]
        options = {"weight": w, "label_smoothing": smoothing}

        def f(x, ops=reference, rows=(y, positive, mask), options=options, code=code):
            reduction = ("none", "mean", "sum", "batchmean")[code]
            return ops.ups_loss(x, *rows, reduction=reduction, **options)

        truth, d_truth, d_reference = both_gradients(f, z)
        loss, scale = kernels.ups_loss(z, y, positive, mask, reduction=code, **options)
        assert_close(loss, truth, f(z), roundings=5)
        d_logits = kernels.ups_loss_backward(one.expand_as(loss), z, y, positive, mask, scale, **options)
        assert_close(d_logits, d_truth, d_reference, roundings=5)
    for code, reduction in enumerate(("none", "mean", "sum", "batchmean")):

        def f(x, reduction=reduction):
            return reference.nce_loss(x, negative, reduction=reduction, weight=weight)

        truth, d_truth, d_reference = both_gradients(f, z)
        loss, scale = kernels.nce_loss(z, negative, code, weight)
        assert_close(loss, truth, f(z), roundings=5)
        d_logits = kernels.nce_loss_backward(one.expand_as(loss), z, negative, scale, weight)
        assert_close(d_logits, d_truth, d_reference, roundings=5)


def test_losses_of_weight_0_are_those_of_no_row(kernels):
    """Whatever stands in it: a target out of range, NaN logits."""
    z, target, positive, negative = batch(12, 10, seed=3)
    weight = torch.ones(12)
    weight[[1, 4]] = 0
    z[[1, 4]], positive[1], target[1], positive[4], negative[4] = nan, True, 99, False, True
    kept = weight != 0
    for smoothing in (0.0, 0.2):
        loss, scale = kernels.ups_loss(
            z, target, positive, negative, weight=weight, label_smoothing=smoothing
        )
        alone, _ = kernels.ups_loss(
            z[kept], target[kept], positive[kept], negative[kept], label_smoothing=smoothing
        )
        torch.testing.assert_close(loss, alone, rtol=1e-6, atol=0)
        d_logits = kernels.ups_loss_backward(
            torch.ones(()), z, target, positive, negative, scale, weight=weight, label_smoothing=smoothing
        )
        assert (d_logits[~kept] == 0).all() and d_logits.isfinite().all()


C_LOSS = [1, 2, 3, 10, 31, 32, 33, 100, 129, 257, 1000, 1025, 4097]


@classes_of_each_dtype(C_LOSS, now=(3, 33))
def test_losses_on_hostile_shapes(kernels, c, dtype):
    for n in (1, 7, 40) if c <= 257 else (1, 3):
        z, *rows = batch(n, c, dtype=dtype, seed=c, packed=n == 7)
        check_nce_loss(kernels, z, rows[2], REDUCTIONS if n < 40 else ("mean",))
        check_ups_loss(kernels, z, *rows)


@pytest.mark.parametrize(("n", "c"), [(601, 10), (151, 100), (70, 1000)])
def test_losses_in_several_blocks(kernels, n, c):
    """Partial sums and a second launch."""
    assert kernels.plan(1, n, c)["blocks"] > 1
    z, *rows = batch(n, c, seed=1)
    check_nce_loss(kernels, z, rows[2])
    check_ups_loss(kernels, z, *rows)


@pytest.mark.parametrize("c", [10, 100, 300, 1500])
@pytest.mark.parametrize("max_blocks", [1, 2, 3])
def test_losses_in_few_blocks(kernels, c, max_blocks):
    """Blocks walk over the rows, the last turn is not full, and neither shared memory nor sums carry anything over."""
    z, *rows = batch(300 if c == 10 else 80 if c == 100 else 20 if c == 300 else 7, c, seed=1)
    (loss, scale), (again, _) = (
        kernels.ups_loss(z, *rows, seed=seed, max_blocks=max_blocks) for seed in (0, 1)
    )
    assert loss == again
    torch.testing.assert_close(loss.double(), reference.ups_loss(z.double(), *rows), rtol=1e-6, atol=0)
    mean, _ = kernels.nce_loss(z, rows[2], 1, max_blocks=max_blocks)
    torch.testing.assert_close(mean.double(), reference.nce_loss(z.double(), rows[2]), rtol=1e-6, atol=0)
    one = torch.ones(())
    few = kernels.ups_loss_backward(one, z, *rows, scale, max_blocks=max_blocks)
    torch.testing.assert_close(few, kernels.ups_loss_backward(one, z, *rows, scale), rtol=0, atol=0)
    few = kernels.nce_loss_backward(one, z, rows[2], scale[:1], max_blocks=max_blocks)
    torch.testing.assert_close(few, kernels.nce_loss_backward(one, z, rows[2], scale[:1]), rtol=0, atol=0)


def test_losses_of_nothing(kernels):
    for n in (0, 5):
        z, target, positive, negative = batch(n, 10)
        nothing = torch.zeros_like(negative)
        check_nce_loss(kernels, z, nothing) if n else None
        loss, scale = kernels.nce_loss(z, nothing, 1)
        assert loss == 0 and scale == 1
        loss, scale = kernels.ups_loss(z, target, torch.zeros_like(positive), nothing)
        assert loss == 0 and scale.tolist() == [1, 1]


@pytest.mark.parametrize("c", [3, 100, 1500])
def test_losses_of_one_kind(kernels, c):
    z, target, positive, negative = batch(6, c)
    target = target.clamp(min=0)
    for all_positive in (torch.ones_like(positive), torch.zeros_like(positive)):
        for mask in (negative, torch.zeros_like(negative), torch.ones_like(negative)):
            check_ups_loss(kernels, z, target, all_positive, mask)


@classes_of_each_dtype([10, 33, 100, 1500], now=(10, 100))
def test_losses_read_slices_of_larger_tensors(kernels, c, dtype):
    z, target, positive, negative = batch(5, c, dtype=dtype, seed=2)
    one = torch.ones((), dtype=scalar_type(z))
    loss, scale = kernels.ups_loss(z, target, positive, negative)
    d_logits = kernels.ups_loss_backward(one, z, target, positive, negative, scale)
    each, _ = kernels.nce_loss(z, negative, 0)
    for offset, packed in itertools.product((0, 1, 3), (False, True)):
        z_in, mask_in = inside(z, offset), inside(pack_mask(negative) if packed else negative, offset)
        rows = target, positive, mask_in
        torch.testing.assert_close(kernels.ups_loss(z_in, *rows), (loss, scale), rtol=0, atol=0)
        got = kernels.ups_loss_backward(one, z_in, *rows, scale)
        torch.testing.assert_close(got, d_logits, rtol=0, atol=0)
        torch.testing.assert_close(kernels.nce_loss(z_in, mask_in, 0)[0], each, rtol=0, atol=0)


@pytest.mark.parametrize("c", [10, 100, 1500])
def test_losses_hold_confident_rows_to_float64(kernels, c):
    """1 - p of the top class down to 1e-6, where float32's own 1 - p keeps one digit, and below the clamp."""
    z = torch.randn(4, c, generator=torch.Generator().manual_seed(3))
    z[:, 1] = z.logsumexp(1) + torch.tensor([8.0, 12.0, 14.0, 25.0])
    mask = torch.ones(4, c, dtype=torch.bool)
    truth, d_truth, _ = both_gradients(lambda x: reference.nce_loss(x, mask, reduction="none"), z)
    loss, scale = kernels.nce_loss(z, mask, 0)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    d_logits = kernels.nce_loss_backward(torch.ones(4), z, mask, scale)
    torch.testing.assert_close(d_logits.double(), d_truth, rtol=2e-5, atol=1e-9)
    rows = torch.ones(4, dtype=torch.long), torch.ones(4, dtype=torch.bool), mask
    truth, d_truth, _ = both_gradients(lambda x: reference.ups_loss(x, *rows), z)
    loss, scale = kernels.ups_loss(z, *rows)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    d_logits = kernels.ups_loss_backward(torch.ones(()), z, *rows, scale)
    torch.testing.assert_close(d_logits.double(), d_truth, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("c", [3, 10, 100, 1500])
def test_losses_of_rows_that_are_not_finite(kernels, c):
    """A NaN or an infinite top logit makes its row NaN if that counts, and no other; -inf is a probability of 0."""
    z, target, positive, negative = batch(8, c, seed=4)
    target, negative[:] = target.clamp(min=0), True
    clean, _ = kernels.nce_loss(z, negative, 0)
    for bad in (nan, inf):
        broken = z.clone()
        broken[2, c - 1], broken[5, 0] = bad, bad
        each, scale = kernels.nce_loss(broken, negative, 0)
        assert each.isnan().tolist() == [i in (2, 5) for i in range(8)]
        assert (each == clean)[[0, 1, 3, 4, 6, 7]].all()
        d_logits = kernels.nce_loss_backward(torch.ones(8), broken, negative, scale)
        assert d_logits.isnan().all(dim=1).tolist() == each.isnan().tolist()
        loss, scale = kernels.ups_loss(broken, target, positive, negative)
        assert not loss.isfinite()
        d_logits = kernels.ups_loss_backward(torch.ones(()), broken, target, positive, negative, scale)
        assert d_logits.isnan().any(dim=1).tolist() == each.isnan().tolist()
        unused = negative.clone()
        unused[[2, 5]] = False
        each, scale = kernels.nce_loss(broken, unused, 0)
        assert (each[[2, 5]] == 0).all()
        assert (kernels.nce_loss_backward(torch.ones(8), broken, unused, scale)[[2, 5]] == 0).all()
    for hopeless in (nan, -inf):  # no class is the top one
        broken = z.clone()
        broken[3] = hopeless
        each, scale = kernels.nce_loss(broken, negative, 0)
        assert each.isnan().tolist() == [i == 3 for i in range(8)]
        d_logits = kernels.nce_loss_backward(torch.ones(8), broken, negative, scale)
        assert d_logits.isnan().all(dim=1).tolist() == each.isnan().tolist()
    masked = z.clone()
    masked[:, 0] = -inf
    target.clamp_(min=1)
    check_nce_loss(kernels, masked, negative)
    check_ups_loss(kernels, masked, target, positive, negative)


@pytest.mark.parametrize("c", [3, 100, 1500])
@pytest.mark.parametrize("bad", [-1, -(2**40), 2**32, 2**40])
def test_ups_loss_of_a_target_out_of_range_is_nan(kernels, c, bad):
    z, target, positive, negative = batch(6, c, seed=5)
    target, positive[:2] = target.clamp(min=0), True
    positive[2] = False
    target[2] = bad  # not a positive row: nobody looks
    loss, scale = kernels.ups_loss(z, target, positive, negative)
    assert loss.isfinite()
    for wrong in (bad, c):
        target[1] = wrong
        assert kernels.ups_loss(z, target, positive, negative)[0].isnan()
        d_logits = kernels.ups_loss_backward(torch.ones(()), z, target, positive, negative, scale)
        assert d_logits.isnan().all(dim=1).tolist() == [i == 1 for i in range(6)]


def views(n, c, *, dtype=torch.float32, seed=0) -> tuple[Tensor, Tensor]:
    """Logits of both views: rows from undecided to nearly certain, no confidence near a threshold that is tried."""
    g = torch.Generator().manual_seed(seed)
    strong = 3 * torch.randn(n, c, generator=g)
    weak = torch.randn(n, c, generator=g) * torch.tensor([0.1, 1.0, 12.0])[torch.arange(n) % 3, None]
    return strong.to(dtype), weak.to(dtype)


def check_fixmatch_loss(kernels: Kernels, strong: Tensor, weak: Tensor, **options) -> None:
    code = options.pop("reduction", 3)
    names = ("none", "mean", "sum", "batchmean")
    weight = options.get("weight")

    def f(x: Tensor) -> Tensor:
        loss = reference.fixmatch_loss(x, weak.to(x.dtype), reduction=names[code], **options)
        assert isinstance(loss, Tensor)
        return loss

    truth, d_truth, d_reference = both_gradients(f, strong)
    got = kernels.fixmatch_loss(strong, weak, reduction=code, **options)
    loss, mask, target, scale = got
    _, want = reference.fixmatch_loss(strong, weak, **options, return_mask=True)
    assert torch.equal(mask, want)
    counts = mask if weight is None else mask & (weight != 0)
    assert torch.equal(target, torch.where(counts, weak.double().argmax(dim=1), -1))
    assert_close(loss, truth, f(strong), roundings=5)
    one = torch.ones((), dtype=scalar_type(strong)).expand_as(loss)
    d_strong = kernels.fixmatch_loss_backward(one, strong, target, scale, weight)
    assert_close(d_strong, d_truth, d_reference, roundings=5)
    again = kernels.fixmatch_loss(strong, weak, reduction=code, **options, seed=1)
    torch.testing.assert_close(again, got, rtol=0, atol=0)
    again = kernels.fixmatch_loss_backward(one, strong, target, scale, weight, seed=1)
    torch.testing.assert_close(again, d_strong, rtol=0, atol=0)


@classes_of_each_dtype(C_LOSS, now=(3, 33))
def test_fixmatch_loss_on_hostile_shapes(kernels, c, dtype):
    g = torch.Generator().manual_seed(c)
    for n in (1, 7, 40) if c <= 257 else (1, 3):
        strong, weak = views(n, c, dtype=dtype, seed=n)
        weight = torch.rand(n, dtype=scalar_type(strong), generator=g)
        weight[::4] = 0
        check_fixmatch_loss(kernels, strong, weak)
        check_fixmatch_loss(kernels, strong, weak, weight=weight, temperature=0.5, tau=0.7, reduction=n % 3)
        check_fixmatch_loss(kernels, strong, weak, tau=0.5 + torch.rand(c, generator=g) / 2, reduction=1)


@pytest.mark.parametrize(("n", "c"), [(601, 10), (151, 100), (70, 1000)])
def test_fixmatch_loss_in_several_blocks(kernels, n, c):
    strong, weak = views(n, c)
    check_fixmatch_loss(kernels, strong, weak)
    loss, _, target, scale = kernels.fixmatch_loss(strong, weak, max_blocks=2)
    torch.testing.assert_close(loss, reference.fixmatch_loss(strong, weak), rtol=1e-5, atol=1e-6)
    want = kernels.fixmatch_loss_backward(torch.ones(()), strong, target, scale)
    few = kernels.fixmatch_loss_backward(torch.ones(()), strong, target, scale, max_blocks=2)
    torch.testing.assert_close(few, want, rtol=0, atol=0)


@pytest.mark.parametrize("c", [10, 100, 1500])
def test_fixmatch_loss_of_rows_that_are_not_finite(kernels, c):
    strong, weak = views(9, c)
    weak[:, 1] = 60  # all rows are confident, of class 1
    for bad in (nan, inf, -inf):
        broken = weak.clone()
        broken[2, c - 1], broken[5, 0], broken[8] = bad, bad, bad
        loss, mask, target, scale = kernels.fixmatch_loss(strong, broken, reduction=0, tau=torch.zeros(c))
        assert (
            mask.tolist() == [i not in (2, 5, 8) for i in range(9)]
            and (target == torch.where(mask, 1, -1)).all()
        )
        assert (loss[~mask] == 0).all() and loss.isfinite().all()
        hidden = strong.clone()
        hidden[~mask] = nan  # nobody looks
        torch.testing.assert_close(
            kernels.fixmatch_loss(hidden, broken, reduction=0)[0], loss, rtol=0, atol=0
        )
        d_strong = kernels.fixmatch_loss_backward(torch.ones(9), hidden, target, scale)
        assert (d_strong[~mask] == 0).all() and (d_strong[mask] != 0).any(dim=1).all()
    for bad in (nan, inf):
        broken = strong.clone()
        broken[3, 0] = bad
        loss, _, target, scale = kernels.fixmatch_loss(broken, weak, reduction=0)
        assert loss.isfinite().tolist() == [i != 3 for i in range(9)]
        d_strong = kernels.fixmatch_loss_backward(torch.ones(9), broken, target, scale)
        assert d_strong.isnan().any(dim=1).tolist() == [i == 3 for i in range(9)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [10, 33, 1500])
def test_fixmatch_loss_reads_slices_and_takes_the_lowest_of_a_tie(kernels, c, dtype):
    strong, weak = views(5, c, dtype=dtype)
    weak[:, 3] = weak[:, c - 1] = 50
    want = kernels.fixmatch_loss(strong, weak, tau=0.4)
    assert (want[2] == 3).all() and want[1].all()
    d_strong = kernels.fixmatch_loss_backward(torch.ones((), dtype=want[0].dtype), strong, want[2], want[3])
    for offset in (1, 3):
        got = kernels.fixmatch_loss(inside(strong, offset), inside(weak, offset), tau=0.4)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        again = kernels.fixmatch_loss_backward(
            torch.ones((), dtype=want[0].dtype), inside(strong, offset), want[2], want[3]
        )
        torch.testing.assert_close(again, d_strong, rtol=0, atol=0)


def test_fixmatch_loss_of_nothing(kernels):
    for n in (0, 5):
        strong, weak = views(n, 10)
        loss, mask, target, scale = kernels.fixmatch_loss(strong, 0 * weak, reduction=1)
        assert loss == 0 and scale == 1 and not mask.any() and (target == -1).all()


MULTILABEL = {"tau_p": 0.5, "tau_n": 0.2, "kappa_p": 0.2, "kappa_n": 0.05}


@classes_of_each_dtype([1, 3, 31, 33, 80, 257], now=(33, 80))
def test_mc_select_multilabel_on_hostile_shapes(kernels, c, dtype):
    for p, n, temp_nl in ((1, 1, 2.0), (3, 7, 2.0), (10, 5, 3.7)):
        z = logits_of(p, n, c, dtype=dtype, seed=c + n)
        z[p - 1, n - 1, c // 2], kinds = nan, {"temp_nl": temp_nl, **MULTILABEL}
        values = torch.tensor(list(MULTILABEL.values()), dtype=scalar_type(z))
        of_class = (values[:, None] * torch.linspace(0.8, 1.2, c)).to(values.dtype)
        numbers = [kinds, {**kinds, **dict(zip(MULTILABEL, of_class.double().numpy(), strict=True))}]
        for limits, numbers_of in zip((None, of_class), numbers, strict=True):
            got = kernels.mc_select_multilabel(z, limits, **kinds)
            want = oracle.mc_select_multilabel(z.double().numpy(), **numbers_of)
            for name in ("positive", "negative"):
                sure = ~want[f"doubt_{name}"]
                assert (getattr(got, name).numpy() == want[name])[sure].all()
            for name in ("confidence", "std"):
                atol = 1e-14 if dtype == torch.float64 else 5e-7  # two roundings and 2 ulp of the exponential
                np.testing.assert_allclose(getattr(got, name).numpy(), want[name], rtol=0, atol=atol)
            for x in (z, inside(z, 2)):  # chunks of several classes where c allows it, and of one
                bits = kernels.mc_select_multilabel(x, limits, packed=True, seed=1, max_blocks=2, **kinds)
                assert_packed(bits, got)


def assert_packed(bits: MultiLabelSelection, got: MultiLabelSelection) -> None:
    for a, b in zip(got, bits, strict=True):
        equal = pack_mask(a) if a.dtype == torch.bool else a.nan_to_num(-1)
        assert torch.equal(b if a.dtype == torch.bool else b.nan_to_num(-1), equal)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mc_select_multilabel_in_one_block(kernels, dtype):
    """Which walks over all rows, the last of them with a part of its warps."""
    z = logits_of(2, 61, 80, dtype=dtype, seed=1)
    got = kernels.mc_select_multilabel(z, **MULTILABEL)
    for x in (z, inside(z, 1)):
        for a, b in zip(got, kernels.mc_select_multilabel(x, max_blocks=1, **MULTILABEL), strict=True):
            assert torch.equal(a, b)
        assert_packed(kernels.mc_select_multilabel(x, packed=True, max_blocks=1, seed=2, **MULTILABEL), got)


def test_mc_select_multilabel_of_equal_passes(kernels):
    got = kernels.mc_select_multilabel(4 * torch.randn(1, 9, 33).repeat(7, 1, 1))
    assert (got.std == 0).all()


@classes_of_each_dtype([1, 10, 33, 150, 1500], now=(33,))
def test_ups_loss_multilabel(kernels, c, dtype):
    n = {1: 1, 10: 601, 33: 7, 150: 20, 1500: 5}[c]  # 601 in several blocks
    g = torch.Generator().manual_seed(n + c)
    z = (4 * torch.randn(n, c, generator=g)).to(dtype)
    masks = [torch.rand(n, c, generator=g) < share for share in (0.2, 0.4)]
    masks[0][::5] = masks[1][::5] = False
    of_image, of_entry = (torch.rand(shape, dtype=scalar_type(z), generator=g) for shape in ((n,), (n, c)))
    of_image[1::4], of_entry[:, ::3] = 0, 0
    names = ("none", "mean", "sum", "batchmean")
    for reduction, weight in enumerate((None, of_image, of_entry, None)):

        def f(x, weight=weight, reduction=reduction):
            return reference.ups_loss_multilabel(x, *masks, weight=weight, reduction=names[reduction])

        truth, d_truth, d_reference = both_gradients(f, z)
        loss, scale = kernels.ups_loss_multilabel(z, *masks, weight=weight, reduction=reduction)
        assert_close(loss, truth, f(z), roundings=5)
        one = torch.ones((), dtype=scalar_type(z)).expand_as(loss)
        d_logits = kernels.ups_loss_multilabel_backward(one, z, *masks, scale=scale, weight=weight)
        assert_close(d_logits, d_truth, d_reference, roundings=5)
        looked = (masks[0] | masks[1]) & (torch.ones(n, c) if weight is None else weight.view(n, -1)).ne(0)
        hidden, bits = inside(torch.where(looked, z, nan), 3), [pack_mask(masks[0]), inside(masks[1], 1)]
        again, _ = kernels.ups_loss_multilabel(hidden, *bits, weight=weight, reduction=reduction, seed=1)
        assert torch.equal(again, loss)
        again = kernels.ups_loss_multilabel_backward(
            one, hidden, *bits, scale=scale, weight=weight, seed=1, max_blocks=2
        )
        assert torch.equal(again, d_logits)
    few, _ = kernels.ups_loss_multilabel(z, *masks, max_blocks=2)
    torch.testing.assert_close(few, kernels.ups_loss_multilabel(z, *masks)[0], rtol=1e-5, atol=1e-6)
    empty = kernels.ups_loss_multilabel(z[:0], *(m[:0] for m in masks))
    assert empty[0] == 0 and empty[1] == 1


# The shim itself -----------------------------------------------------------------------------------------------------


def run_control(kernels: Kernels, name: str, seed: int = 0) -> tuple[str, list[int]]:
    kernels.lib.control.restype = ctypes.c_char_p
    out = torch.full((64 + 64,), -7, dtype=torch.int32)
    report = kernels.lib.control(name.encode(), ctypes.c_uint64(seed), ctypes.c_void_p(out.data_ptr()))
    return report.decode(), out[:64].tolist()


def test_the_shim_runs_what_is_right(kernels):
    for seed in range(4):
        assert run_control(kernels, "with_barrier", seed) == ("", list(range(63, -1, -1)))
        assert run_control(kernels, "shuffle_sum", seed) == (
            "",
            [sum(range(32))] * 32 + [sum(range(32, 64))] * 32,
        )


@pytest.mark.parametrize(
    ("control", "report"),
    [
        ("barrier_some_skip", "waits at __syncthreads for thread"),
        ("shuffle_some_skip", "which has exited"),
        ("shuffle_apart", "stands at a shuffle"),
        ("shuffle_meets_barrier", "which waits at __syncthreads"),
        ("shuffle_outside_its_mask", "reads a lane that is not in the mask"),
        ("not_in_its_mask", "is not in the mask that it gives"),
        ("unaligned_load", "not aligned to its size"),
    ],
)
def test_the_shim_reports_what_is_wrong(kernels, control, report):
    for seed in range(4):
        assert report in run_control(kernels, control, seed)[0]


def test_a_missing_barrier_shows(kernels):
    results = [run_control(kernels, "without_barrier", seed) for seed in range(4)]
    assert all(report == "" and out != list(range(63, -1, -1)) for report, out in results)
    assert len({tuple(out) for _, out in results}) > 1
    assert run_control(kernels, "half_written_shared_memory")[1] == [*range(32), *[-1] * 32]


def test_a_write_past_the_end_shows(kernels):
    results = Results()
    out = results.new((64,), torch.int32)
    kernels.lib.control(b"write_past_the_end", ctypes.c_uint64(0), ctypes.c_void_p(out.data_ptr()))
    with pytest.raises(AssertionError, match="written past its end"):
        results.check()


@pytest.mark.slow
def test_kernels_are_clean_under_sanitizers(request):
    """Exact heap blocks for every buffer, in a process of its own; and the controls are caught."""
    probe = [*CXX, *SANITIZERS, "-x", "c++", "-", "-o", os.devnull]
    if (
        shutil.which(CXX[0])
        and subprocess.run(probe, input="int main() {}", text=True, capture_output=True).returncode
    ):
        pytest.skip("this compiler has no AddressSanitizer: out-of-bounds reads are not proved here")
    program = compiled(request, "sanitize", [*LIBRARY, "sanitize.cpp"], ["-O0", *SANITIZERS])

    def run(*args: str) -> subprocess.CompletedProcess:
        options = {"ASAN_OPTIONS": "detect_leaks=0"}  # a fiber that is given up leaves its blocks
        return subprocess.run([program, *args], capture_output=True, text=True, env={**os.environ, **options})

    done = run()
    assert (done.returncode, done.stdout) == (0, "clean\n"), done.stderr[-4000:]
    assert "heap-buffer-overflow" in run("write_past_the_end").stderr
    assert "index 64 out of bounds" in run("shared_write_past_the_end").stderr
    assert run("with_barrier").returncode == 0
