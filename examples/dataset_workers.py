"""`augment` in a Dataset with worker processes: `python examples/dataset_workers.py`.

What is drawn for an image depends on seed, draw and its id alone. So a run sees the same bits without workers and with
two, forked or spawned. A run that resumes at epoch 7 sees what it would have seen.
"""

from __future__ import annotations

import hashlib
import time

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

import ups_fast

POLICY = ups_fast.Policy(ops=(("Rotate", (-10, 10)), ("TranslateX", (-1, 1))), n_ops=1, crop=1)


class Digits(Dataset):
    """Augmented digits with their labels. Workers see `epoch`, because its memory is shared."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # here, because a spawned worker does not need it

        bunch = load_digits()
        images = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)
        self.images = images[..., None].share_memory_()  # [1797, 8, 8, 1], copied to no worker
        self.target = torch.from_numpy(bunch.target).share_memory_()
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return 1437  # the rest is for the test

    def __getitems__(self, ids: list[int]) -> tuple[Tensor, Tensor]:  # a whole batch: [B, 1, 8, 8], [B]
        index = torch.tensor(ids)
        rule = {"policy": POLICY, "seed": 0, "draw": self.epoch, "mean": (0.3,), "std": (0.35,)}
        return ups_fast.augment(self.images, index, **rule), self.target[index]


def as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch  # `__getitems__` has put it together already


def train(workers: int, context: str | None, epochs: int = 6) -> tuple[float, str]:
    """Test accuracy, and a digest of every pixel that the network has seen."""
    torch.manual_seed(0)
    data, digest = Digits(), hashlib.sha256()
    loader = DataLoader(
        data,
        batch_size=64,
        sampler=RandomSampler(data, generator=torch.Generator().manual_seed(0)),
        num_workers=workers,
        multiprocessing_context=context,
        persistent_workers=workers > 0,
        collate_fn=as_it_is,
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), ups_fast.Mish(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for epoch in range(epochs):
        data.epoch.fill_(epoch)
        for images, target in loader:
            digest.update(images.contiguous().numpy().tobytes())
            loss = nn.functional.cross_entropy(model(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    test = (data.images[1437:].permute(0, 3, 1, 2) / 255 - 0.3) / 0.35
    return float((model(test).argmax(1) == data.target[1437:]).float().mean()), digest.hexdigest()


def main() -> list[tuple[float, str]]:
    results = []
    for workers, context in ((0, None), (2, "fork"), (2, "spawn")):
        start = time.perf_counter()
        results.append(train(workers, context))
        took = time.perf_counter() - start
        accuracy, digest = results[-1]
        print(
            f"{workers} workers ({context}): test accuracy {accuracy:.4f}, pixels {digest[:12]}, {took:.1f} s"
        )
    return results


if __name__ == "__main__":
    main()
