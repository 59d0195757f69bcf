"""UPS's loss under DistributedDataParallel, exact: `python examples/ddp.py`.

Two processes take `perm[rank::world]` of each batch. Their shares hold unequal numbers of positive and negative rows:
the mean of their mean losses is not the loss of the whole batch. Here each row has the weight 1 / (rows of its
kind in the whole batch), and `reduction="sum"` adds them up. So the trained weights are those of one process, but for
rounding.

Data: handwritten digits, 100 with a label. Of the others only one class is known that they are not.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ups_fast

LABELED, BATCH, EPOCHS, SEED = 100, 128, 15, 0
POLICY = ups_fast.Policy(ops=(("Rotate", (-10, 10)), ("TranslateX", (-1, 1))), n_ops=1, crop=1)


def work(rank: int, world: int, folder: str, images: Tensor, target: Tensor) -> None:
    """What one process does; rank 0 saves accuracy and weights."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.manual_seed(SEED)
    positive = torch.arange(1797) < LABELED
    wrong = (target + torch.randint(1, 10, (1797,))) % 10  # a class that the image is not
    negative = nn.functional.one_hot(wrong, 10).bool()

    model = DistributedDataParallel(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 128), ups_fast.Mish(), nn.Linear(128, 10))
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)

    def view(index: Tensor, policy: ups_fast.Policy, epoch: int) -> Tensor:
        return ups_fast.augment(images, index, policy=policy, seed=SEED, draw=epoch, mean=(0.3,), std=(0.35,))

    for epoch in range(EPOCHS):
        order = torch.randperm(1437, generator=torch.Generator().manual_seed(epoch))
        for perm in order.split(BATCH):
            index = perm[rank::world]
            rows = positive[index]
            counts = torch.stack([rows.sum(), (~rows).sum()])
            dist.all_reduce(counts)
            weight = torch.where(rows, 1 / counts[0], 1 / counts[1])
            logits = model(view(index, POLICY, epoch))
            loss = ups_fast.ups_loss(
                logits, target[index], rows, negative[index], reduction="sum", weight=weight
            )
            optimizer.zero_grad()
            (
                loss * world
            ).backward()  # DistributedDataParallel divides the sum of the gradients by the world's size
            optimizer.step()

    if rank == 0:
        test = torch.arange(1437, 1797)
        accuracy = (model(view(test, ups_fast.Policy(), 0)).argmax(1) == target[test]).float().mean().item()
        torch.save({"accuracy": accuracy, "weights": model.module.state_dict()}, f"{folder}/result.pt")
    dist.destroy_process_group()


def train(world: int) -> tuple[float, dict[str, Tensor]]:
    """Test accuracy and weights from so many processes."""
    from sklearn.datasets import load_digits  # here, because the processes do not need it

    bunch = load_digits()
    images = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)[..., None]  # [1797, 8, 8, 1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            work, (world, folder, images, torch.from_numpy(bunch.target)), nprocs=world
        )
        result = torch.load(Path(folder) / "result.pt")
    return result["accuracy"], result["weights"]


def main() -> tuple[float, float, float]:
    """Test accuracy from one process and from two, and the largest difference of their weights."""
    (one, weights), (two, others) = train(1), train(2)
    difference = max(float((weights[name] - others[name]).abs().max()) for name in weights)
    print(
        f"test accuracy {one:.4f} from one process, {two:.4f} from two; weights differ by {difference:.1e} at most"
    )
    return one, two, difference


if __name__ == "__main__":
    main()
