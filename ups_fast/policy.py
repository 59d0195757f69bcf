"""Augmentation policies as data, and the tables that the augmentation kernels read them from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from threading import Thread
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from ups_fast.words import did_you_mean

# A jitter factor of 1: factors are multiples of 2^-14, for which Pillow's float32 blend is exact.
ONE = 1 << 14
FILL = (125, 123, 114)  # color of CutoutAbs: the mean of ImageNet
WORDS = 72  # int32 of a row of the variants table

# The operations, in the order of csrc/augment.h; those of one line are kinds of one kernel operation.
_LOOKUP, _AUTO_CONTRAST, _EQUALIZE, _AFFINE, _COLOR, _CONTRAST, _SHARPNESS, _FILL = range(8)


@dataclass(frozen=True)
class Policy:
    """What is done to an image, in this order; each image draws its own.

    ops        RandAugment's operations: (name, values), the values that it draws from with equal probability
    n_ops      so many operations are drawn from `ops`, with replacement, and applied
    flip       left to right with probability 1/2
    crop       reflect-pad by so many pixels on each side and crop back at random
    jitter     of brightness, contrast and saturation, in random order: factors of 1 - x .. 1 + x, x in [0, 1]
    cutout     largest side of one square of zeros (after normalization): a side of 1..cutout, `side // 2` pixels
               each way from a center anywhere, cut off at the border

    Names and values, each operation as Pillow does it:

    ====================  ============================================================================
    AutoContrast          (0,)
    Equalize              (0,)
    Invert                (0,)
    Rotate                degrees, counter-clockwise; nearest neighbor, black outside, as all that move
    Posterize             bits kept, 0..8; 0 is a black image
    Solarize              threshold: pixels of at least this are inverted
    SolarizeAdd           added first, cut off at 0 and 255; then Solarize with threshold 128
    Color, Contrast,      factor of at least 0; 1 changes nothing
    Brightness, Sharpness
    ShearX, ShearY        pixels per pixel
    TranslateX/Y          pixels
    CutoutAbs             side of a square of color (125, 123, 114), its luma on gray images; its center lies
                          anywhere in [0, size) of height and of width
    CutoutPublished       the same with its center in (1, size], as the published code draws it
    Gamma                 exponent of pixels in [0, 1]; not among the published operations
    ====================  ============================================================================

    Raises ValueError that names the field.

    >>> Policy(ops=(("Rotate", (-9, 9)), ("Invert", (0,))), n_ops=1, crop=4).flip
    False
    """

    ops: tuple[tuple[str, tuple[float, ...]], ...] = ()
    n_ops: int = 0
    flip: bool = False
    crop: int = 0
    jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)
    cutout: int = 0

    def __post_init__(self) -> None:
        for name, values in self.ops:
            if name not in OPERATIONS:
                hint = did_you_mean(name, OPERATIONS)
                raise ValueError(f"an operation must be one of {', '.join(OPERATIONS)}, got {name!r}{hint}")
            low, high = OPERATIONS[name]
            if not values or not all(low <= value <= high for value in values):
                got = " ".join(f"{value:g}" for value in values) or "none"
                raise ValueError(f"{name} must have values in {low:g}..{high:g}, got {got}")
        for field, top in (("n_ops", 64), ("crop", 2047), ("cutout", 2048)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= top:
                raise ValueError(f"policy.{field} must be an integer of 0..{top}, got {value!r}")
        if self.n_ops and not self.ops:
            raise ValueError(f"policy.ops must not be empty where n_ops is {self.n_ops}")
        if len(self.jitter) != 3 or not all(0 <= x <= 1 for x in self.jitter):
            raise ValueError(f"policy.jitter must be three numbers in [0, 1], got {self.jitter}")


_ANY = (-1e4, 1e4)
# In the order of the published list, with the range of their values: in images of up to 2048 pixels no shear leaves the
# 32,767 pixels of 16.16 fixed point.
OPERATIONS = {
    "AutoContrast": (0, 0),
    "Equalize": (0, 0),
    "Invert": (0, 0),
    "Rotate": (-360, 360),
    "Posterize": (0, 8),
    "Solarize": (0, 256),
    "SolarizeAdd": (-255, 255),
    "Color": (0, 100),
    "Contrast": (0, 100),
    "Brightness": (0, 100),
    "Sharpness": (0, 100),
    "ShearX": (-10, 10),
    "ShearY": (-10, 10),
    "CutoutAbs": (0, 1e4),
    "TranslateX": _ANY,
    "TranslateY": _ANY,
    "Gamma": (0.01, 100),
    "CutoutPublished": (0, 1e4),
}
PUBLISHED = tuple(OPERATIONS)[:16]
# The center lies so many pixels or more from the top and left.
SQUARES = {"CutoutAbs": 0, "CutoutPublished": 1}
_RANGES = {  # of the published RandAugment, from magnitude 0 to 30; where it has a sign, either is as likely
    "Rotate": (0, 30, True),
    "Posterize": (0, 4, False),
    "Solarize": (0, 256, False),
    "SolarizeAdd": (0, 110, False),
    "Color": (0.1, 1.9, False),
    "Contrast": (0.1, 1.9, False),
    "Brightness": (0.1, 1.9, False),
    "Sharpness": (0.1, 1.9, False),
    "ShearX": (0, 0.3, True),
    "ShearY": (0, 0.3, True),
    "CutoutAbs": (0, 40, False),
    "TranslateX": (0, 100, True),
    "TranslateY": (0, 100, True),
}


def randaugment(
    magnitude: float, *, least_bits: int = 1, square: str = "CutoutAbs"
) -> tuple[tuple[str, tuple[float, ...]], ...]:
    """The published RandAugment's 16 operations at a magnitude of 0..30, for `Policy.ops`.

    Posterize keeps at least `least_bits` bits: 0 is what the published code does up to magnitude 7, a black image.
    `square` is CutoutAbs, or CutoutPublished as the published code draws its center.
    """
    ops = []
    for name in PUBLISHED:
        low, high, signed = _RANGES.get(name, (0, 0, False))
        value = magnitude / 30 * (high - low) + low
        if name == "Posterize":
            value = max(least_bits, int(value))
        ops.append((square if name == "CutoutAbs" else name, (value, -value) if signed else (value,)))
    return tuple(ops)


def parse_ops(text: str) -> tuple[tuple[str, tuple[float, ...]], ...]:
    """`Policy.ops` from words: "published", "ups", or "TranslateX -1 1, Gamma 0.6 1.6"; "" is no operation.

    Raises ValueError that says what is wrong.
    """
    if text in ("published", "ups"):
        return POLICIES[text].ops
    ops = []
    for part in text.split(",") if text.strip() else []:
        name, *words = part.split() or [""]
        if not words and OPERATIONS.get(name) == (0, 0):
            words = ["0"]  # it has no value
        try:
            ops.append((name, tuple(map(float, words))))
        except ValueError:
            raise ValueError(
                f"{name} must be followed by numbers, such as {name} -1 1, and a comma ends it; got {part.strip()!r}"
            ) from None
    Policy(ops=tuple(ops))  # raises where a name or a value is impossible
    return tuple(ops)


_ups = Policy(ops=randaugment(4), n_ops=3, flip=True, crop=4, jitter=(0.4, 0.4, 0.4), cutout=16)
POLICIES = {
    "published": replace(_ups, ops=randaugment(4, least_bits=0, square="CutoutPublished")),
    "ups": _ups,
    "weak": Policy(flip=True, crop=4),
    "none": Policy(),
}


def weak_policy(flip: bool, crop: int, size: Sequence[int]) -> Policy:
    """Mirrors and shifts images of this height and width; without a crop by FixMatch's eighth of the shorter side."""
    return Policy(flip=flip, crop=crop or min(size) // 8)


def find_policy(policy: str | Policy) -> Policy:
    """A policy by its name: published, ups, weak or none. Raises ValueError or TypeError."""
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str):
        raise TypeError(f"policy must be a Policy or a name, got {type(policy).__name__}")
    if policy not in POLICIES:
        hint = did_you_mean(policy.lower(), POLICIES)
        raise ValueError(f"policy must be one of {', '.join(POLICIES)} or a Policy, got {policy!r}{hint}")
    return POLICIES[policy]


# The draws --------------------------------------------------------------------------------------------------------

_PER_OP, _FRAME = 3, 11  # int32 of PlannedOp and PlannedFrame in csrc/augment.h


@dataclass(frozen=True)
class AugmentPlan:
    """What is drawn for each image of a batch. The tensors are views into `draws`: to write to one is to change it.

    >>> import torch
    >>> from ups_fast import augment_plan
    >>> plan = augment_plan(torch.tensor([3, 8]), policy="weak", size=32, seed=0, draw=0)
    >>> plan.flip.shape, plan.crop.shape
    (torch.Size([2]), torch.Size([2, 2]))
    >>> plan.flip[:] = 0  # no image of this batch is mirrored
    """

    draws: Tensor  # int32 [B, 3 n_ops + 11]
    policy: Policy
    size: tuple[int, int]  # height and width of the images

    @property
    def variant(self) -> Tensor:  # int32 [B, n_ops], position in `names`, -1 for no operation
        return self._ops()[:, :, 0]

    @property
    def corner(self) -> Tensor:  # int32 [B, n_ops, 2], top and left of the square of a CutoutAbs
        return self._ops()[:, :, 1:]

    @property
    def flip(self) -> Tensor:  # int32 [B], 1 where the image is mirrored
        return self._frame()[:, 0]

    @property
    def crop(self) -> Tensor:  # int32 [B, 2], how far the crop lies below and right of the image
        return self._frame()[:, 1:3]

    @property
    def jitter_order(self) -> Tensor:  # int32 [B], position in JITTER_ORDERS
        return self._frame()[:, 3]

    @property
    def jitter(
        self,
    ) -> Tensor:  # int32 [B, 3], factors of brightness, contrast and saturation, in units of 1 / ONE
        return self._frame()[:, 4:7]

    @property
    def cutout(
        self,
    ) -> Tensor:  # int32 [B, 4], top, left, bottom and right of the cutout, the latter two outside
        return self._frame()[:, 7:]

    @property
    def names(self) -> list[tuple[str, float]]:
        """Name and value of each variant: the operations of the policy with each of their values in turn."""
        return variant_names(self.policy)

    def operations(self, image: int) -> list[tuple[str, float, tuple[int, int]]]:
        """Name, value and corner of the operations of one image of the batch, in their order."""
        drawn = zip(self.variant[image].tolist(), self.corner[image].tolist(), strict=True)
        return [(*self.names[variant], tuple(corner)) for variant, corner in drawn if variant >= 0]

    def _ops(self) -> Tensor:
        n_ops = self.policy.n_ops
        return self.draws[:, : _PER_OP * n_ops].unflatten(1, (n_ops, _PER_OP))

    def _frame(self) -> Tensor:
        return self.draws[:, -_FRAME:]


JITTER_ORDERS = (
    (0, 1, 2),
    (0, 2, 1),
    (1, 0, 2),
    (1, 2, 0),
    (2, 0, 1),
    (2, 1, 0),
)  # 0 brightness, 1 contrast, 2 sat.


def variant_names(policy: Policy) -> list[tuple[str, float]]:
    return [(name, value) for name, values in policy.ops for value in values]


# Tables -----------------------------------------------------------------------------------------------------------


P = ParamSpec("P")
R = TypeVar("R")


def _kept(make: Callable[P, R]) -> Callable[P, R]:
    """An lru_cache of real tensors, whatever mode of torch the first caller is in.

    FakeTensorMode, a tracer, torch.func, inference_mode and torch.device(...) would make other tensors, which must not
    meet later callers. All of them are modes of a thread, so `make` runs in a thread of its own.
    """

    @lru_cache(maxsize=64)
    @wraps(make)
    def found(*args: P.args, **kwargs: P.kwargs) -> R:
        results: list[R] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(make(*args, **kwargs))
            except BaseException as error:
                errors.append(error)

        thread = Thread(target=run)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    return found  # type: ignore[return-value]


@dataclass(frozen=True)
class Tables:
    """A policy for images of one size, as the kernels read it."""

    variants: Tensor  # int32 [V, 72], a variant is one operation with one of its values: see csrc/augment.h
    operations: Tensor  # int32 [O, 2], first variant and number of variants of each operation
    blends: Tensor  # uint8 [K, 256, 256], [k, a, b] is Pillow's blend of a towards b by factor k
    settings: tuple[int, ...]  # see `settings`


def settings(policy: Policy) -> tuple[int, ...]:
    """The rest of a policy: n_ops, flip, crop, cutout, lowest and highest factors of the jitter."""
    low = [math.ceil((1 - x) * ONE) for x in policy.jitter]
    high = [math.floor((1 + x) * ONE) for x in policy.jitter]
    return (policy.n_ops, int(policy.flip), policy.crop, policy.cutout, *low, *high)


@_kept
def tables(policy: Policy, height: int, width: int, channels: int, device: torch.device) -> Tables:
    """The tables on the device, made once."""
    rows: list[Tensor] = []
    operations, factors = [], [1.0]
    for name, values in policy.ops:
        operations.append((len(rows), len(values)))
        rows += [_variant(name, value, height, width, channels, factors) for value in values]
    return Tables(
        torch.stack(rows).to(device) if rows else torch.zeros(0, WORDS, dtype=torch.int32, device=device),
        torch.tensor(operations, dtype=torch.int32).view(-1, 2).to(device),
        torch.stack([blend_table(factor) for factor in factors]).to(device),
        settings(policy),
    )


@_kept
def normalization(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[C, 256] in `dtype`: what (pixel / 255 - mean) / std, computed in float32, is for each pixel value."""
    pixel = torch.arange(256, dtype=torch.float32).div(255)
    columns = (
        torch.tensor(mean, dtype=torch.float32)[:, None],
        torch.tensor(std, dtype=torch.float32)[:, None],
    )
    return ((pixel - columns[0]) / columns[1]).to(dtype).to(device)


def blend_table(factor: float) -> Tensor:
    """uint8 [256, 256]: [a, b] is a + factor * (b - a) in float32, each step rounded, cut off, the rest dropped."""
    a = torch.arange(256, dtype=torch.float32)[:, None]
    b = torch.arange(256, dtype=torch.float32)[None, :]
    step = (b - a) * torch.tensor(factor, dtype=torch.float32)
    return (a + step).clamp(0, 255).to(torch.uint8)


def _variant(name: str, value: float, height: int, width: int, channels: int, factors: list[float]) -> Tensor:
    """A row of the variants table; a factor that has no blend table yet is appended to `factors`."""
    numbers: list[int] = []
    lookup = list(range(256))  # Python's numbers: a tensor's would follow torch.set_default_dtype
    kind = _LOOKUP
    if name == "AutoContrast":
        kind = _AUTO_CONTRAST
    elif name == "Equalize":
        kind = _EQUALIZE
    elif name == "Invert":
        lookup = [255 - level for level in lookup]
    elif name == "Posterize":
        lookup = [level & -(1 << (8 - int(value))) for level in lookup]
    elif name == "Solarize":
        lookup = _solarized(lookup, value)
    elif name == "SolarizeAdd":
        lookup = _solarized([max(0, min(255, int(level + value))) for level in lookup], 128)
    elif name == "Brightness":
        lookup = blend_table(value)[0].tolist()
    elif name == "Gamma":
        lookup = gamma_levels(value)
    elif name in ("Color", "Contrast", "Sharpness"):
        kind = {"Color": _COLOR, "Contrast": _CONTRAST, "Sharpness": _SHARPNESS}[name]
        if value not in factors:
            factors.append(value)
        numbers = [factors.index(value)]
    elif name in SQUARES:
        kind = _FILL
        color = FILL if channels == 3 else (luma(*FILL),) * 3
        numbers = [round(value / 2 * 65536), int(value), *color, SQUARES[name]]
    else:
        kind = _AFFINE
        numbers = affine_matrix(name, value, height, width)
    words = torch.zeros(8, dtype=torch.int32)
    words[: 1 + len(numbers)] = torch.tensor([kind, *numbers], dtype=torch.int32)
    return torch.cat([words, torch.tensor(lookup, dtype=torch.uint8).view(torch.int32)])


def _solarized(lookup: list[int], threshold: float) -> list[int]:
    return [level if level < threshold else 255 - level for level in lookup]


def gamma_levels(exponent: float) -> list[int]:
    """The new value of each pixel value 0..255, rounded to nearest."""
    return [int(255 * (level / 255) ** exponent + 0.5) for level in range(256)]


def luma(red: int, green: int, blue: int) -> int:
    """Pillow's conversion to gray."""
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def affine_matrix(name: str, value: float, height: int, width: int) -> list[int]:
    """Of an operation that moves pixels: output pixel (x, y) shows pixel (a0 x + a1 y + a2, a3 x + a4 y + a5) >> 16.

    The same rounding to 16.16 fixed point as Pillow's, where a pixel's center lies at + 0.5. A shift moves by whole
    pixels, and turns by right angles are exact, as in Pillow.
    """
    if name == "TranslateX":
        return [65536, 0, _whole_shift(value, width), 0, 65536, 0]
    if name == "TranslateY":
        return [65536, 0, 0, 0, 65536, _whole_shift(value, height)]
    if name == "ShearX":
        matrix = [1.0, value, 0.0, 0.0, 1.0, 0.0]
    elif name == "ShearY":
        matrix = [1.0, 0.0, 0.0, value, 1.0, 0.0]
    else:
        angle = value % 360
        last_x, last_y = (width - 1) << 16, (height - 1) << 16
        if angle == 180:
            return [-65536, 0, last_x, 0, -65536, last_y]
        if angle in (90, 270) and width == height:
            return [0, -65536, last_x, 65536, 0, 0] if angle == 90 else [0, 65536, 0, -65536, 0, last_y]
        radians = -math.radians(angle)
        cos, sin = round(math.cos(radians), 15), round(math.sin(radians), 15)
        right, down = width / 2, height / 2
        matrix = [cos, sin, 0.0, -sin, cos, 0.0]
        matrix[2] = cos * -right + sin * -down + right
        matrix[5] = -sin * -right + cos * -down + down
    if matrix[1] == matrix[3] == 0:  # nothing but a shift
        return [65536, 0, 0, 0, 65536, 0]
    a0, a1, a2, a3, a4, a5 = matrix
    centered = [a0, a1, a2 + a0 * 0.5 + a1 * 0.5, a3, a4, a5 + a3 * 0.5 + a4 * 0.5]
    return [math.floor(number * 65536 + 0.5) for number in centered]


def _whole_shift(value: float, size: int) -> int:
    return max(-size, min(size, math.floor(value + 0.5))) << 16
