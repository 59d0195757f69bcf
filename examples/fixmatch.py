"""FixMatch with UPS's selection, in a loop of your own: `python examples/fixmatch.py`.

Handwritten digits of scikit-learn, 40 of 1,437 training images with a label. Every step shows unlabeled images twice: a
weak view gives the pseudo-label, a strong view learns it. A view counts where the network is confident and certain:
`mc_select` looks at several passes with dropout, and also finds classes that an image surely is not.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import ups_fast
from ups_fast import CounterDropout, Mish, Policy

LABELED, UNLABELED, PASSES, SEED = 40, 128, 4, 0
WEAK = Policy(crop=1)
STRONG = Policy(
    ops=(("Rotate", (-15, 15)), ("ShearX", (-0.2, 0.2)), ("Contrast", (0.6, 1.4)), ("TranslateX", (-1, 1))),
    n_ops=2,
    crop=1,
    cutout=3,
)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), Mish(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), Mish(), nn.MaxPool2d(2), nn.Flatten()),
        )
        self.dropout = CounterDropout(0.3)
        self.classifier = nn.Linear(64 * 4, 10)

    def forward(self, x: Tensor, keys: Tensor | None = None, passes: int = 1) -> Tensor:
        hidden = self.features(x).repeat(passes, 1)  # what comes before dropout is computed once
        return self.classifier(self.dropout(hidden, keys))


def main(steps: int = 200) -> tuple[float, float]:
    """Test accuracy, and the share of right pseudo-labels over the last 50 steps."""
    torch.manual_seed(SEED)
    bunch = load_digits()
    images = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)[..., None]  # [1797, 8, 8, 1]
    target = torch.from_numpy(bunch.target)
    test, train = torch.arange(1797).split([360, 1437])
    labeled, unlabeled = train[:LABELED], train[LABELED:]

    def view(index: Tensor, policy: Policy, step: int) -> Tensor:
        return ups_fast.augment(images, index, policy=policy, seed=SEED, draw=step, mean=(0.3,), std=(0.35,))

    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    right = chosen = 0
    for step in range(steps):
        known = labeled[torch.randperm(len(labeled))]
        guessed = unlabeled[torch.randint(len(unlabeled), (UNLABELED,))]

        with torch.no_grad():  # draw 0, 1, ...: other masks for each pass and step
            draw = step * PASSES + torch.arange(PASSES).repeat_interleave(UNLABELED)
            keys = ups_fast.dropout_keys(guessed.repeat(PASSES), seed=SEED, draw=draw)
            logits = model(view(guessed, WEAK, step), keys, PASSES).unflatten(0, (PASSES, -1))
        found = ups_fast.mc_select(logits, tau_p=0.9, kappa_p=0.05)

        batch = torch.cat([view(known, WEAK, step), view(guessed, STRONG, step)])
        z_known, z_guessed = model(batch).split([len(known), UNLABELED])
        everyone, nobody = (
            torch.ones(len(known), dtype=torch.bool),
            torch.zeros(len(known), 10, dtype=torch.bool),
        )
        loss = ups_fast.ups_loss(z_known, target[known], everyone, nobody)
        loss = loss + ups_fast.ups_loss(z_guessed, found.label, found.positive, found.negative)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= steps - 50:
            right += int((found.label == target[guessed])[found.positive].sum())
            chosen += int(found.positive.sum())

    model.eval()
    accuracy = float((model(view(test, Policy(), 0)).argmax(1) == target[test]).float().mean())
    print(
        f"test accuracy {accuracy:.3f} from {LABELED} labels; {right / chosen:.3f} of the pseudo-labels are right"
    )
    return accuracy, right / chosen


if __name__ == "__main__":
    main()
