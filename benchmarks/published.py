"""The published recipe written anew, as the rival: Pillow in worker processes, an eager step that waits for its device.

What the UPS code (Rizve et al., 2021) does to a training image, call by call, drawn from Python's and NumPy's global
random states, what its training loop does with a batch, and how it labels. Posterize to 0 bits is a black image, which
Pillow itself refuses since 13. The network is ours, called without keys: torch's dropout, torch's mish.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from ups_fast.modules import Mish


def _either(value: float) -> float:
    return -value if random.random() > 0.5 else value


def _affine(picture: Image.Image, *matrix: float) -> Image.Image:
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix)


def _square(picture: Image.Image, side: float) -> Image.Image:
    width, height = picture.size
    left = int(max(0, np.random.uniform(width) - side / 2))
    top = int(max(0, np.random.uniform(height) - side / 2))
    picture = picture.copy()
    box = left, top, min(width, left + side), min(height, top + side)
    ImageDraw.Draw(picture).rectangle(box, (125, 123, 114))
    return picture


def _solarize_add(picture: Image.Image, added: float) -> Image.Image:
    lighter = np.clip(np.array(picture).astype(int) + added, 0, 255).astype(np.uint8)
    return ImageOps.solarize(Image.fromarray(lighter), 128)


def _posterize(picture: Image.Image, bits: float) -> Image.Image:
    return ImageOps.posterize(picture, int(bits)) if bits >= 1 else picture.point(lambda level: 0)


OPERATIONS = [  # with the range that magnitudes 0 to 30 span
    (lambda picture, _: ImageOps.autocontrast(picture), 0, 1),
    (lambda picture, _: ImageOps.equalize(picture), 0, 1),
    (lambda picture, _: ImageOps.invert(picture), 0, 1),
    (lambda picture, v: picture.rotate(_either(v)), 0, 30),
    (_posterize, 0, 4),
    (lambda picture, v: ImageOps.solarize(picture, v), 0, 256),
    (_solarize_add, 0, 110),
    (lambda picture, v: ImageEnhance.Color(picture).enhance(v), 0.1, 1.9),
    (lambda picture, v: ImageEnhance.Contrast(picture).enhance(v), 0.1, 1.9),
    (lambda picture, v: ImageEnhance.Brightness(picture).enhance(v), 0.1, 1.9),
    (lambda picture, v: ImageEnhance.Sharpness(picture).enhance(v), 0.1, 1.9),
    (lambda picture, v: _affine(picture, 1, _either(v), 0, 0, 1, 0), 0, 0.3),
    (lambda picture, v: _affine(picture, 1, 0, 0, _either(v), 1, 0), 0, 0.3),
    (_square, 0, 40),
    (lambda picture, v: _affine(picture, 1, 0, _either(v), 0, 1, 0), 0, 100),
    (lambda picture, v: _affine(picture, 1, 0, 0, 0, 1, _either(v)), 0, 100),
]


def rand_augment(picture: Image.Image, n: int = 3, m: int = 4) -> Image.Image:
    for operation, low, high in random.choices(OPERATIONS, k=n):
        picture = operation(picture, m / 30 * (high - low) + low)
    return picture


def cutout(image: Tensor, longest: int = 16) -> Tensor:
    """One square of zeros in a tensor [C, H, W]."""
    _, height, width = image.shape
    half = random.randint(1, longest) // 2
    y, x = np.random.randint(height), np.random.randint(width)
    mask = np.ones((height, width), np.float32)
    mask[max(0, y - half) : min(height, y + half), max(0, x - half) : min(width, x + half)] = 0
    return image * torch.from_numpy(mask)


def training_transform(mean: tuple[float, ...], std: tuple[float, ...]) -> transforms.Compose:
    """From a Pillow image to a tensor [C, H, W]."""
    return transforms.Compose(
        [
            rand_augment,
            transforms.RandomHorizontalFlip(),
            transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
            transforms.ColorJitter(0.4, 0.4, 0.4),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
            cutout,
        ]
    )


class MarkedImages(Dataset):
    """Images with a target and a row of marks: all ones for a positive sample, else its negative classes."""

    def __init__(self, images: Tensor, targets: Tensor, marks: Tensor, transform: Any) -> None:
        self.images, self.targets, self.marks = images.numpy(), targets.numpy(), marks.double().numpy()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, np.ndarray]:
        image = self.transform(Image.fromarray(self.images[index]))
        return image, self.targets[index], self.marks[index]


def torch_only(model: nn.Module) -> nn.Module:
    """A network of ours with torch's own mish."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Mish):
                setattr(module, name, nn.Mish())
    return model


def batches(
    positive: MarkedImages, negative: MarkedImages, size: int, workers: int
) -> Iterator[list[Tensor]]:
    """Without end: half a batch of each kind, joined, from two loaders with so many workers each."""
    loaders = [
        DataLoader(each, size // 2, sampler=RandomSampler(each), num_workers=workers, drop_last=True)
        for each in (positive, negative)
    ]
    while True:
        for pair in zip(*loaders, strict=True):
            yield [torch.cat(parts) for parts in zip(*pair, strict=True)]


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: list[Tensor], device: str
) -> float:
    images, targets, marks = (part.to(device) for part in batch)
    logits = model(images)
    positive = marks.sum(dim=1) == logits.shape[1]
    negative = (marks.sum(dim=1) != logits.shape[1]) * (marks.sum(dim=1) > 0)
    loss: Any = 0
    if sum(positive * 1) > 0:
        loss += F.cross_entropy(logits[positive], targets[positive])
    if sum(negative * 1) > 0:
        chosen = marks[negative]
        missing = torch.clamp(1 - F.softmax(logits[negative], dim=1), 1e-7, 1.0)
        loss += torch.mean(-torch.sum(torch.log(missing) * chosen, dim=-1) / (chosen.sum(dim=-1) + 1e-7))
    loss.backward()
    value = loss.item()
    optimizer.step()
    model.zero_grad()
    return value


# FixMatch as its PyTorch ports have it: two loaders with Pillow workers, a joint eager step ---------------------------


def strong_augment(picture: Image.Image, n: int = 2, m: int = 10) -> Image.Image:
    """RandAugment as FixMatch draws it: n operations, each with a magnitude of 1 to m and by half of all chances."""
    for operation, low, high in random.choices(OPERATIONS, k=n):
        if random.random() < 0.5:
            picture = operation(picture, random.randint(1, m) / 30 * (high - low) + low)
    return _square(picture, 16)


class TwoViews(Dataset):
    """Each image in the weak view, and in the strong one where `strong`."""

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        strong: bool,
    ) -> None:
        self.images, self.targets, self.strong = images.numpy(), targets.numpy(), strong
        self.weak = transforms.Compose(
            [transforms.RandomHorizontalFlip(), transforms.RandomCrop(32, 4, padding_mode="reflect")]
        )
        self.clean = clean_transform(mean, std)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        picture = Image.fromarray(self.images[index])
        weak = self.clean(self.weak(picture))
        if not self.strong:
            return weak, torch.tensor(self.targets[index])
        return weak, self.clean(strong_augment(self.weak(picture)))


def fixmatch_batches(
    labeled: TwoViews, unlabeled: TwoViews, size: int, mu: int, workers: int
) -> Iterator[list[Tensor]]:
    """Without end: images, targets, weak and strong views."""
    loaders = [
        DataLoader(each, rows, sampler=RandomSampler(each), num_workers=workers, drop_last=True)
        for each, rows in ((labeled, size), (unlabeled, size * mu))
    ]
    while True:
        for first, second in zip(*loaders, strict=False):
            yield [*first, *second]


def fixmatch_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: list[Tensor],
    device: str,
    tau: float = 0.95,
) -> float:
    images, targets, weak, strong = (part.to(device) for part in batch)
    size = len(images)
    logits = model(torch.cat([images, weak, strong]))
    logits_weak, logits_strong = logits[size:].chunk(2)
    supervised = F.cross_entropy(logits[:size], targets)
    confidence, label = logits_weak.detach().softmax(dim=-1).max(dim=-1)
    mask = confidence.ge(tau).float()
    loss = supervised + (F.cross_entropy(logits_strong, label, reduction="none") * mask).mean()
    loss.backward()
    value = loss.item()
    optimizer.step()
    model.zero_grad()
    return value


def clean_transform(mean: tuple[float, ...], std: tuple[float, ...]) -> transforms.Compose:
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])


@torch.no_grad()
def label(
    model: nn.Module,
    loader: DataLoader,  # of clean images, in order
    device: str,
    *,
    passes: int = 10,
    tau_p: float = 0.70,
    tau_n: float = 0.05,
    kappa_p: float = 0.05,
    kappa_n: float = 0.005,
    temp_nl: float = 2.0,
    balanced: bool = False,
) -> tuple[list[int], list[int], list[int], list[list[int]]]:
    """Positive samples and their labels, negative samples and the row of marks of each, in lists.

    Each pass is one through the whole network, dropout being in train mode, and the softmaxes of a batch are stacked.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    best, surest, uncertainty, marks = [], [], [], []
    for images, _, _ in loader:
        images = images.to(device)
        positive, negative = [], []
        for _ in range(passes):
            logits = model(images)
            positive.append(F.softmax(logits, dim=1))
            negative.append(F.softmax(logits / temp_nl, dim=1))
        p, q = torch.stack(positive), torch.stack(negative)
        std, (value, winner) = p.std(dim=0), p.mean(dim=0).max(dim=1)
        best.extend(winner.cpu().tolist())
        surest.extend(value.cpu().tolist())
        uncertainty.extend(std.gather(1, winner[:, None])[:, 0].cpu().tolist())
        surely_not = (q.mean(dim=0) < tau_n) & (q.std(dim=0) < kappa_n)
        marks.extend(surely_not.cpu().numpy().astype(int).tolist())
    chosen = [i for i in range(len(best)) if surest[i] >= tau_p and uncertainty[i] < kappa_p]
    if balanced:
        groups = [[i for i in chosen if best[i] == c] for c in range(len(marks[0]))]
        most = max(25, min(map(len, groups)))
        chosen = [i for group in groups for i in sorted(group, key=uncertainty.__getitem__)[:most]]
    kept = set(chosen)
    rest = [i for i in range(len(best)) if i not in kept and sum(marks[i]) > 0]
    return chosen, [best[i] for i in chosen], rest, [marks[i] for i in rest]


def short_round(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    labeled: MarkedImages,  # augmented; all marks are ones
    unlabeled: MarkedImages,  # clean
    *,
    epochs: int,
    size: int,
    workers: int,
    device: str,
) -> None:
    """The first round: epochs over the labeled images, at a learning rate per step, then labels for all others."""
    loader = DataLoader(labeled, size, sampler=RandomSampler(labeled), num_workers=workers, drop_last=True)
    total = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: max(0.0, math.cos(7 / 16 * math.pi * step / total))
    )
    model.train()
    for _ in range(epochs):
        for batch in loader:
            training_step(model, optimizer, batch, device)
            schedule.step()
    label(model, DataLoader(unlabeled, size, num_workers=workers), device, balanced=True)
