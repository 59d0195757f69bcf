"""The specification of `augment` and `augment_plan`: the published chain in Pillow and NumPy, image by image.

Bit for bit what Pillow computes on x86-64 (tried: 9.5, 10.4, 12.0 and 13.0 agree). Two exceptions are ours: Posterize
to 0 bits, which Pillow refuses since 13, and the color of CutoutAbs on gray images.
"""

from __future__ import annotations

import functools
import math
import numbers
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ups_fast.policy import (
    FILL,
    JITTER_ORDERS,
    ONE,
    SQUARES,
    AugmentPlan,
    Policy,
    find_policy,
    gamma_levels,
    luma,
    variant_names,
)

if TYPE_CHECKING:
    from PIL import Image

FRAME, JITTER, CUTOUT = 1 << 16, (1 << 16) + 1, (1 << 16) + 2  # what is drawn; 0, 1, ... are the operations


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox 4x32-10 (Salmon et al., SC 2011): four random words of 32 bits, a function of the arguments alone."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


_Function = TypeVar("_Function", bound=Callable[..., Any])


def once_epoch(function: _Function) -> _Function:
    """`draw` was called `epoch`. That keyword works for one more release, with a warning that names the new one."""

    @functools.wraps(function)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        if "epoch" in kwargs:
            name = function.__name__
            if "draw" in kwargs:
                raise TypeError(f"{name} got both draw and epoch, its old name: pass draw alone")
            message = (
                f"the keyword epoch of {name} is now draw: pass draw=, as the next release removes epoch"
            )
            warnings.warn(message, FutureWarning, stacklevel=2)
            kwargs["draw"] = kwargs.pop("epoch")
        return function(*args, **kwargs)

    return cast(_Function, renamed)


@once_epoch
def augment_plan(
    index: Tensor,
    *,
    policy: str | Policy,
    size: int | tuple[int, int],
    seed: int | Tensor,
    draw: int | Tensor,
) -> AugmentPlan:
    """What `augment` draws for each image: the same numbers, so that anyone can replay an image.

    A draw is a function of seed, draw, sample id and what it is for (Philox 4x32-10): it does not depend on the
    batch, its order, the device or the process.

    Args:
        index: [B] int64, sample ids of the batch; any strides.
        policy: a `Policy`, or a name: ``published`` (the chain of the UPS code, its two oddities included: Posterize
            keeps 0 bits, a black image, and the colored square is rarely at the top or left), ``ups`` (the same
            without the two), ``weak`` (flip, crop by 4), ``none``.
        size: height and width of the images, or the side of square ones, 1 to 2048 pixels.
        seed: integer of 0 .. 2^63 - 1, or an int64 tensor [] on the device of `index`.
        draw: integer of 0 .. 2^32 - 1, or an int64 tensor [] or [B] on the device of `index`, of which the lower 32
            bits count: which epoch or step. One for each row lets a sample that occurs twice be augmented in two ways.

    Returns:
        `AugmentPlan` with a row for each index, on its device.

    Raises:
        TypeError, ValueError: naming the argument and what it got.

    >>> plan = augment_plan(torch.tensor([3, 8]), policy="ups", size=32, seed=0, draw=0)
    >>> len(plan.operations(0))  # of image 3: name, value and corner of each operation
    3
    """
    policy, (height, width) = check_augment_plan(index, policy, size, seed, draw)
    draw_numbers = draw.expand(len(index)).tolist() if isinstance(draw, Tensor) else [int(draw)] * len(index)
    rows = [
        _drawn(sample, policy, height, width, int(seed), each)
        for sample, each in zip(index.tolist(), draw_numbers, strict=True)
    ]
    draws = torch.tensor(rows, dtype=torch.int32).view(len(rows), 3 * policy.n_ops + 11)
    return AugmentPlan(draws.to(index.device), policy, (height, width))


def _drawn(sample: int, policy: Policy, height: int, width: int, seed: int, draw: int) -> list[int]:
    def words(what: int) -> tuple[int, int, int, int]:
        halves = [number >> shift & 0xFFFFFFFF for number in (sample, seed) for shift in (0, 32)]
        return philox((halves[0], halves[1], draw & 0xFFFFFFFF, what), (halves[2], halves[3]))

    def between(word: int, low: int, high: int) -> int:
        return low + (word * (high - low + 1) >> 32)

    def corner(word: int, length: int, side: float, low: int) -> int:
        center = low * 65537 + (
            word * ((length - low) << 16) >> 32
        )  # in units of 2^-16: [0, length) or (1, length]
        return min(length, max(0, center - round(side / 2 * 65536)) >> 16)

    plan = []
    names = variant_names(policy)
    for i in range(policy.n_ops):
        first, second, down, right = words(i)
        name, values = policy.ops[between(first, 0, len(policy.ops) - 1)]
        value = values[between(second, 0, len(values) - 1)]
        low = SQUARES.get(name)
        plan += [
            names.index((name, value)),
            0 if low is None else corner(down, height, value, low),
            0 if low is None else corner(right, width, value, low),
        ]
    word = words(FRAME)
    plan += [between(word[0], 0, 1) if policy.flip else 0]
    plan += [between(each, -policy.crop, policy.crop) for each in word[1:3]]
    plan += [between(word[3], 0, 5)]
    for each, x in zip(words(JITTER), policy.jitter, strict=False):
        plan += [between(each, -int(-(1 - x) * ONE // 1), int((1 + x) * ONE // 1))]
    word = words(CUTOUT)
    half = between(word[0], 1, policy.cutout) // 2 if policy.cutout else 0
    y, x = between(word[1], 0, height - 1), between(word[2], 0, width - 1)
    return [*plan, max(0, y - half), max(0, x - half), min(height, y + half), min(width, x + half)]


@once_epoch
def augment(
    images: Tensor,
    index: Tensor,
    *,
    policy: str | Policy,
    seed: int | Tensor,
    draw: int | Tensor,
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    dtype: torch.dtype = torch.float32,
    plan: AugmentPlan | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A batch gathered from a resident data set, augmented and normalized, in the order of `Policy`.

    Before it is normalized, an image is bit for bit what Pillow makes of it.

    Args:
        images: [N, H, W, C] uint8, C = 1 or 3, contiguous.
        index: [B] int64, on the device of `images`; any strides. Which images, and the ids that they draw by.
        policy, seed, draw: as in `augment_plan`.
        mean, std: C numbers each, one for each channel, for pixels in [0, 1]; std above 0. Lists, tuples, arrays of
            NumPy or tensors; a CUDA tensor makes the call wait for the device.
        dtype: of the result: float32, float16 or bfloat16. Computed in float32 and rounded once.
        plan: what to do instead of what would be drawn, made by `augment_plan` for the same policy and size.
        out: where to write the result, if not into new memory: as what is returned.

    Returns:
        [B, C, H, W] of `dtype`, channels last in memory, on the device of `images`.

    Raises:
        TypeError, ValueError: naming the argument and what it got.
        RuntimeError: an index is out of range. On a GPU this ends the CUDA context, as torch's own indexing does.
        ImportError: there are neither kernels for this device nor Pillow.

    >>> images = torch.randint(0, 256, (100, 32, 32, 3), dtype=torch.uint8)
    >>> rule = {"policy": "ups", "seed": 0, "draw": 0, "mean": [0.5] * 3, "std": [0.25] * 3}
    >>> batch = augment(images, torch.tensor([7, 42]), **rule)
    >>> batch.shape, batch.dtype
    (torch.Size([2, 3, 32, 32]), torch.float32)
    >>> torch.equal(augment(images, torch.tensor([42]), **rule)[0], batch[1])  # whatever the batch is
    True
    """
    found = check_augment(images, index, policy, seed, draw, mean, std, dtype, plan, out)
    policy, (height, width), means, stds = found
    _need_pillow()
    if index.numel() and not (index.min() >= 0 and index.max() < len(images)):
        raise RuntimeError(f"index must lie in 0..{len(images) - 1}, got {index.min()}..{index.max()}")
    plan = plan or augment_plan(index, policy=policy, size=(height, width), seed=seed, draw=draw)
    rows = [replay(images[sample], plan, i) for i, sample in enumerate(index.tolist())]
    pixels = torch.stack(rows) if rows else images[:0].cpu()
    center, scale = torch.tensor(means, dtype=torch.float32), torch.tensor(stds, dtype=torch.float32)
    batch = ((pixels.to(torch.float32) / 255 - center) / scale).to(dtype)
    for image, (top, left, bottom, right) in zip(batch, plan.cutout.tolist(), strict=True):
        image[top:bottom, left:right] = 0
    result = batch.permute(0, 3, 1, 2)
    return result.to(images.device) if out is None else out.copy_(result)


def _need_pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise ImportError(
            "augment needs Pillow where it runs without its compiled kernels: run `pip install pillow`, or build the "
            "kernels (ups_fast.backend() says how)"
        ) from None


def replay(
    image: Tensor,  # uint8 [H, W, C]
    plan: AugmentPlan,
    row: int,
) -> Tensor:  # uint8 [H, W, C]
    """One image through Pillow as `plan` has drawn it for row `row`, before it is normalized."""
    _need_pillow()
    import numpy as np
    from PIL import Image

    gray = image.shape[2] == 1
    picture = Image.fromarray((image[:, :, 0] if gray else image).cpu().numpy())
    for name, value, corner in plan.operations(row):
        picture = operate(picture, name, value, corner)
    picture = _flipped_and_cropped(picture, bool(plan.flip[row]), *plan.crop[row].tolist())
    factors = [number / ONE for number in plan.jitter[row].tolist()]
    for what in JITTER_ORDERS[plan.jitter_order[row]]:
        picture = operate(picture, ("Brightness", "Contrast", "Color")[what], factors[what])
    pixels = torch.from_numpy(np.array(picture))
    return pixels[:, :, None] if gray else pixels


def operate(picture: Image.Image, name: str, value: float, corner: tuple[int, int] = (0, 0)) -> Image.Image:
    """One operation of a policy, with its value; `corner` is the top and left of a CutoutAbs."""
    from PIL import Image, ImageDraw, ImageEnhance, ImageOps

    def moved(*matrix: float) -> Image.Image:
        return picture.transform(picture.size, Image.Transform.AFFINE, matrix)

    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        return getattr(ImageEnhance, name)(picture).enhance(value)
    if name == "AutoContrast":
        return ImageOps.autocontrast(picture)
    if name == "Equalize":
        return ImageOps.equalize(picture)
    if name == "Invert":
        return ImageOps.invert(picture)
    if name == "Rotate":
        return picture.rotate(value)
    if name == "ShearX":
        return moved(1, value, 0, 0, 1, 0)
    if name == "ShearY":
        return moved(1, 0, 0, value, 1, 0)
    if name == "TranslateX":
        return moved(1, 0, value, 0, 1, 0)
    if name == "TranslateY":
        return moved(1, 0, 0, 0, 1, value)
    if name == "Posterize":
        kept = -(1 << (8 - int(value)))
        return picture.point([level & kept & 255 for level in range(256)] * len(picture.getbands()))
    if name == "Solarize":
        return ImageOps.solarize(picture, value)  # type: ignore[arg-type]
    if name == "SolarizeAdd":
        added = [max(0, min(255, int(level + value))) for level in range(256)]
        return ImageOps.solarize(picture.point(added * len(picture.getbands())), 128)
    if name == "Gamma":
        return picture.point(gamma_levels(value) * len(picture.getbands()))
    assert name in SQUARES, name
    picture = picture.copy()
    top, left = corner
    box = left, top, min(picture.width, left + value), min(picture.height, top + value)
    ImageDraw.Draw(picture).rectangle(box, FILL if picture.mode == "RGB" else luma(*FILL))
    return picture


def _flipped_and_cropped(picture: Image.Image, flip: bool, down: int, right: int) -> Image.Image:
    import numpy as np
    from PIL import Image, ImageOps

    if flip:
        picture = ImageOps.mirror(picture)
    pixels = np.asarray(picture)
    pad = max(abs(down), abs(right))
    padded = np.pad(pixels, ((pad, pad), (pad, pad)) + ((0, 0),) * (pixels.ndim - 2), mode="reflect")
    height, width = pixels.shape[:2]
    top, left = pad + down, pad + right
    return Image.fromarray(padded[top : top + height, left : left + width])


def check_augment_plan(
    index: Tensor, policy: str | Policy, size: int | tuple[int, int], seed: int | Tensor, draw: int | Tensor
) -> tuple[Policy, tuple[int, int]]:
    """The policy and size meant; raises the error of the first argument that is not as documented."""
    if not isinstance(index, Tensor):
        raise TypeError(f"index must be a tensor, got {type(index).__name__}")
    if index.dtype != torch.int64 or index.ndim != 1:
        raise TypeError(f"index must be int64 [B], got {index.dtype} {list(index.shape)}")
    policy = find_policy(policy)
    both: Any = (size, size) if is_integer(size) else size
    if (
        not isinstance(both, Sequence)
        or len(both) != 2
        or not all(is_integer(side) and 1 <= plain(side) <= 2048 for side in both)
    ):
        raise ValueError(f"size must be height and width in 1..2048, got {size}")
    height, width = _number(both[0]), _number(both[1])
    if policy.crop >= min(height, width):
        raise ValueError(f"policy.crop must be below the image size {height}x{width}, got {policy.crop}")
    check_counter("seed", seed, 63, index)
    check_counter("draw", draw, 32, index, each=True)
    return policy, (height, width)


def _number(side: int) -> int:
    """A side of the images shapes the tables: a tracer makes a graph for this number alone."""
    return int(side) if isinstance(side, torch.SymInt) else operator.index(side)


def plain(number: int) -> int:
    """One of NumPy, whose narrow types overflow in comparisons and sums, as Python's."""
    return number if isinstance(number, (int, torch.SymInt)) else operator.index(number)


def is_integer(x: object) -> TypeGuard[int]:
    """Whether x is an integer of Python, NumPy or a tracer, and not a bool."""
    return type(x) is int or (
        isinstance(x, (int, numbers.Integral, torch.SymInt)) and not isinstance(x, bool)
    )


def check_counter(name: str, value: int | Tensor, bits: int, index: Tensor, *, each: bool = False) -> None:
    """Raise the error of a number to draw from that is not as documented; `each`: [B] will do, too."""
    if isinstance(value, Tensor):
        shapes = [[], [index.shape[0]]] if each else [[]]
        if value.dtype != torch.int64 or list(value.shape) not in shapes or value.device != index.device:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(
                f"{name} must be an int or an int64 tensor {wanted} on {index.device}, got {value.dtype} "
                f"{list(value.shape)} on {value.device}"
            )
    elif not is_integer(value) or not 0 <= plain(value) < 1 << bits:
        raise ValueError(f"{name} must be an integer of 0 .. 2^{bits} - 1, got {value!r}")


def _check_channels(name: str, values: Sequence[float] | Tensor, channels: int) -> tuple[float, ...]:
    """mean or std as Python's floats, one for each channel."""
    draw_numbersmeant = (
        "3 finite numbers, such as (0.5, 0.5, 0.5)" if channels == 3 else "1 finite number, such as (0.5,)"
    )
    wanted = f"{name} must be {draw_numbersmeant}, one for each channel"
    if isinstance(values, Tensor):
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            raise TypeError(f"{wanted}; while a graph is traced it cannot be a tensor: use {name}.tolist()")
        values = values.tolist()
    elif hasattr(values, "tolist"):  # of NumPy
        values = values.tolist()
    if not isinstance(values, (tuple, list)) and (
        not isinstance(values, Sequence) or isinstance(values, str)
    ):
        raise TypeError(f"{wanted}, got {values!r}")
    if [
        x for x in values if type(x) is not float and (isinstance(x, bool) or not isinstance(x, numbers.Real))
    ]:
        raise TypeError(f"{wanted}, got {values!r}")
    if len(values) != channels or [x for x in values if not -3e38 < x < 3e38]:
        raise ValueError(f"{wanted}, got {values!r}")
    # As float(x), but Dynamo takes what comes for a number and not for a symbol.
    return tuple([math.copysign(x, x) for x in values])


def check_augment(
    images: Tensor,
    index: Tensor,
    policy: str | Policy,
    seed: int | Tensor,
    draw: int | Tensor,
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    dtype: torch.dtype,
    plan: AugmentPlan | None,
    out: Tensor | None,
) -> tuple[Policy, tuple[int, int], tuple[float, ...], tuple[float, ...]]:
    """Policy, size, mean and std meant; raises the error of the first argument that is not as documented."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise TypeError(
            f"images must be uint8 [N, H, W, C] with C = 1 or 3, got {images.dtype} {list(images.shape)}"
        )
    if not images.is_contiguous():
        raise ValueError(f"images must be contiguous, got strides {images.stride()}")
    height, width, channels = images.shape[1:]
    if not (1 <= height <= 2048 and 1 <= width <= 2048):
        raise ValueError(f"images must be 1 to 2048 pixels high and wide, got {list(images.shape)}")
    policy, size = check_augment_plan(index, policy, (height, width), seed, draw)
    if index.device != images.device:
        raise ValueError(f"index must be on the device of images, {images.device}, got {index.device}")
    means, stds = _check_channels("mean", mean, channels), _check_channels("std", std, channels)
    if min(stds) < 2**-126:  # what float32 holds
        raise ValueError(f"std must be above 0, got {stds}")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    if plan is not None:
        _check_plan(plan, policy, size, index)
    if out is not None:
        shape = [index.shape[0], channels, height, width]
        if not isinstance(out, Tensor):
            raise TypeError(f"out must be a tensor, got {type(out).__name__}")
        if out.dtype != dtype or list(out.shape) != shape or out.device != images.device:
            raise ValueError(
                f"out must be {dtype} {shape} on {images.device}, got {out.dtype} {list(out.shape)} on {out.device}"
            )
        if out.requires_grad:
            raise ValueError("out must not require a gradient")
        apart = torch.compiler.is_compiling() or not out.numel()
        if not apart and out.untyped_storage()._cdata == images.untyped_storage()._cdata:
            raise ValueError("out must not share memory with images")
        if not out.permute(0, 2, 3, 1).is_contiguous():
            raise ValueError(f"out must be channels last in memory, got strides {out.stride()}")
    return policy, size, means, stds


def _check_plan(plan: AugmentPlan, policy: Policy, size: tuple[int, int], index: Tensor) -> None:
    if not isinstance(plan, AugmentPlan):
        raise TypeError(f"plan must be an AugmentPlan, got {type(plan).__name__}")
    if plan.policy != policy or plan.size != size:
        raise ValueError(f"plan must be of this policy and of size {size}, got {plan.policy}, {plan.size}")
    if plan.draws.shape[0] != index.shape[0] or plan.draws.device != index.device:
        raise ValueError(
            f"plan must have a row for each of {index.shape[0]} indices on {index.device}, got "
            f"{plan.draws.shape[0]} on {plan.draws.device}"
        )
    words = 3 * policy.n_ops + 11
    if plan.draws.dtype != torch.int32 or plan.draws.ndim != 2 or plan.draws.shape[1] != words:
        raise ValueError(
            f"plan.draws must be int32 [B, {words}], got {plan.draws.dtype} {list(plan.draws.shape)}"
        )
